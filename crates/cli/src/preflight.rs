//! `pacs job check --preflight`: a small rehearsal of what a run does first, before anybody pays for the large one.
//!
//! Every [`Trial`] exercises one part of the job as configured (its data, its verifiers, its programs and devices) and reports
//! what it observed. A failed trial also says how late in a run the same fault would have surfaced.

mod step;
mod verifiers;

use std::fmt;
use std::time::{Duration, Instant};

use pacs_spec::JobSpec;
use serde::Serialize;

use crate::arguments::Check;
use crate::failure::Failure;
use crate::format::{duration, plural};

/// The result of exercising one part of the job.
#[derive(Debug, Serialize)]
pub(crate) struct Trial {
    /// The part: data, a verifier, or the step.
    part: String,
    seconds: f64,
    /// One line about what was observed.
    found: String,
    problem: Option<Problem>,
}

/// A reason not to start the run.
#[derive(Debug, Serialize)]
struct Problem {
    said: String,
    /// How late a run would have met the problem without the preflight.
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

    /// Returns the problem in one sentence; `None` when the trial passed.
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

/// Runs the trials in order, reports each to `seen`, and stops at the first that fails.
///
/// # Errors
/// When a trial cannot be set up at all.
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
                "a run would have reported this when it loads its problems, with all its workers waiting".to_owned();
            add(Trial::new("data", began, Err(Problem { said: error.to_string(), otherwise })));
            return Ok(trials);
        }
    }
    add(step::try_it(spec, arguments)?);
    Ok(trials)
}

/// Describes what a run generates before its verifiers are used for the first time.
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
