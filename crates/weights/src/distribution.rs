//! Assigns to each host the source that it fetches a version from.
//!
//! The learner that published a version is the root of a tree in which every fetching host also relays, so the learner
//! sends each version [`FAN_OUT`] times, however many hosts there are. A host relays pieces as soon as they are
//! verified, so each level costs the time of a piece, not of the whole version. Pure bookkeeping: the coordinator uses
//! it within calls.

use std::collections::{BTreeMap, BTreeSet};

use pacs_types::WorkerId;

use crate::{Source, VersionId};
use pacs_runtime::net::PeerRole;

/// Hosts that may fetch from one source at the same time while there are others. With two, the tree takes
/// twice the time of one transfer and its depth is logarithmic in the hosts; with one it would be a
/// chain, which any slow host delays.
pub const FAN_OUT: usize = 2;

/// The transfers of the current version.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    version: Option<VersionId>,
    /// Data address of the learner; empty if it serves none.
    root: String,
    hosts: BTreeMap<WorkerId, Host>,
}

#[derive(Clone, Debug, Default)]
struct Host {
    /// Address at which it relays; empty if it does not.
    address: String,
    /// Source that it fetches from.
    from: Option<Place>,
    /// Whether it has the whole version.
    whole: bool,
    failed: BTreeSet<Place>,
}

/// A possible source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Root,
    Host(WorkerId),
}

impl Distribution {
    /// Starts the distribution of a version; does nothing if that is the current one.
    pub fn announce(&mut self, version: VersionId, root: &str) {
        if self.version != Some(version) || self.root != root {
            *self = Self { version: Some(version), root: root.to_owned(), hosts: BTreeMap::new() };
        }
    }

    /// The version in distribution; `None` before the first.
    #[must_use]
    pub fn version(&self) -> Option<VersionId> {
        self.version
    }

    /// Records that a worker has the whole version.
    pub fn holds(&mut self, worker: WorkerId) {
        if let Some(host) = self.hosts.get_mut(&worker) {
            (host.whole, host.from) = (true, None);
        }
    }

    /// Removes workers that are gone; hosts that fetch from them will report a failure.
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

    /// Assigns a source to `worker`, which relays at `address` (empty: it does not). The assignment stays the same
    /// until the source is among the `failed` ones; a source that failed for a worker is assigned to it again only if
    /// there is no other.
    pub fn find(&mut self, worker: WorkerId, address: &str, failed: &[String]) -> Vec<Source> {
        let known: Vec<Place> =
            self.places().filter(|place| failed.iter().any(|f| f == self.address(*place))).collect();
        let host = self.hosts.entry(worker).or_default();
        address.clone_into(&mut host.address);
        // A host that asks does not have the version (any more).
        host.whole = false;
        host.failed.extend(known);
        host.from = host.from.filter(|from| !host.failed.contains(from));
        let from = host.from.or_else(|| self.best(worker)).or_else(|| {
            // All sources have failed once, so earlier failures are forgiven.
            self.hosts.entry(worker).or_default().failed.clear();
            self.best(worker)
        });
        self.hosts.entry(worker).or_default().from = from;
        let role = |place| if place == Place::Root { PeerRole::Learner } else { PeerRole::Rollout };
        let source = |place| Source { address: self.address(place).to_owned(), role: role(place) };
        from.map(source).into_iter().collect()
    }

    /// The source with room that is closest to the root, the least loaded of several; if
    /// none has room, the least loaded.
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
            // The learner comes last, because its link has other work.
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

    /// Number of transfers from the root to a place; `None` if it receives nothing, or receives it from `asker`.
    fn depth(&self, place: Place, asker: WorkerId) -> Option<usize> {
        let mut depth = 0;
        let mut place = place;
        loop {
            let Place::Host(worker) = place else { return Some(depth) };
            let host = self.hosts.get(&worker).filter(|_| worker != asker)?;
            // A host with the whole version is as good as the root, whatever it fetched from.
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
