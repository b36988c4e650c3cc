//! Which groups form the next batch: a pure decision on integers.
//!
//! A group is *born* at the version of its oldest token. Trained in the step after version `V`, it has a lag of
//! `V - born`, and no group may have a lag above `max_lag`. So a group born at `u` has to be consumed by step
//! `u + max_lag + 1` at the latest, and every step consumes `groups` of them. The earliest deadlines go first, and a
//! younger group is only taken when the remaining older ones can still all be consumed in time:
//!
//! ```text
//! for every u in V - max_lag ..= V:   left(born <= u) <= (u + max_lag - V) * groups
//! ```
//!
//! With at most `(max_lag + 1) * groups` groups in flight, the one in training included, the condition holds for
//! `u = V` whenever a group is drawn, and consuming a batch that satisfies it keeps it for the next version. Hence the
//! groups that are due never exceed one batch: waiting for them always ends, and the bound needs no eviction to hold.

use pacs_types::GroupId;

use crate::Staleness;

/// One group in flight, as a candidate for the next batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Version of its oldest token.
    pub(crate) born: u64,
    pub(crate) id: GroupId,
    /// Whether all its samples have verdicts.
    pub(crate) complete: bool,
    /// Whether it may be restarted with newer weights.
    pub(crate) evictable: bool,
}

/// Conditions on the next batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// The newest version, which the batch turns into the next one.
    pub(crate) version: u64,
    pub(crate) max_lag: u64,
    /// Groups of a batch.
    pub(crate) groups: usize,
    pub(crate) staleness: Staleness,
}

/// Outcome of the decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Train on these groups, in order of id.
    Train(Vec<GroupId>),
    /// Too few groups are complete for a batch.
    TooFew,
    /// An incomplete group has to be in this batch or an early one, so the batch waits for it.
    WaitFor(GroupId),
    /// These groups hold the batch up and have to be restarted with the newest weights.
    Evict(Vec<GroupId>),
}

/// Decides on the next batch; the order of the candidates does not matter.
pub(crate) fn decide(terms: Terms, mut candidates: Vec<Candidate>) -> Decision {
    candidates.sort_unstable_by_key(|candidate| (candidate.born, candidate.id));
    let complete = candidates.iter().filter(|candidate| candidate.complete);
    let mut batch: Vec<Candidate> = complete.take(terms.groups).copied().collect();
    if batch.len() < terms.groups {
        return Decision::TooFew;
    }
    if terms.staleness != Staleness::Accept {
        for room in 0..=terms.max_lag {
            let born_by = (terms.version + room).checked_sub(terms.max_lag);
            let Some(held_up) = born_by.and_then(|born_by| held_up(terms, &candidates, &batch, born_by, room)) else {
                continue;
            };
            return held_up;
        }
    }
    batch.sort_unstable_by_key(|candidate| candidate.id);
    Decision::Train(batch.into_iter().map(|candidate| candidate.id).collect())
}

/// Handles the groups born by a version when more of them would remain than the steps until their deadline can consume.
fn held_up(terms: Terms, candidates: &[Candidate], batch: &[Candidate], born_by: u64, room: u64) -> Option<Decision> {
    let by = |groups: &[Candidate]| groups.partition_point(|candidate| candidate.born <= born_by);
    let left = by(candidates) - by(batch);
    let allowed = usize::try_from(room).unwrap_or(usize::MAX).saturating_mul(terms.groups);
    let excess = left.saturating_sub(allowed);
    let open: Vec<&Candidate> = candidates[..by(candidates)].iter().filter(|candidate| !candidate.complete).collect();
    // There is nothing to wait for: the remaining groups are complete and are taken first next time.
    let oldest = open.first().filter(|_| excess > 0)?;
    if terms.staleness == Staleness::Evict {
        let evicted: Vec<GroupId> = open.iter().filter(|group| group.evictable).take(excess).map(|g| g.id).collect();
        if !evicted.is_empty() {
            return Some(Decision::Evict(evicted));
        }
    }
    Some(Decision::WaitFor(oldest.id))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngSeed};

    use super::*;

    fn group(id: u64, born: u64, complete: bool) -> Candidate {
        Candidate { born, id: GroupId(id), complete, evictable: true }
    }

    fn terms(version: u64, max_lag: u64, groups: usize) -> Terms {
        Terms { version, max_lag, groups, staleness: Staleness::Wait }
    }

    fn train(ids: &[u64]) -> Decision {
        Decision::Train(ids.iter().copied().map(GroupId).collect())
    }

    #[test]
    fn without_lag_a_batch_is_all_groups_of_its_version() {
        let groups = |last| vec![group(4, 2, true), group(3, 2, last)];
        assert_eq!(decide(terms(2, 0, 2), groups(false)), Decision::TooFew);
        assert_eq!(decide(terms(2, 0, 2), groups(true)), train(&[3, 4]));
    }

    #[test]
    fn the_oldest_go_first_and_may_be_overtaken_while_there_is_room() {
        let all = vec![group(0, 0, false), group(1, 0, true), group(2, 1, true), group(3, 1, true)];
        // Born at 0 and due in the step after version 2: one step of two groups remains after this one.
        assert_eq!(decide(terms(1, 2, 2), all.clone()), train(&[1, 2]));
        // Due in this step.
        assert_eq!(decide(terms(2, 2, 2), all.clone()), Decision::WaitFor(GroupId(0)));
        assert_eq!(decide(Terms { staleness: Staleness::Evict, ..terms(2, 2, 2) }, all.clone()), {
            Decision::Evict(vec![GroupId(0)])
        });
        assert_eq!(decide(Terms { staleness: Staleness::Accept, ..terms(2, 2, 2) }, all), train(&[1, 2]));
    }

    #[test]
    fn two_old_groups_of_a_batch_of_one_are_not_left_to_the_last_step() {
        // Both are due after version 2, and a step takes one: overtaking them at version 1 would leave one too old.
        let all = vec![group(1, 0, false), group(2, 0, true), group(3, 1, true)];
        assert_eq!(decide(terms(1, 2, 1), all), train(&[2]));
        let all = vec![group(1, 0, false), group(2, 0, false), group(3, 1, true)];
        assert_eq!(decide(terms(1, 2, 1), all), Decision::WaitFor(GroupId(1)));
    }

    proptest! {
        #![proptest_config(Config { rng_seed: RngSeed::Fixed(1), cases: 300, ..Config::default() })]

        /// Groups complete in any order. No trained group exceeds the bound, and the loop never starves.
        #[test]
        fn the_bound_holds_and_the_loop_continues(
            max_lag in 0u64..4, groups in 1usize..4, evict in any::<bool>(), picks in prop::collection::vec(any::<u32>(), 200),
        ) {
            let staleness = if evict { Staleness::Evict } else { Staleness::Wait };
            let (mut version, mut next, mut trained) = (0, 0, 0);
            let mut pool: Vec<Candidate> = Vec::new();
            let slots = (max_lag as usize + 1) * groups;
            for pick in picks {
                while pool.len() < slots {
                    pool.push(group(next, version, false));
                    next += 1;
                }
                let open: Vec<usize> = (0..pool.len()).filter(|i| !pool[*i].complete).collect();
                if let Some(index) = open.get(pick as usize % open.len().max(1)) {
                    pool[*index].complete = true;
                }
                match decide(Terms { staleness, ..terms(version, max_lag, groups) }, pool.clone()) {
                    Decision::Train(batch) => {
                        prop_assert_eq!(batch.len(), groups);
                        for id in batch {
                            let index = pool.iter().position(|c| c.id == id).expect("a batch is made of candidates");
                            let taken = pool.swap_remove(index);
                            prop_assert!(taken.complete && version - taken.born <= max_lag, "{taken:?} at {version}");
                        }
                        version += 1;
                        trained += 1;
                    }
                    Decision::TooFew => prop_assert!(pool.iter().filter(|c| c.complete).count() < groups),
                    Decision::WaitFor(id) => {
                        let waited = pool.iter().find(|c| c.id == id).expect("a candidate is waited for");
                        prop_assert!(!waited.complete);
                    }
                    Decision::Evict(ids) => {
                        prop_assert!(evict);
                        for candidate in pool.iter_mut().filter(|c| ids.contains(&c.id)) {
                            prop_assert!(!candidate.complete);
                            candidate.born = version;
                        }
                    }
                }
            }
            // Every pick completes a group, and at most the pool remains.
            prop_assert!(trained * groups + slots >= 200 - slots, "{trained} steps of {groups}");
        }
    }
}
