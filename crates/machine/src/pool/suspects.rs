//! What kills its workers: groups that do so to rollout workers, answers that do so to verifiers.
//!
//! A worker holds many things when it dies, and most of them are innocent. So each death is held against all of them, but
//! what is one death short of the budget is a suspect: it is leased alone, to a worker that holds nothing else, and only the
//! death of that one accuses it. What is innocent clears itself by being done.
//!
//! Workers that are lost together accuse the machine room (a preempted fleet, a switch): a death counts against what the
//! worker held only while few workers die that held other things ([`Pool::acquit`]). Whether they do shows within a
//! window around the death, so what is accused is neither leased nor given up before that is over.

use std::time::Duration;

use pacs_types::{GroupId, Role, SampleId, WorkerId};
use serde::{Deserialize, Serialize};

use super::Pool;

/// What a worker held when it went.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Revoked {
    pub(crate) groups: Vec<GroupId>,
    pub(crate) samples: Vec<SampleId>,
}

impl Revoked {
    /// Leases that ended.
    pub(crate) fn leases(&self) -> usize {
        self.groups.len() + self.samples.len()
    }
}

/// A worker died that held one thing alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Accusation {
    pub(crate) at: Duration,
    /// Who died, and how.
    pub(crate) why: String,
}

/// The death of a worker, as far as it says something of what the worker held.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Death<'a> {
    pub(crate) at: Duration,
    /// Who, and how.
    pub(crate) why: &'a str,
    /// The worker held one thing.
    pub(crate) alone: bool,
    /// Deaths after which a thing is given up, the one in isolation included.
    pub(crate) most: u32,
}

impl Pool {
    /// The next group for a worker: its place in the queue, its missing samples, and whether it is leased alone.
    pub(crate) fn next_for(&self, worker: WorkerId) -> Option<(usize, usize, bool)> {
        let holds = self.held.contains_key(&worker);
        let mut of_worker = self.group_loans.values().filter(|loan| loan.worker == worker);
        if holds && !self.suspects.is_empty() && of_worker.any(|loan| self.suspects.contains(&loan.item)) {
            return None;
        }
        let fits = |id: &GroupId| !self.accused.contains_key(id) && (!holds || !self.suspects.contains(id));
        let place = self.waiting.iter().position(fits)?;
        let id = self.waiting[place];
        Some((place, self.groups[&id].missing(), self.suspects.contains(&id)))
    }

    /// Whether a worker has a sample on lease.
    pub(crate) fn holds_sample(&self, worker: WorkerId) -> bool {
        self.held_samples.contains_key(&worker)
    }

    /// Whether a worker has a sample on lease that is to be alone with it.
    pub(crate) fn holds_suspect_sample(&self, worker: WorkerId) -> bool {
        let is_suspect = |item: &SampleId| self.suspect_samples.contains(item);
        !self.suspect_samples.is_empty()
            && self.holds_sample(worker)
            && self.sample_loans.values().any(|loan| loan.worker == worker && is_suspect(&loan.item))
    }

    pub(crate) fn is_suspect_sample(&self, id: SampleId) -> bool {
        self.suspect_samples.contains(&id)
    }

    /// Ends every lease of a worker; the work waits again, first in line.
    pub(crate) fn revoke_worker(&mut self, worker: WorkerId) -> Revoked {
        let (groups, samples) = self.loans_matching(|loan| loan.worker == worker, |loan| loan.worker == worker);
        let revoked = Revoked {
            groups: groups.iter().map(|lease| self.group_loans[lease].item).collect(),
            samples: samples.iter().map(|lease| self.sample_loans[lease].item).collect(),
        };
        self.end_loans(&groups, &samples);
        revoked
    }

    /// Holds the death of a worker against what it held.
    pub(crate) fn hold_against(&mut self, revoked: &Revoked, death: Death<'_>) {
        for id in &revoked.groups {
            let Some(group) = self.groups.get_mut(id) else { continue };
            match verdict(&mut group.deaths, self.suspects.contains(id), death) {
                Suspicion::None => {}
                Suspicion::Suspect => drop(self.suspects.insert(*id)),
                Suspicion::Accused => drop(self.accused.insert(*id, death.accusation())),
            }
        }
        for id in &revoked.samples {
            let was_suspect = self.suspect_samples.contains(id);
            match verdict(&mut self.slot_mut(*id).deaths, was_suspect, death) {
                Suspicion::None => {}
                Suspicion::Suspect => drop(self.suspect_samples.insert(*id)),
                Suspicion::Accused => drop(self.accused_samples.insert(*id, death.accusation())),
            }
        }
    }

    /// Takes back what deaths of this role since a time say, of everything that they say too little of: `is_void` is asked
    /// how many of them held the thing. Returns how much was taken back.
    pub(crate) fn acquit(&mut self, role: Role, since: Duration, most: u32, is_void: impl Fn(usize) -> bool) -> usize {
        let void = |deaths: &mut Vec<Duration>| {
            let own = deaths.iter().filter(|at| **at > since).count();
            let void = own > 0 && is_void(own);
            if void {
                deaths.retain(|at| *at <= since);
            }
            void
        };
        let is_suspect = |deaths: &[Duration]| deaths.len() as u64 + 1 >= u64::from(most);
        let mut acquitted = 0;
        for (id, group) in &mut self.groups {
            match role {
                Role::Rollout if void(&mut group.deaths) => {
                    acquitted += 1;
                    self.accused.remove(id);
                    if !is_suspect(&group.deaths) {
                        self.suspects.remove(id);
                    }
                }
                Role::Verifier => {
                    for (index, slot) in (0u32..).zip(&mut group.samples) {
                        if !void(&mut slot.deaths) {
                            continue;
                        }
                        let sample = SampleId { group: *id, index };
                        acquitted += 1;
                        self.accused_samples.remove(&sample);
                        if !is_suspect(&slot.deaths) {
                            self.suspect_samples.remove(&sample);
                        }
                    }
                }
                Role::Rollout | Role::Learner => {}
            }
        }
        acquitted
    }

    /// What was accused before `limit`: nothing has spoken for it since.
    pub(crate) fn condemnable(&self, limit: Duration) -> (Vec<GroupId>, Vec<SampleId>) {
        let groups = self.accused.iter().filter(|(_, accusation)| accusation.at < limit).map(|(id, _)| *id);
        let samples = self.accused_samples.iter().filter(|(_, accusation)| accusation.at < limit).map(|(id, _)| *id);
        (groups.collect(), samples.collect())
    }

    /// What a group is accused of.
    pub(crate) fn accusation(&self, id: GroupId) -> Option<&Accusation> {
        self.accused.get(&id)
    }

    /// What a sample is accused of.
    pub(crate) fn sample_accusation(&self, id: SampleId) -> Option<&Accusation> {
        self.accused_samples.get(&id)
    }
}

impl Death<'_> {
    fn accusation(self) -> Accusation {
        Accusation { at: self.at, why: self.why.to_owned() }
    }
}

/// What a worker's death makes of something that it held.
enum Suspicion {
    None,
    Suspect,
    Accused,
}

fn verdict(deaths: &mut Vec<Duration>, was_suspect: bool, death: Death<'_>) -> Suspicion {
    let short_of_one = death.most.saturating_sub(1) as usize;
    if death.most <= 1 || (was_suspect && death.alone) {
        deaths.push(death.at);
        return Suspicion::Accused;
    }
    // Not beyond what makes it a suspect: with other things held, it need not have been the one. The newest ones stay,
    // which may still turn out to be void.
    if deaths.len() >= short_of_one {
        deaths.remove(0);
    }
    deaths.push(death.at);
    if deaths.len() >= short_of_one { Suspicion::Suspect } else { Suspicion::None }
}

/// A map as a list: a sample's id is no name.
pub(super) mod pairs {
    use std::collections::BTreeMap;

    use pacs_types::SampleId;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Accusation;

    pub(crate) fn serialize<S: Serializer>(
        accused: &BTreeMap<SampleId, Accusation>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(accused)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<SampleId, Accusation>, D::Error> {
        Ok(Vec::<(SampleId, Accusation)>::deserialize(deserializer)?.into_iter().collect())
    }
}
