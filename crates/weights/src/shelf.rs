//! What a process relays: versions that it has, and pieces of the one that it is fetching.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{Description, Digest, VersionId, Whole};

/// Bound on relayed versions: the newest, the previous one, and the one being fetched.
const MOST: usize = 3;

/// The versions that a [`DataServer`](crate::DataServer) serves. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Shelf(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    entries: Mutex<Vec<Entry>>,
    /// Notified when a piece is verified or a version is removed.
    changed: Condvar,
}

#[derive(Debug)]
struct Entry {
    description: Description,
    file: Arc<File>,
    /// Which pieces are verified; `None` when all are.
    ready: Option<Vec<bool>>,
}

/// State of a piece.
#[derive(Debug)]
pub(crate) enum Piece {
    /// It is at this range of the file.
    Ready(Arc<File>, Range<u64>),
    /// It is being fetched.
    NotYet,
    /// The version is not here, or has no such piece.
    Unknown,
}

impl Shelf {
    /// Starts to relay a whole version.
    pub fn put(&self, whole: &Whole) {
        self.insert(Entry { description: whole.description().clone(), file: Arc::clone(whole.file()), ready: None });
    }

    /// Starts to relay the verified pieces of a version that is being fetched.
    pub(crate) fn begin(&self, description: &Description, file: &Arc<File>, ready: Vec<bool>) {
        self.insert(Entry { description: description.clone(), file: Arc::clone(file), ready: Some(ready) });
    }

    pub(crate) fn verified(&self, id: VersionId, index: usize) {
        let mut entries = self.lock();
        let entry = entries.iter_mut().find(|entry| entry.description.id() == id);
        if let Some(flag) = entry.and_then(|entry| entry.ready.as_mut()).and_then(|ready| ready.get_mut(index)) {
            *flag = true;
        }
        drop(entries);
        self.0.changed.notify_all();
    }

    /// Stops relaying a version.
    pub(crate) fn remove(&self, id: VersionId) {
        self.lock().retain(|entry| entry.description.id() != id);
        self.0.changed.notify_all();
    }

    /// Stops relaying the versions before `oldest`.
    pub fn retire_before(&self, oldest: VersionId) {
        self.lock().retain(|entry| entry.description.id() >= oldest);
        self.0.changed.notify_all();
    }

    fn insert(&self, entry: Entry) {
        let mut entries = self.lock();
        entries.retain(|other| other.description.id() != entry.description.id());
        entries.push(entry);
        entries.sort_by_key(|entry| entry.description.id());
        let surplus = entries.len().saturating_sub(MOST);
        entries.drain(..surplus);
        drop(entries);
        self.0.changed.notify_all();
    }

    /// Returns a piece, waiting up to `patience` for one that is being fetched.
    pub(crate) fn piece(&self, id: VersionId, digest: &Digest, index: usize, patience: Duration) -> Piece {
        let deadline = Instant::now() + patience;
        let mut entries = self.lock();
        loop {
            let known = |entry: &&Entry| entry.description.id() == id && entry.description.digest() == digest;
            let Some(entry) = entries.iter().find(known).filter(|entry| index < entry.description.pieces()) else {
                return Piece::Unknown;
            };
            if entry.ready.as_ref().is_none_or(|ready| ready[index]) {
                return Piece::Ready(Arc::clone(&entry.file), entry.description.piece(index));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Piece::NotYet;
            }
            entries = self.0.changed.wait_timeout(entries, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A version that is here with all its pieces.
    pub(crate) fn whole(&self, id: VersionId, digest: &Digest) -> Option<(Description, Arc<File>)> {
        let entries = self.lock();
        let known = |entry: &&Entry| entry.description.id() == id && entry.description.digest() == digest;
        let entry = entries.iter().find(known).filter(|entry| entry.ready.is_none())?;
        Some((entry.description.clone(), Arc::clone(&entry.file)))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        // Every change is a single assignment, so a poisoned lock is usable.
        self.0.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
