//! Poison pills: groups that kill rollout workers, and answers that kill verifiers.
//!
//! A worker holds many items when it dies, and most of them are innocent. So each death counts against all of them, but
//! an item that is one death short of the budget becomes a suspect: it is leased in isolation, to a worker that holds
//! nothing else, and only the death of that worker accuses it. An innocent item clears itself by being completed.
//!
//! Mass losses have causes outside of the work (a preempted fleet, a switch). So a death counts against what the worker
//! held only while few workers die that held other things ([`Pool::acquit`]). That shows within a window around the
//! death, so an accused item is neither leased nor given up before the window is over.

use std::time::Duration;

use pacs_types::{GroupId, Role, SampleId, WorkerId};
use serde::{Deserialize, Serialize};

use super::Pool;

/// What a worker held when it was removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Revoked {
    pub(crate) groups: Vec<GroupId>,
    pub(crate) samples: Vec<SampleId>,
}

impl Revoked {
    /// Number of leases that ended.
    pub(crate) fn leases(&self) -> usize {
        self.groups.len() + self.samples.len()
    }
}

/// The death of a worker that held one item in isolation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Accusation {
    pub(crate) at: Duration,
    /// Name of the worker and how it ended.
    pub(crate) why: String,
}

/// The death of a worker, as evidence about what it held.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Death<'a> {
    pub(crate) at: Duration,
    /// Name of the worker and how it ended.
    pub(crate) why: &'a str,
    /// Whether the worker held only one item.
    pub(crate) alone: bool,
    /// Deaths after which an item is given up, including the one in isolation.
    pub(crate) most: u32,
}

impl Pool {
    /// The next group for a worker: its queue position, its number of missing samples, and whether it must be isolated.
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

    /// Whether a worker holds a sample.
    pub(crate) fn holds_sample(&self, worker: WorkerId) -> bool {
        self.held_samples.contains_key(&worker)
    }

    /// Whether a worker holds an isolated sample, so that it must not get another one.
    pub(crate) fn holds_suspect_sample(&self, worker: WorkerId) -> bool {
        let is_suspect = |item: &SampleId| self.suspect_samples.contains(item);
        !self.suspect_samples.is_empty()
            && self.holds_sample(worker)
            && self.sample_loans.values().any(|loan| loan.worker == worker && is_suspect(&loan.item))
    }

    pub(crate) fn is_suspect_sample(&self, id: SampleId) -> bool {
        self.suspect_samples.contains(&id)
    }

    /// Ends all leases of a worker; the work returns to the front of the queues.
    pub(crate) fn revoke_worker(&mut self, worker: WorkerId) -> Revoked {
        let (groups, samples) = self.loans_matching(|loan| loan.worker == worker, |loan| loan.worker == worker);
        let revoked = Revoked {
            groups: groups.iter().map(|lease| self.group_loans[lease].item).collect(),
            samples: samples.iter().map(|lease| self.sample_loans[lease].item).collect(),
        };
        self.end_loans(&groups, &samples);
        revoked
    }

    /// Counts the death of a worker against everything that it held.
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

    /// Withdraws deaths of this role after `since` from every item for which they are no evidence: `is_void` receives
    /// the number of those deaths whose worker held the item. Returns the number of items that changed.
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

    /// Items that were accused before `limit`, so that no mass loss can acquit them any more.
    pub(crate) fn condemnable(&self, limit: Duration) -> (Vec<GroupId>, Vec<SampleId>) {
        let groups = self.accused.iter().filter(|(_, accusation)| accusation.at < limit).map(|(id, _)| *id);
        let samples = self.accused_samples.iter().filter(|(_, accusation)| accusation.at < limit).map(|(id, _)| *id);
        (groups.collect(), samples.collect())
    }

    /// The accusation against a group, if any.
    pub(crate) fn accusation(&self, id: GroupId) -> Option<&Accusation> {
        self.accused.get(&id)
    }

    /// The accusation against a sample, if any.
    pub(crate) fn sample_accusation(&self, id: SampleId) -> Option<&Accusation> {
        self.accused_samples.get(&id)
    }
}

impl Death<'_> {
    fn accusation(self) -> Accusation {
        Accusation { at: self.at, why: self.why.to_owned() }
    }
}

/// Consequence of a death for an item that the worker held.
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
    // Capped at what makes a suspect: the worker held other items, so this one need not be the cause. The newest deaths
    // are kept, because those may still turn out to be void.
    if deaths.len() >= short_of_one {
        deaths.remove(0);
    }
    deaths.push(death.at);
    if deaths.len() >= short_of_one { Suspicion::Suspect } else { Suspicion::None }
}

/// Serializes a map as a list of pairs, because a sample id cannot be a JSON key.
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
