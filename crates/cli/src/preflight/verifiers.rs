//! The preflight's check of verifiers, on answers whose verdicts are known.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use pacs_data::Problem as Row;
use pacs_spec::{JobSpec, JudgeKind, JudgeSpec, VerifierSpec};
use pacs_types::Outcome;
use pacs_verifier::{Judge, Judgement, Task};

use super::{Problem, Trial, first_samples};
use crate::failure::Failure;
use crate::format::{duration, plural};
use crate::verifier::guard;

/// Number of problems whose reference answers are graded.
const PROBLEMS: usize = 8;

/// A response that is wrong for every problem.
const NO_ANSWER: &str = "I do not know.";

/// Grades two responses per problem with every verifier of the job: the reference answer, and one without an answer.
///
/// # Errors
/// When the runtime cannot be started.
pub(super) fn try_all(spec: &JobSpec, problems: &[Row]) -> Result<Vec<Trial>, Failure> {
    // Problems of other sets are for the verifiers that they name.
    let label = std::iter::once((VerifierSpec::LABEL.to_owned(), spec.verifier_of(&spec.data.train).judge()));
    let rewards = spec.reward.verifiers.iter().map(|(name, one)| (name.clone(), one.judge()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    let trials = label
        .chain(rewards)
        .map(|(name, judge)| {
            let began = Instant::now();
            let tried =
                runtime.block_on(Attempt { spec, gives_label: name == VerifierSpec::LABEL }.grade(&judge, problems));
            Trial::new(format!("verifier {name}"), began, tried)
        })
        .collect();
    // In the background, because an overrunning verification cannot be interrupted.
    runtime.shutdown_background();
    Ok(trials)
}

struct Attempt<'a> {
    spec: &'a JobSpec,
    /// Whether the verifier gives the label. Otherwise it gives a part of the reward, which may be any number.
    gives_label: bool,
}

impl Attempt<'_> {
    async fn grade(self, spec: &JudgeSpec, problems: &[Row]) -> Result<String, Problem> {
        let judge = Judge::new(spec, Some(&guard()), 1, 0).map_err(|error| self.problem(error.to_string()))?;
        let (mut right, mut asked, mut slowest) = (0, 0, std::time::Duration::ZERO);
        // Those of other sets are for the verifiers that they name.
        let own = self.spec.data.train.verifier.as_deref();
        let tried: Vec<&Row> = problems.iter().filter(|row| row.verifier.as_deref() == own).take(PROBLEMS).collect();
        for row in &tried {
            let answer = match &spec.by {
                JudgeKind::Math(_) => format!("\\boxed{{{}}}", row.answer),
                // The reference holds the target and numbers; a right answer is an expression of them.
                JudgeKind::Countdown => pacs_verify::solve_countdown(&row.answer).unwrap_or_default(),
                // The reference names cases, and a program that passes them where the data set has one.
                JudgeKind::Code(_) => {
                    match pacs_verify::Suite::parse(&row.answer).ok().and_then(|suite| suite.solution) {
                        Some(solution) => format!("```python\n{solution}\n```"),
                        None => continue,
                    }
                }
                JudgeKind::Exact | JudgeKind::Exec(_) | JudgeKind::Grpc(_) => row.answer.clone(),
            };
            asked += 1;
            for (response, is_right) in [(answer, true), (NO_ANSWER.to_owned(), false)] {
                let task =
                    Task { question: row.question.clone(), response: response.clone(), gold: row.answer.clone() };
                let Judgement { verdict, elapsed, .. } = judge.verify(Arc::new(task)).await;
                slowest = slowest.max(elapsed);
                if !verdict.outcome.is_conclusive() {
                    let what = verdict.outcome.name().replace('_', " ");
                    return Err(self.problem(format!("{what} on the answer {response:?}: {}", verdict.rule)));
                }
                let correct = verdict.outcome == Outcome::Correct;
                if self.gives_label && correct && !is_right {
                    return Err(self.worthless(format!("{response:?} is correct to it, question {:?}", row.question)));
                }
                right += u64::from(correct && is_right);
            }
        }
        if asked == 0 {
            return Ok("not tried: the problems have no reference solutions".to_owned());
        }
        if self.gives_label && right == 0 {
            let first = tried.first().map(|row| row.answer.as_str()).unwrap_or_default();
            return Err(self.worthless(format!("no reference answer is correct to it, such as {first:?}")));
        }
        let answers = plural(asked, "reference answer", "reference answers");
        Ok(format!("{right} of {answers} correct, no answer is not; slowest in {}", duration(slowest)))
    }

    /// Makes the problem of a verifier that fails.
    fn problem(&self, said: String) -> Problem {
        let attempts = self.spec.verifier.max_attempts;
        let first = first_samples(self.spec);
        let otherwise =
            format!("a run would first have generated {first}, and have tried {attempts} times to grade them");
        Problem { said, otherwise }
    }

    /// Makes the problem of a verifier that works but whose verdicts teach nothing.
    fn worthless(&self, said: String) -> Problem {
        Problem { said, otherwise: "a run would have trained for steps on no signal, or on a wrong one".to_owned() }
    }
}
