use std::collections::VecDeque;
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::TrainOrder;

/// The sets of training problems and how they are mixed: everything that the draw order depends on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DrawPlan {
    /// Seed of the job.
    pub seed: u64,
    /// Whether each epoch of a set is shuffled anew; otherwise all are in source order.
    pub shuffle: bool,
    /// The sets, at least one; problems are numbered across all of them in this order.
    pub sets: Vec<SetShare>,
}

/// Size and weight of one set of problems.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetShare {
    /// Weight of the set, above 0; its share of the draws is relative to the weights of all sets.
    #[serde(with = "pacs_types::bits")]
    pub weight: f64,
    /// Number of problems, at least 1.
    pub problems: usize,
}

impl DrawPlan {
    /// Number of problems in all sets.
    #[must_use]
    pub fn problems(&self) -> usize {
        self.sets.iter().map(|set| set.problems).sum()
    }
}

/// Number of draws whose sets are computed together.
const BLOCK: u64 = 1024;
/// Number of cached blocks; groups in flight are close together in the order.
const REMEMBERED: usize = 8;

/// The endless order in which training problems are drawn, from one set or several.
///
/// The draw at `cursor` goes to the set with the largest deficit `weight x (cursor + 1) - draws so far`, with
/// weights that add up to 1. So every stretch of draws, such as a step, holds each set in proportion, and the set
/// of a draw is a function of the weights and the cursor alone. Within a set the problems come in its
/// [`TrainOrder`], epoch by epoch.
#[derive(Debug)]
pub struct DrawOrder {
    plan: DrawPlan,
    sets: Vec<Set>,
    walked: Mutex<Walked>,
}

#[derive(Debug)]
struct Set {
    /// Share of the draws, 0 to 1.
    share: f64,
    order: TrainOrder,
    /// Index of the set's first problem among those of all sets.
    first: usize,
}

#[derive(Debug)]
struct Walked {
    /// Number of draws from each set before each block, up to the last block that was asked for.
    before: Vec<Vec<u64>>,
    /// Cached blocks: the set of each draw, and the number of earlier draws from that set.
    blocks: VecDeque<(u64, Vec<(usize, u64)>)>,
}

impl DrawOrder {
    /// Creates the order of a plan.
    ///
    /// # Panics
    /// When a set of the plan has no problem, or more than 2^32 - 1.
    #[must_use]
    pub fn new(plan: DrawPlan) -> Self {
        let total: f64 = plan.sets.iter().map(|set| set.weight).sum();
        let mut first = 0;
        let sets: Vec<Set> = (0u8..)
            .zip(&plan.sets)
            .map(|(number, SetShare { weight, problems })| {
                let order = TrainOrder::of_set(plan.seed, number, *problems, plan.shuffle);
                let set = Set { share: weight / total, order, first };
                first += problems;
                set
            })
            .collect();
        let walked = Mutex::new(Walked { before: vec![vec![0; sets.len()]], blocks: VecDeque::new() });
        Self { plan, sets, walked }
    }

    /// The plan that this order follows.
    #[must_use]
    pub fn plan(&self) -> &DrawPlan {
        &self.plan
    }

    /// Index of the problem drawn at `cursor`. Indexes run through all sets in the order of the plan.
    ///
    /// # Panics
    /// Never: no holder of the lock panics.
    #[must_use]
    pub fn index_at(&self, cursor: u64) -> usize {
        // A single set needs no walk over earlier draws: its position is the cursor.
        let (set, draw) = match &self.sets[..] {
            [_] => (0, cursor),
            _ => self.place_of(cursor),
        };
        let set = &self.sets[set];
        set.first + set.order.index_at(draw)
    }

    /// The set of a draw, and the number of earlier draws from that set.
    fn place_of(&self, cursor: u64) -> (usize, u64) {
        let block = cursor / BLOCK;
        let place = (cursor % BLOCK) as usize;
        let mut walked = self.walked.lock().expect("no holder of this lock panics");
        if let Some((_, places)) = walked.blocks.iter().find(|(known, _)| *known == block) {
            return places[place];
        }
        // Only a resumed job walks over more than one block: a million draws take a few hundredths of a second.
        loop {
            let next = walked.before.len() as u64 - 1;
            let from = next.min(block);
            let mut counts = walked.before[from as usize].clone();
            let places: Vec<(usize, u64)> =
                (from * BLOCK..(from + 1) * BLOCK).map(|cursor| self.draw(cursor, &mut counts)).collect();
            if from == next {
                walked.before.push(counts);
            }
            if from == block {
                let found = places[place];
                if walked.blocks.len() == REMEMBERED {
                    walked.blocks.pop_front();
                }
                walked.blocks.push_back((block, places));
                return found;
            }
        }
    }

    fn draw(&self, cursor: u64, counts: &mut [u64]) -> (usize, u64) {
        let deficit = |set: usize| self.sets[set].share * (cursor + 1) as f64 - counts[set] as f64;
        // The largest deficit, and not a random set by weight: random draws would leave small sets out of many steps.
        // Ties go to the first set.
        let chosen = (1..self.sets.len()).fold(0, |best, set| if deficit(set) > deficit(best) { set } else { best });
        counts[chosen] += 1;
        (chosen, counts[chosen] - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETS: [(f64, usize); 3] = [(3.0, 50), (1.0, 7), (0.5, 400)];

    fn order(seed: u64, shuffle: bool, sets: &[(f64, usize)]) -> DrawOrder {
        let sets = sets.iter().map(|(weight, problems)| SetShare { weight: *weight, problems: *problems }).collect();
        DrawOrder::new(DrawPlan { seed, shuffle, sets })
    }

    fn set_of(index: usize) -> usize {
        if index < 50 { 0 } else { usize::from(index >= 57) + 1 }
    }

    fn drawn(order: &DrawOrder, cursors: std::ops::Range<u64>) -> Vec<usize> {
        cursors.map(|cursor| order.index_at(cursor)).collect()
    }

    #[test]
    fn every_stretch_of_draws_holds_each_set_in_proportion() {
        let all = drawn(&order(7, true, &SETS), 0..9000);
        for (stretch, at) in [(9usize, 0usize), (90, 1000), (900, 5000), (9000, 0)] {
            let mut counts = [0.0; 3];
            all[at..at + stretch].iter().for_each(|index| counts[set_of(*index)] += 1.0);
            for (count, (weight, _)) in counts.iter().zip(SETS) {
                let share = weight / 4.5 * stretch as f64;
                assert!((count - share).abs() <= 2.0, "{count} of {stretch} draws instead of {share}");
            }
        }
    }

    #[test]
    fn each_set_has_epochs_of_its_own() {
        let all = drawn(&order(7, true, &SETS), 0..4500);
        for (set, (_, len)) in (0..3).zip(SETS) {
            let of_set: Vec<usize> = all.iter().copied().filter(|index| set_of(*index) == set).collect();
            for epoch in of_set.chunks_exact(len) {
                let mut sorted = epoch.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                assert_eq!(sorted.len(), len, "an epoch of set {set} has every problem once");
            }
        }
    }

    #[test]
    fn a_resumed_mixture_continues_where_it_was() {
        let all = drawn(&order(7, true, &SETS), 0..5000);
        // The ends of blocks and of epochs: the second set's seven problems repeat every 31 or 32 draws.
        for start in [0, 1, 31, 32, 1023, 1024, 1025, 2048, 4999] {
            let resumed = order(7, true, &SETS);
            assert_eq!(drawn(&resumed, start..5000), all[start as usize..], "from {start}");
        }
        let jumping = order(7, true, &SETS);
        for cursor in [4999, 3, 2047, 2048, 0, 4500] {
            assert_eq!(jumping.index_at(cursor), all[cursor as usize]);
        }
    }

    #[test]
    fn one_set_alone_is_drawn_in_its_own_order() {
        let (mixture, one) = (order(7, true, &[(5.0, 30)]), TrainOrder::new(7, 30, true));
        assert!((0..100).all(|cursor| mixture.index_at(cursor) == one.index_at(cursor)));
    }

    #[test]
    fn the_choice_of_sets_never_changes_between_versions() {
        // Resumed jobs depend on these values.
        let mixture = order(1, false, &[(2.0, 4), (1.0, 4)]);
        assert_eq!(drawn(&mixture, 0..9), [0, 4, 1, 2, 5, 3, 0, 6, 1]);
    }
}
