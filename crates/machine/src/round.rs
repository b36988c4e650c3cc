use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use pacs_types::{GroupId, LeaseId, Outcome, Purpose, SampleId, WeightVersion, WorkerId};

use crate::{QueueDepths, WantedSample};

/// Ids of evaluation groups start here, so that they never meet those of training groups, and so that the noise of an
/// evaluation does not depend on how many prompts were trained on before it.
pub const EVALUATION_GROUPS: u64 = 1 << 40;

/// Position of the problem that an evaluation group measures; none for a training group.
#[must_use]
pub fn evaluation_problem(group: GroupId) -> Option<u64> {
    group.0.checked_sub(EVALUATION_GROUPS)
}

/// A failed sample is kept for another verifier this long.
const OTHER_VERIFIER_PREFERENCE: Duration = Duration::from_secs(2);

/// The groups that are sampled and verified together: a training batch or an evaluation.
#[derive(Clone, Debug)]
pub(crate) struct Round {
    pub(crate) purpose: Purpose,
    /// The weights that every sample must come from.
    pub(crate) version: WeightVersion,
    /// Groups that the round needs.
    pub(crate) wanted: usize,
    /// Groups that were dropped for want of verdicts.
    pub(crate) dropped: usize,
    /// The data cursor before the round drew from it.
    pub(crate) cursor_before: u64,
    groups: BTreeMap<GroupId, Group>,
    complete: usize,
    /// Groups that wait for a rollout worker, oldest first.
    waiting: VecDeque<GroupId>,
    /// Samples that wait for a verifier, oldest first.
    unverified: VecDeque<SampleId>,
    group_loans: BTreeMap<LeaseId, Loan<GroupId>>,
    sample_loans: BTreeMap<LeaseId, Loan<SampleId>>,
}

#[derive(Clone, Copy, Debug)]
struct Loan<T> {
    worker: WorkerId,
    item: T,
    /// When it was made or last heard of.
    since: Duration,
}

#[derive(Clone, Debug)]
struct Group {
    drawn: Duration,
    samples: Vec<Slot>,
    unjudged: usize,
}

/// One sample of a group.
#[derive(Clone, Debug)]
struct Slot {
    state: State,
    /// Samples of this slot that were given up because no verdict could be had.
    replaced: u32,
    /// The loan that the sample came under.
    generated_under: LeaseId,
    /// Verifications of this sample that failed.
    failures: u32,
    /// The verifier that failed last, and when.
    failed_by: Option<(WorkerId, Duration)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Waits for a rollout worker; its group is in `waiting`.
    Missing,
    Generating {
        under: LeaseId,
    },
    Unverified,
    Verifying,
    Judged {
        under: LeaseId,
        label: f64,
    },
}

/// What became of something handed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It counts.
    Fresh,
    /// It was there already.
    Repeat,
    /// Its loan is over.
    Stale,
    /// The verification failed; the sample waits for another one.
    Again,
    /// The verification failed for the last time.
    GiveUp,
}

impl Round {
    pub(crate) fn new(purpose: Purpose, version: WeightVersion, wanted: usize, cursor_before: u64) -> Self {
        Self {
            purpose,
            version,
            wanted,
            dropped: 0,
            cursor_before,
            groups: BTreeMap::new(),
            complete: 0,
            waiting: VecDeque::new(),
            unverified: VecDeque::new(),
            group_loans: BTreeMap::new(),
            sample_loans: BTreeMap::new(),
        }
    }

    /// Puts a new group of `samples` samples at the end of the queue.
    pub(crate) fn add(&mut self, id: GroupId, samples: u32, now: Duration) {
        let slot =
            Slot { state: State::Missing, replaced: 0, generated_under: LeaseId(0), failures: 0, failed_by: None };
        let samples = vec![slot; samples as usize];
        self.groups.insert(id, Group { drawn: now, unjudged: samples.len(), samples });
        self.waiting.push_back(id);
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.complete == self.wanted
    }

    /// All groups, in order of id.
    pub(crate) fn group_ids(&self) -> Vec<GroupId> {
        self.groups.keys().copied().collect()
    }

    pub(crate) fn waiting_groups(&self) -> usize {
        self.waiting.len()
    }

    pub(crate) fn holds_group(&self, worker: WorkerId) -> bool {
        self.group_loans.values().any(|loan| loan.worker == worker)
    }

    pub(crate) fn loans_of(&self, worker: WorkerId) -> usize {
        self.group_loans.values().filter(|loan| loan.worker == worker).count()
            + self.sample_loans.values().filter(|loan| loan.worker == worker).count()
    }

    /// Missing samples of the group that would be lent next.
    pub(crate) fn next_group_size(&self) -> Option<usize> {
        self.waiting.front().map(|id| self.groups[id].missing())
    }

    /// Lends the oldest waiting group: its id and the samples that are missing.
    pub(crate) fn lend_group(
        &mut self,
        lease: LeaseId,
        worker: WorkerId,
        now: Duration,
    ) -> Option<(GroupId, Vec<WantedSample>)> {
        let item = self.waiting.pop_front()?;
        let group = self.groups.get_mut(&item).expect("waiting groups are in the round");
        let mut wanted = Vec::new();
        for (index, slot) in (0u32..).zip(&mut group.samples).filter(|(_, slot)| slot.state == State::Missing) {
            slot.state = State::Generating { under: lease };
            wanted.push(WantedSample { index, attempt: slot.replaced });
        }
        self.group_loans.insert(lease, Loan { worker, item, since: now });
        Some((item, wanted))
    }

    /// Takes a generated sample.
    pub(crate) fn take_sample(&mut self, lease: LeaseId, worker: WorkerId, id: SampleId, now: Duration) -> Taken {
        let Some(group) = self.groups.get_mut(&id.group) else { return Taken::Stale };
        let Some(slot) = group.samples.get_mut(id.index as usize) else { return Taken::Stale };
        if slot.state != (State::Generating { under: lease }) {
            // Also when the sample was given up since: its replacement comes under another loan.
            return if slot.generated_under == lease { Taken::Repeat } else { Taken::Stale };
        }
        let Some(loan) = self.group_loans.get_mut(&lease).filter(|loan| loan.worker == worker) else {
            return Taken::Stale;
        };
        loan.since = now;
        slot.state = State::Unverified;
        slot.generated_under = lease;
        if !group.samples.iter().any(|slot| slot.state == State::Generating { under: lease }) {
            self.group_loans.remove(&lease);
        }
        self.unverified.push_back(id);
        Taken::Fresh
    }

    /// Ends a group's loan; what is missing of it waits again, first in line.
    pub(crate) fn revoke_group(&mut self, lease: LeaseId, worker: WorkerId) -> bool {
        let Some(loan) = self.group_loans.get(&lease).filter(|loan| loan.worker == worker) else { return false };
        let id = loan.item;
        self.group_loans.remove(&lease);
        self.give_back(lease, id);
        true
    }

    /// Lets the samples of a group that are still open under a loan wait again, first in line.
    fn give_back(&mut self, lease: LeaseId, id: GroupId) {
        let group = self.groups.get_mut(&id).expect("lent groups are in the round");
        for slot in group.samples.iter_mut().filter(|slot| slot.state == State::Generating { under: lease }) {
            slot.state = State::Missing;
        }
        self.wait_first(id);
    }

    fn wait_first(&mut self, id: GroupId) {
        // A group may be there already: with a sample that takes the place of another.
        if !self.waiting.contains(&id) {
            self.waiting.push_front(id);
        }
    }

    /// Samples that wait for a verifier.
    pub(crate) fn unverified(&self) -> usize {
        self.unverified.len()
    }

    /// Lends up to `most` samples. One that `worker` failed is left to others for a while, if there are `others`.
    pub(crate) fn lend_samples(
        &mut self,
        leases: &mut impl FnMut() -> LeaseId,
        worker: WorkerId,
        most: usize,
        others: bool,
        now: Duration,
    ) -> Vec<(LeaseId, SampleId)> {
        let mut lent = Vec::new();
        let mut kept = VecDeque::new();
        while lent.len() < most {
            let Some(id) = self.unverified.pop_front() else { break };
            let slot = self.slot_mut(id);
            let failed_here = |(by, at): (WorkerId, Duration)| by == worker && now < at + OTHER_VERIFIER_PREFERENCE;
            if others && slot.failed_by.is_some_and(failed_here) {
                kept.push_back(id);
                continue;
            }
            slot.state = State::Verifying;
            let lease = leases();
            self.sample_loans.insert(lease, Loan { worker, item: id, since: now });
            lent.push((lease, id));
        }
        kept.append(&mut self.unverified);
        self.unverified = kept;
        lent
    }

    /// Takes a verdict.
    pub(crate) fn take_verdict(
        &mut self,
        lease: LeaseId,
        worker: WorkerId,
        id: SampleId,
        verdict: (Outcome, f64),
        max_attempts: u32,
        now: Duration,
    ) -> Taken {
        match self.sample_loans.get(&lease) {
            Some(loan) if loan.worker == worker && loan.item == id => {}
            _ => return self.repeat_or_stale(lease, id),
        }
        self.sample_loans.remove(&lease);
        let (outcome, label) = verdict;
        let slot = self.slot_mut(id);
        if !outcome.is_conclusive() {
            slot.state = State::Unverified;
            slot.failures += 1;
            slot.failed_by = Some((worker, now));
            let give_up = slot.failures >= max_attempts;
            self.unverified.push_front(id);
            return if give_up { Taken::GiveUp } else { Taken::Again };
        }
        slot.state = State::Judged { under: lease, label };
        let group = self.groups.get_mut(&id.group).expect("a lent sample's group is in the round");
        group.unjudged -= 1;
        if group.unjudged == 0 {
            self.complete += 1;
        }
        Taken::Fresh
    }

    fn repeat_or_stale(&self, lease: LeaseId, id: SampleId) -> Taken {
        let slot = self.groups.get(&id.group).and_then(|group| group.samples.get(id.index as usize));
        match slot.map(|slot| slot.state) {
            Some(State::Judged { under, .. }) if under == lease => Taken::Repeat,
            _ => Taken::Stale,
        }
    }

    fn slot_mut(&mut self, id: SampleId) -> &mut Slot {
        let group = self.groups.get_mut(&id.group).expect("queued and lent samples belong to groups of the round");
        &mut group.samples[id.index as usize]
    }

    /// Samples that were given up in the place of this one.
    pub(crate) fn replaced(&self, id: SampleId) -> u32 {
        self.groups[&id.group].samples[id.index as usize].replaced
    }

    /// Gives up a sample that waits for a verifier: another one takes its place.
    pub(crate) fn replace_sample(&mut self, id: SampleId) {
        self.unverified.retain(|waiting| *waiting != id);
        let slot = self.slot_mut(id);
        slot.state = State::Missing;
        slot.replaced += 1;
        slot.failures = 0;
        slot.failed_by = None;
        self.wait_first(id.group);
    }

    /// Forgets a group and all that was lent of it.
    pub(crate) fn drop_group(&mut self, id: GroupId) {
        self.groups.remove(&id);
        self.waiting.retain(|waiting| *waiting != id);
        self.unverified.retain(|sample| sample.group != id);
        self.group_loans.retain(|_, loan| loan.item != id);
        self.sample_loans.retain(|_, loan| loan.item.group != id);
        self.dropped += 1;
    }

    /// Ends every loan of a worker; the work waits again, first in line. Returns how many there were.
    pub(crate) fn revoke_worker(&mut self, worker: WorkerId) -> usize {
        self.revoke_if(|loan_worker, _| loan_worker == worker, |loan_worker, _| loan_worker == worker)
    }

    /// Ends every loan that was not heard of since `groups` or `samples`. Returns how many there were.
    pub(crate) fn revoke_older(&mut self, groups: Option<Duration>, samples: Option<Duration>) -> usize {
        self.revoke_if(
            |_, since| groups.is_some_and(|limit| since < limit),
            |_, since| samples.is_some_and(|limit| since < limit),
        )
    }

    fn revoke_if(
        &mut self,
        group: impl Fn(WorkerId, Duration) -> bool,
        sample: impl Fn(WorkerId, Duration) -> bool,
    ) -> usize {
        let groups: Vec<_> = self.group_loans.extract_if(.., |_, loan| group(loan.worker, loan.since)).collect();
        let samples: Vec<_> = self.sample_loans.extract_if(.., |_, loan| sample(loan.worker, loan.since)).collect();
        // Backwards, so that the oldest loan ends up first.
        for (lease, loan) in groups.iter().rev() {
            self.give_back(*lease, loan.item);
        }
        for (_, loan) in samples.iter().rev() {
            self.slot_mut(loan.item).state = State::Unverified;
            self.unverified.push_front(loan.item);
        }
        groups.len() + samples.len()
    }

    pub(crate) fn depths(&self) -> QueueDepths {
        QueueDepths {
            groups_waiting: self.waiting.len(),
            groups_generating: self.group_loans.len(),
            samples_waiting: self.unverified.len(),
            samples_verifying: self.sample_loans.len(),
            groups_complete: self.complete,
            groups_wanted: self.wanted,
        }
    }

    /// The oldest group without all its verdicts, when it was drawn, and who holds it or a sample of it.
    pub(crate) fn oldest_open(&self) -> Option<(GroupId, Duration, Option<WorkerId>)> {
        let (id, group) = self.groups.iter().find(|(_, group)| group.unjudged > 0)?;
        let generating = self.group_loans.values().find(|loan| loan.item == *id).map(|loan| loan.worker);
        let verifying = || self.sample_loans.values().find(|loan| loan.item.group == *id).map(|loan| loan.worker);
        Some((*id, group.drawn, generating.or_else(verifying)))
    }

    /// Share of right answers and of mixed groups (neither all right nor all wrong), over complete groups.
    pub(crate) fn pass_rate_and_mixed_share(&self) -> (f64, f64) {
        let (mut passes, mut samples, mut mixed, mut groups) = (0.0, 0.0f64, 0.0, 0.0f64);
        for group in self.groups.values() {
            let labels = group.samples.iter().filter_map(|slot| match slot.state {
                State::Judged { label, .. } => Some(label),
                _ => None,
            });
            let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
            for label in labels {
                passes += label;
                samples += 1.0;
                (low, high) = (low.min(label), high.max(label));
            }
            mixed += f64::from(u8::from(low < high));
            groups += 1.0;
        }
        (passes / samples.max(1.0), mixed / groups.max(1.0))
    }
}

impl Group {
    fn missing(&self) -> usize {
        self.samples.iter().filter(|slot| slot.state == State::Missing).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);
    const ROLLOUT: WorkerId = WorkerId(1);
    const GRADER: WorkerId = WorkerId(2);

    fn round(groups: u64, samples: u32) -> Round {
        let mut round = Round::new(Purpose::Train, WeightVersion(0), groups as usize, 0);
        (0..groups).for_each(|group| round.add(GroupId(group), samples, NOW));
        round
    }

    fn sample(group: u64, index: u32) -> SampleId {
        SampleId { group: GroupId(group), index }
    }

    /// Lends the next group: its id and the samples that are wanted of it.
    fn lend(round: &mut Round, lease: u64) -> Option<(u64, Vec<(u32, u32)>)> {
        let (group, wanted) = round.lend_group(LeaseId(lease), ROLLOUT, NOW)?;
        Some((group.0, wanted.into_iter().map(|sample| (sample.index, sample.attempt)).collect()))
    }

    fn lend_one_sample(round: &mut Round, lease: u64, others: bool, now: Duration) -> Option<SampleId> {
        let lent = round.lend_samples(&mut || LeaseId(lease), GRADER, 1, others, now);
        lent.first().map(|(_, id)| *id)
    }

    #[test]
    fn a_lapsed_group_waits_first_in_line_with_what_is_missing() {
        let mut round = round(2, 3);
        assert_eq!(lend(&mut round, 1), Some((0, vec![(0, 0), (1, 0), (2, 0)])));
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), NOW), Taken::Fresh);
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), NOW), Taken::Repeat);
        assert_eq!(round.revoke_worker(ROLLOUT), 1);
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(0, 2), NOW), Taken::Stale);
        assert_eq!(lend(&mut round, 2), Some((0, vec![(0, 0), (2, 0)])));
    }

    #[test]
    fn a_sample_of_another_group_or_worker_is_stale() {
        let mut round = round(2, 1);
        round.lend_group(LeaseId(1), ROLLOUT, NOW);
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(1, 0), NOW), Taken::Stale);
        assert_eq!(round.take_sample(LeaseId(1), GRADER, sample(0, 0), NOW), Taken::Stale);
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(0, 7), NOW), Taken::Stale);
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(9, 0), NOW), Taken::Stale);
    }

    #[test]
    fn failed_verifications_go_to_another_verifier_and_end() {
        let mut round = round(1, 1);
        round.lend_group(LeaseId(1), ROLLOUT, NOW);
        round.take_sample(LeaseId(1), ROLLOUT, sample(0, 0), NOW);
        assert_eq!(lend_one_sample(&mut round, 5, true, NOW), Some(sample(0, 0)));
        let failed = (Outcome::TimedOut, 0.0);
        assert_eq!(round.take_verdict(LeaseId(5), GRADER, sample(0, 0), failed, 2, NOW), Taken::Again);
        assert_eq!(lend_one_sample(&mut round, 6, true, NOW), None, "another verifier should have it");
        assert_eq!(lend_one_sample(&mut round, 6, true, NOW + OTHER_VERIFIER_PREFERENCE), Some(sample(0, 0)));
        assert_eq!(round.take_verdict(LeaseId(6), GRADER, sample(0, 0), failed, 2, NOW), Taken::GiveUp);
        round.drop_group(GroupId(0));
        assert_eq!(lend_one_sample(&mut round, 7, false, NOW), None);
        assert!(!round.is_complete());
    }

    #[test]
    fn a_replacement_is_generated_beside_the_rest_of_its_group() {
        let mut round = round(1, 3);
        assert_eq!(lend(&mut round, 1), Some((0, vec![(0, 0), (1, 0), (2, 0)])));
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), NOW), Taken::Fresh);
        lend_one_sample(&mut round, 5, false, NOW);
        let failed = (Outcome::Failed, 0.0);
        assert_eq!(round.take_verdict(LeaseId(5), GRADER, sample(0, 1), failed, 1, NOW), Taken::GiveUp);
        round.replace_sample(sample(0, 1));
        assert_eq!(lend_one_sample(&mut round, 6, false, NOW), None, "it waits for a rollout worker");
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), NOW), Taken::Repeat, "of the sample given up");
        assert_eq!(lend(&mut round, 2), Some((0, vec![(1, 1)])), "the other two are on loan");
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(0, 1), NOW), Taken::Repeat);
        assert_eq!(round.take_sample(LeaseId(1), ROLLOUT, sample(0, 2), NOW), Taken::Fresh);
        assert_eq!(round.take_sample(LeaseId(2), ROLLOUT, sample(0, 0), NOW), Taken::Stale, "lent under the first");
        assert_eq!(round.revoke_worker(ROLLOUT), 2);
        assert_eq!(lend(&mut round, 3), Some((0, vec![(0, 0), (1, 1)])));
        assert_eq!(lend(&mut round, 4), None, "the group waits once");
    }

    #[test]
    fn verdicts_count_once() {
        let mut round = round(1, 2);
        round.lend_group(LeaseId(1), ROLLOUT, NOW);
        for index in 0..2 {
            round.take_sample(LeaseId(1), ROLLOUT, sample(0, index), NOW);
            let lease = LeaseId(10 + u64::from(index));
            lend_one_sample(&mut round, lease.0, false, NOW);
            let right = (Outcome::Correct, f64::from(index));
            assert_eq!(round.take_verdict(lease, GRADER, sample(0, index), right, 1, NOW), Taken::Fresh);
            assert_eq!(round.take_verdict(lease, GRADER, sample(0, index), right, 1, NOW), Taken::Repeat);
        }
        assert!(round.is_complete());
        assert_eq!(round.pass_rate_and_mixed_share(), (0.5, 1.0));
        assert_eq!(round.take_verdict(LeaseId(99), GRADER, sample(0, 0), (Outcome::Wrong, 0.0), 1, NOW), Taken::Stale);
    }

    #[test]
    fn silent_loans_lapse() {
        let mut round = round(2, 1);
        round.lend_group(LeaseId(1), ROLLOUT, NOW);
        round.lend_group(LeaseId(2), ROLLOUT, NOW + Duration::from_secs(5));
        assert_eq!(round.revoke_older(Some(NOW + Duration::from_secs(1)), None), 1);
        assert_eq!(lend(&mut round, 3), Some((0, vec![(0, 0)])));
    }
}
