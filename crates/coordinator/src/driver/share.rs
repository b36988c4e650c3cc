//! Assigns the answers of a mini-batch to ranks.
//!
//! A step takes as long as its slowest rank, so answers are balanced by cost: a part that grows with the tokens, and
//! one that grows with the pairs of tokens that see each other, which dominates in long contexts. The assignment does
//! not change the result.

use pacs_algo::balance;
use pacs_shape::{Flops, PassWork};

/// Load of the slowest rank, relative to that without splitting, below which groups are split: a prompt on two ranks is
/// computed and sent twice.
const WORTH_SPLITTING: f64 = 0.95;

/// Token counts of one group of a mini-batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupLengths {
    pub(crate) prompt: usize,
    /// Tokens of each answer.
    pub(crate) answers: Vec<usize>,
}

/// Returns the rank of each answer of each group, as a deterministic function of its arguments.
///
/// Whole groups are assigned in order of decreasing cost, each to the rank with the least load. If splitting groups
/// clearly reduces the largest load, or there are fewer groups than ranks, single answers are assigned in the same way,
/// and an answer's cost includes its prompt where the rank does not have that yet.
pub(crate) fn share(groups: &[GroupLengths], ranks: usize, cost: &Flops) -> Vec<Vec<usize>> {
    let single = one_by_one(groups, ranks, cost);
    if groups.len() < ranks {
        return single;
    }
    let together = whole_groups(groups, ranks, cost);
    let slowest = |assigned: &[Vec<usize>]| loads(groups, assigned, ranks, cost).into_iter().fold(0.0, f64::max);
    if slowest(&single) < WORTH_SPLITTING * slowest(&together) { single } else { together }
}

/// Returns the unit and the rank of each answer, group by group. Units depend on the lengths alone
/// ([`pacs_shape::units`]); they are assigned in order of decreasing cost.
pub(crate) fn share_units(groups: &[GroupLengths], ranks: usize, cost: &Flops) -> Vec<(usize, usize)> {
    let units = pacs_shape::units(groups.iter().map(|group| (group.prompt, &group.answers[..])));
    let mut costs = vec![0.0; units.iter().flatten().last().map_or(0, |last| last + 1)];
    for (group, units) in groups.iter().zip(&units) {
        for of_unit in units.chunk_by(|a, b| a == b).scan(0, |start, same| {
            let answers = &group.answers[*start..*start + same.len()];
            *start += same.len();
            Some((same[0], answers))
        }) {
            costs[of_unit.0] += cost.of(PassWork::row(group.prompt, of_unit.1));
        }
    }
    let costs: Vec<u64> = costs.into_iter().map(|cost| cost as u64).collect();
    let assigned = balance(&costs, ranks);
    units.into_iter().flatten().map(|unit| (unit, assigned[unit])).collect()
}

fn whole_groups(groups: &[GroupLengths], ranks: usize, cost: &Flops) -> Vec<Vec<usize>> {
    let cost_of = |group: &GroupLengths| cost.of(PassWork::row(group.prompt, &group.answers)) as u64;
    let costs: Vec<u64> = groups.iter().map(cost_of).collect();
    let assigned = balance(&costs, ranks);
    groups.iter().zip(assigned).map(|(group, rank)| vec![rank; group.answers.len()]).collect()
}

fn one_by_one(groups: &[GroupLengths], ranks: usize, cost: &Flops) -> Vec<Vec<usize>> {
    // Answer, its group, and its cost without the prompt.
    let mut dearest_first: Vec<(usize, usize, f64)> = Vec::new();
    let prompts: Vec<f64> = groups.iter().map(|group| cost.of(PassWork::row(group.prompt, &[]))).collect();
    for (place, group) in groups.iter().enumerate() {
        let own = |answer: &usize| cost.of(PassWork::row(group.prompt, &[*answer])) - prompts[place];
        dearest_first.extend(group.answers.iter().enumerate().map(|(index, answer)| (place, index, own(answer))));
    }
    dearest_first.sort_by(|a, b| b.2.total_cmp(&a.2));
    let mut assigned: Vec<Vec<usize>> = groups.iter().map(|group| vec![0; group.answers.len()]).collect();
    let mut has_prompt = vec![false; groups.len() * ranks];
    let mut loads = vec![0.0; ranks];
    for (place, index, own) in dearest_first {
        let with = |rank: usize| {
            let prompt = if has_prompt[place * ranks + rank] { 0.0 } else { prompts[place] };
            loads[rank] + prompt + own
        };
        let rank = (0..ranks).min_by(|a, b| with(*a).total_cmp(&with(*b))).expect("there is a rank");
        loads[rank] = with(rank);
        has_prompt[place * ranks + rank] = true;
        assigned[place][index] = rank;
    }
    assigned
}

/// Load of each rank, with each prompt counted once per rank.
fn loads(groups: &[GroupLengths], assigned: &[Vec<usize>], ranks: usize, cost: &Flops) -> Vec<f64> {
    let mut loads = vec![0.0; ranks];
    for (group, assigned) in groups.iter().zip(assigned) {
        let mut of_rank: Vec<Vec<usize>> = vec![Vec::new(); ranks];
        for (answer, rank) in group.answers.iter().zip(assigned) {
            of_rank[*rank].push(*answer);
        }
        for (load, answers) in loads.iter_mut().zip(of_rank).filter(|(_, answers)| !answers.is_empty()) {
            *load += cost.of(PassWork::row(group.prompt, &answers));
        }
    }
    loads
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pacs_shape::ModelConfig;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    use super::*;

    /// A model of 135 million parameters, in which a token that sees 4,000 others costs twice
    /// as much as one that sees none.
    fn small_model() -> Flops {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama3");
        let golden = ModelConfig::read(&folder).expect("golden model");
        let config = ModelConfig {
            vocab_size: 49_152,
            hidden: 576,
            layers: 30,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            ..golden
        };
        Flops::new(&config, config.vocab_size)
    }

    fn slowest(groups: &[GroupLengths], assigned: &[Vec<usize>], ranks: usize) -> f64 {
        loads(groups, assigned, ranks, &small_model()).into_iter().fold(0.0, f64::max)
    }

    /// Lower bound of any assignment: an equal share of everything, each prompt computed once, or the costliest answer.
    fn least(groups: &[GroupLengths], ranks: usize) -> f64 {
        let cost = small_model();
        let all: f64 = groups.iter().map(|group| cost.of(PassWork::row(group.prompt, &group.answers))).sum();
        let single = |group: &GroupLengths| {
            group.answers.iter().map(|answer| cost.of(PassWork::row(group.prompt, &[*answer]))).fold(0.0, f64::max)
        };
        groups.iter().map(single).fold(all / ranks as f64, f64::max)
    }

    fn group(prompt: usize, answers: &[usize]) -> GroupLengths {
        GroupLengths { prompt, answers: answers.to_vec() }
    }

    #[test]
    fn long_contexts_are_spread_by_what_they_cost_and_not_by_their_tokens() {
        // One answer of 32 thousand tokens, and eight groups of eight answers with two
        // thousand each: 160 thousand tokens.
        let mut groups = vec![group(256, &[32_768])];
        groups.extend((0..8).map(|_| group(256, &[2048; 8])));
        let ideal = least(&groups, 2);
        let by_tokens = share(&groups, 2, &Flops::of_any_model());
        let by_cost = share(&groups, 2, &small_model());
        let tokens = loads(&groups, &by_tokens, 2, &Flops::of_any_model());
        assert!((tokens[0] / tokens[1] - 1.0).abs() < 0.02, "the tokens are balanced: {tokens:?}");
        assert!(slowest(&groups, &by_tokens, 2) > 4.0 / 3.0 * ideal, "but not the work");
        assert!(slowest(&groups, &by_cost, 2) < 4.0 / 3.0 * ideal, "Graham's bound");
        assert!(slowest(&groups, &by_cost, 2) < 1.03 * ideal, "and here much less");
    }

    #[test]
    fn a_group_is_split_where_that_is_worth_its_prompt() {
        let cost = small_model();
        // One group of four answers is much longer than the others.
        let groups = [group(64, &[8000, 8000, 8000, 8000]), group(64, &[100; 4]), group(64, &[100; 4])];
        let ranks: std::collections::BTreeSet<usize> = share(&groups, 2, &cost)[0].iter().copied().collect();
        assert_eq!(ranks.len(), 2);
        assert!(
            slowest(&groups, &share(&groups, 2, &cost), 2)
                < 0.6 * slowest(&groups, &whole_groups(&groups, 2, &cost), 2)
        );
        // Groups of equal cost stay together, and so do groups that consist mostly of their prompt.
        let alike: Vec<GroupLengths> = (0..6).map(|_| group(64, &[100, 200, 300])).collect();
        let heavy = [group(4000, &[10, 12, 14]), group(4000, &[5, 5, 5]), group(4000, &[8, 9, 7])];
        for (groups, ranks) in [(&alike[..], 3), (&heavy[..], 2)] {
            let together = |ranks: &Vec<usize>| ranks.iter().all(|rank| *rank == ranks[0]);
            assert!(share(groups, ranks, &cost).iter().all(together), "{groups:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

        #[test]
        fn every_answer_has_one_rank_and_no_rank_has_more_than_its_share_and_one_answer(
            lengths in prop::collection::vec((1usize..4000, prop::collection::vec(1usize..30_000, 0..6)), 0..12),
            ranks in 1usize..9,
        ) {
            let groups: Vec<GroupLengths> =
                lengths.iter().map(|(prompt, answers)| group(*prompt, answers)).collect();
            let cost = small_model();
            let assigned = share(&groups, ranks, &cost);
            prop_assert_eq!(&assigned, &share(&groups, ranks, &cost), "the same every time");
            prop_assert_eq!(assigned.len(), groups.len());
            for (group, assigned) in groups.iter().zip(&assigned) {
                prop_assert_eq!(group.answers.len(), assigned.len());
                prop_assert!(assigned.iter().all(|rank| *rank < ranks));
            }
            // Before the last answer was assigned to the slowest rank, every rank had at
            // least as much load as that one.
            let alone = |group: &GroupLengths| -> Vec<f64> {
                group.answers.iter().map(|answer| cost.of(PassWork::row(group.prompt, &[*answer]))).collect()
            };
            let alone: Vec<f64> = groups.iter().flat_map(alone).collect();
            let bound = alone.iter().sum::<f64>() / ranks as f64 + alone.iter().copied().fold(0.0, f64::max);
            prop_assert!(slowest(&groups, &assigned, ranks) <= bound / WORTH_SPLITTING * (1.0 + 1e-9));
        }
    }
}
