use std::sync::Arc;

use pacs_protocol::v1;
use pacs_spec::{EvaluationSet, JobSpec, RewardSpec, VerifierSpec};
use pacs_types::{GroupId, NoiseKey, Outcome, SampleId, Verdict, evaluation_problem};

use crate::exec::Entry;
use crate::fault::Fault;
use crate::reward::{Answer, combine};
use crate::{Judge, Judgement, Task, VerifierError};

/// All verifiers of a job.
#[derive(Clone)]
pub(crate) struct Grading(Arc<Inner>);

struct Inner {
    label: Judge,
    rewards: Vec<Part>,
    /// Those of sets of held-out problems that have their own.
    sets: Vec<(EvaluationSet, Judge)>,
    /// Those that problems name.
    named: Vec<(String, Judge)>,
    spec: RewardSpec,
    max_new_tokens: u32,
    seed: u64,
}

/// The stream of noise that decides which labels are inverted, apart from those of sampling.
const LABEL_NOISE_STREAM: u64 = 0x6c61_6265_6c73;

/// A verifier whose reward is added.
struct Part {
    name: String,
    weight: f64,
    judge: Judge,
}

impl Grading {
    /// The grading that a job spec asks for, with at most `concurrency` verifications of each verifier at once.
    pub(crate) fn new(spec: &JobSpec, guard: Option<&Entry>, concurrency: usize) -> Result<Self, VerifierError> {
        let cache_entries = spec.verifier.cache_entries as usize;
        let judge = |judge| Judge::new(&judge, guard, concurrency, cache_entries);
        let part = |(name, verifier): (&String, &pacs_spec::RewardVerifierSpec)| {
            Ok(Part { name: name.clone(), weight: verifier.weight, judge: judge(verifier.judge())? })
        };
        let of_set = |set: EvaluationSet| match &set.verifier {
            None => Ok(None),
            Some(verifier) => Ok(Some((judge(verifier.judge())?, set))),
        };
        let sets = spec.evaluation_sets().into_iter().map(of_set).collect::<Result<Vec<_>, VerifierError>>()?;
        let named = |(name, verifier): (String, VerifierSpec)| Ok((name, judge(verifier.judge())?));
        Ok(Self(Arc::new(Inner {
            named: spec.named_verifiers().into_iter().map(named).collect::<Result<_, VerifierError>>()?,
            sets: sets.into_iter().flatten().map(|(judge, set)| (set, judge)).collect(),
            label: judge(spec.verifier.judge())?,
            rewards: spec.reward.verifiers.iter().map(part).collect::<Result<_, VerifierError>>()?,
            spec: spec.reward.clone(),
            max_new_tokens: spec.rollout.max_new_tokens,
            seed: spec.seed,
        })))
    }

    /// Tries what the verifiers need of this machine.
    pub(crate) async fn prepare(&self) -> Result<(), VerifierError> {
        let Inner { label, rewards, sets, named, .. } = &*self.0;
        let more = rewards.iter().map(|part| &part.judge);
        let more = more.chain(sets.iter().map(|(_, judge)| judge)).chain(named.iter().map(|(_, judge)| judge));
        for judge in std::iter::once(label).chain(more) {
            judge.prepare().await?;
        }
        Ok(())
    }

    /// Grades one sample. The first verifier that fails ends it: half a verdict is none.
    pub(crate) async fn grade(&self, task: v1::VerifyTask) -> v1::TaskVerdict {
        let v1::VerifyTask { lease_id, group_id, sample_index, response, gold, question, answer_tokens, verifier } =
            task;
        let named = (!verifier.is_empty()).then_some(verifier);
        let task = Arc::new(Task { question, response, gold });
        let sample = SampleId { group: GroupId(group_id), index: sample_index };
        let mut verifications = Vec::with_capacity(1 + self.0.rewards.len());
        let verdict = match self.by(named.as_deref(), group_id) {
            // A failure and not a wrong answer: the data names a verifier that the job lacks, which is no fault of the sample.
            Err(unknown) => unknown,
            // What is measured by a verifier of its own has no reward but its label.
            Ok((name, judge, true)) => {
                let label = judge.verify(Arc::clone(&task)).await;
                verifications.push(measured(name, &label));
                label.verdict
            }
            Ok((name, judge, false)) => {
                self.verdict((name, judge), &task, sample, answer_tokens, &mut verifications).await
            }
        };
        if !verdict.outcome.is_conclusive() {
            let sample = format_args!("g{group_id}.{sample_index}");
            tracing::warn!(%sample, outcome = verdict.outcome.name(), rule = verdict.rule, "verification failed");
        }
        v1::TaskVerdict { lease_id, group_id, sample_index, verdict: Some(verdict.into()), verifications }
    }

    /// The verifier of the set that a group belongs to, where that has its own.
    fn of_set(&self, group: u64) -> Option<&Judge> {
        let number = evaluation_problem(GroupId(group))?;
        self.0.sets.iter().find(|(set, _)| set.position(number).is_some()).map(|(_, judge)| judge)
    }

    /// Whether the label of a sample is inverted by `reward.label_noise`: a function of job seed and sample, so that it is the same
    /// however often and by whichever worker the sample is graded.
    fn is_inverted(&self, sample: SampleId) -> bool {
        // Evaluations keep their labels: they measure what the noise does.
        let trained = evaluation_problem(sample.group).is_none();
        trained && NoiseKey::new(self.0.seed, LABEL_NOISE_STREAM, sample).uniform(0) < self.0.spec.label_noise
    }

    /// The verifier that grades a sample: the one its problem names, else that of its set, else that of the job. With it, its name
    /// in metrics, and whether only its label counts. The error is the verdict for an unknown name.
    fn by(&self, named: Option<&str>, group: u64) -> Result<(&str, &Judge, bool), Verdict> {
        let is_measured = evaluation_problem(GroupId(group)).is_some();
        if let Some(name) = named {
            let found = self.0.named.iter().find(|(known, _)| known == name);
            let unknown = || Fault::Reported(format!("the job has no verifier `{}`", name.escape_debug())).into();
            return found.map(|(name, judge)| (name.as_str(), judge, is_measured)).ok_or_else(unknown);
        }
        Ok(match self.of_set(group) {
            Some(judge) => (VerifierSpec::LABEL, judge, true),
            None => (VerifierSpec::LABEL, &self.0.label, false),
        })
    }

    async fn verdict(
        &self,
        (name, judge): (&str, &Judge),
        task: &Arc<Task>,
        sample: SampleId,
        tokens: u32,
        done: &mut Vec<v1::Verification>,
    ) -> Verdict {
        let mut label = judge.verify(Arc::clone(task)).await;
        done.push(measured(name, &label));
        if !label.verdict.outcome.is_conclusive() {
            return label.verdict;
        }
        // After the verifier and not in it, so that remembered verdicts are those of the verifier and hold without the noise, too.
        if self.is_inverted(sample) {
            label.verdict = inverted(label.verdict);
        }
        let mut rewards = Vec::with_capacity(self.0.rewards.len());
        // One after the other: samples are graded in parallel already, and a failed part saves the cost of those after it.
        for Part { name, weight, judge } in &self.0.rewards {
            let judgement = judge.verify(Arc::clone(task)).await;
            done.push(measured(name, &judgement));
            let verdict = judgement.verdict;
            if !verdict.outcome.is_conclusive() {
                return Verdict { rule: format!("{name}: {}", verdict.rule), ..verdict };
            }
            rewards.push((*weight, verdict.reward));
        }
        let answer = Answer { text: &task.response, tokens };
        combine(label.verdict, rewards, answer, &self.0.spec, self.0.max_new_tokens)
    }
}

/// The opposite of a conclusive verdict of a built-in verifier, whose label and reward are 0 or 1.
fn inverted(verdict: Verdict) -> Verdict {
    let outcome = if verdict.outcome == Outcome::Correct { Outcome::Wrong } else { Outcome::Correct };
    let rule = format!("{} (inverted)", verdict.rule);
    Verdict { outcome, label: 1.0 - verdict.label, reward: 1.0 - verdict.reward, rule, ..verdict }
}

fn measured(verifier: &str, judgement: &Judgement) -> v1::Verification {
    v1::Verification {
        verifier: verifier.to_owned(),
        outcome: v1::Outcome::from(judgement.verdict.outcome).into(),
        reward: judgement.verdict.reward,
        elapsed_us: u64::try_from(judgement.elapsed.as_micros()).unwrap_or(u64::MAX),
        cached: judgement.cached,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn grading(more: &str) -> Grading {
        let text = format!(
            "name = 'test'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\n\
             evaluation = {{ before = false, after = false, every_steps = 0 }}\nrollout.max_new_tokens = 100\n{more}"
        );
        Grading::new(&pacs_spec::parse(&text, Path::new("test")).unwrap(), None, 2).unwrap()
    }

    fn task(response: &str) -> v1::VerifyTask {
        v1::VerifyTask {
            lease_id: 7,
            group_id: 3,
            sample_index: 1,
            response: response.into(),
            gold: "5".into(),
            question: "2 + 3?".into(),
            answer_tokens: 95,
            verifier: String::new(),
        }
    }

    const STYLE: &str =
        "[reward]\noverlong_tokens = 10\n[reward.verifiers.style]\nweight = 0.25\nextraction = 'strict'\n";

    #[tokio::test]
    async fn the_reward_has_all_parts_and_the_label_one() {
        let grading = grading(STYLE);
        let graded = grading.grade(task("\\boxed{5}")).await;
        assert_eq!((graded.lease_id, graded.group_id, graded.sample_index), (7, 3, 1));
        let verdict = graded.verdict.unwrap();
        assert_eq!((verdict.outcome(), verdict.label, verdict.reward), (v1::Outcome::Correct, 1.0, 0.75));
        let names: Vec<_> = graded.verifications.iter().map(|v| (v.verifier.as_str(), v.cached)).collect();
        assert_eq!(names, [("label", false), ("style", false)]);
        // The last expression is an answer for one of the two.
        let verdict = grading.grade(task("2 + 3 = 5")).await.verdict.unwrap();
        assert_eq!((verdict.label, verdict.reward), (1.0, 0.5));
        let again = grading.grade(task("2 + 3 = 5")).await;
        assert!(again.verifications.iter().all(|v| v.cached && v.elapsed_us == 0), "{again:?}");
        assert_eq!(again.verdict.unwrap(), verdict);
    }

    #[tokio::test]
    async fn label_noise_inverts_its_share_of_training_verdicts_and_none_of_an_evaluation() {
        let noisy = grading("reward.label_noise = 0.25\n");
        let mut inverted = 0;
        for sample_index in 0..2000 {
            let task = v1::VerifyTask { sample_index, ..task("\\boxed{5}") };
            let verdict = noisy.grade(task.clone()).await.verdict.unwrap();
            assert_eq!(noisy.grade(task).await.verdict.unwrap(), verdict, "the same whenever it is graded");
            let is_inverted = verdict.rule.ends_with(" (inverted)");
            let (outcome, label) = if is_inverted { (v1::Outcome::Wrong, 0.0) } else { (v1::Outcome::Correct, 1.0) };
            assert_eq!((verdict.outcome(), verdict.label, verdict.reward), (outcome, label, label));
            inverted += u32::from(is_inverted);
        }
        // Five standard deviations of a binomial variable about its mean of 500.
        assert!((403..597).contains(&inverted), "{inverted} of 2000");
        let of_evaluation = v1::VerifyTask { group_id: pacs_types::EVALUATION_GROUPS, ..task("\\boxed{5}") };
        for sample_index in 0..100 {
            let verdict = noisy.grade(v1::VerifyTask { sample_index, ..of_evaluation.clone() }).await.verdict.unwrap();
            assert_eq!(verdict.label, 1.0);
        }
        let wrong = grading("reward.label_noise = 0.5\n");
        let verdicts = (0..64).map(|sample_index| wrong.grade(v1::VerifyTask { sample_index, ..task("\\boxed{6}") }));
        let mut labels = Vec::new();
        for verdict in verdicts {
            labels.push(verdict.await.verdict.unwrap().label);
        }
        assert!(labels.contains(&0.0) && labels.contains(&1.0), "{labels:?}");
    }

    #[tokio::test]
    async fn a_part_that_fails_fails_the_whole() {
        let broken = "[reward.verifiers.broken]\nkind = 'exec'\ncommand = ['/no/such/program']\n";
        let graded = grading(broken).grade(task("\\boxed{5}")).await;
        let verdict = graded.verdict.unwrap();
        assert_eq!((verdict.outcome(), verdict.label, verdict.reward), (v1::Outcome::Failed, 0.0, 0.0));
        assert!(verdict.rule.starts_with("broken: start `/no/such/program`: "), "{}", verdict.rule);
        let outcomes: Vec<_> = graded.verifications.iter().map(v1::Verification::outcome).collect();
        assert_eq!(outcomes, [v1::Outcome::Correct, v1::Outcome::Failed]);
    }
}
