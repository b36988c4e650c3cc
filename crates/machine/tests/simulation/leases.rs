//! Leases as reconstructed from answers and events alone.

use std::collections::{BTreeMap, BTreeSet};

use pacs_machine::{GroupGrant, SampleGrant};
use pacs_types::{GroupId, LeaseId, Role, SampleId, WorkerId};

/// All granted leases, and which workers may get new ones.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    /// Role and name of each registration.
    names: BTreeMap<WorkerId, (Role, String)>,
    /// Newest registration of each name.
    holders: BTreeMap<(Role, String), WorkerId>,
    /// Workers that are to leave.
    leaving: BTreeSet<WorkerId>,
    /// Each worker's newest request that was granted leases, and those leases.
    answered: BTreeMap<WorkerId, (u64, Vec<LeaseId>)>,
    /// Every lease ever granted.
    seen: BTreeSet<LeaseId>,
    /// Samples on lease to rollout workers.
    generating: BTreeMap<SampleId, (LeaseId, WorkerId)>,
    /// Samples on lease to verifiers.
    judging: BTreeMap<SampleId, (LeaseId, WorkerId)>,
    /// Leases that the watchdog may have ended, which depends on what the run was waiting for.
    doubtful: BTreeSet<LeaseId>,
    /// Failed verifications of each present answer.
    failures: BTreeMap<SampleId, u32>,
    /// Number of workers that died while holding a group.
    deaths: BTreeMap<GroupId, u32>,
    pub(crate) paused: bool,
}

impl Leases {
    pub(crate) fn registered(&mut self, worker: WorkerId, role: Role, name: &str) {
        self.names.insert(worker, (role, name.to_owned()));
        self.holders.insert((role, name.to_owned()), worker);
    }

    pub(crate) fn role(&self, worker: WorkerId) -> Option<Role> {
        self.names.get(&worker).map(|(role, _)| *role)
    }

    /// Checks that a worker that was heard has not been replaced.
    pub(crate) fn heard(&self, worker: WorkerId) {
        let name = self.names.get(&worker).unwrap_or_else(|| panic!("{worker} was heard and has never registered"));
        assert_eq!(self.holders.get(name), Some(&worker), "{worker} was heard, and another process has its name");
    }

    pub(crate) fn leaves(&mut self, worker: WorkerId) {
        self.leaving.insert(worker);
    }

    /// An operator drains all workers of a name.
    pub(crate) fn drained(&mut self, name: &str) {
        let drained = self.holders.iter().filter(|((_, held), _)| held == name).map(|(_, worker)| *worker);
        self.leaving.extend(drained);
    }

    /// Checks that a worker may be granted a new lease.
    fn may_lease(&mut self, worker: WorkerId, lease: LeaseId) -> bool {
        self.heard(worker);
        let is_new = self.seen.insert(lease);
        assert!(!is_new || !self.paused, "{lease} was given out while the run was paused");
        assert!(!is_new || !self.leaving.contains(&worker), "{lease} was given to {worker}, which is to leave");
        is_new
    }

    /// Checks that a retried request is granted the leases that its first try was granted.
    fn answers(&mut self, worker: WorkerId, request: u64, leases: Vec<LeaseId>) {
        let others = || leases.iter().any(|lease| !self.seen.contains(lease));
        if let Some((_, given)) = self.answered.get(&worker).filter(|(newest, _)| *newest == request && others()) {
            let mut open = self.generating.values().chain(self.judging.values()).map(|(lease, _)| lease);
            let open = open.find(|lease| given.contains(lease) && !self.doubtful.contains(lease));
            assert_eq!(open, None, "{worker} asked again, and was given {leases:?} as well");
        }
        if !leases.is_empty() {
            self.answered.insert(worker, (request, leases));
        }
    }

    pub(crate) fn groups(&mut self, worker: WorkerId, request: u64, grants: &[GroupGrant]) {
        self.answers(worker, request, grants.iter().map(|grant| grant.lease).collect());
        for grant in grants {
            let is_new = self.may_lease(worker, grant.lease);
            for wanted in grant.samples.iter().filter(|_| is_new) {
                let sample = SampleId { group: grant.group, index: wanted.index };
                let before = self.generating.insert(sample, (grant.lease, worker));
                let before = before.filter(|(lease, _)| !self.doubtful.contains(lease));
                assert_eq!(before, None, "{sample} is generated already, and was given to {worker}, too");
            }
        }
    }

    pub(crate) fn samples(&mut self, worker: WorkerId, request: u64, grants: &[SampleGrant], max_attempts: u32) {
        self.answers(worker, request, grants.iter().map(|grant| grant.lease).collect());
        for SampleGrant { lease, sample } in grants {
            if self.may_lease(worker, *lease) {
                let before = self.judging.insert(*sample, (*lease, worker));
                let before = before.filter(|(lease, _)| !self.doubtful.contains(lease));
                assert_eq!(before, None, "{sample} is judged already, and was given to {worker}, too");
                let failures = self.failures.get(sample).copied().unwrap_or(0);
                assert!(failures < max_attempts, "{sample} has failed {failures} times and is judged again");
            }
        }
    }

    /// Checks that an accepted sample came under the lease that asks for it.
    pub(crate) fn generated(&mut self, worker: WorkerId, lease: LeaseId, sample: SampleId) {
        self.heard(worker);
        let open = self.generating.remove(&sample);
        assert_eq!(open, Some((lease, worker)), "{sample} was taken under {lease} of {worker}");
    }

    /// Checks that an accepted verdict came under the lease that asks for it.
    pub(crate) fn judged(&mut self, worker: WorkerId, lease: LeaseId, sample: SampleId) {
        self.heard(worker);
        let open = self.judging.remove(&sample);
        assert_eq!(open, Some((lease, worker)), "a verdict on {sample} was taken under {lease} of {worker}");
    }

    pub(crate) fn verification_failed(&mut self, lease: LeaseId, sample: SampleId) {
        if self.judging.get(&sample).is_some_and(|(open, _)| *open == lease) {
            self.judging.remove(&sample);
            *self.failures.entry(sample).or_default() += 1;
        }
    }

    /// These leases have lapsed.
    pub(crate) fn lapsed(&mut self, groups: &[LeaseId], samples: &[LeaseId]) {
        self.generating.retain(|_, (lease, _)| !groups.contains(lease));
        self.judging.retain(|_, (lease, _)| !samples.contains(lease));
    }

    /// The watchdog acted, so any lease may have ended.
    pub(crate) fn stalled(&mut self) {
        let open = self.generating.values().chain(self.judging.values());
        self.doubtful = open.map(|(lease, _)| *lease).collect();
    }

    pub(crate) fn all_lapsed(&mut self) {
        self.generating.clear();
        self.judging.clear();
    }

    /// A worker died, which ends its leases.
    pub(crate) fn lost(&mut self, worker: WorkerId) {
        let held: BTreeSet<GroupId> =
            self.generating.iter().filter(|(_, (_, by))| *by == worker).map(|(sample, _)| sample.group).collect();
        held.into_iter().for_each(|group| *self.deaths.entry(group).or_default() += 1);
        self.left(worker);
    }

    /// A worker deregistered, which ends its leases.
    pub(crate) fn left(&mut self, worker: WorkerId) {
        self.generating.retain(|_, (_, by)| *by != worker);
        self.judging.retain(|_, (_, by)| *by != worker);
    }

    /// Number of workers that died while holding a group.
    pub(crate) fn deaths(&self, group: GroupId) -> u32 {
        self.deaths.get(&group).copied().unwrap_or(0)
    }

    /// The next attempt replaces this sample.
    pub(crate) fn replaced(&mut self, sample: SampleId) {
        self.failures.remove(&sample);
        self.judging.remove(&sample);
    }

    /// The open work of a group was reissued, so its leases are void.
    pub(crate) fn reissued(&mut self, group: GroupId) {
        self.generating.retain(|sample, _| sample.group != group);
        self.judging.retain(|sample, _| sample.group != group);
    }

    pub(crate) fn forget(&mut self, group: GroupId) {
        self.reissued(group);
        self.failures.retain(|sample, _| sample.group != group);
    }

    /// Steps were undone, so leases for their weights are void.
    pub(crate) fn undone(&mut self) {
        self.generating.clear();
    }

    pub(crate) fn start_over(&mut self) {
        self.all_lapsed();
        self.failures.clear();
        self.deaths.clear();
        self.paused = false;
    }
}
