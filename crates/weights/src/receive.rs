//! Obtains a version for this process in the cheapest way available.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::broadcast::{Brought, take_part};
use crate::fetch::fetch_rest;
use crate::{
    Announcement, Claim, FetchError, FetchOptions, Fetched, GroupTransport, HostStore, Part, Shelf, SourceFinder,
    StoreError, VersionId, Whole,
};

/// Interval at which a process looks for a file that another process of this host brings.
const LOOK: Duration = Duration::from_millis(20);
/// Longest wait for another process of this host, plus the time of the bytes at `LEAST_RATE`.
const OTHERS: Duration = Duration::from_secs(600);
const LEAST_RATE: u64 = 1 << 20;
/// Number of folders without room that are given up before the fetch fails.
const FOLDERS: usize = 3;

/// How a version came to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// It was on this host already, and the file is mapped.
    Shared,
    /// It was fetched from another host over TCP or TLS.
    Stream,
    /// A learner broadcast it to several hosts; pieces that were lost on the way were fetched.
    Broadcast,
}

impl Transport {
    /// Name for logs and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Stream => "stream",
            Self::Broadcast => "broadcast",
        }
    }
}

/// A version that this process can map.
#[derive(Clone, Debug)]
pub struct Received {
    /// The verified version.
    pub whole: Whole,
    /// How it came to this process.
    pub transport: Transport,
    /// Statistics of the fetch; zeros if nothing was fetched.
    pub fetched: Fetched,
}

/// Why a version could not be obtained.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The fetch failed or was cancelled.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The store of this host cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another process of this host brings it, but does not finish.
    #[error("another process on this host has been fetching the weights for {} s", .0.as_secs())]
    Others(Duration),
}

impl ReceiveError {
    /// Whether the caller cancelled the reception.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Fetch(FetchError::Cancelled))
    }
}

/// Obtains versions for this process, and relays what it fetched.
#[derive(Debug)]
pub struct Receiver {
    store: Arc<HostStore>,
    shelf: Shelf,
    options: FetchOptions,
    broadcast: Option<Arc<dyn GroupTransport>>,
    /// The version received last, which may be in use while the next one arrives.
    newest: Mutex<Option<VersionId>>,
}

impl Receiver {
    /// A receiver that stores versions in `store`, and relays through `shelf` what it fetches.
    #[must_use]
    pub fn new(store: Arc<HostStore>, shelf: Shelf, options: FetchOptions) -> Self {
        Self { store, shelf, options, broadcast: None, newest: Mutex::new(None) }
    }

    /// Takes part in the broadcasts of a learner with the same transport.
    #[must_use]
    pub fn with_broadcast(self, transport: Option<Arc<dyn GroupTransport>>) -> Self {
        Self { broadcast: transport, ..self }
    }

    /// Obtains a version: the host's copy if there is one or another process brings it, otherwise by a broadcast of the
    /// learner that announced it, and missing pieces from the sources that `finder` names. Removes versions before the
    /// one that was received last, by an earlier process too.
    ///
    /// # Errors
    /// See [`ReceiveError`].
    pub fn receive(
        &self,
        announcement: &Announcement,
        finder: &SourceFinder<'_>,
        cancelled: &AtomicBool,
    ) -> Result<Received, ReceiveError> {
        let description = &announcement.description;
        let limit = OTHERS + Duration::from_secs(description.bytes() / LEAST_RATE);
        let (started, mut full) = (Instant::now(), 0);
        let received = loop {
            match self.store.claim(description)? {
                Claim::Whole(whole) => {
                    break Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
                }
                Claim::Ours(part) => match self.bring(part, &announcement.address, finder, cancelled) {
                    Err(ReceiveError::Store(StoreError::NoRoom { .. })) if full < FOLDERS => full += 1,
                    brought => break brought?,
                },
                Claim::Theirs if cancelled.load(Ordering::Acquire) => return Err(FetchError::Cancelled.into()),
                Claim::Theirs if started.elapsed() > limit => return Err(ReceiveError::Others(started.elapsed())),
                Claim::Theirs => std::thread::sleep(LOOK),
            }
        };
        let before = self.newest.lock().unwrap_or_else(PoisonError::into_inner).replace(description.id());
        // A restarted process does not know the version that its predecessor used last, but the store has it.
        let before = before.or_else(|| self.store.newest_before(description.id()));
        if let Some(before) = before {
            self.store.retire_before(before.min(description.id()));
            self.shelf.retire_before(before.min(description.id()));
        }
        Ok(received)
    }

    fn bring(
        &self,
        part: Part,
        root: &str,
        finder: &SourceFinder<'_>,
        cancelled: &AtomicBool,
    ) -> Result<Received, ReceiveError> {
        let brought = self.broadcast(&part, root, cancelled).and_then(|brought| {
            let rest = fetch_rest(&part, brought.ready, &self.shelf, finder, &self.options, cancelled)?;
            Ok((brought.fetched, rest))
        });
        match brought {
            Ok((before, rest)) => {
                let whole = part.finish()?;
                self.shelf.put(&whole);
                let transport = if before.broadcast_bytes > 0 { Transport::Broadcast } else { Transport::Stream };
                let fetched = Fetched {
                    bytes: before.bytes + rest.bytes,
                    broadcast_bytes: before.broadcast_bytes,
                    resumed_pieces: if before.bytes > 0 { 0 } else { rest.resumed_pieces },
                    wrong_pieces: before.wrong_pieces + rest.wrong_pieces,
                };
                Ok(Received { whole, transport, fetched })
            }
            Err(FetchError::Store(error)) => {
                // Removed, because the next claim would otherwise stay with this folder.
                part.abandon();
                Err(error.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes part in a broadcast if that can help; returns which pieces are present.
    fn broadcast(&self, part: &Part, root: &str, cancelled: &AtomicBool) -> Result<Brought, FetchError> {
        let ready = part.verified()?;
        let none = |ready| Brought { ready, fetched: Fetched::default(), problem: None };
        let Some(transport) = &self.broadcast else { return Ok(none(ready)) };
        // A broadcast would send pieces again that an earlier attempt has left here.
        if root.is_empty() || ready.contains(&true) || cancelled.load(Ordering::Acquire) {
            return Ok(none(ready));
        }
        let brought = take_part(part, &self.shelf, root, transport.as_ref(), &self.options, cancelled)?;
        if let Some(problem) = &brought.problem {
            let missing = brought.ready.iter().filter(|ready| !**ready).count();
            tracing::info!(missing, "a broadcast did not bring all pieces, they are fetched: {problem}");
        }
        Ok(brought)
    }
}
