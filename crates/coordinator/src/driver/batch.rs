use std::collections::BTreeSet;

use pacs_protocol::v1;
use pacs_shape::Flops;
use pacs_types::{FinishReason, GroupId, SampleId};

use super::Store;
use super::share::{GroupLengths, share};

/// Among whom a batch is shared, and by what.
pub(crate) struct Sharing<'a> {
    /// How many ranks there are.
    pub(crate) ranks: u32,
    /// What a sequence costs.
    pub(crate) cost: Flops,
    /// Where the samples are.
    pub(crate) store: &'a Store,
    /// Tokens of a group's prompt.
    pub(crate) prompt_tokens: &'a dyn Fn(GroupId) -> usize,
}

/// The batch of a step: who computes what.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) step: u64,
    pub(crate) groups: Vec<GroupId>,
    /// Groups of the step that the learner does not get.
    pub(crate) left_out: Vec<GroupId>,
    index: Vec<v1::SequenceIndex>,
}

impl Batch {
    /// Shares the groups' sequences among ranks, so that each mini-batch costs every rank about the same.
    pub(crate) fn new(
        step: u64,
        groups: Vec<GroupId>,
        left_out: Vec<GroupId>,
        mini_batches: u32,
        sharing: &Sharing<'_>,
    ) -> Self {
        let mut index = Vec::new();
        for mini_batch in 0..mini_batches {
            let members: Vec<GroupId> = (0u64..)
                .zip(&groups)
                .filter(|(i, _)| i * u64::from(mini_batches) / groups.len() as u64 == u64::from(mini_batch))
                .map(|(_, group)| *group)
                .collect();
            index.extend(entries(&members, mini_batch, sharing));
        }
        Self { step, groups, left_out, index }
    }

    /// The task of one rank.
    pub(crate) fn task<'p>(&self, rank: u32, store: &Store, prompt: impl Fn(GroupId) -> &'p [u32]) -> v1::TrainTask {
        let mine: Vec<_> = (0u32..).zip(&self.index).filter(|(_, entry)| entry.rank == rank).collect();
        let groups: BTreeSet<GroupId> = mine.iter().map(|(_, entry)| GroupId(entry.group_id)).collect();
        let prompts = groups
            .into_iter()
            .map(|group| v1::GroupPrompt { group_id: group.0, tokens: prompt(group).to_vec() })
            .collect();
        let sequences = mine
            .into_iter()
            .filter_map(|(position, entry)| {
                let sample = store.sample(SampleId { group: GroupId(entry.group_id), index: entry.sample_index })?;
                Some(v1::SequenceData {
                    position,
                    tokens: sample.tokens.clone(),
                    rollout_logprobs: sample.logprobs.clone(),
                    sampled_logprobs: sample.sampled_logprobs.clone(),
                })
            })
            .collect();
        v1::TrainTask { step: self.step, index: self.index.clone(), prompts, sequences, learning_rate: None }
    }
}

/// The index entries of one mini-batch.
fn entries(groups: &[GroupId], mini_batch: u32, sharing: &Sharing<'_>) -> Vec<v1::SequenceIndex> {
    let mut entries = Vec::new();
    let mut lengths = Vec::with_capacity(groups.len());
    for group in groups {
        let first = entries.len();
        for (sample_index, sample, verdict) in sharing.store.group(*group) {
            entries.push(v1::SequenceIndex {
                group_id: group.0,
                sample_index,
                mini_batch,
                rank: 0,
                label: verdict.label,
                reward: verdict.reward,
                answer_tokens: u32::try_from(sample.tokens.len()).unwrap_or(u32::MAX),
                truncated: sample.finish == FinishReason::Length,
            });
        }
        let answers = entries[first..].iter().map(|entry| entry.answer_tokens as usize).collect();
        lengths.push(GroupLengths { prompt: (sharing.prompt_tokens)(*group), answers });
    }
    let ranks = share(&lengths, sharing.ranks as usize, &sharing.cost);
    for (entry, rank) in entries.iter_mut().zip(ranks.into_iter().flatten()) {
        entry.rank = u32::try_from(rank).unwrap_or(u32::MAX);
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_types::{Outcome, Sample, Verdict, WeightVersion};

    fn store(groups: u64, samples: u32) -> Store {
        let mut store = Store::default();
        for group in 0..groups {
            for index in 0..samples {
                let tokens = vec![index; 1 + (group * 5 + u64::from(index) * 3) as usize % 7];
                let id = SampleId { group: GroupId(group), index };
                let sample = Sample {
                    logprobs: vec![-0.5; tokens.len()],
                    tokens,
                    entropy_sum: 0.0,
                    text: String::new(),
                    finish: FinishReason::Stop,
                    version: WeightVersion(0),
                    sampled_logprobs: Vec::new(),
                    spans: Vec::new(),
                };
                store.put_sample(id, sample);
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
    fn every_sequence_has_one_rank_and_is_sent_to_it() {
        for (groups, ranks, mini_batches) in [(8u64, 2u32, 2u32), (6, 3, 1), (4, 3, 2), (1, 4, 1), (3, 1, 3)] {
            let store = store(groups, 4);
            let ids = (0..groups).map(GroupId).collect();
            let sharing = Sharing { ranks, cost: Flops::of_any_model(), store: &store, prompt_tokens: &|_| 3 };
            let batch = Batch::new(5, ids, Vec::new(), mini_batches, &sharing);
            assert_eq!(batch.index.len() as u64, 4 * groups);
            assert!(batch.index.is_sorted_by_key(|entry| (entry.mini_batch, entry.group_id, entry.sample_index)));
            let per_mini_batch = groups / u64::from(mini_batches);
            for entry in &batch.index {
                assert_eq!(u64::from(entry.mini_batch), entry.group_id / per_mini_batch);
            }
            let prompt = [1, 2, 3];
            let tasks: Vec<_> = (0..ranks).map(|rank| batch.task(rank, &store, |_| &prompt)).collect();
            let mut positions: Vec<u32> =
                tasks.iter().flat_map(|task| task.sequences.iter().map(|data| data.position)).collect();
            positions.sort_unstable();
            assert!(positions.into_iter().eq(0..4 * groups as u32), "every sequence goes to one rank");
            for task in &tasks {
                assert_eq!(task.index, batch.index, "every rank has the whole index");
                for data in &task.sequences {
                    let entry = &task.index[data.position as usize];
                    assert_eq!(data.tokens.len(), entry.answer_tokens as usize);
                    assert!(task.prompts.iter().any(|prompt| prompt.group_id == entry.group_id));
                }
            }
        }
    }
}
