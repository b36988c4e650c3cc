//! `pacs job check --preflight`: does on a small scale what a run does first, before anybody pays for the large one.
//!
//! Every [`Trial`] takes one part of the job as it is (its data, its verifiers, its programs and devices) and says what was
//! seen; one that fails also says how far a run would have come before the same was seen there.

mod step;
mod verifiers;

use std::fmt;
use std::time::{Duration, Instant};

use pacs_spec::JobSpec;
use serde::Serialize;

use crate::arguments::Check;
use crate::failure::Failure;
use crate::format::{duration, plural};

/// What became of one part of the job.
#[derive(Debug, Serialize)]
pub(crate) struct Trial {
    /// What was tried.
    part: String,
    seconds: f64,
    /// What was seen.
    found: String,
    problem: Option<Problem>,
}

/// Why a run should not be started.
#[derive(Debug, Serialize)]
struct Problem {
    said: String,
    /// When a run would have said so.
    otherwise: String,
}

impl Trial {
    fn new(part: impl Into<String>, began: Instant, found: Result<String, Problem>) -> Self {
        let (part, seconds) = (part.into(), began.elapsed().as_secs_f64());
        match found {
            Ok(found) => Self { part, seconds, found, problem: None },
            Err(problem) => Self { part, seconds, found: String::new(), problem: Some(problem) },
        }
    }

    /// What is wrong, in one sentence.
    pub(crate) fn problem(&self) -> Option<String> {
        self.problem.as_ref().map(|problem| format!("{}: {}", self.part, problem.said))
    }
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let took = duration(Duration::try_from_secs_f64(self.seconds).unwrap_or_default());
        match &self.problem {
            None => write!(f, "ok       {:<14}  {} ({took})", self.part, self.found),
            Some(problem) => {
                let (said, otherwise) = (&problem.said, &problem.otherwise);
                write!(f, "FAILURE  {:<14}  {said} ({took})\n{:25}{otherwise}", self.part, "")
            }
        }
    }
}

/// Tries one part after the other, tells `seen` of each, and stops at the first that fails.
///
/// # Errors
/// When the trials themselves cannot be made.
pub(crate) fn run(spec: &JobSpec, arguments: &Check, mut seen: impl FnMut(&Trial)) -> Result<Vec<Trial>, Failure> {
    let mut trials = Vec::new();
    let mut add = |trial: Trial| {
        seen(&trial);
        trials.push(trial);
        trials.last().is_some_and(|trial| trial.problem.is_none())
    };
    let began = Instant::now();
    match pacs_data::load(spec) {
        Ok(problems) => {
            let rows = plural(problems.train.len() as u64, "problem", "problems");
            add(Trial::new("data", began, Ok(format!("{rows} to train on, as prompts"))));
            if !verifiers::try_all(spec, &problems.train)?.into_iter().all(&mut add) {
                return Ok(trials);
            }
        }
        Err(error) => {
            let otherwise =
                "a run would have said so when it loads its problems, with all its workers waiting".to_owned();
            add(Trial::new("data", began, Err(Problem { said: error.to_string(), otherwise })));
            return Ok(trials);
        }
    }
    add(step::try_it(spec, arguments)?);
    Ok(trials)
}

/// How much a run does before it hears of its verifiers for the first time.
fn first_samples(spec: &JobSpec) -> String {
    let samples = u64::from(spec.batch.prompts_per_step) * u64::from(spec.rollout.samples_per_prompt);
    let samples = plural(samples, "sample", "samples");
    format!("{samples} of up to {} tokens", spec.rollout.max_new_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_it_would_have_cost() {
        let problem = Problem { said: "it hangs".into(), otherwise: "a run would have waited".into() };
        let trial = Trial { part: "verifier".into(), seconds: 2.0, found: String::new(), problem: Some(problem) };
        let expected = "FAILURE  verifier        it hangs (2.0 s)\n                         a run would have waited";
        assert_eq!(trial.to_string(), expected);
        assert_eq!(trial.problem().as_deref(), Some("verifier: it hangs"));
    }
}
