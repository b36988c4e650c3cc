//! The members of a run. Names and roles are indexed, because every worker call looks them up.

use std::collections::{BTreeMap, HashMap};

use pacs_types::{Role, WorkerId};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::worker::{Drain, Worker};

/// The members of a run, by registration.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Roster {
    members: BTreeMap<WorkerId, Worker>,
    /// Names are per role: a verifier may have the name of a learner without affecting it.
    by_name: [HashMap<String, WorkerId>; 3],
    rollouts: Count,
    learners: Count,
    verifiers: Count,
}

/// Member counts of one role.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Count {
    all: usize,
    /// Members that are to leave.
    draining: usize,
}

impl Roster {
    pub(crate) fn insert(&mut self, id: WorkerId, worker: Worker) {
        self.by_name[slots_of(worker.role)].insert(worker.name.clone(), id);
        let count = self.count_mut(worker.role);
        count.all += 1;
        count.draining += usize::from(worker.draining().is_some());
        self.members.insert(id, worker);
    }

    pub(crate) fn remove(&mut self, id: WorkerId) -> Option<Worker> {
        let worker = self.members.remove(&id)?;
        // A newer registration may hold the name by now.
        let names = &mut self.by_name[slots_of(worker.role)];
        if names.get(&worker.name) == Some(&id) {
            names.remove(&worker.name);
        }
        let count = self.count_mut(worker.role);
        count.all -= 1;
        count.draining -= usize::from(worker.draining().is_some());
        Some(worker)
    }

    /// Marks a member as draining, and counts it.
    pub(crate) fn drain(&mut self, id: WorkerId, why: Drain) {
        let Some(worker) = self.members.get_mut(&id) else { return };
        let (role, before) = (worker.role, worker.draining());
        worker.drain(why);
        self.count_mut(role).draining += usize::from(before.is_none());
    }

    pub(crate) fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.members.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        self.members.get_mut(&id)
    }

    /// The member with this role and name.
    pub(crate) fn find(&self, role: Role, name: &str) -> Option<(WorkerId, &Worker)> {
        let id = *self.by_name[slots_of(role)].get(name)?;
        Some((id, self.members.get(&id)?))
    }

    /// All members with this name, at most one per role.
    pub(crate) fn find_all(&self, name: &str) -> Vec<(WorkerId, &Worker)> {
        Role::ALL.into_iter().filter_map(|role| self.find(role, name)).collect()
    }

    /// Members in order of registration.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (WorkerId, &Worker)> {
        self.members.iter().map(|(id, worker)| (*id, worker))
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &Worker> {
        self.members.values()
    }

    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut Worker> {
        self.members.values_mut()
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = WorkerId> {
        self.members.keys().copied()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    pub(crate) fn count(&self, role: Role) -> usize {
        self.count_of(role).all
    }

    /// Number of members of a role that may get new work.
    pub(crate) fn staying(&self, role: Role) -> usize {
        let count = self.count_of(role);
        count.all - count.draining
    }

    fn count_of(&self, role: Role) -> Count {
        match role {
            Role::Rollout => self.rollouts,
            Role::Learner => self.learners,
            Role::Verifier => self.verifiers,
        }
    }

    fn count_mut(&mut self, role: Role) -> &mut Count {
        match role {
            Role::Rollout => &mut self.rollouts,
            Role::Learner => &mut self.learners,
            Role::Verifier => &mut self.verifiers,
        }
    }
}

fn slots_of(role: Role) -> usize {
    match role {
        Role::Rollout => 0,
        Role::Learner => 1,
        Role::Verifier => 2,
    }
}

impl FromIterator<(WorkerId, Worker)> for Roster {
    fn from_iter<I: IntoIterator<Item = (WorkerId, Worker)>>(members: I) -> Self {
        let mut roster = Self::default();
        members.into_iter().for_each(|(id, worker)| roster.insert(id, worker));
        roster
    }
}

/// Only the members are stored; the indexes are derived from them.
impl Serialize for Roster {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.members.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Roster {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(BTreeMap::<WorkerId, Worker>::deserialize(deserializer)?.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::worker::Process;

    fn worker(role: Role, name: &str) -> Worker {
        let process = Process { host: "host".into(), pid: 1, started: 0 };
        Worker::new(role, name.into(), process, String::new(), Duration::ZERO)
    }

    #[test]
    fn counts_follow_who_comes_leaves_and_is_to_leave() {
        let mut roster = Roster::default();
        for id in 0..5 {
            roster.insert(WorkerId(id), worker(Role::Rollout, &format!("rollout-{id}")));
        }
        roster.insert(WorkerId(9), worker(Role::Verifier, "verifier-0"));
        roster.drain(WorkerId(1), Drain::Ending);
        roster.drain(WorkerId(1), Drain::Operator);
        roster.drain(WorkerId(2), Drain::Ending);
        assert_eq!((roster.count(Role::Rollout), roster.staying(Role::Rollout)), (5, 3));
        assert!(roster.remove(WorkerId(2)).is_some() && roster.remove(WorkerId(2)).is_none());
        assert_eq!((roster.count(Role::Rollout), roster.staying(Role::Rollout)), (4, 3));
        assert_eq!((roster.staying(Role::Verifier), roster.count(Role::Learner)), (1, 0));
        let text = serde_json::to_string(&roster).unwrap();
        assert_eq!(serde_json::from_str::<Roster>(&text).unwrap(), roster);
    }

    #[test]
    fn a_name_leads_to_its_newest_registration() {
        let mut roster = Roster::default();
        roster.insert(WorkerId(1), worker(Role::Rollout, "a"));
        roster.insert(WorkerId(2), worker(Role::Rollout, "a"));
        roster.remove(WorkerId(1));
        assert_eq!(roster.find(Role::Rollout, "a").map(|(id, _)| id), Some(WorkerId(2)));
        roster.remove(WorkerId(2));
        assert!(roster.find(Role::Rollout, "a").is_none() && roster.is_empty());
    }

    #[test]
    fn roles_have_names_of_their_own() {
        let mut roster = Roster::default();
        roster.insert(WorkerId(1), worker(Role::Learner, "a"));
        roster.insert(WorkerId(2), worker(Role::Verifier, "a"));
        assert_eq!(roster.find(Role::Learner, "a").map(|(id, _)| id), Some(WorkerId(1)));
        assert_eq!(roster.find_all("a").len(), 2);
        roster.remove(WorkerId(2));
        assert_eq!(roster.find(Role::Learner, "a").map(|(id, _)| id), Some(WorkerId(1)));
        assert!(roster.find(Role::Verifier, "a").is_none());
    }
}
