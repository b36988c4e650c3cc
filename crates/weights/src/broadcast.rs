//! The receiver's side of a broadcast: one version to many hosts, over a communicator that this crate does not know.
//!
//! The learner's [`DataServer`](crate::DataServer) is the meeting point: hosts that lack the announced version join a
//! round, which closes after a moment; its members then form a group, and rank 0 broadcasts the pieces in order. A
//! round is never repeated. Hosts that come too late, and pieces that a broken group did not bring, are left to the
//! transport `stream`, so a broadcast can only save time. Rejected: a communicator that lives as long as the run,
//! because every rollout worker that leaves would end it for all.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pacs_runtime::net::PeerRole;

use crate::data_protocol::{DataConnection, GREETING, Request, Status};
use crate::description::hash;
use crate::rounds::WINDOW;
use crate::{FetchOptions, Fetched, Part, Shelf, StoreError};

/// Threads of a receiver that verify and write pieces while the next ones arrive. Each holds a piece in memory.
const WRITERS: usize = 2;
/// How long a member of a group waits for its peers, in addition to the time of the bytes. It is short, because a host
/// that stands still delays the others this long.
pub const GROUP_TIMEOUT: Duration = Duration::from_secs(10);

/// The members of one broadcast.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Identifies run and version, so that peers of another group are refused.
    pub name: String,
    /// Rank of this process; 0 is the learner that published the version.
    pub rank: usize,
    /// Address at which each rank awaits its peers (host:port).
    pub addresses: Vec<String>,
}

/// A way for a group to exchange bytes. Every wait in it has a deadline.
pub trait GroupTransport: Send + Sync + fmt::Debug {
    /// Name of the transport, which must be the same on all members of a group.
    fn name(&self) -> &'static str;

    /// Opens an address for the peers of one group.
    ///
    /// # Errors
    /// When no address can be opened.
    fn listen(&self) -> io::Result<Box<dyn Seat>>;
}

/// An open address at which a process awaits the peers of one group.
pub trait Seat: Send {
    /// The address for the peers (host:port).
    fn address(&self) -> String;

    /// Forms the group; returns when all members have joined.
    ///
    /// # Errors
    /// When a member does not join in time.
    fn enter(self: Box<Self>, group: &Group) -> Result<Box<dyn Channel>, String>;
}

/// A member's end of a group. The first error ends the group for all members.
pub trait Channel: Send {
    /// Replaces `bytes` by those of rank 0. The length must be the same on every rank.
    ///
    /// # Errors
    /// When a member is lost or too slow.
    fn broadcast(&mut self, bytes: &mut [u8]) -> Result<(), String>;

    /// Returns when every rank has called this.
    ///
    /// # Errors
    /// When a member is lost or too slow.
    fn finish(self: Box<Self>) -> Result<(), String>;
}

/// Result of a broadcast.
#[derive(Debug)]
pub(crate) struct Brought {
    /// Which pieces are verified and written.
    pub(crate) ready: Vec<bool>,
    pub(crate) fetched: Fetched,
    /// Why pieces are missing; `None` if all arrived.
    pub(crate) problem: Option<String>,
}

/// Takes part in the broadcast of `part` by the learner at `root`. Failures are no errors,
/// because missing pieces are fetched.
pub(crate) fn take_part(
    part: &Part,
    shelf: &Shelf,
    root: &str,
    transport: &dyn GroupTransport,
    options: &FetchOptions,
    cancelled: &AtomicBool,
) -> Result<Brought, StoreError> {
    let pieces = part.description().pieces();
    let nothing =
        |problem: String| Brought { ready: vec![false; pieces], fetched: Fetched::default(), problem: Some(problem) };
    let mut channel = match join(part, root, transport, options) {
        Ok(channel) => channel,
        Err(problem) => return Ok(nothing(problem)),
    };
    shelf.begin(part.description(), part.file(), vec![false; pieces]);
    let writing = Writing { part, shelf, cancelled, state: Mutex::new(ReceivedPieces::new(pieces)) };
    // A buffer is with the group, with a writer, or free, so the number of buffers bounds the memory.
    let (free, freed) = channel_of_buffers();
    let (full, filled) = sync_channel::<(usize, Vec<u8>)>(0);
    let filled = Mutex::new(filled);
    let received = std::thread::scope(|scope| {
        for free in std::iter::repeat_n(free, WRITERS) {
            let (writing, filled) = (&writing, &filled);
            scope.spawn(move || writing.work(filled, &free));
        }
        // Moved into this closure, so that the writers end with it.
        let full = full;
        let gone = || "the threads that write pieces have ended".to_owned();
        for index in 0..pieces {
            let mut buffer = freed.recv().map_err(|_| gone())?;
            let range = part.description().piece(index);
            buffer.resize(usize::try_from(range.end - range.start).unwrap_or(usize::MAX), 0);
            channel.broadcast(&mut buffer)?;
            full.send((index, buffer)).map_err(|_| gone())?;
        }
        channel.finish()
    });
    let ReceivedPieces { ready, fetched, store } = writing.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    match store {
        Some(error) => {
            shelf.remove(part.description().id());
            Err(error)
        }
        None => Ok(Brought { ready, fetched, problem: received.err() }),
    }
}

fn channel_of_buffers() -> (Sender<Vec<u8>>, Receiver<Vec<u8>>) {
    let (free, freed) = channel();
    for _ in 0..=WRITERS {
        // Cannot fail: the receiver is in this scope.
        let _ = free.send(Vec::new());
    }
    (free, freed)
}

/// Requests a place in the round, and forms the group.
fn join(
    part: &Part,
    root: &str,
    transport: &dyn GroupTransport,
    options: &FetchOptions,
) -> Result<Box<dyn Channel>, String> {
    let description = part.description();
    let ask = || -> io::Result<Option<(Box<dyn Seat>, Group)>> {
        let seat = transport.listen()?;
        let mut connection = DataConnection::dial(root, PeerRole::Learner, &options.security, &options.run)?;
        connection.wait_up_to(WINDOW + GREETING)?;
        let request = Request::Join {
            id: description.id(),
            digest: *description.digest(),
            transport: transport.name().to_owned(),
            address: seat.address(),
        };
        request.write(&mut connection)?;
        if connection.status()? != Status::Here {
            return Ok(None);
        }
        let (rank, addresses) = connection.members()?;
        if addresses.get(rank) != Some(&seat.address()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "its answer is for another member"));
        }
        let name = group_name(&options.run, description.digest());
        Ok(Some((seat, Group { name, rank, addresses })))
    };
    match ask() {
        Ok(Some((seat, group))) => seat.enter(&group),
        Ok(None) => Err("no broadcast of this version begins".to_owned()),
        Err(error) => Err(format!("ask `{root}` for a place: {error}")),
    }
}

/// Name of the group, computed alike by every member.
pub(crate) fn group_name(run: &str, digest: &crate::Digest) -> String {
    let digest: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{run}/weights/{digest}")
}

/// State of the threads that verify and write pieces.
struct Writing<'a> {
    part: &'a Part,
    shelf: &'a Shelf,
    cancelled: &'a AtomicBool,
    state: Mutex<ReceivedPieces>,
}

struct ReceivedPieces {
    ready: Vec<bool>,
    fetched: Fetched,
    /// The first error of the store, after which no piece can be kept.
    store: Option<StoreError>,
}

impl ReceivedPieces {
    fn new(pieces: usize) -> Self {
        Self { ready: vec![false; pieces], fetched: Fetched::default(), store: None }
    }
}

impl Writing<'_> {
    fn work(&self, filled: &Mutex<Receiver<(usize, Vec<u8>)>>, free: &Sender<Vec<u8>>) {
        loop {
            let next = filled.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((index, buffer)) = next else { return };
            self.keep(index, &buffer);
            if free.send(buffer).is_err() {
                return;
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ReceivedPieces> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, index: usize, bytes: &[u8]) {
        // A member without use for the pieces still receives them: leaving would end the group for the others.
        if self.cancelled.load(Ordering::Acquire) || self.lock().store.is_some() {
            return;
        }
        let description = self.part.description();
        if !description.is_piece(index, &hash(bytes)) {
            tracing::warn!(index, "a piece of the weights was corrupt; it is fetched again");
            self.lock().fetched.wrong_pieces += 1;
            return;
        }
        let written = self.part.write(bytes, description.piece(index).start);
        let mut state = self.lock();
        match written {
            Ok(()) => {
                state.ready[index] = true;
                state.fetched.bytes += bytes.len() as u64;
                state.fetched.broadcast_bytes += bytes.len() as u64;
                drop(state);
                self.shelf.verified(description.id(), index);
            }
            Err(error) => drop(state.store.get_or_insert(error)),
        }
    }
}
