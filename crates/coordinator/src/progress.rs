use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What a run tells those who watch it.
#[derive(Clone, Debug)]
pub enum Progress {
    /// The run has been waiting for a while.
    Waiting {
        /// For what, which role, since when.
        sentence: String,
    },
    /// All learners have loaded their state.
    Prepared {
        /// Training steps that it has seen.
        step: u64,
        /// Steps of the whole job.
        total_steps: u64,
        /// Names by rank.
        learners: Vec<String>,
    },
    /// The policy was measured.
    Evaluated(EvaluationSummary),
    /// It is being measured.
    Measuring {
        /// Samples that have their verdict.
        judged: u64,
        /// Samples in all.
        samples: u64,
        /// Time to the end at the rate of this process so far; absent until there is one.
        remaining_seconds: Option<f64>,
    },
    /// A training step was made.
    Step(Box<StepSummary>),
    /// A checkpoint was committed.
    Saved {
        /// Training steps done.
        step: u64,
        /// Its folder.
        path: PathBuf,
        /// How long it took from its beginning until it was durable. Training may have gone on meanwhile.
        seconds: f64,
    },
    /// A worker is gone; its work is issued again.
    WorkerLost {
        /// Its slot.
        name: String,
        /// How it went.
        why: String,
    },
    /// A worker was drained and leaves: it is not to be started again.
    Drained {
        /// Its slot.
        name: String,
    },
    /// Likewise: the search for the group that training fails by has come further, so a learner that died did not die in vain.
    Narrowed {
        /// A sentence.
        text: String,
    },
    /// Something that the operator should read.
    Note {
        /// A sentence.
        text: String,
    },
}

/// One training step in numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct StepSummary {
    /// Training steps done.
    pub step: u64,
    /// Steps of the whole job.
    #[serde(skip)]
    pub total_steps: u64,
    /// Newest weights that may have generated the batch.
    pub version: u64,
    /// How many versions behind those the oldest token of the batch is.
    pub lag: u64,
    /// When the step ended, in seconds since 1970.
    pub time: f64,
    /// Mean reward of the samples.
    pub reward_mean: f64,
    /// Mean label of the samples.
    pub pass_rate: f64,
    /// Share of groups whose labels are not all the same: those that there is something to learn from.
    pub mixed_share: f64,
    /// Mean entropy of the distributions that the answers' tokens were drawn from, nats a token.
    pub entropy: f64,
    /// Mean tokens of an answer.
    pub answer_tokens_mean: f64,
    /// Share of answers that were cut off at the limit of new tokens.
    pub truncated_share: f64,
    /// Share of answers in which no answer could be read.
    pub unparsable_share: f64,
    /// Verifications of this step that failed or timed out; none of them is a verdict.
    pub failed_verdicts: u64,
    /// Samples of this step that were given up for others because no verdict could be had.
    pub replaced_samples: u64,
    /// Groups of this step that were given up for the next prompts.
    pub dropped_groups: u64,
    /// Groups of this step that the learner did not get, or that were refilled, because their labels are all the same.
    pub uniform_groups_left_out: u64,
    /// Groups that were started again because they would have grown too old.
    pub evicted_groups: u64,
    /// Draws since the step before that were skipped: their problems are retired, or teach little.
    pub skipped_draws: u64,
    /// Retired problems that were drawn again since the step before, because too few others were left.
    pub reopened_problems: u64,
    /// Problems that are retired.
    pub retired_problems: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Generated tokens a second of the whole step.
    pub tokens_per_second: f64,
    /// Optimizer updates that were skipped in this step.
    pub skipped_updates: u32,
    /// Where the time went.
    #[serde(flatten)]
    pub seconds: StepSeconds,
    /// What the learner and the verifiers measured, by name.
    #[serde(skip)]
    pub metrics: BTreeMap<String, f64>,
    /// Estimated time to the end of the job.
    #[serde(skip)]
    pub remaining_seconds: f64,
}

impl StepSummary {
    /// All numbers by name, as `metrics.jsonl` has them. A worker's metric never hides one of these fields.
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

/// Where the time of a step went.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct StepSeconds {
    /// Generating and verifying, together.
    pub sampling_seconds: f64,
    /// The end of sampling, when all samples were there and only verdicts were missing.
    pub verifying_seconds: f64,
    /// Training.
    pub training_seconds: f64,
    /// Sampling and training.
    pub total_seconds: f64,
    /// Time since the step before that the learners stood still for checkpoints.
    pub checkpoint_stall_seconds: f64,
    /// Share of that in itself and `total_seconds`.
    pub checkpoint_stall_share: f64,
    /// Time of the checkpoint that has become durable since the step before, from its beginning; absent when none has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_write_seconds: Option<f64>,
}

/// One evaluation in numbers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct EvaluationSummary {
    /// Training steps that the policy has seen.
    pub step: u64,
    /// Name of the set; absent for that of `data.evaluation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// When it ended, in seconds since 1970.
    pub time: f64,
    /// Share of right answers: the mean over problems of the mean label.
    pub pass_at_1: f64,
    /// The `k` of `pass_at_k`: samples of each problem.
    pub k: u32,
    /// Share of problems with a right answer among `k`; absent when `k` is 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass_at_k: Option<f64>,
    /// The unbiased estimate of pass@k at powers of two up to `k`, and at `k`; absent when `k` is 1.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pass_curve: BTreeMap<usize, f64>,
    /// Problems that were measured.
    pub problems: u64,
    /// Problems left out because no verdict could be had.
    pub excluded: u32,
    /// Samples that were measured.
    pub samples: u64,
    /// Mean tokens of an answer.
    pub answer_tokens_mean: f64,
    /// Share of answers that were cut off at the limit of new tokens.
    pub truncated_share: f64,
    /// Share of answers in which no answer could be read.
    pub unparsable_share: f64,
    /// How long it took.
    pub seconds: f64,
}

impl EvaluationSummary {
    /// What the set is called.
    #[must_use]
    pub fn label(&self) -> &str {
        self.set.as_deref().unwrap_or("evaluation")
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// All steps are made.
    Finished {
        /// Training steps done.
        step: u64,
        /// The last checkpoint.
        checkpoint: PathBuf,
        /// The exported model: a Hugging Face folder.
        model: PathBuf,
    },
    /// The operator stopped it.
    Stopped {
        /// Training steps done.
        step: u64,
        /// Where a resumed run goes on; absent when no step was made.
        checkpoint: Option<PathBuf>,
    },
    /// It could not go on.
    Failed {
        /// One sentence.
        reason: String,
    },
    /// This process has a bug: it panicked in the middle of an event. Nothing that was acknowledged is lost, and another process
    /// resumes from the journal.
    Panicked {
        /// One sentence.
        reason: String,
    },
    /// This process could not go on (the disk takes no more), and nothing is lost: the same command goes on.
    Interrupted {
        /// One sentence.
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
