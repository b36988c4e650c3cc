//! One rank's share of a batch, and its division into passes that fit the token budget.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

use pacs_shape::RouteShape;

use crate::error::BatchError;

/// A sequence of the batch, with what every rank knows of it.
#[derive(Clone, Debug, PartialEq)]
pub struct IndexEntry {
    /// Id of the sequence's group.
    pub group: u64,
    /// Index of the sequence's sample in its group; training does not depend on it.
    pub sample: u32,
    /// Optimizer update that trains on it, counted from 0; never decreases along the index.
    pub mini_batch: usize,
    /// Rank that computes its forward and backward.
    pub rank: usize,
    /// Verifiable outcome, from 0 to 1.
    pub label: f64,
    /// Reward that policy gradients train on; finite.
    pub reward: f64,
    /// Number of answer tokens; at least 1.
    pub answer_tokens: u32,
    /// Whether the answer ended at the length limit.
    pub truncated: bool,
    /// Unit of sequences that are always computed together, counted from 0; never decreases along the index. `None`
    /// without `resources.deterministic`, where the last bits of the weights may depend on how the batch is cut.
    pub unit: Option<usize>,
}

/// Tokens and rollout log-probs of one sequence that this rank computes.
#[derive(Clone, Debug, PartialEq)]
pub struct SequenceTokens {
    /// Position of the sequence in [`TrainBatch::index`].
    pub position: usize,
    /// Answer tokens; never empty.
    pub tokens: Vec<u32>,
    /// Log-prob of each token by the rollout engine, at the sampling temperature (nats). The learner compares its
    /// own with these.
    pub rollout_logprobs: Vec<f32>,
    /// Log-prob of each token under the distribution that it was drawn from, after top-k, top-p and min-p (nats). Empty
    /// when no filter cut anything off; `rollout_logprobs` holds then.
    pub sampled_logprobs: Vec<f32>,
    /// Version of the weights that generated the oldest token. If it is the version that the step trains, the learner
    /// reproduces `rollout_logprobs` up to rounding.
    pub version: u64,
    /// Experts that computed the tokens but the last, as [`RouteShape`] lays them out; empty where they are not recorded.
    pub routes: Vec<u8>,
}

impl SequenceTokens {
    /// Returns the log-probs of the distribution that the tokens were drawn from (nats): the denominator
    /// of importance weights.
    #[must_use]
    pub fn behaviour_logprobs(&self) -> &[f32] {
        if self.sampled_logprobs.is_empty() { &self.rollout_logprobs } else { &self.sampled_logprobs }
    }
}

impl TrainBatch {
    /// Finds the first group with a token outside a vocabulary of `size`, and the token. Kernels would read
    /// beyond the embedding.
    #[must_use]
    pub fn outside_vocabulary(&self, size: i64) -> Option<(u64, u32)> {
        let outside = |tokens: &[u32]| tokens.iter().copied().find(|token| i64::from(*token) >= size);
        let prompts = self.prompts.iter().find_map(|(group, tokens)| Some((*group, outside(tokens)?)));
        let answer =
            |sequence: &SequenceTokens| Some((self.index.get(sequence.position)?.group, outside(&sequence.tokens)?));
        prompts.or_else(|| self.sequences.iter().find_map(answer))
    }

    /// Checks that prompts and answers of this rank have the routes of all tokens that a pass computes.
    ///
    /// # Errors
    /// When some are missing, or name an expert that layers do not have.
    pub(super) fn check_routes(&self, shape: &RouteShape) -> Result<(), BatchError> {
        let fail = |whose: String, problem: String| {
            Err(BatchError { step: self.step, problem: format!("the routes of {whose} {problem}") })
        };
        for (group, tokens) in &self.prompts {
            let routes = self.prompt_routes.get(group).map_or(&[][..], Vec::as_slice);
            if let Err(problem) = shape.check_range(routes, tokens.len()) {
                return fail(format!("the prompt of group {group}"), problem);
            }
        }
        for SequenceTokens { position, tokens, routes, .. } in &self.sequences {
            if let Err(problem) = shape.check_range(routes, tokens.len() - 1) {
                return fail(format!("sequence {position}"), problem);
            }
        }
        Ok(())
    }
}

/// Everything that one rank needs for a training step.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainBatch {
    /// Step to train, counted from 1.
    pub step: u64,
    /// Every sequence of the batch, in the order that all ranks share.
    pub index: Vec<IndexEntry>,
    /// Prompt tokens of the groups that this rank holds sequences of, by group id.
    pub prompts: HashMap<u64, Vec<u32>>,
    /// Experts that computed these prompts, as [`RouteShape`] lays them out, by group id; empty where they are not recorded. A group has
    /// the same ones on every rank.
    pub prompt_routes: HashMap<u64, Vec<u8>>,
    /// Sequences that this rank computes, in the order of the index.
    pub sequences: Vec<SequenceTokens>,
}

impl TrainBatch {
    /// Returns the number of optimizer updates in the batch.
    #[must_use]
    pub fn mini_batches(&self) -> usize {
        self.index.last().map_or(0, |entry| entry.mini_batch + 1)
    }

    /// Whether all tokens of the sequence at `place` were generated by the weights that the step trains.
    pub(super) fn is_current(&self, place: usize) -> bool {
        // Step `n` trains version `n - 1`.
        self.sequences[place].version + 1 >= self.step
    }

    /// Positions of a mini-batch's sequences, which are consecutive.
    pub(super) fn members(&self, mini_batch: usize) -> Range<usize> {
        let start = self.index.partition_point(|entry| entry.mini_batch < mini_batch);
        start..self.index.partition_point(|entry| entry.mini_batch <= mini_batch)
    }

    /// Cuts `sequences` (places in [`Self::sequences`]) into passes of at most `tokens` tokens.
    ///
    /// Within a pass, a group's prompt appears once, followed by its answers. A group that does not fit continues in
    /// the next pass, which is exact because only scalars couple its members. The largest pass comes first: a device's
    /// caching allocator then reuses its blocks for the smaller passes, instead of growing with each larger one.
    ///
    /// A unit is never split between passes, and each of its groups gets a row of its own.
    pub(super) fn passes(&self, sequences: &[usize], tokens: usize) -> Vec<Pass> {
        let mut passes: Vec<Pass> = Vec::new();
        let unit_of = |place: &usize| self.index[self.sequences[*place].position].unit;
        for unit in sequences.chunk_by(|a, b| unit_of(a).is_some() && unit_of(a) == unit_of(b)) {
            if unit_of(&unit[0]).is_none() {
                continue;
            }
            let unit = self.unit(unit);
            let pass = match passes.last_mut() {
                Some(pass) if pass.tokens + unit.tokens <= tokens => pass,
                _ => push_empty(&mut passes),
            };
            pass.units.push(unit.rows.len());
            pass.rows.extend(unit.rows);
            pass.tokens += unit.tokens;
        }
        let sequences = sequences.iter().filter(|place| unit_of(place).is_none());
        for &place in sequences {
            let sequence = &self.sequences[place];
            let group = self.index[sequence.position].group;
            let prompt = self.prompts[&group].len();
            let answer = sequence.tokens.len();
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

    /// Builds the rows of a unit, or of the part of it that has a gradient. Sequences without one are left out on
    /// every rank alike.
    fn unit(&self, sequences: &[usize]) -> Pass {
        let mut unit = Pass::default();
        let group_of = |place: &usize| self.index[self.sequences[*place].position].group;
        for answers in sequences.chunk_by(|a, b| group_of(a) == group_of(b)) {
            let group = group_of(&answers[0]);
            let tokens = answers.iter().map(|place| self.sequences[*place].tokens.len()).sum::<usize>();
            unit.tokens += self.prompts[&group].len() + tokens;
            unit.rows.push(Row { group, answers: answers.to_vec() });
        }
        unit
    }

    /// Assigns units to the sequences the way the coordinator does. Needs all prompts of the batch.
    ///
    /// # Panics
    /// When a prompt is missing.
    pub fn cut_into_units(&mut self) {
        let mut first = 0;
        for entries in self.index.chunk_by_mut(|a, b| a.mini_batch == b.mini_batch) {
            let lengths: Vec<(usize, Vec<usize>)> = (entries.chunk_by(|a, b| a.group == b.group))
                .map(|group| (self.prompts[&group[0].group].len(), group))
                .map(|(prompt, group)| (prompt, group.iter().map(|entry| entry.answer_tokens as usize).collect()))
                .collect();
            let units = pacs_shape::units(lengths.iter().map(|(prompt, answers)| (*prompt, &answers[..])));
            for (entry, unit) in entries.iter_mut().zip(units.into_iter().flatten()) {
                entry.unit = Some(first + unit);
            }
            first = entries.last().and_then(|entry| entry.unit).map_or(first, |last| last + 1);
        }
    }

    /// Checks that every sequence has a unit and that no unit is divided between ranks or mini-batches.
    ///
    /// # Errors
    /// When the bits of the weights would depend on the assignment of sequences to ranks.
    pub(super) fn check_units(&self) -> Result<(), BatchError> {
        let fail = |problem: String| Err(BatchError { step: self.step, problem });
        for (position, pair) in self.index.windows(2).enumerate() {
            let [this, next] = pair else { continue };
            let same = this.unit == next.unit;
            if next.unit < this.unit || same && (this.mini_batch, this.rank) != (next.mini_batch, next.rank) {
                return fail(format!("entries {position} and {} of its index divide a unit", position + 1));
            }
        }
        for (position, entry) in self.index.iter().enumerate() {
            if entry.unit.is_none() {
                return fail(format!("entry {position} of its index has no unit, and `resources.deterministic` is on"));
            }
        }
        Ok(())
    }
}

/// A text to train on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Text {
    /// All tokens of the text, context included.
    pub tokens: Vec<u32>,
    /// Whether each token is learnt, aligned with `tokens`. The first token is never learnt, since nothing predicts it.
    pub learnt: Vec<bool>,
}

impl Text {
    /// Appends tokens, all of them learnt or all context.
    pub fn extend(&mut self, tokens: &[u32], learnt: bool) {
        self.tokens.extend(tokens);
        self.learnt.resize(self.tokens.len(), learnt);
    }

    /// Returns the number of learnt tokens.
    #[must_use]
    pub fn targets(&self) -> usize {
        self.learnt.iter().skip(1).filter(|learnt| **learnt).count()
    }
}

fn push_empty(passes: &mut Vec<Pass>) -> &mut Pass {
    passes.push(Pass::default());
    passes.last_mut().expect("one was just pushed")
}

/// Sequences that go through the model in one forward.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pass {
    pub(super) rows: Vec<Row>,
    /// Number of rows of each unit, in order; empty without units.
    pub(super) units: Vec<usize>,
    pub(crate) tokens: usize,
}

/// A prompt followed by its answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(crate) group: u64,
    /// Answers in order, as places in [`TrainBatch::sequences`].
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
            sample: 0,
            mini_batch: 0,
            rank: 0,
            label: 0.0,
            reward: 0.0,
            answer_tokens: tokens as u32,
            truncated: false,
            unit: None,
        };
        let sequence = |(position, &(_, tokens)): (usize, &(u64, usize))| SequenceTokens {
            position,
            tokens: vec![1; tokens],
            rollout_logprobs: vec![-1.0; tokens],
            sampled_logprobs: Vec::new(),
            version: 0,
            routes: Vec::new(),
        };
        TrainBatch {
            step: 1,
            index: answers.iter().map(entry).collect(),
            prompts: answers.iter().map(|(group, _)| (*group, vec![7; 10])).collect(),
            prompt_routes: HashMap::new(),
            sequences: answers.iter().enumerate().map(sequence).collect(),
        }
    }

    #[test]
    fn a_prompt_is_computed_once_per_pass_and_groups_may_be_split() {
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
    fn a_unit_is_never_divided_and_has_rows_of_its_own() {
        let mut batch = batch(&[(1, 5), (1, 5), (1, 5), (2, 5), (3, 5)]);
        for (entry, unit) in batch.index.iter_mut().zip([0, 0, 1, 1, 2]) {
            entry.unit = Some(unit);
        }
        batch.check_units().expect("units are whole");
        let shape = |tokens| {
            let passes = batch.passes(&[0, 1, 2, 3, 4], tokens);
            passes.into_iter().map(|pass| (pass.tokens, pass.units, pass.rows.len())).collect::<Vec<_>>()
        };
        assert_eq!(shape(1000), [(65, vec![1, 2, 1], 4)], "the prompt of group 1 stands in two units");
        assert_eq!(shape(50), [(50, vec![1, 2], 3), (15, vec![1], 1)]);
        assert_eq!(shape(1), [(30, vec![2], 2), (20, vec![1], 1), (15, vec![1], 1)]);
        batch.index[3].rank = 1;
        let problem = batch.check_units().expect_err("a unit is on two ranks").to_string();
        assert_eq!(problem, "batch of step 1: entries 2 and 3 of its index divide a unit");
        batch.index.iter_mut().for_each(|entry| entry.unit = None);
        assert!(batch.check_units().is_err());
    }

    #[test]
    fn a_sequence_longer_than_the_budget_goes_alone() {
        let batch = batch(&[(1, 50), (2, 5)]);
        assert_eq!(batch.passes(&[0, 1], 20).len(), 2);
    }
}
