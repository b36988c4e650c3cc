mod group;
mod suspects;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pacs_types::{GroupId, LeaseId, SampleId, WeightVersion, WorkerId};
use serde::{Deserialize, Serialize};

pub(crate) use self::group::{Group, Judgement, pass_rate_and_mixed_share, present};
use self::group::{SampleState, Slot};
pub(crate) use self::suspects::{Accusation, Death, Revoked};
use crate::schedule::Candidate;
use crate::{QueueDepths, UniformBy, WantedSample};

pub use pacs_types::{EVALUATION_GROUPS, evaluation_problem};

/// How long a sample with a failed verification is reserved for verifiers other than the one that failed.
const OTHER_VERIFIER_PREFERENCE: Duration = Duration::from_secs(2);
/// Restarts of a group for its age; after that, the step waits for it, so that a slow group makes progress.
const MOST_EVICTIONS: u32 = 3;

/// Groups in flight with their samples, queues and leases.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Pool {
    groups: BTreeMap<GroupId, Group>,
    complete: usize,
    /// Groups with samples to generate and no rollout worker, in lease order.
    waiting: VecDeque<GroupId>,
    /// Samples without a verdict or a verifier, in lease order.
    unverified: VecDeque<SampleId>,
    group_loans: BTreeMap<LeaseId, Lease<GroupId>>,
    sample_loans: BTreeMap<LeaseId, Lease<SampleId>>,
    /// Number of groups that each rollout worker holds.
    held: BTreeMap<WorkerId, usize>,
    /// Number of samples that each verifier holds.
    held_samples: BTreeMap<WorkerId, usize>,
    /// Groups that are leased in isolation, because they may have killed their workers.
    suspects: BTreeSet<GroupId>,
    /// Samples that are leased in isolation, for the same reason.
    suspect_samples: BTreeSet<SampleId>,
    /// Suspects whose worker died while it held nothing else. They are not leased until the accusation is decided.
    accused: BTreeMap<GroupId, Accusation>,
    /// Accused samples, likewise.
    #[serde(with = "self::suspects::pairs")]
    accused_samples: BTreeMap<SampleId, Accusation>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Lease<T> {
    worker: WorkerId,
    item: T,
    /// Time of the last sign of progress, at first the grant.
    since: Duration,
}

/// How the pool took a submitted sample or verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It is new and counts.
    Fresh,
    /// It was submitted under this lease before.
    Repeat,
    /// Its lease is over.
    Stale,
    /// The verification failed, and the sample waits for another one.
    Again,
    /// The verification failed, and the sample has no tries left.
    GiveUp,
    /// It is new and was the last verdict that its group waited for.
    Completes,
}

impl Pool {
    /// Appends a new group of `samples` samples to the queue.
    pub(crate) fn add(&mut self, id: GroupId, samples: u32, born: WeightVersion, now: Duration) {
        let samples = vec![Slot::empty(); samples as usize];
        let unjudged = samples.len();
        let group =
            Group { drawn: now, started: None, born, samples, unjudged, overdue: 0, evictions: 0, deaths: Vec::new() };
        self.groups.insert(id, group);
        self.waiting.push_back(id);
    }

    pub(crate) fn len(&self) -> usize {
        self.groups.len()
    }

    pub(crate) fn complete(&self) -> usize {
        self.complete
    }

    /// Numbers of samples with a verdict, and of all samples.
    pub(crate) fn judged_samples(&self) -> (u64, u64) {
        let count = |(judged, all): (u64, u64), group: &Group| {
            let samples = group.samples.len();
            (judged + (samples - group.unjudged) as u64, all + samples as u64)
        };
        self.groups.values().fold((0, 0), count)
    }

    /// Ids of all groups, ascending.
    pub(crate) fn group_ids(&self) -> impl Iterator<Item = GroupId> {
        self.groups.keys().copied()
    }

    pub(crate) fn contains(&self, id: GroupId) -> bool {
        self.groups.contains_key(&id)
    }

    pub(crate) fn waiting_groups(&self) -> usize {
        self.waiting.len()
    }

    /// Number of groups that a rollout worker may lease.
    pub(crate) fn leasable_groups(&self) -> usize {
        self.waiting.len().saturating_sub(self.accused.len())
    }

    /// Number of samples that a verifier may lease.
    pub(crate) fn leasable_samples(&self) -> usize {
        self.unverified.len().saturating_sub(self.accused_samples.len())
    }

    pub(crate) fn loans_of(&self, worker: WorkerId) -> usize {
        let of = |held: &BTreeMap<WorkerId, usize>| held.get(&worker).copied().unwrap_or(0);
        of(&self.held) + of(&self.held_samples)
    }

    /// The groups as candidates for `schedule.rs`.
    pub(crate) fn candidates(&self) -> Vec<Candidate> {
        let candidate = |(id, group): (&GroupId, &Group)| Candidate {
            born: group.born.0,
            id: *id,
            complete: group.unjudged == 0,
            evictable: group.evictions < MOST_EVICTIONS,
        };
        self.groups.iter().map(candidate).collect()
    }

    /// Removes complete groups to form a batch.
    pub(crate) fn take(&mut self, ids: &[GroupId]) -> BTreeMap<GroupId, Group> {
        let taken: BTreeMap<_, _> = ids.iter().filter_map(|id| Some((*id, self.groups.remove(id)?))).collect();
        self.complete -= taken.len();
        taken
    }

    /// Returns complete groups of an interrupted step.
    pub(crate) fn put_back(&mut self, groups: BTreeMap<GroupId, Group>) {
        self.complete += groups.len();
        self.groups.extend(groups);
    }

    pub(crate) fn holds_group(&self, worker: WorkerId) -> bool {
        self.held.contains_key(&worker)
    }

    /// Leases the group at a queue position; returns its id and its missing samples.
    pub(crate) fn lend_group(
        &mut self,
        place: usize,
        lease: LeaseId,
        worker: WorkerId,
        version: WeightVersion,
        now: Duration,
    ) -> Option<(GroupId, Vec<WantedSample>)> {
        let item = self.waiting.remove(place)?;
        let group = self.groups.get_mut(&item).expect("waiting groups are in the pool");
        // Without samples of an earlier lease, no token will be older than the weights of this one.
        if group.samples.iter().all(|slot| slot.state == SampleState::Missing) {
            group.born = version;
        }
        group.started.get_or_insert(now);
        let mut wanted = Vec::new();
        for (index, slot) in (0u32..).zip(&mut group.samples).filter(|(_, slot)| slot.state == SampleState::Missing) {
            slot.state = SampleState::Generating { under: lease };
            wanted.push(WantedSample { index, attempt: slot.replaced });
        }
        self.group_loans.insert(lease, Lease { worker, item, since: now });
        *self.held.entry(worker).or_default() += 1;
        Some((item, wanted))
    }

    /// The group of a lease, and the samples that are still open under it.
    pub(crate) fn lent_group(&self, lease: LeaseId) -> Option<(GroupId, Vec<WantedSample>)> {
        let id = self.group_loans.get(&lease)?.item;
        let open = (0u32..).zip(&self.groups[&id].samples);
        let open = open.filter(|(_, slot)| slot.state == SampleState::Generating { under: lease });
        Some((id, open.map(|(index, slot)| WantedSample { index, attempt: slot.replaced }).collect()))
    }

    /// The sample of a lease.
    pub(crate) fn lent_sample(&self, lease: LeaseId) -> Option<SampleId> {
        self.sample_loans.get(&lease).map(|loan| loan.item)
    }

    /// Oldest version that a sample may have under this lease; `None` if the lease is over.
    pub(crate) fn oldest_allowed(&self, lease: LeaseId) -> Option<WeightVersion> {
        let loan = self.group_loans.get(&lease)?;
        self.groups.get(&loan.item).map(|group| group.born)
    }

    /// Accepts a generated sample. `version` is that of its oldest token, `newest` the newest version now.
    pub(crate) fn take_sample(
        &mut self,
        lease: LeaseId,
        worker: WorkerId,
        id: SampleId,
        (version, newest): (WeightVersion, WeightVersion),
        now: Duration,
    ) -> Taken {
        let Some(group) = self.groups.get_mut(&id.group) else { return Taken::Stale };
        let Some(slot) = group.samples.get_mut(id.index as usize) else { return Taken::Stale };
        if slot.state != (SampleState::Generating { under: lease }) {
            // This covers a sample that was given up since: its replacement has another lease.
            return if slot.generated_under == lease { Taken::Repeat } else { Taken::Stale };
        }
        let Some(loan) = self.group_loans.get_mut(&lease).filter(|loan| loan.worker == worker) else {
            return Taken::Stale;
        };
        loan.since = now;
        slot.state = SampleState::Unverified;
        slot.generated_under = lease;
        (slot.version, slot.newest) = (version, newest);
        if !group.samples.iter().any(|slot| slot.state == SampleState::Generating { under: lease }) {
            self.end_group_lease(lease);
        }
        self.unverified.push_back(id);
        Taken::Fresh
    }

    fn end_group_lease(&mut self, lease: LeaseId) -> Option<Lease<GroupId>> {
        let loan = self.group_loans.remove(&lease)?;
        if let Some(held) = self.held.get_mut(&loan.worker) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&loan.worker);
            }
        }
        Some(loan)
    }

    /// Ends a group's lease if `worker` holds it; the missing samples return to the front of the queue.
    pub(crate) fn revoke_group(&mut self, lease: LeaseId, worker: WorkerId) -> bool {
        if self.group_loans.get(&lease).is_none_or(|loan| loan.worker != worker) {
            return false;
        }
        self.give_back(lease);
        true
    }

    /// Ends a lease; the samples that are still open under it return to the front of the queue.
    fn give_back(&mut self, lease: LeaseId) {
        let Some(loan) = self.end_group_lease(lease) else { return };
        let group = self.groups.get_mut(&loan.item).expect("leased groups are in the pool");
        for slot in group.samples.iter_mut().filter(|slot| slot.state == SampleState::Generating { under: lease }) {
            slot.state = SampleState::Missing;
        }
        self.wait_first(loan.item);
    }

    fn wait_first(&mut self, id: GroupId) {
        // The group may wait already, for the replacement of a given-up sample.
        if !self.waiting.contains(&id) {
            self.waiting.push_front(id);
        }
    }

    /// Number of samples that wait for a verifier.
    pub(crate) fn unverified(&self) -> usize {
        self.unverified.len()
    }

    /// Leases up to `most` samples. A sample that `worker` failed is left to other verifiers for a while, if there are
    /// `others`. A suspect is leased in isolation, to a worker that `holds` nothing.
    pub(crate) fn lend_samples(
        &mut self,
        leases: &mut impl FnMut() -> LeaseId,
        worker: WorkerId,
        most: usize,
        (others, holds): (bool, bool),
        now: Duration,
    ) -> Vec<(LeaseId, SampleId)> {
        let mut lent = Vec::new();
        let mut kept = Vec::new();
        while lent.len() < most {
            let Some(id) = self.unverified.pop_front() else { break };
            let is_suspect = self.suspect_samples.contains(&id);
            if self.accused_samples.contains_key(&id) || (is_suspect && (holds || !lent.is_empty())) {
                kept.push(id);
                continue;
            }
            let slot = self.slot_mut(id);
            let failed_here = |(by, at): (WorkerId, Duration)| by == worker && now < at + OTHER_VERIFIER_PREFERENCE;
            if others && slot.failed_by.is_some_and(failed_here) {
                kept.push(id);
                continue;
            }
            slot.state = SampleState::Verifying;
            let lease = leases();
            self.sample_loans.insert(lease, Lease { worker, item: id, since: now });
            *self.held_samples.entry(worker).or_default() += 1;
            lent.push((lease, id));
            if is_suspect {
                break;
            }
        }
        // Skipped samples keep their places at the front of the queue.
        for id in kept.into_iter().rev() {
            self.unverified.push_front(id);
        }
        lent
    }

    fn end_sample_lease(&mut self, lease: LeaseId) -> Option<Lease<SampleId>> {
        let loan = self.sample_loans.remove(&lease)?;
        if let Some(held) = self.held_samples.get_mut(&loan.worker) {
            *held -= 1;
            if *held == 0 {
                self.held_samples.remove(&loan.worker);
            }
        }
        Some(loan)
    }

    /// Accepts a verdict.
    pub(crate) fn take_verdict(
        &mut self,
        lease: LeaseId,
        worker: WorkerId,
        id: SampleId,
        judgement: Judgement,
        max_attempts: u32,
        now: Duration,
    ) -> Taken {
        match self.sample_loans.get(&lease) {
            Some(loan) if loan.worker == worker && loan.item == id => {}
            _ => return self.repeat_or_stale(lease, id),
        }
        self.end_sample_lease(lease);
        let Judgement { outcome, label, reward } = judgement;
        if !outcome.is_conclusive() {
            return self.fail_verification(id, worker, max_attempts, now);
        }
        self.slot_mut(id).state = SampleState::Judged { under: lease, label, reward };
        self.clear_sample(id);
        let group = self.groups.get_mut(&id.group).expect("a leased sample's group is in the pool");
        group.unjudged -= 1;
        if group.unjudged > 0 {
            return Taken::Fresh;
        }
        group.born = group.samples.iter().map(|slot| slot.version).min().unwrap_or(group.born);
        self.suspects.remove(&id.group);
        self.accused.remove(&id.group);
        self.complete += 1;
        Taken::Completes
    }

    /// Returns a sample whose verification failed to the queue, or reports that it has no tries left.
    fn fail_verification(&mut self, id: SampleId, worker: WorkerId, max_attempts: u32, now: Duration) -> Taken {
        let slot = self.slot_mut(id);
        slot.state = SampleState::Unverified;
        slot.failures += 1;
        slot.failed_by = Some((worker, now));
        let give_up = slot.failures >= max_attempts;
        self.unverified.push_front(id);
        if give_up { Taken::GiveUp } else { Taken::Again }
    }

    fn repeat_or_stale(&self, lease: LeaseId, id: SampleId) -> Taken {
        let slot = self.groups.get(&id.group).and_then(|group| group.samples.get(id.index as usize));
        match slot.map(|slot| slot.state) {
            Some(SampleState::Judged { under, .. }) if under == lease => Taken::Repeat,
            Some(
                SampleState::Missing
                | SampleState::Generating { .. }
                | SampleState::Unverified
                | SampleState::Verifying
                | SampleState::Judged { .. },
            )
            | None => Taken::Stale,
        }
    }

    fn slot_mut(&mut self, id: SampleId) -> &mut Slot {
        let group = self.groups.get_mut(&id.group).expect("queued and leased samples belong to groups of the pool");
        &mut group.samples[id.index as usize]
    }

    /// The samples that are present, with the leases of the sample and of its verdict.
    pub(crate) fn present(&self) -> impl Iterator<Item = (SampleId, LeaseId, Option<LeaseId>)> {
        present(&self.groups)
    }

    /// Number of samples that were given up at this position.
    pub(crate) fn replaced(&self, id: SampleId) -> u32 {
        self.groups[&id.group].samples[id.index as usize].replaced
    }

    /// Gives up a sample that waits for a verifier; its next attempt will be generated.
    pub(crate) fn replace_sample(&mut self, id: SampleId) {
        self.unverified.retain(|waiting| *waiting != id);
        let slot = self.slot_mut(id);
        slot.state = SampleState::Missing;
        slot.replaced += 1;
        slot.failures = 0;
        slot.deaths.clear();
        slot.failed_by = None;
        self.clear_sample(id);
        self.wait_first(id.group);
    }

    /// Schedules a sample for regeneration because its content is lost, in whatever state it is.
    /// Returns false if there was none.
    pub(crate) fn lose_sample(&mut self, id: SampleId) -> bool {
        let Some(group) = self.groups.get_mut(&id.group) else { return false };
        let Some(slot) = group.samples.get_mut(id.index as usize) else { return false };
        match slot.state {
            SampleState::Missing | SampleState::Generating { .. } => return false,
            SampleState::Judged { .. } => {
                self.complete -= usize::from(group.unjudged == 0);
                group.unjudged += 1;
            }
            SampleState::Verifying => {
                let (_, loans) = self.loans_matching(|_| false, |loan| loan.item == id);
                for lease in loans {
                    self.end_sample_lease(lease);
                }
            }
            SampleState::Unverified => self.unverified.retain(|waiting| *waiting != id),
        }
        self.clear_sample(id);
        let Some(slot) = self.groups.get_mut(&id.group).and_then(|group| group.samples.get_mut(id.index as usize))
        else {
            return false;
        };
        // The next attempt, because the noise of the lost one is spent.
        *slot = Slot { replaced: slot.replaced + 1, ..Slot::empty() };
        self.wait_first(id.group);
        true
    }

    /// Discards the samples of a group and queues it again.
    pub(crate) fn restart_group(&mut self, id: GroupId, born: WeightVersion) {
        let Some(mut group) = self.remove(id) else { return };
        group.evictions += 1;
        group.born = born;
        group.started = None;
        group.unjudged = group.samples.len();
        for slot in &mut group.samples {
            *slot = Slot { replaced: slot.replaced, ..Slot::empty() };
        }
        self.groups.insert(id, group);
        self.waiting.push_front(id);
    }

    /// Reissues the open work of a group. Returns whether its tries are used up.
    pub(crate) fn reissue_group(&mut self, id: GroupId, max_attempts: u32, now: Duration) -> bool {
        let Some(group) = self.groups.get_mut(&id) else { return false };
        group.overdue += 1;
        group.started = Some(now);
        if group.overdue >= max_attempts {
            return true;
        }
        let (groups, samples) = self.loans_matching(|loan| loan.item == id, |loan| loan.item.group == id);
        self.end_loans(&groups, &samples);
        false
    }

    /// Removes a group and all its leases.
    pub(crate) fn remove(&mut self, id: GroupId) -> Option<Group> {
        let group = self.groups.remove(&id)?;
        self.complete -= usize::from(group.unjudged == 0);
        self.waiting.retain(|waiting| *waiting != id);
        self.unverified.retain(|sample| sample.group != id);
        let (groups, samples) = self.loans_matching(|loan| loan.item == id, |loan| loan.item.group == id);
        for lease in groups {
            self.end_group_lease(lease);
        }
        for lease in samples {
            self.end_sample_lease(lease);
        }
        self.suspects.remove(&id);
        self.accused.remove(&id);
        self.suspect_samples.retain(|sample| sample.group != id);
        self.accused_samples.retain(|sample, _| sample.group != id);
        Some(group)
    }

    /// Clears suspicions and accusations of a sample.
    fn clear_sample(&mut self, id: SampleId) {
        self.suspect_samples.remove(&id);
        self.accused_samples.remove(&id);
    }

    fn loans_matching(
        &self,
        group: impl Fn(&Lease<GroupId>) -> bool,
        sample: impl Fn(&Lease<SampleId>) -> bool,
    ) -> (Vec<LeaseId>, Vec<LeaseId>) {
        let groups = self.group_loans.iter().filter(|(_, loan)| group(loan)).map(|(lease, _)| *lease).collect();
        let samples = self.sample_loans.iter().filter(|(_, loan)| sample(loan)).map(|(lease, _)| *lease).collect();
        (groups, samples)
    }

    /// Leases without progress since these times.
    pub(crate) fn silent_loans(
        &self,
        groups: Option<Duration>,
        samples: Option<Duration>,
    ) -> (Vec<LeaseId>, Vec<LeaseId>) {
        self.loans_matching(
            |loan| groups.is_some_and(|limit| loan.since < limit),
            |loan| samples.is_some_and(|limit| loan.since < limit),
        )
    }

    /// Incomplete groups whose work was first leased before `limit`.
    pub(crate) fn overdue_groups(&self, limit: Duration) -> Vec<GroupId> {
        let overdue = |group: &Group| group.unjudged > 0 && group.started.is_some_and(|started| started < limit);
        self.groups.iter().filter(|(_, group)| overdue(group)).map(|(id, _)| *id).collect()
    }

    /// Ends leases; the work returns to the front of the queue, oldest first. Returns how many there were.
    pub(crate) fn end_loans(&mut self, groups: &[LeaseId], samples: &[LeaseId]) -> usize {
        let mut ended = 0;
        // In reverse, because each returns to the front.
        for lease in groups.iter().rev() {
            ended += usize::from(self.group_loans.contains_key(lease));
            self.give_back(*lease);
        }
        for lease in samples.iter().rev() {
            let Some(loan) = self.end_sample_lease(*lease) else { continue };
            ended += 1;
            self.slot_mut(loan.item).state = SampleState::Unverified;
            self.unverified.push_front(loan.item);
        }
        ended
    }

    /// Ends all leases; the work returns to the queues. Returns how many there were.
    pub(crate) fn end_all_loans(&mut self) -> usize {
        let (groups, samples) = self.loans_matching(|_| true, |_| true);
        self.end_loans(&groups, &samples)
    }

    /// Removes all groups with tokens of weights newer than `version`, and ends all group leases, since such tokens may
    /// be on the way. Returns the removed groups.
    pub(crate) fn forget_newer(&mut self, version: WeightVersion) -> Vec<GroupId> {
        let loans: Vec<LeaseId> = self.group_loans.keys().copied().collect();
        self.end_loans(&loans, &[]);
        let is_newer = |group: &Group| !group.is_of(version);
        let newer: Vec<GroupId> = self.groups.iter().filter(|(_, group)| is_newer(group)).map(|(id, _)| *id).collect();
        for id in &newer {
            self.remove(*id);
        }
        newer
    }

    /// Removes the groups that were drawn last, until `most` are left. Returns their ids.
    pub(crate) fn forget_beyond(&mut self, most: usize) -> Vec<GroupId> {
        let last: Vec<GroupId> = self.groups.keys().skip(most).copied().collect();
        for id in &last {
            self.remove(*id);
        }
        last
    }

    pub(crate) fn depths(&self) -> QueueDepths {
        QueueDepths {
            groups_waiting: self.waiting.len(),
            groups_generating: self.group_loans.len(),
            samples_waiting: self.unverified.len(),
            samples_verifying: self.sample_loans.len(),
            groups_complete: self.complete,
            groups_wanted: 0,
        }
    }

    /// The oldest incomplete group, when it was drawn, and a worker that holds it or a sample of it.
    pub(crate) fn oldest_open(&self) -> Option<(GroupId, Duration, Option<WorkerId>)> {
        let id = self.groups.iter().find(|(_, group)| group.unjudged > 0).map(|(id, _)| *id)?;
        self.open(id)
    }

    /// The same for a given group.
    pub(crate) fn open(&self, id: GroupId) -> Option<(GroupId, Duration, Option<WorkerId>)> {
        let group = self.groups.get(&id)?;
        let generating = self.group_loans.values().find(|loan| loan.item == id).map(|loan| loan.worker);
        let verifying = || self.sample_loans.values().find(|loan| loan.item.group == id).map(|loan| loan.worker);
        Some((id, group.drawn, generating.or_else(verifying)))
    }

    /// Samples of a group that have to be generated, and samples without a verdict.
    pub(crate) fn open_samples(&self, id: GroupId) -> Option<(usize, usize)> {
        let group = self.groups.get(&id)?;
        let is_open = |slot: &&Slot| matches!(slot.state, SampleState::Missing | SampleState::Generating { .. });
        Some((group.samples.iter().filter(is_open).count(), group.unjudged))
    }

    /// What has gone wrong with an incomplete group so far, in words.
    pub(crate) fn troubles(&self, id: GroupId) -> Vec<String> {
        let Some(group) = self.groups.get(&id) else { return Vec::new() };
        let times = |count: u32| if count == 1 { "once".to_owned() } else { format!("{count} times") };
        let failures: u32 = group.samples.iter().map(|slot| slot.failures).sum();
        let replaced: u32 = group.samples.iter().map(|slot| slot.replaced).sum();
        let deaths = group.samples.iter().map(|slot| slot.deaths.len()).max().unwrap_or(0).max(group.deaths.len());
        let deadly = u32::try_from(deaths).unwrap_or(u32::MAX);
        let all = [
            (group.overdue, "took too long"),
            (group.evictions, "started again with newer weights"),
            (failures, "verifications failed"),
            (replaced, "samples given up"),
            (deadly, "a worker died that held it"),
        ];
        all.into_iter()
            .filter(|(count, _)| *count > 0)
            .map(|(count, what)| format!("{what} {}", times(count)))
            .collect()
    }

    /// Whether a complete group has no contrast between its samples.
    pub(crate) fn is_uniform(&self, id: GroupId, by: UniformBy) -> bool {
        self.groups.get(&id).is_some_and(|group| group.is_uniform(by))
    }
}

#[cfg(test)]
mod tests;
