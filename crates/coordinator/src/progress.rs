use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// An event for those who watch a run.
#[derive(Clone, Debug)]
pub enum Progress {
    /// The run has been waiting for some time.
    Waiting {
        /// What it waits for, from which role, and since when.
        sentence: String,
    },
    /// All learners have loaded their starting state.
    Prepared {
        /// Training steps that the state has seen.
        step: u64,
        /// Steps of the whole job.
        total_steps: u64,
        /// Worker names, indexed by rank.
        learners: Vec<String>,
    },
    /// An evaluation is complete.
    Evaluated(EvaluationSummary),
    /// An evaluation is in progress.
    Measuring {
        /// Samples with a verdict.
        judged: u64,
        /// All samples of the evaluation.
        samples: u64,
        /// Estimated time to the end at the rate of this process; `None` until it can be estimated.
        remaining_seconds: Option<f64>,
    },
    /// A training step is done.
    Step(Box<StepSummary>),
    /// A checkpoint was committed.
    Saved {
        /// Training steps done in the saved state.
        step: u64,
        /// Folder of the checkpoint.
        path: PathBuf,
        /// Time from the start of the save until it was durable. Training may have continued meanwhile.
        seconds: f64,
    },
    /// A worker was lost; its work is reissued.
    WorkerLost {
        /// Name of its slot.
        name: String,
        /// How it ended, in words.
        why: String,
    },
    /// A worker was drained and leaves: its supervisor must not restart it.
    Drained {
        /// Name of its slot.
        name: String,
    },
    /// An operator has changed the run.
    Operated {
        /// Identity of the operator; "this process" for signals.
        who: String,
        /// What was done, for people.
        what: String,
    },
    /// The search for a group that makes training fail has narrowed its suspects, so the
    /// lost generation was not in vain.
    Narrowed {
        /// The finding, as a sentence.
        text: String,
    },
    /// A message that the operator should read.
    Note {
        /// The message, as a sentence.
        text: String,
    },
}

/// Metrics of one training step.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StepSummary {
    /// Training steps done.
    pub step: u64,
    /// Steps of the whole job.
    #[serde(skip)]
    pub total_steps: u64,
    /// Version of the newest weights that may have generated the batch.
    pub version: u64,
    /// Lag of the batch: versions between its oldest token and those weights.
    pub lag: u64,
    /// End of the step, in seconds since 1970.
    pub time: f64,
    /// Mean reward of the samples.
    pub reward_mean: f64,
    /// Mean label of the samples.
    pub pass_rate: f64,
    /// Share of mixed groups, whose labels are not all the same. Under group baselines, only these carry gradient.
    pub mixed_share: f64,
    /// Mean entropy of the sampling distributions of the answers' tokens, in nats per token.
    pub entropy: f64,
    /// Mean length of an answer, in tokens.
    pub answer_tokens_mean: f64,
    /// Share of answers that were cut off at the limit of new tokens.
    pub truncated_share: f64,
    /// Share of answers from which no final answer could be extracted.
    pub unparsable_share: f64,
    /// Verifications that failed or timed out during this step; none of them counts as a verdict.
    pub failed_verdicts: u64,
    /// Samples of this step that were replaced because they could not be verified.
    pub replaced_samples: u64,
    /// Groups of this step that were given up and replaced by the next prompt.
    pub dropped_groups: u64,
    /// Uniform groups of this step that were left out or refilled.
    pub uniform_groups_left_out: u64,
    /// Groups that were restarted because they would have exceeded the lag bound.
    pub evicted_groups: u64,
    /// Draws since the previous step that the curriculum skipped.
    pub skipped_draws: u64,
    /// Retired problems that were reopened since the previous step, because too few others were left.
    pub reopened_problems: u64,
    /// Number of retired problems.
    pub retired_problems: u64,
    /// Number of generated tokens.
    pub generated_tokens: u64,
    /// Generated tokens per second of the whole step.
    pub tokens_per_second: f64,
    /// Optimizer updates that were skipped in this step.
    pub skipped_updates: u32,
    /// Duration of the parts of the step.
    #[serde(flatten)]
    pub seconds: StepSeconds,
    /// Metrics from the learner and the verifiers, by name.
    #[serde(skip)]
    pub metrics: BTreeMap<String, f64>,
    /// Estimated time to the end of the job, in seconds.
    #[serde(skip)]
    pub remaining_seconds: f64,
}

impl StepSummary {
    /// All numbers by name, as in `metrics.jsonl`. A worker's metric never hides one of these fields.
    #[must_use]
    pub fn numbers(&self) -> Map<String, Value> {
        let own = serde_json::to_value(self).expect("a summary is numbers with names");
        let Value::Object(mut numbers) = own else { unreachable!("a struct serialises to an object") };
        for (name, value) in &self.metrics {
            if !numbers.contains_key(name) {
                numbers.insert(name.clone(), Value::from(*value));
            }
        }
        numbers
    }
}

/// Duration of the parts of a step.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StepSeconds {
    /// Generation and verification, which overlap.
    pub sampling_seconds: f64,
    /// The end of sampling in which all samples were present and only verdicts were missing.
    pub verifying_seconds: f64,
    /// Computing the step on the learner ranks.
    pub training_seconds: f64,
    /// Sampling and training together.
    pub total_seconds: f64,
    /// Time since the previous step during which the learners waited for checkpoints.
    pub checkpoint_stall_seconds: f64,
    /// The same as a share of itself plus `total_seconds`.
    pub checkpoint_stall_share: f64,
    /// Duration of the checkpoint that became durable since the previous step; `None` if there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_write_seconds: Option<f64>,
}

/// Result of the evaluation of one set.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluationSummary {
    /// Training steps that the policy has seen.
    pub step: u64,
    /// Name of the set; `None` for that of `data.evaluation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// End of the evaluation, in seconds since 1970.
    pub time: f64,
    /// Mean over problems of the mean label.
    pub pass_at_1: f64,
    /// Samples per problem, the `k` of `pass_at_k`.
    pub k: u32,
    /// Share of problems with a right answer among `k`; `None` if `k` is 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass_at_k: Option<f64>,
    /// Unbiased estimates of pass@k at powers of two up to `k`, and at `k`; empty if `k` is 1.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pass_curve: BTreeMap<usize, f64>,
    /// Number of problems that were evaluated.
    pub problems: u64,
    /// Problems that were left out because they could not be verified.
    pub excluded: u32,
    /// Number of samples.
    pub samples: u64,
    /// Mean length of an answer, in tokens.
    pub answer_tokens_mean: f64,
    /// Share of answers that were cut off at the limit of new tokens.
    pub truncated_share: f64,
    /// Share of answers from which no final answer could be extracted.
    pub unparsable_share: f64,
    /// Duration of the evaluation.
    pub seconds: f64,
}

impl EvaluationSummary {
    /// Name of the set for people.
    #[must_use]
    pub fn label(&self) -> &str {
        self.set.as_deref().unwrap_or("evaluation")
    }
}

/// How the run of a coordinator process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// All steps are done.
    Finished {
        /// Training steps done.
        step: u64,
        /// Folder of the last checkpoint.
        checkpoint: PathBuf,
        /// Folder of the exported model, in Hugging Face format.
        model: PathBuf,
    },
    /// An operator stopped the run.
    Stopped {
        /// Training steps done.
        step: u64,
        /// The checkpoint that a resumed run continues from; `None` before the first step.
        checkpoint: Option<PathBuf>,
    },
    /// The run cannot continue.
    Failed {
        /// The reason, as a sentence.
        reason: String,
    },
    /// The process panicked in the middle of an event, which is a bug. Nothing acknowledged is lost, and the next
    /// process resumes from the journal.
    Panicked {
        /// The reason, as a sentence.
        reason: String,
    },
    /// The process could not continue, because of its disk for example. Nothing is lost: the
    /// same command resumes the run.
    Interrupted {
        /// The reason, as a sentence.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learner_metrics_are_added_but_hide_nothing() {
        let metrics =
            BTreeMap::from([("loss".to_owned(), 0.5), ("step".to_owned(), 9.0), ("bad".to_owned(), f64::NAN)]);
        let numbers = StepSummary { step: 3, metrics, ..StepSummary::default() }.numbers();
        assert_eq!((&numbers["step"], &numbers["loss"], &numbers["bad"]), (&3.into(), &0.5.into(), &Value::Null));
        assert!(numbers.contains_key("sampling_seconds"));
    }
}
