//! Getting a version to this process, by whichever way is the shortest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{
    Claim, Description, FetchError, FetchOptions, Fetched, HostStore, Part, Shelf, SourceFinder, StoreError, VersionId,
    Whole, fetch,
};

/// How often those who wait for another process of this host look for the file.
const LOOK: Duration = Duration::from_millis(20);
/// How long another process of this host is waited for at most, and besides for each byte.
const OTHERS: Duration = Duration::from_secs(600);
const LEAST_RATE: u64 = 1 << 20;
/// Times that a folder without room is given up for the next.
const FOLDERS: usize = 3;

/// How a version came to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// It was on this host: the file is mapped.
    Shared,
    /// It was fetched from another host, over TCP or TLS.
    Stream,
}

impl Transport {
    /// As it stands in logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Stream => "stream",
        }
    }
}

/// A version that this process can map.
#[derive(Clone, Debug)]
pub struct Received {
    /// The version.
    pub whole: Whole,
    /// How it came.
    pub transport: Transport,
    /// What was fetched for it.
    pub fetched: Fetched,
}

/// Why a version is not there.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// It was not fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The store of this host cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Another process of this host brings it, and does not end.
    #[error("another process of this host has been bringing the weights for {} s", .0.as_secs())]
    Others(Duration),
}

impl ReceiveError {
    /// Whether nobody wanted the version any more.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Fetch(FetchError::Cancelled))
    }
}

/// Brings versions to this process, and hands on what it fetched.
#[derive(Debug)]
pub struct Receiver {
    store: Arc<HostStore>,
    shelf: Shelf,
    options: FetchOptions,
    /// The version that was received last; it may still be in use while the next one comes.
    newest: Mutex<Option<VersionId>>,
}

impl Receiver {
    /// Brings versions into `store`, and hands on by `shelf` what it fetched.
    #[must_use]
    pub fn new(store: Arc<HostStore>, shelf: Shelf, options: FetchOptions) -> Self {
        Self { store, shelf, options, newest: Mutex::new(None) }
    }

    /// Gets a version: the host's copy where there is one or another process brings it, else from the sources that `finder`
    /// names. Versions before the one that was received last, also by an earlier process, are removed.
    ///
    /// # Errors
    /// See [`ReceiveError`].
    pub fn receive(
        &self,
        description: &Description,
        finder: &SourceFinder<'_>,
        cancelled: &AtomicBool,
    ) -> Result<Received, ReceiveError> {
        let limit = OTHERS + Duration::from_secs(description.bytes() / LEAST_RATE);
        let (started, mut full) = (Instant::now(), 0);
        let received = loop {
            match self.store.claim(description)? {
                Claim::Whole(whole) => {
                    break Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
                }
                Claim::Ours(part) => match self.bring(part, finder, cancelled) {
                    Err(ReceiveError::Store(StoreError::NoRoom { .. })) if full < FOLDERS => full += 1,
                    brought => break brought?,
                },
                Claim::Theirs if cancelled.load(Ordering::Acquire) => return Err(FetchError::Cancelled.into()),
                Claim::Theirs if started.elapsed() > limit => return Err(ReceiveError::Others(started.elapsed())),
                Claim::Theirs => std::thread::sleep(LOOK),
            }
        };
        let before = self.newest.lock().unwrap_or_else(PoisonError::into_inner).replace(description.id());
        // A process that starts again does not know which version its predecessor used last, but the store has it.
        let before = before.or_else(|| self.store.newest_before(description.id()));
        if let Some(before) = before {
            self.store.retire_before(before.min(description.id()));
            self.shelf.retire_before(before.min(description.id()));
        }
        Ok(received)
    }

    fn bring(&self, part: Part, finder: &SourceFinder<'_>, cancelled: &AtomicBool) -> Result<Received, ReceiveError> {
        match fetch(&part, &self.shelf, finder, &self.options, cancelled) {
            Ok(fetched) => {
                let whole = part.finish()?;
                self.shelf.put(&whole);
                Ok(Received { whole, transport: Transport::Stream, fetched })
            }
            Err(FetchError::Store(error)) => {
                part.abandon();
                Err(error.into())
            }
            Err(error) => Err(error.into()),
        }
    }
}
