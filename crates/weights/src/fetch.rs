//! Fetches a version from the hosts that have it, piece by piece.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pacs_runtime::Backoff;
use pacs_runtime::net::{PeerRole, Security};

use crate::data_protocol::{DataConnection, Request, STALL, Status};
use crate::shelf::Shelf;
use crate::store::CHUNK;
use crate::{Part, StoreError};

/// Consecutive broken connections, wrong pieces or empty answers after which a source counts as failed.
const STRIKES: u32 = 2;
/// Link speed that is still waited for, in bytes per second.
const SLOW_RATE: u64 = 2 << 20;
/// Interval at which waiting threads check for cancellation.
const LOOK: Duration = Duration::from_millis(50);

/// A host that has a version or is fetching it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Data address of the source (host:port).
    pub address: String,
    /// Role that its certificate must have.
    pub role: PeerRole,
}

/// Returns sources, best first, given the addresses of failed ones.
pub type SourceFinder<'a> = dyn Fn(&[String]) -> Result<Vec<Source>, String> + Sync + 'a;

/// Parameters of a fetch.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Protection of the connections.
    pub security: Security,
    /// Id of the run that sources must belong to.
    pub run: String,
    /// Number of concurrent connections.
    pub connections: usize,
    /// Time without a piece from any source after which the fetch fails; extended for large pieces.
    pub patience: Duration,
}

impl FetchOptions {
    /// The parameters of rollout workers.
    #[must_use]
    pub fn new(security: Security, run: impl Into<String>) -> Self {
        Self { security, run: run.into(), connections: 4, patience: Duration::from_secs(60) }
    }
}

/// Statistics of a fetch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Verified bytes received over the network, including those of a broadcast.
    pub bytes: u64,
    /// The part of them that came by a broadcast.
    pub broadcast_bytes: u64,
    /// Pieces that an earlier attempt had written already.
    pub resumed_pieces: usize,
    /// Pieces with a wrong digest, which were fetched again.
    pub wrong_pieces: u64,
}

/// Why a version could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No source sent a piece within the patience.
    #[error("no piece of the weights came for {} s: {last}", patience.as_secs())]
    NoProgress {
        /// Time without progress.
        patience: Duration,
        /// Description of the last problem.
        last: String,
    },
    /// The store cannot keep it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The caller cancelled the fetch.
    #[error("fetching was cancelled")]
    Cancelled,
}

/// Fetches the pieces that `part` lacks; `shelf` relays each as soon as it is verified.
///
/// # Errors
/// See [`FetchError`]. Verified pieces stay in the file and are not fetched again.
pub fn fetch(
    part: &Part,
    shelf: &Shelf,
    finder: &SourceFinder<'_>,
    options: &FetchOptions,
    cancelled: &AtomicBool,
) -> Result<Fetched, FetchError> {
    fetch_rest(part, part.verified()?, shelf, finder, options, cancelled)
}

/// Like [`fetch`], for a caller that knows which pieces are `ready`.
pub(crate) fn fetch_rest(
    part: &Part,
    ready: Vec<bool>,
    shelf: &Shelf,
    finder: &SourceFinder<'_>,
    options: &FetchOptions,
    cancelled: &AtomicBool,
) -> Result<Fetched, FetchError> {
    let missing: VecDeque<usize> = (0..ready.len()).filter(|index| !ready[*index]).collect();
    let counts = Fetched { resumed_pieces: ready.len() - missing.len(), ..Fetched::default() };
    shelf.begin(part.description(), part.file(), ready);
    let threads = options.connections.clamp(1, missing.len().max(1));
    let state = FetchProgress {
        left: missing.len(),
        missing,
        avoid: BTreeMap::new(),
        progressed: Instant::now(),
        sources: Vec::new(),
        strikes: BTreeMap::new(),
        failed: Vec::new(),
        last: "no source was asked yet".to_owned(),
        counts,
        ended: None,
    };
    let backoff = Mutex::new(Backoff::new(Duration::from_millis(50), Duration::from_secs(2)));
    let transfer = Transfer {
        part,
        shelf,
        finder,
        options,
        cancelled,
        state: Mutex::new(state),
        changed: Condvar::new(),
        backoff,
    };
    std::thread::scope(|scope| {
        for number in 1..threads {
            let transfer = &transfer;
            scope.spawn(move || transfer.work(number));
        }
        transfer.work(0);
    });
    let state = transfer.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match state.ended {
        None => Ok(state.counts),
        Some(error) => {
            shelf.remove(part.description().id());
            Err(error)
        }
    }
}

struct Transfer<'a> {
    part: &'a Part,
    shelf: &'a Shelf,
    finder: &'a SourceFinder<'a>,
    options: &'a FetchOptions,
    cancelled: &'a AtomicBool,
    state: Mutex<FetchProgress>,
    changed: Condvar,
    /// Held by the thread that asks for sources.
    backoff: Mutex<Backoff>,
}

struct FetchProgress {
    /// Pieces to fetch in order, because relays further down want the first ones first, too.
    missing: VecDeque<usize>,
    /// Number of pieces that are not verified yet.
    left: usize,
    /// Source that sent a piece wrong, by piece.
    avoid: BTreeMap<usize, String>,
    progressed: Instant,
    sources: Vec<Source>,
    strikes: BTreeMap<String, u32>,
    failed: Vec<String>,
    last: String,
    counts: Fetched,
    ended: Option<FetchError>,
}

/// Result of requesting a piece.
enum Outcome {
    Right,
    Wrong,
    NotYet,
    Unknown,
}

impl Transfer<'_> {
    fn lock(&self) -> MutexGuard<'_, FetchProgress> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fetches pieces, over one connection at a time, until none is missing.
    fn work(&self, number: usize) {
        let mut buffer = vec![0; CHUNK];
        let mut connected: Option<(Source, DataConnection)> = None;
        while let Some((index, avoid)) = self.next() {
            let bad = avoid.as_deref();
            let usable = connected.take().filter(|(source, _)| self.may_ask(source, bad));
            let tried = match usable {
                Some(connected) => Ok(connected),
                None => match self.source(number, bad) {
                    None => {
                        self.give_back(index);
                        continue;
                    }
                    Some(source) => {
                        let dialled = DataConnection::dial(
                            &source.address,
                            source.role,
                            &self.options.security,
                            &self.options.run,
                        );
                        dialled.map(|connection| (source.clone(), connection)).map_err(|error| (source, error))
                    }
                },
            };
            let (source, mut connection) = match tried {
                Ok(connected) => connected,
                Err((source, error)) => {
                    self.give_back(index);
                    self.strike(&source, &error.to_string(), 1);
                    continue;
                }
            };
            match self.piece(&mut connection, index, &mut buffer) {
                Ok(Outcome::Right) => {
                    self.verified(index, &source);
                    connected = Some((source, connection));
                }
                Ok(Outcome::Wrong) => {
                    let mut state = self.lock();
                    state.counts.wrong_pieces += 1;
                    state.avoid.insert(index, source.address.clone());
                    drop(state);
                    self.give_back(index);
                    tracing::warn!(
                        source = source.address,
                        index,
                        "a piece of the weights was corrupt; it is fetched again"
                    );
                    self.strike(&source, "it sent a piece with another digest", 1);
                    connected = Some((source, connection));
                }
                Ok(Outcome::NotYet) => {
                    self.give_back(index);
                    // A relay may itself wait for the piece on a slow link, so it gets a strike
                    // only after half of the patience.
                    if self.lock().progressed.elapsed() > self.patience() / 2 {
                        self.strike(&source, "it waits for pieces itself", 1);
                    }
                    connected = Some((source, connection));
                }
                Ok(Outcome::Unknown) => {
                    self.give_back(index);
                    // At once: the source would give the same answer again.
                    self.strike(&source, "it does not have this version, or no longer has it", STRIKES);
                }
                Err(FetchError::NoProgress { last, .. }) => {
                    self.give_back(index);
                    self.strike(&source, &last, 1);
                }
                Err(error) => {
                    self.end(error);
                    return;
                }
            }
        }
    }

    /// Time without a piece after which the fetch fails, adjusted to the size of a piece.
    fn patience(&self) -> Duration {
        let piece = self.part.description().piece(0);
        self.options.patience + Duration::from_secs((piece.end - piece.start) / SLOW_RATE)
    }

    /// The next piece to fetch, and a source to avoid for it; `None` when the fetch is over.
    fn next(&self) -> Option<(usize, Option<String>)> {
        let mut state = self.lock();
        loop {
            if state.left == 0 || state.ended.is_some() {
                return None;
            }
            if self.cancelled.load(Ordering::Acquire) {
                state.ended = Some(FetchError::Cancelled);
            } else if state.progressed.elapsed() > self.patience() {
                let last = std::mem::take(&mut state.last);
                state.ended = Some(FetchError::NoProgress { patience: self.patience(), last });
            } else if let Some(index) = state.missing.pop_front() {
                let avoid = state.avoid.get(&index).cloned();
                return Some((index, avoid));
            } else {
                state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            self.changed.notify_all();
        }
    }

    fn give_back(&self, index: usize) {
        let mut state = self.lock();
        // In its place, so that pieces are still fetched in order.
        let place = state.missing.partition_point(|other| *other < index);
        state.missing.insert(place, index);
        self.changed.notify_all();
    }

    fn verified(&self, index: usize, source: &Source) {
        let piece = self.part.description().piece(index);
        let mut state = self.lock();
        state.left -= 1;
        state.counts.bytes += piece.end - piece.start;
        state.progressed = Instant::now();
        // Strikes count in a row only.
        state.strikes.remove(&source.address);
        drop(state);
        self.shelf.verified(self.part.description().id(), index);
        self.changed.notify_all();
    }

    fn strike(&self, source: &Source, problem: &str, strikes: u32) {
        let mut state = self.lock();
        state.last = format!("{}: {problem}", source.address);
        let count = state.strikes.entry(source.address.clone()).or_default();
        *count += strikes;
        if *count >= STRIKES && !state.failed.contains(&source.address) {
            tracing::warn!(source = source.address, "a source of weights is abandoned: {problem}");
            state.failed.push(source.address.clone());
        }
    }

    fn end(&self, error: FetchError) {
        self.lock().ended.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Whether to request a piece from a source that has not failed. A source that sent the piece wrong is asked again
    /// only if there is no other.
    fn may_ask(&self, source: &Source, bad: Option<&str>) -> bool {
        let state = self.lock();
        let is_good = |other: &Source| !state.failed.contains(&other.address);
        let has_other = || state.sources.iter().any(|other| other != source && is_good(other));
        is_good(source) && (bad != Some(&source.address) || !has_other())
    }

    /// A source to dial; `None` after a wait in which there was none.
    fn source(&self, number: usize, bad: Option<&str>) -> Option<Source> {
        if let Some(source) = self.known(number, bad) {
            return Some(source);
        }
        // One thread asks at a time; the others use its answer.
        let mut backoff = self.backoff.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have asked while this one waited for the lock.
        if let Some(source) = self.known(number, bad) {
            return Some(source);
        }
        let failed = {
            let state = self.lock();
            if state.ended.is_some() {
                return None;
            }
            state.failed.clone()
        };
        if !failed.is_empty() {
            std::thread::sleep(backoff.wait());
        }
        let found = (self.finder)(&failed);
        let mut state = self.lock();
        match found {
            Ok(found) if !found.is_empty() => {
                // A failed source that is assigned again is the only one.
                let again = |address: &String| found.iter().any(|source| source.address == *address);
                state.failed.retain(|address| !again(address));
                state.strikes.retain(|address, _| !again(address));
                state.sources = found;
            }
            Ok(_) => state.last = "no source has it".to_owned(),
            Err(problem) => state.last = format!("ask who has it: {problem}"),
        }
        drop(state);
        self.known(number, bad)
    }

    fn known(&self, number: usize, bad: Option<&str>) -> Option<Source> {
        let state = self.lock();
        let good: Vec<&Source> =
            state.sources.iter().filter(|source| !state.failed.contains(&source.address)).collect();
        let other: Vec<&Source> = good.iter().copied().filter(|source| bad != Some(&source.address)).collect();
        let choice = if other.is_empty() { good } else { other };
        choice.get(number.checked_rem(choice.len())?).map(|source| (*source).clone())
    }

    fn piece(&self, connection: &mut DataConnection, index: usize, buffer: &mut [u8]) -> Result<Outcome, FetchError> {
        let description = self.part.description();
        let broken = |error: io::Error| FetchError::NoProgress { patience: STALL, last: error.to_string() };
        let first = u32::try_from(index).map_err(|error| broken(io::Error::other(error)))?;
        let request = Request::Pieces { id: description.id(), digest: *description.digest(), first, count: 1 };
        let piece = description.piece(index);
        connection.expect(piece.end - piece.start);
        request.write(connection).map_err(broken)?;
        match connection.status().map_err(broken)? {
            Status::Here => {}
            Status::NotYet => return Ok(Outcome::NotYet),
            Status::Unknown | Status::Stranger | Status::NoBroadcast => return Ok(Outcome::Unknown),
        }
        // The deadline covers the bytes only, not the time that the source itself waited for them.
        connection.expect(piece.end - piece.start);
        let (mut hasher, mut offset) = (blake3::Hasher::new(), piece.start);
        while offset < piece.end {
            let length = buffer.len().min(usize::try_from(piece.end - offset).unwrap_or(usize::MAX));
            let chunk = &mut buffer[..length];
            connection.read_exact(chunk).map_err(broken)?;
            // Hashed while it is in the core's cache; the write counts only once the whole piece is verified.
            hasher.update(chunk);
            self.part.write(chunk, offset)?;
            offset += length as u64;
        }
        let right = description.is_piece(index, hasher.finalize().as_bytes());
        Ok(if right { Outcome::Right } else { Outcome::Wrong })
    }
}
