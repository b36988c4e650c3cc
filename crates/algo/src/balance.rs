use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Assigns items to ranks so that the ranks' total costs are close: the costliest item first, each to the least loaded
/// rank (ties to the lowest rank). Returns the rank of each item; the result is deterministic.
///
/// No rank gets more than the mean plus one item, and none more than 4/3 of the best possible maximum (Graham 1969).
///
/// # Panics
///
/// When there are items but no ranks.
#[must_use]
pub fn balance(costs: &[u64], ranks: usize) -> Vec<usize> {
    let mut dearest_first: Vec<usize> = (0..costs.len()).collect();
    dearest_first.sort_by_key(|&item| Reverse(costs[item]));
    // Loads are 128 bits wide, because sums of costs of 64 bits may overflow.
    let mut loads: BinaryHeap<_> = (0..ranks).map(|rank| Reverse((0u128, rank))).collect();
    let mut assignment = vec![0; costs.len()];
    for item in dearest_first {
        let Reverse((load, rank)) = loads.pop().expect("items are balanced over at least one rank");
        assignment[item] = rank;
        loads.push(Reverse((load + u128::from(costs[item]), rank)));
    }
    assignment
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn expensive_items_are_spread_before_cheap_ones() {
        assert_eq!(balance(&[1, 2, 3, 4], 2), [0, 1, 1, 0]);
        assert_eq!(balance(&[5, 5, 5], 3), [0, 1, 2], "ties go to the lowest rank");
        assert_eq!(balance(&[u64::MAX, u64::MAX], 1), [0, 0], "loads do not overflow");
        assert_eq!(balance(&[], 4), [0; 0]);
    }

    fn loads(costs: &[u64], ranks: usize, assignment: &[usize]) -> Vec<u64> {
        let mut loads = vec![0; ranks];
        for (cost, &rank) in costs.iter().zip(assignment) {
            loads[rank] += cost;
        }
        loads
    }

    /// Finds the best possible maximum by trying every assignment.
    fn best_maximum(costs: &[u64], ranks: usize) -> u64 {
        let assignments = ranks.pow(u32::try_from(costs.len()).unwrap());
        (0..assignments)
            .map(|mut code| {
                let assignment: Vec<usize> = costs
                    .iter()
                    .map(|_| {
                        let rank = code % ranks;
                        code /= ranks;
                        rank
                    })
                    .collect();
                loads(costs, ranks, &assignment).into_iter().max().unwrap()
            })
            .min()
            .unwrap()
    }

    proptest! {
        #[test]
        fn no_rank_exceeds_the_mean_by_more_than_one_item(
            costs in prop::collection::vec(0u64..10_000, 1..200),
            ranks in 1usize..17,
        ) {
            let loads = loads(&costs, ranks, &balance(&costs, ranks));
            let mean = costs.iter().sum::<u64>() / ranks as u64;
            prop_assert!(loads.iter().all(|&load| load <= mean + costs.iter().max().unwrap()), "{loads:?}");
        }

        #[test]
        fn the_maximum_is_within_a_third_of_the_best(
            costs in prop::collection::vec(1u64..50, 1..8),
            ranks in 1usize..4,
        ) {
            let maximum = loads(&costs, ranks, &balance(&costs, ranks)).into_iter().max().unwrap();
            prop_assert!(3 * maximum <= 4 * best_maximum(&costs, ranks));
        }
    }
}
