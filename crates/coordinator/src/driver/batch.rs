use std::sync::Arc;

use pacs_protocol::v1;
use pacs_shape::Flops;
use pacs_types::{FinishReason, GroupId};

use super::share::{GroupLengths, share, share_units};
use super::{KeptSample, Store};

/// Parameters of the division of a batch among ranks.
pub(crate) struct Sharing<'a> {
    /// Number of ranks.
    pub(crate) ranks: u32,
    /// Cost model of a sequence.
    pub(crate) cost: Flops,
    /// The samples of the groups.
    pub(crate) store: &'a Store,
    /// Number of tokens of a group's prompt.
    pub(crate) prompt_tokens: &'a dyn Fn(GroupId) -> usize,
    /// Whether to divide by units, which do not depend on the number of ranks, instead of by answers.
    pub(crate) by_units: bool,
}

/// The batch of a step, divided among ranks.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) step: u64,
    pub(crate) groups: Vec<GroupId>,
    /// Groups of the step that the learner does not receive.
    pub(crate) left_out: Vec<GroupId>,
    content: Arc<BatchContent>,
}

/// The part of a batch that is sent to ranks; shared, so that they are served without the driver's lock.
#[derive(Debug, Default)]
pub(crate) struct BatchContent {
    /// All sequences in mini-batch order; those of a group are adjacent.
    pub(crate) index: Vec<v1::SequenceIndex>,
    /// The sample of each index entry.
    pub(crate) samples: Vec<KeptSample>,
}

impl Batch {
    /// Divides the sequences among ranks, so that each mini-batch costs every rank about the same.
    pub(crate) fn new(
        step: u64,
        groups: Vec<GroupId>,
        left_out: Vec<GroupId>,
        mini_batches: u32,
        sharing: &Sharing<'_>,
    ) -> Self {
        let mut content = BatchContent::default();
        for mini_batch in 0..mini_batches {
            let members: Vec<GroupId> = (0u64..)
                .zip(&groups)
                .filter(|(i, _)| i * u64::from(mini_batches) / groups.len() as u64 == u64::from(mini_batch))
                .map(|(_, group)| *group)
                .collect();
            content.add(&members, mini_batch, sharing);
        }
        Self { step, groups, left_out, content: Arc::new(content) }
    }

    pub(crate) fn content(&self) -> Arc<BatchContent> {
        Arc::clone(&self.content)
    }

    /// The task message of one rank, with the sizes of what it will receive.
    pub(crate) fn task(&self, rank: u32) -> v1::TrainTask {
        let mut task =
            v1::TrainTask { step: self.step, sequences: narrow(self.content.index.len()), ..Default::default() };
        let mut newest = None;
        for entry in self.content.index.iter().filter(|entry| entry.rank == rank) {
            task.rank_sequences += 1;
            task.rank_tokens += u64::from(entry.answer_tokens);
            task.rank_groups += u32::from(newest.replace(entry.group_id) != Some(entry.group_id));
        }
        task
    }
}

impl BatchContent {
    /// Appends the sequences of one mini-batch.
    fn add(&mut self, groups: &[GroupId], mini_batch: u32, sharing: &Sharing<'_>) {
        let begin = self.index.len();
        let mut lengths = Vec::with_capacity(groups.len());
        for group in groups {
            let first = self.index.len();
            for (sample_index, sample, verdict) in sharing.store.group(*group) {
                self.index.push(v1::SequenceIndex {
                    group_id: group.0,
                    sample_index,
                    mini_batch,
                    rank: 0,
                    label: verdict.label,
                    reward: verdict.reward,
                    answer_tokens: sample.tokens,
                    truncated: sample.finish == FinishReason::Length,
                    unit: None,
                });
                self.samples.push(sample.clone());
            }
            let answers = self.index[first..].iter().map(|entry| entry.answer_tokens as usize).collect();
            lengths.push(GroupLengths { prompt: (sharing.prompt_tokens)(*group), answers });
        }
        if sharing.by_units {
            let first = self.index[..begin].last().and_then(|entry| entry.unit).map_or(0, |last| last + 1);
            let shared = share_units(&lengths, sharing.ranks as usize, &sharing.cost);
            for (entry, (unit, rank)) in self.index[begin..].iter_mut().zip(shared) {
                (entry.unit, entry.rank) = (Some(first + narrow(unit)), narrow(rank));
            }
            return;
        }
        let ranks = share(&lengths, sharing.ranks as usize, &sharing.cost);
        for (entry, rank) in self.index[begin..].iter_mut().zip(ranks.into_iter().flatten()) {
            entry.rank = narrow(rank);
        }
    }
}

fn narrow(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::driver::store::counted;
    use pacs_types::{Outcome, SampleId, Verdict};

    fn store(groups: u64, samples: u32) -> Store {
        let mut store = Store::default();
        for group in 0..groups {
            for index in 0..samples {
                let tokens = 1 + (group * 5 + u64::from(index) * 3) as u32 % 7;
                let id = SampleId { group: GroupId(group), index };
                store.put_sample(id, counted(tokens, FinishReason::Stop));
                let verdict = Verdict {
                    outcome: Outcome::Correct,
                    label: 1.0,
                    reward: 2.0,
                    extracted: None,
                    rule: String::new(),
                };
                store.put_verdict(id, verdict);
            }
        }
        store
    }

    #[test]
    fn every_sequence_has_one_rank_which_is_told_how_many_it_has() {
        for (groups, ranks, mini_batches) in [(8u64, 2u32, 2u32), (6, 3, 1), (4, 3, 2), (1, 4, 1), (3, 1, 3)] {
            let store = store(groups, 4);
            let ids = (0..groups).map(GroupId).collect();
            let cost = Flops::of_any_model();
            let sharing = Sharing { ranks, cost, store: &store, prompt_tokens: &|_| 3, by_units: false };
            let batch = Batch::new(5, ids, Vec::new(), mini_batches, &sharing);
            let index = &batch.content.index;
            assert_eq!((index.len() as u64, batch.content.samples.len()), (4 * groups, index.len()));
            assert!(index.is_sorted_by_key(|entry| (entry.mini_batch, entry.group_id, entry.sample_index)));
            let per_mini_batch = groups / u64::from(mini_batches);
            for (entry, sample) in index.iter().zip(&batch.content.samples) {
                assert_eq!(u64::from(entry.mini_batch), entry.group_id / per_mini_batch);
                assert_eq!(entry.answer_tokens, sample.tokens);
            }
            let tasks: Vec<_> = (0..ranks).map(|rank| batch.task(rank)).collect();
            let total = |of: fn(&v1::TrainTask) -> u64| tasks.iter().map(of).sum::<u64>();
            assert_eq!(total(|task| u64::from(task.rank_sequences)), 4 * groups);
            let tokens: u64 = index.iter().map(|entry| u64::from(entry.answer_tokens)).sum();
            assert_eq!(total(|task| task.rank_tokens), tokens);
            for (task, rank) in tasks.iter().zip(0..) {
                assert_eq!((task.step, u64::from(task.sequences)), (5, 4 * groups), "every rank has the whole index");
                let of_rank = index.iter().filter(|entry| entry.rank == rank);
                let groups: std::collections::BTreeSet<u64> = of_rank.map(|entry| entry.group_id).collect();
                assert_eq!(task.rank_groups as usize, groups.len());
            }
        }
    }

    #[test]
    fn units_are_those_of_the_batch_whatever_the_number_of_ranks() {
        let store = store(40, 4);
        let of_ranks = |ranks| {
            let cost = Flops::of_any_model();
            let sharing = Sharing { ranks, cost, store: &store, prompt_tokens: &|_| 150, by_units: true };
            let batch = Batch::new(5, (0..40).map(GroupId).collect(), Vec::new(), 2, &sharing);
            batch.content.index.clone()
        };
        let alone = of_ranks(1);
        let units: std::collections::BTreeSet<_> = alone.iter().map(|entry| entry.unit).collect();
        assert!(units.len() > 4 && alone.is_sorted_by_key(|entry| entry.unit), "{units:?}");
        for ranks in 2..5 {
            let index = of_ranks(ranks);
            assert!(index.iter().zip(&alone).all(|(entry, alone)| entry.unit == alone.unit));
            for pair in index.windows(2).filter(|pair| pair[0].unit == pair[1].unit) {
                assert_eq!((pair[0].rank, pair[0].mini_batch), (pair[1].rank, pair[1].mini_batch));
            }
            assert!((0..ranks).all(|rank| index.iter().any(|entry| entry.rank == rank)));
        }
    }
}
