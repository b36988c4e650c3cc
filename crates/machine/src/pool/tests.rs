use pacs_types::{Outcome, Role};

use super::*;

const NOW: Duration = Duration::from_secs(100);
const ROLLOUT: WorkerId = WorkerId(1);
const GRADER: WorkerId = WorkerId(2);

const VERSION: WeightVersion = WeightVersion(0);

fn pool(groups: u64, samples: u32) -> Pool {
    let mut pool = Pool::default();
    (0..groups).for_each(|group| pool.add(GroupId(group), samples, VERSION, NOW));
    pool
}

/// A worker dies at `second`. Returns what it held, and the groups and samples that are accused since.
fn kill(pool: &mut Pool, worker: WorkerId, second: u64, most: u32) -> (Revoked, Vec<GroupId>, Vec<SampleId>) {
    let at = NOW + Duration::from_secs(second);
    let revoked = pool.revoke_worker(worker);
    let alone = revoked.leases() == 1;
    pool.hold_against(&revoked, Death { at, why: "it died", alone, most });
    let (groups, samples) = pool.condemnable(at + Duration::from_secs(1));
    (revoked, groups, samples)
}

fn judged(outcome: Outcome, label: f64) -> Judgement {
    Judgement { outcome, label, reward: Some(1.0) }
}

fn sample(group: u64, index: u32) -> SampleId {
    SampleId { group: GroupId(group), index }
}

/// Leases the next group; returns its id and the index and attempt of each wanted sample.
fn lend(pool: &mut Pool, lease: u64) -> Option<(u64, Vec<(u32, u32)>)> {
    let (group, wanted) = pool.lend_group(0, LeaseId(lease), ROLLOUT, VERSION, NOW)?;
    Some((group.0, wanted.into_iter().map(|sample| (sample.index, sample.attempt)).collect()))
}

fn lend_one_sample(pool: &mut Pool, lease: u64, others: bool, now: Duration) -> Option<SampleId> {
    let lent = pool.lend_samples(&mut || LeaseId(lease), GRADER, 1, (others, pool.holds_sample(GRADER)), now);
    lent.first().map(|(_, id)| *id)
}

#[test]
fn a_lapsed_group_waits_first_in_line_with_what_is_missing() {
    let mut pool = pool(2, 3);
    assert_eq!(lend(&mut pool, 1), Some((0, vec![(0, 0), (1, 0), (2, 0)])));
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), (VERSION, VERSION), NOW), Taken::Fresh);
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), (VERSION, VERSION), NOW), Taken::Repeat);
    assert_eq!(pool.revoke_worker(ROLLOUT).leases(), 1);
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 2), (VERSION, VERSION), NOW), Taken::Stale);
    assert_eq!(lend(&mut pool, 2), Some((0, vec![(0, 0), (2, 0)])));
}

#[test]
fn a_sample_of_another_group_or_worker_is_stale() {
    let mut pool = pool(2, 1);
    pool.lend_group(0, LeaseId(1), ROLLOUT, VERSION, NOW);
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(1, 0), (VERSION, VERSION), NOW), Taken::Stale);
    assert_eq!(pool.take_sample(LeaseId(1), GRADER, sample(0, 0), (VERSION, VERSION), NOW), Taken::Stale);
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 7), (VERSION, VERSION), NOW), Taken::Stale);
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(9, 0), (VERSION, VERSION), NOW), Taken::Stale);
}

#[test]
fn failed_verifications_go_to_another_verifier_and_end() {
    let mut pool = pool(1, 1);
    pool.lend_group(0, LeaseId(1), ROLLOUT, VERSION, NOW);
    pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 0), (VERSION, VERSION), NOW);
    assert_eq!(lend_one_sample(&mut pool, 5, true, NOW), Some(sample(0, 0)));
    let failed = judged(Outcome::TimedOut, 0.0);
    assert_eq!(pool.take_verdict(LeaseId(5), GRADER, sample(0, 0), failed, 2, NOW), Taken::Again);
    assert_eq!(lend_one_sample(&mut pool, 6, true, NOW), None, "another verifier should have it");
    assert_eq!(lend_one_sample(&mut pool, 6, true, NOW + OTHER_VERIFIER_PREFERENCE), Some(sample(0, 0)));
    assert_eq!(pool.take_verdict(LeaseId(6), GRADER, sample(0, 0), failed, 2, NOW), Taken::GiveUp);
    pool.remove(GroupId(0));
    assert_eq!(lend_one_sample(&mut pool, 7, false, NOW), None);
    assert_eq!((pool.complete(), pool.len()), (0, 0));
}

#[test]
fn a_replacement_is_generated_while_the_rest_of_its_group_runs() {
    let mut pool = pool(1, 3);
    assert_eq!(lend(&mut pool, 1), Some((0, vec![(0, 0), (1, 0), (2, 0)])));
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), (VERSION, VERSION), NOW), Taken::Fresh);
    lend_one_sample(&mut pool, 5, false, NOW);
    let failed = judged(Outcome::Failed, 0.0);
    assert_eq!(pool.take_verdict(LeaseId(5), GRADER, sample(0, 1), failed, 1, NOW), Taken::GiveUp);
    pool.replace_sample(sample(0, 1));
    assert_eq!(lend_one_sample(&mut pool, 6, false, NOW), None, "it waits for a rollout worker");
    assert_eq!(
        pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), (VERSION, VERSION), NOW),
        Taken::Repeat,
        "of the sample given up"
    );
    assert_eq!(lend(&mut pool, 2), Some((0, vec![(1, 1)])), "the other two are leased");
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), (VERSION, VERSION), NOW), Taken::Repeat);
    assert_eq!(pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 2), (VERSION, VERSION), NOW), Taken::Fresh);
    assert_eq!(
        pool.take_sample(LeaseId(2), ROLLOUT, sample(0, 0), (VERSION, VERSION), NOW),
        Taken::Stale,
        "leased under the first"
    );
    assert_eq!(pool.revoke_worker(ROLLOUT).leases(), 2);
    assert_eq!(lend(&mut pool, 3), Some((0, vec![(0, 0), (1, 1)])));
    assert_eq!(lend(&mut pool, 4), None, "the group waits once");
}

#[test]
fn verdicts_count_once() {
    let mut pool = pool(1, 2);
    pool.lend_group(0, LeaseId(1), ROLLOUT, VERSION, NOW);
    for index in 0..2 {
        pool.take_sample(LeaseId(1), ROLLOUT, sample(0, index), (VERSION, VERSION), NOW);
        let lease = LeaseId(10 + u64::from(index));
        lend_one_sample(&mut pool, lease.0, false, NOW);
        let right = judged(Outcome::Correct, f64::from(index));
        let taken = if index == 0 { Taken::Fresh } else { Taken::Completes };
        assert_eq!(pool.take_verdict(lease, GRADER, sample(0, index), right, 1, NOW), taken);
        assert_eq!(pool.take_verdict(lease, GRADER, sample(0, index), right, 1, NOW), Taken::Repeat);
    }
    assert_eq!(pool.complete(), 1);
    assert!(!pool.is_uniform(GroupId(0), UniformBy::Labels));
    assert!(pool.is_uniform(GroupId(0), UniformBy::Rewards), "the labels differ, and the rewards do not");
    let groups = pool.take(&[GroupId(0)]);
    assert_eq!(pass_rate_and_mixed_share(groups.values()), (0.5, 1.0));
    pool.put_back(groups);
    assert_eq!(pool.take_verdict(LeaseId(99), GRADER, sample(0, 0), judged(Outcome::Wrong, 0.0), 1, NOW), Taken::Stale);
}

#[test]
fn silent_leases_lapse() {
    let mut pool = pool(2, 1);
    pool.lend_group(0, LeaseId(1), ROLLOUT, VERSION, NOW);
    pool.lend_group(0, LeaseId(2), ROLLOUT, VERSION, NOW + Duration::from_secs(5));
    let (groups, samples) = pool.silent_loans(Some(NOW + Duration::from_secs(1)), None);
    assert_eq!(pool.end_loans(&groups, &samples), 1);
    assert_eq!(lend(&mut pool, 3), Some((0, vec![(0, 0)])));
}

#[test]
fn a_poison_group_is_found_among_innocent_ones() {
    let mut pool = pool(3, 1);
    for lease in 1..=2 {
        (0..3).for_each(|group| assert!(lend(&mut pool, 10 * lease + group).is_some()));
        assert_eq!(kill(&mut pool, ROLLOUT, lease, 3).1, []);
    }
    // Each is leased in isolation now, so a third death identifies the cause.
    let (place, missing, alone) = pool.next_for(ROLLOUT).expect("a group waits");
    assert_eq!((missing, alone), (1, true));
    let (innocent, _) = pool.lend_group(place, LeaseId(40), ROLLOUT, VERSION, NOW).expect("it waits");
    assert_eq!(pool.next_for(ROLLOUT), None, "nothing else is leased meanwhile");
    let taken = pool.take_sample(LeaseId(40), ROLLOUT, sample(innocent.0, 0), (VERSION, VERSION), NOW);
    assert_eq!(taken, Taken::Fresh);
    let (place, ..) = pool.next_for(ROLLOUT).expect("a group waits");
    let (deadly, _) = pool.lend_group(place, LeaseId(41), ROLLOUT, VERSION, NOW).expect("it waits");
    assert_eq!(kill(&mut pool, ROLLOUT, 9, 3).1, [deadly]);
    assert_ne!(deadly, innocent);
    let next = pool.next_for(ROLLOUT).map(|(place, ..)| pool.waiting[place]);
    assert_ne!(next, Some(deadly), "what is accused is not leased");
    assert_eq!(pool.leasable_groups(), 1);
}

/// A pool with one group of `samples` samples, all of which wait for a verifier.
fn unverified(samples: u32) -> Pool {
    let mut pool = pool(1, samples);
    pool.lend_group(0, LeaseId(1), ROLLOUT, VERSION, NOW);
    for index in 0..samples {
        pool.take_sample(LeaseId(1), ROLLOUT, sample(0, index), (VERSION, VERSION), NOW);
    }
    pool
}

fn lend_many(pool: &mut Pool, first_lease: u64, most: usize) -> Vec<u32> {
    let mut lease = first_lease;
    let mut leases = || {
        lease += 1;
        LeaseId(lease - 1)
    };
    let holds = pool.holds_sample(GRADER);
    let lent = pool.lend_samples(&mut leases, GRADER, most, (false, holds), NOW);
    lent.into_iter().map(|(_, id)| id.index).collect()
}

#[test]
fn a_poison_sample_is_found_among_innocent_ones() {
    let mut pool = unverified(3);
    for round in 1..=2 {
        assert_eq!(lend_many(&mut pool, 10 * round, 8), [0, 1, 2]);
        let (revoked, _, accused) = kill(&mut pool, GRADER, round, 3);
        assert_eq!((revoked.leases(), accused), (3, Vec::new()));
    }
    // Each is leased in isolation now: an innocent sample is judged, and a third death identifies the cause.
    assert_eq!(lend_many(&mut pool, 30, 8), [0]);
    assert!(pool.holds_suspect_sample(GRADER));
    assert_eq!(lend_many(&mut pool, 31, 8), [0; 0], "nothing else is leased meanwhile");
    let right = judged(Outcome::Correct, 1.0);
    assert_eq!(pool.take_verdict(LeaseId(30), GRADER, sample(0, 0), right, 1, NOW), Taken::Fresh);
    assert_eq!(lend_many(&mut pool, 40, 8), [1]);
    assert_eq!(kill(&mut pool, GRADER, 9, 3).2, [sample(0, 1)]);
    assert_eq!((pool.leasable_samples(), pool.unverified()), (1, 2), "what is accused is not leased");
    // Its replacement starts with a clean record; the other one is still a suspect.
    pool.replace_sample(sample(0, 1));
    assert_eq!(lend(&mut pool, 50), Some((0, vec![(1, 1)])));
    pool.take_sample(LeaseId(50), ROLLOUT, sample(0, 1), (VERSION, VERSION), NOW);
    assert_eq!(lend_many(&mut pool, 60, 8), [2]);
    assert_eq!(pool.take_verdict(LeaseId(60), GRADER, sample(0, 2), right, 1, NOW), Taken::Fresh);
    assert_eq!(lend_many(&mut pool, 70, 8), [1]);
    assert!(!pool.holds_suspect_sample(GRADER));
    assert_eq!(kill(&mut pool, GRADER, 20, 3).2, []);
}

#[test]
fn deaths_that_say_nothing_are_taken_back() {
    let mut pool = pool(3, 1);
    let seconds = |second| NOW + Duration::from_secs(second);
    for round in 1..=2 {
        (0..3).for_each(|group| assert!(lend(&mut pool, 10 * round + group).is_some()));
        kill(&mut pool, ROLLOUT, round, 3);
    }
    assert_eq!(pool.suspects.len(), 3);
    // One of the two deaths belonged to a mass loss.
    assert_eq!(pool.acquit(Role::Rollout, seconds(1), 3, |own| own == 1), 3);
    assert!(pool.suspects.is_empty() && pool.groups.values().all(|group| group.deaths == [seconds(1)]));
    // So did the death of the worker that held one group in isolation.
    (0..3).for_each(|group| assert!(lend(&mut pool, 40 + group).is_some()));
    kill(&mut pool, ROLLOUT, 30, 3);
    let (place, _, alone) = pool.next_for(ROLLOUT).expect("a group waits");
    assert!(alone && pool.lend_group(place, LeaseId(50), ROLLOUT, VERSION, NOW).is_some());
    assert_eq!(kill(&mut pool, ROLLOUT, 60, 3).1.len(), 1);
    assert_eq!(pool.acquit(Role::Rollout, seconds(50), 3, |_| true), 1);
    assert_eq!(pool.condemnable(seconds(1000)).0, []);
    assert_eq!(pool.suspects.len(), 3, "what was held against it before stays");
}

#[test]
fn an_orderly_exit_of_a_verifier_is_no_evidence() {
    let mut pool = unverified(2);
    for round in 0..10 {
        assert_eq!(lend_many(&mut pool, 10 * round + 10, 8), [0, 1]);
        assert_eq!(pool.revoke_worker(GRADER).leases(), 2);
    }
    assert!(!pool.holds_sample(GRADER) && pool.suspect_samples.is_empty());
}

#[test]
fn a_sample_that_is_gone_is_generated_with_other_noise() {
    let mut pool = pool(1, 2);
    pool.lend_group(0, LeaseId(1), ROLLOUT, VERSION, NOW);
    pool.take_sample(LeaseId(1), ROLLOUT, sample(0, 0), (VERSION, VERSION), NOW);
    lend_one_sample(&mut pool, 5, false, NOW);
    assert!(pool.lose_sample(sample(0, 0)) && !pool.lose_sample(sample(0, 0)) && !pool.lose_sample(sample(0, 1)));
    let late = pool.take_verdict(LeaseId(5), GRADER, sample(0, 0), judged(Outcome::Correct, 1.0), 1, NOW);
    assert_eq!(late, Taken::Stale);
    assert_eq!(lend(&mut pool, 2), Some((0, vec![(0, 1)])));
}

#[test]
fn a_group_that_takes_too_long_is_reissued_and_then_dropped() {
    let mut pool = pool(2, 1);
    pool.lend_group(0, LeaseId(1), ROLLOUT, VERSION, NOW);
    assert_eq!(pool.overdue_groups(NOW), [], "not before the limit");
    assert_eq!(pool.overdue_groups(NOW + Duration::from_secs(1)), [GroupId(0)]);
    assert!(!pool.reissue_group(GroupId(0), 2, NOW));
    assert_eq!(lend(&mut pool, 2), Some((0, vec![(0, 0)])));
    assert!(pool.reissue_group(GroupId(0), 2, NOW));
}

#[test]
fn groups_of_newer_weights_are_discarded() {
    let mut pool = pool(3, 1);
    for (lease, newest) in [(1, 0), (2, 1), (3, 0)] {
        pool.lend_group(0, LeaseId(lease), ROLLOUT, VERSION, NOW);
        if lease < 3 {
            let id = sample(lease - 1, 0);
            pool.take_sample(LeaseId(lease), ROLLOUT, id, (VERSION, WeightVersion(newest)), NOW);
        }
    }
    assert_eq!(pool.forget_newer(VERSION), [GroupId(1)]);
    let late = pool.take_sample(LeaseId(3), ROLLOUT, sample(2, 0), (VERSION, VERSION), NOW);
    assert_eq!(late, Taken::Stale, "its lease has ended");
    assert_eq!(lend(&mut pool, 4), Some((2, vec![(0, 0)])));
}
