//! A rank's share of a batch, and how it is cut into passes that fit the token budget.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

/// One sequence of the batch, as every rank knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexEntry {
    /// Group it belongs to.
    pub group: u64,
    /// Optimizer update it takes part in, from 0, never falling along the index.
    pub mini_batch: usize,
    /// Rank that computes it.
    pub rank: usize,
    /// Verifiable outcome, 0 to 1.
    pub label: f64,
    /// Reward, finite.
    pub reward: f64,
    /// Tokens of the answer.
    pub answer_tokens: u32,
    /// It ended at the length limit.
    pub truncated: bool,
}

/// Tokens of one sequence that this rank computes.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceTokens {
    /// Position in the index.
    pub position: usize,
    /// Answer tokens, not empty.
    pub tokens: Vec<u32>,
    /// The rollout engine's log-prob of each under the temperature-scaled policy (nats): what the learner's own are
    /// compared with.
    pub rollout_logprobs: Vec<f32>,
    /// Log-prob of each under the distribution that it was drawn from, behind top-k, top-p and min-p (nats). Empty when
    /// nothing was cut off: then it is `rollout_logprobs`.
    pub sampled_logprobs: Vec<f32>,
    /// Version of the weights that generated its oldest token. Where that is the one that a step trains, the learner computes
    /// `rollout_logprobs` itself, up to rounding.
    pub version: u64,
}

impl SequenceTokens {
    /// What importance weights divide by: log-probs of the distribution that was drawn from (nats).
    #[must_use]
    pub fn behaviour_logprobs(&self) -> &[f32] {
        if self.sampled_logprobs.is_empty() { &self.rollout_logprobs } else { &self.sampled_logprobs }
    }
}

impl TrainBatch {
    /// The first group with a token that a vocabulary of `size` does not have, and the token. The kernels would read beyond
    /// the embedding.
    #[must_use]
    pub fn outside_vocabulary(&self, size: i64) -> Option<(u64, u32)> {
        let outside = |tokens: &[u32]| tokens.iter().copied().find(|token| i64::from(*token) >= size);
        let prompts = self.prompts.iter().find_map(|(group, tokens)| Some((*group, outside(tokens)?)));
        let answer =
            |sequence: &SequenceTokens| Some((self.index.get(sequence.position)?.group, outside(&sequence.tokens)?));
        prompts.or_else(|| self.sequences.iter().find_map(answer))
    }
}

/// All that one rank needs for a training step.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainBatch {
    /// The step being made; the first of a job is 1.
    pub step: u64,
    /// Every sequence of the batch.
    pub index: Vec<IndexEntry>,
    /// Prompts of the groups that this rank holds sequences of.
    pub prompts: HashMap<u64, Vec<u32>>,
    /// This rank's sequences, in the order of the index.
    pub sequences: Vec<SequenceTokens>,
}

/// A batch that contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("batch of step {step}: {problem}")]
pub struct BatchError {
    /// The step.
    pub step: u64,
    /// What is wrong.
    pub problem: String,
}

impl TrainBatch {
    /// How many optimizer updates the batch makes.
    #[must_use]
    pub fn mini_batches(&self) -> usize {
        self.index.last().map_or(0, |entry| entry.mini_batch + 1)
    }

    /// Whether all tokens of the sequence at `place` come from the weights that the step trains.
    pub(crate) fn is_current(&self, place: usize) -> bool {
        // Step `n` trains version `n - 1`.
        self.sequences[place].version + 1 >= self.step
    }

    /// Positions of the members of a mini-batch, which are consecutive.
    pub(crate) fn members(&self, mini_batch: usize) -> Range<usize> {
        let start = self.index.partition_point(|entry| entry.mini_batch < mini_batch);
        start..self.index.partition_point(|entry| entry.mini_batch <= mini_batch)
    }

    /// Cuts `sequences` (places in [`Self::sequences`]) into passes of at most `tokens` tokens.
    ///
    /// A group's prompt stands once a pass with its answers behind it; a group that does not fit is continued in the
    /// next pass, which is exact because only scalars couple its members. The largest pass comes first: a device's allocator
    /// gives the memory that it took for that one to those behind, where it would take more for every larger one.
    pub(crate) fn passes(&self, sequences: &[usize], tokens: usize) -> Vec<Pass> {
        let mut passes: Vec<Pass> = Vec::new();
        for &place in sequences {
            let sequence = &self.sequences[place];
            let group = self.index[sequence.position].group;
            let (prompt, answer) = (self.prompts[&group].len(), sequence.tokens.len());
            let pass = match passes.last_mut() {
                Some(pass) => {
                    let cost = if pass.holds(group) { answer } else { prompt + answer };
                    if pass.tokens + cost <= tokens { pass } else { push_empty(&mut passes) }
                }
                None => push_empty(&mut passes),
            };
            if !pass.holds(group) {
                pass.rows.push(Row { group, answers: Vec::new() });
                pass.tokens += prompt;
            }
            pass.rows.last_mut().expect("the group's row is the last").answers.push(place);
            pass.tokens += answer;
        }
        passes.sort_by_key(|pass| Reverse(pass.tokens));
        passes
    }
}

fn push_empty(passes: &mut Vec<Pass>) -> &mut Pass {
    passes.push(Pass::default());
    passes.last_mut().expect("one was just pushed")
}

/// Sequences that go through the model together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pass {
    pub(crate) rows: Vec<Row>,
    pub(crate) tokens: usize,
}

/// A prompt with answers behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) group: u64,
    /// Places in [`TrainBatch::sequences`].
    pub(crate) answers: Vec<usize>,
}

impl Pass {
    fn holds(&self, group: u64) -> bool {
        self.rows.last().is_some_and(|row| row.group == group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(answers: &[(u64, usize)]) -> TrainBatch {
        let entry = |&(group, tokens): &(u64, usize)| IndexEntry {
            group,
            mini_batch: 0,
            rank: 0,
            label: 0.0,
            reward: 0.0,
            answer_tokens: tokens as u32,
            truncated: false,
        };
        let sequence = |(position, &(_, tokens)): (usize, &(u64, usize))| SequenceTokens {
            position,
            tokens: vec![1; tokens],
            rollout_logprobs: vec![-1.0; tokens],
            sampled_logprobs: Vec::new(),
            version: 0,
        };
        TrainBatch {
            step: 1,
            index: answers.iter().map(entry).collect(),
            prompts: answers.iter().map(|(group, _)| (*group, vec![7; 10])).collect(),
            sequences: answers.iter().enumerate().map(sequence).collect(),
        }
    }

    #[test]
    fn a_prompt_stands_once_a_pass_and_groups_may_be_split() {
        let batch = batch(&[(1, 5), (1, 5), (1, 5), (2, 5)]);
        let passes = batch.passes(&[0, 1, 2, 3], 20);
        let shape: Vec<Vec<(u64, Vec<usize>)>> =
            passes.iter().map(|p| p.rows.iter().map(|r| (r.group, r.answers.clone())).collect()).collect();
        assert_eq!(shape, [vec![(1, vec![0, 1])], vec![(1, vec![2])], vec![(2, vec![3])]]);
        assert_eq!(passes.iter().map(|p| p.tokens).collect::<Vec<_>>(), [20, 15, 15]);
        assert_eq!(batch.passes(&[0, 1, 2, 3], 1000).len(), 1);
        let tokens = batch.passes(&[2, 3, 0, 1], 20).iter().map(|pass| pass.tokens).collect::<Vec<_>>();
        assert_eq!(tokens, [20, 15, 15], "the largest first");
    }

    #[test]
    fn a_sequence_longer_than_the_budget_goes_alone() {
        let batch = batch(&[(1, 50), (2, 5)]);
        assert_eq!(batch.passes(&[0, 1], 20).len(), 2);
    }
}
