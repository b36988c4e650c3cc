//! What a step weighs between processes, by the numbers of the job alone.
//!
//! Every figure is the most that it can be, with all answers as long as they may be. Two of them rest on what is usual: the
//! text of a token takes up to [`TEXT_BYTES`], and token ids are below two million.

use pacs_types::MAX_SAMPLE_BYTES;

use crate::JobSpec;

/// A token id in a message.
const TOKEN_BYTES: u64 = 3;
/// Bytes of a log-prob on the wire: float32.
const LOGPROB_BYTES: u64 = 4;
/// Text of a token.
const TEXT_BYTES: u64 = 8;
/// An entry of the index of a batch: group, sample, mini-batch, rank, label, reward, length.
const ENTRY_BYTES: u64 = 48;
/// What the coordinator keeps of a sample, a verdict, its lease and its place on the disk included.
const KEPT_BYTES: u64 = 640;
/// A coordinator without samples, with its reading of a batch for the archive, and samples on their way to the disk.
const COORDINATOR_BYTES: u64 = 128 << 20;
/// Pieces of a batch on their way to one rank.
const STREAM_BYTES: u64 = 8 << 20;
/// What a message holds of a list.
const LIST_BYTES: u64 = 4 << 20;

/// Most sequences of a step: every rank holds the whole index.
pub(crate) const MOST_SEQUENCES: u64 = 1 << 24;

/// What a step of a job weighs, at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepWeight {
    /// Sequences of a step.
    pub sequences: u64,
    /// One sample in a message.
    pub sample_bytes: u64,
    /// The samples of a step on their way from the rollout workers; the journal holds them until the step is made.
    pub samples_in_bytes: u64,
    /// The batch on its way to all ranks together: each gets the index and its own sequences.
    pub batch_out_bytes: u64,
    /// The part of one rank, when all have the same.
    pub rank_bytes: u64,
    /// The largest message.
    pub largest_message_bytes: u64,
    /// Samples in the journal when all slots are full.
    pub journal_bytes: u64,
    /// The coordinator's memory when all slots are full, without the problems.
    pub coordinator_bytes: u64,
}

impl JobSpec {
    /// What a step weighs between processes, where the routes of a token take so many bytes ([`JobSpec::route_shape`]); 0 where none
    /// are recorded.
    #[must_use]
    pub fn step_weight(&self, route_bytes: u64) -> StepWeight {
        let sequences = self.sequences_per_step();
        let slots = u64::from(self.slots()) * u64::from(self.rollout.samples_per_prompt);
        let ranks = u64::from(self.resources.learners.max(1));
        let answer = u64::from(self.rollout.max_new_tokens) * (self.answer_token_bytes() + route_bytes);
        let prompt_routes = self.data.max_prompt_tokens as u64 * route_bytes;
        let sample_bytes = answer + u64::from(self.rollout.max_new_tokens) * TEXT_BYTES + prompt_routes;
        let prompt = self.data.max_prompt_tokens as u64 * TOKEN_BYTES;
        let index = sequences * ENTRY_BYTES;
        // A prompt may stand on every rank that has a sequence of its group.
        let prompts = u64::from(self.batch.prompts_per_step) * (prompt + prompt_routes) * ranks.min(sequences);
        let batch_out_bytes = sequences * answer + prompts + ranks * index;
        StepWeight {
            sequences,
            sample_bytes,
            samples_in_bytes: sequences * sample_bytes,
            batch_out_bytes,
            rank_bytes: batch_out_bytes.div_ceil(ranks),
            largest_message_bytes: LIST_BYTES.max(sample_bytes + prompt),
            journal_bytes: slots * sample_bytes,
            coordinator_bytes: COORDINATOR_BYTES + slots * KEPT_BYTES + index + ranks * STREAM_BYTES,
        }
    }

    /// Sequences of a step.
    #[must_use]
    pub fn sequences_per_step(&self) -> u64 {
        u64::from(self.batch.prompts_per_step) * u64::from(self.rollout.samples_per_prompt)
    }

    /// The longest answer whose sample fits into a message.
    pub(crate) fn most_new_tokens(&self) -> u64 {
        MAX_SAMPLE_BYTES as u64 / (self.answer_token_bytes() + TEXT_BYTES)
    }

    /// What a token takes without its text: where something is cut off the distribution, samples have two log-probs of each.
    fn answer_token_bytes(&self) -> u64 {
        let rollout = &self.rollout;
        let cuts = rollout.top_p < 1.0 || rollout.top_k > 0 || rollout.min_p > 0.0;
        let cuts = cuts || self.evaluation_sets().iter().any(crate::EvaluationSet::filters);
        TOKEN_BYTES + LOGPROB_BYTES * if cuts { 2 } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn spec(changes: &str) -> Result<JobSpec, String> {
        let text = format!(
            "name = 'm'\nmodel.path = 'm'\ndata.train.path = 'x.jsonl'\nevaluation = {{ before = false, after = false, \
             every_steps = 0 }}\n{changes}"
        );
        crate::parse(&text, Path::new("m.toml")).map_err(|errors| errors.to_string())
    }

    #[test]
    fn the_weight_of_a_step_follows_from_its_numbers() {
        let paper = "resources.learners = 8\nrollout.max_new_tokens = 8192\ndata.max_prompt_tokens = 1024";
        let weight = spec(paper).unwrap().step_weight(0);
        assert_eq!((weight.sequences, weight.sample_bytes), (8192, 8192 * 15));
        assert_eq!(weight.samples_in_bytes, 8192 * 8192 * 15);
        // Answers once, the index and at most every prompt on each rank.
        assert_eq!(weight.batch_out_bytes, 8192 * 8192 * 7 + 8 * 8192 * 48 + 8 * 1024 * 1024 * 3);
        assert_eq!(weight.largest_message_bytes, 4 << 20);
        assert!(weight.coordinator_bytes < 256 << 20, "{weight:?}");
        let cut = spec(&format!("{paper}\nrollout.top_p = 0.9")).unwrap().step_weight(0);
        assert_eq!(cut.sample_bytes, 8192 * 19, "two log-probs of each token");
        let ahead = spec(&format!("{paper}\nasynchrony.max_lag = 2")).unwrap().step_weight(0);
        assert_eq!(ahead.journal_bytes, 3 * weight.journal_bytes);
        // Each sample has the routes of its prompt; the learner gets them once a group and rank.
        let routed = spec(paper).unwrap().step_weight(384);
        assert_eq!(routed.sample_bytes, 8192 * (15 + 384) + 1024 * 384);
        assert_eq!(routed.batch_out_bytes - weight.batch_out_bytes, 8192 * 8192 * 384 + 8 * 1024 * 1024 * 384);
    }

    #[test]
    fn what_no_message_can_carry_is_refused_with_the_number() {
        let fits = "rollout.max_new_tokens = 838860";
        assert!(spec(fits).is_ok(), "{:?}", spec(fits));
        let problem = spec("rollout.max_new_tokens = 838861").unwrap_err();
        assert!(problem.contains("expected at most 838860"), "{problem}");
        let problem = spec("rollout.max_new_tokens = 700000\nrollout.min_p = 0.1").unwrap_err();
        assert!(problem.contains("expected at most 662258"), "{problem}");
        let problem = spec("batch.prompts_per_step = 1000000\nrollout.samples_per_prompt = 1000").unwrap_err();
        assert!(problem.contains("1000000000 sequences"), "{problem}");
    }
}
