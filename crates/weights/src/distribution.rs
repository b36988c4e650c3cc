//! Who fetches a version from whom.
//!
//! The learner that published is the root of a tree in which every host that fetches also hands on, so that it sends each
//! version [`FAN_OUT`] times, however many hosts there are. A host hands on the pieces that it has verified, so depth costs
//! the time of a piece, not that of the whole. Pure bookkeeping: the coordinator asks it within a call.

use std::collections::{BTreeMap, BTreeSet};

use pacs_types::WorkerId;

use crate::{Source, VersionId};
use pacs_runtime::net::PeerRole;

/// Hosts that fetch from one source at the same time, as long as there is another one. With two the tree is half as fast as one
/// transfer and no deeper than the logarithm of the hosts; with one it would be a chain, which every slow host holds up.
pub const FAN_OUT: usize = 2;

/// The transfers of one version at a time.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    version: Option<VersionId>,
    /// Data address of the learner; empty when it serves none.
    root: String,
    hosts: BTreeMap<WorkerId, Host>,
}

#[derive(Clone, Debug, Default)]
struct Host {
    /// Where it hands on; empty when it does not.
    address: String,
    /// Whom it fetches from.
    from: Option<Place>,
    /// It has all of it.
    whole: bool,
    failed: BTreeSet<Place>,
}

/// A source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Root,
    Host(WorkerId),
}

impl Distribution {
    /// Begins with a version; nothing changes when it is the one that is distributed already.
    pub fn announce(&mut self, version: VersionId, root: &str) {
        if self.version != Some(version) || self.root != root {
            *self = Self { version: Some(version), root: root.to_owned(), hosts: BTreeMap::new() };
        }
    }

    /// The version that is distributed.
    #[must_use]
    pub fn version(&self) -> Option<VersionId> {
        self.version
    }

    /// Notes that a worker that was given a source has all of it.
    pub fn holds(&mut self, worker: WorkerId) {
        if let Some(host) = self.hosts.get_mut(&worker) {
            (host.whole, host.from) = (true, None);
        }
    }

    /// Forgets the workers that are gone; who fetches from them will say that they failed.
    pub fn retain(&mut self, is_member: impl Fn(WorkerId) -> bool) {
        self.hosts.retain(|worker, _| is_member(*worker));
        let gone = |place: Option<Place>, hosts: &BTreeMap<WorkerId, Host>| match place {
            Some(Place::Host(worker)) => !hosts.contains_key(&worker),
            Some(Place::Root) | None => false,
        };
        let orphans: Vec<WorkerId> =
            self.hosts.iter().filter(|(_, host)| gone(host.from, &self.hosts)).map(|(worker, _)| *worker).collect();
        for worker in orphans {
            self.hosts.entry(worker).or_default().from = None;
        }
    }

    /// Where `worker`, which hands on at `address` (empty: it does not), is to fetch the version. The same source is named until
    /// it is among the `failed` ones; a source that failed for a worker is named to it again only when there is no other.
    pub fn find(&mut self, worker: WorkerId, address: &str, failed: &[String]) -> Vec<Source> {
        let known: Vec<Place> =
            self.places().filter(|place| failed.iter().any(|f| f == self.address(*place))).collect();
        let host = self.hosts.entry(worker).or_default();
        address.clone_into(&mut host.address);
        host.whole = false;
        host.failed.extend(known);
        host.from = host.from.filter(|from| !host.failed.contains(from));
        let from = host.from.or_else(|| self.best(worker)).or_else(|| {
            // Everybody has failed once: what was a break may be over.
            self.hosts.entry(worker).or_default().failed.clear();
            self.best(worker)
        });
        self.hosts.entry(worker).or_default().from = from;
        let role = |place| if place == Place::Root { PeerRole::Learner } else { PeerRole::Rollout };
        let source = |place| Source { address: self.address(place).to_owned(), role: role(place) };
        from.map(source).into_iter().collect()
    }

    /// The source closest to the root that has room, and of several the least loaded one; when none has room, the least loaded.
    fn best(&self, worker: WorkerId) -> Option<Place> {
        let mut loads: BTreeMap<Place, usize> = BTreeMap::new();
        for host in self.hosts.values() {
            host.from.into_iter().for_each(|from| *loads.entry(from).or_default() += 1);
        }
        let failed = self.hosts.get(&worker).map(|host| &host.failed);
        let load = |place| loads.get(&place).copied().unwrap_or(0);
        let candidates = self.places().filter_map(|place| {
            let depth = self.depth(place, worker)?;
            let failed = failed.is_some_and(|failed| failed.contains(&place));
            let full = load(place).saturating_sub(FAN_OUT - 1);
            // The learner has other work for its link.
            let key = (full, depth, load(place), place == Place::Root, place);
            (!failed && !self.address(place).is_empty()).then_some((key, place))
        });
        candidates.min().map(|(_, place)| place)
    }

    fn places(&self) -> impl Iterator<Item = Place> {
        std::iter::once(Place::Root).chain(self.hosts.keys().copied().map(Place::Host))
    }

    fn address(&self, place: Place) -> &str {
        match place {
            Place::Root => &self.root,
            Place::Host(worker) => self.hosts.get(&worker).map_or("", |host| &host.address),
        }
    }

    /// Transfers between the root and a place; `None` when it gets nothing, or gets it from `asker`.
    fn depth(&self, place: Place, asker: WorkerId) -> Option<usize> {
        let mut depth = 0;
        let mut place = place;
        loop {
            let Place::Host(worker) = place else { return Some(depth) };
            let host = self.hosts.get(&worker).filter(|_| worker != asker)?;
            if host.whole {
                return Some(depth);
            }
            place = host.from?;
            depth += 1;
        }
    }
}

#[cfg(test)]
mod tests;
