//! The durable state of a run: every event that changed the machine, and the samples and verdicts that came with it.
//!
//! ```text
//! run folder/journal/
//! ├── journal.db               SQLite in WAL mode: a snapshot of the machine, the records after it, operators' actions
//! └── samples-000001.seg …     samples and verdicts, append-only frames with checksums
//! ```
//!
//! One thread writes batches: frames first, then the records that refer to them, each made durable before the next.
//! Waiting for a record means waiting for all earlier ones. Snapshots are handed in separately ([`Snapshots`]), later
//! than the records that they cover. Start with [`Journal::open`].

mod database;
mod frame;
mod segments;
mod stored;
mod writer;

use std::collections::BTreeSet;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use pacs_machine::{Machine, Record};
use pacs_types::GroupId;
use tokio::sync::watch;

use self::database::Database;
pub(crate) use self::frame::{Frame, FrameKey};
pub(crate) use self::segments::Frames;
use self::segments::Segments;
pub(crate) use self::stored::{ReadError, StoredFrame};
use self::writer::Writer;
use crate::FileError;
use crate::records::{Epoch, Room};

/// Longest time that an answer may wait for the disk.
const DURABLE_DEADLINE: Duration = Duration::from_secs(60);

/// The driver's state that is stored with a snapshot, by name.
pub(crate) type Extras = Vec<(String, Vec<u8>)>;
/// Records in order, with the messages that belong to them.
pub(crate) type Records = Vec<(Record, Option<Vec<u8>>)>;

/// The state that an earlier coordinator has left.
#[derive(Debug)]
pub(crate) struct Recovered {
    /// The machine of the snapshot.
    pub(crate) machine: Machine,
    /// The driver's state that was stored with it.
    pub(crate) extras: Extras,
    /// Records after the snapshot, in order.
    pub(crate) records: Records,
    /// Samples and verdicts in the segments.
    pub(crate) frames: Frames,
}

impl Recovered {
    /// Whether the checkpoint of a step may have been in the middle of its save or commit.
    pub(crate) fn may_commit(&self, step: u64) -> bool {
        let mut machine = self.machine.clone();
        for (record, _) in &self.records {
            machine.step(record.now, record.event.clone());
        }
        machine.committing().is_some_and(|(snapshot, _, _)| snapshot.step == step)
    }
}

/// A snapshot that will replace the records up to some number.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// The machine, as JSON.
    pub(crate) machine: String,
    /// The driver's state, by name.
    pub(crate) extras: Extras,
    /// Groups whose samples are still needed.
    pub(crate) live: Vec<GroupId>,
}

impl Snapshot {
    /// Serializes a machine, which takes megabytes when thousands of samples are in flight.
    pub(crate) fn of(machine: &Machine, extras: Extras) -> Self {
        let live: BTreeSet<GroupId> = machine.present().map(|present| present.sample.group).collect();
        let machine = serde_json::to_string(machine).expect("a machine is numbers, texts and lists of them");
        Self { machine, extras, live: live.into_iter().collect() }
    }
}

/// Accepts snapshots. Each is handed in only after the run folder has caught up with it.
#[derive(Clone, Debug)]
pub(crate) struct Snapshots(writer::Inbox);

impl Snapshots {
    /// Replaces the records up to number `seq` by a snapshot.
    pub(crate) fn put(&self, seq: u64, snapshot: Snapshot) {
        self.0.snapshot(seq, snapshot);
    }
}

/// An operator's action, for the audit table.
#[derive(Clone, Debug)]
pub(crate) struct Audit {
    /// Time in seconds since 1970.
    pub(crate) at: u64,
    pub(crate) who: String,
    pub(crate) what: String,
}

/// Progress of the writing thread.
#[derive(Clone, Debug, Default)]
struct Durable {
    /// Number up to which every record is durable.
    upto: u64,
    /// Whether the disk is full, which may pass.
    is_full: bool,
    /// Why nothing more will be written; `None` while the thread works.
    failed: Option<String>,
}

/// Why a record is not durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotDurable {
    /// The disk is full; the record will be written when there is room.
    Full,
    /// It may never be, for this reason.
    Failed(String),
}

/// The journal of a run. Dropping it writes what is pending and ends its thread.
#[derive(Debug)]
pub(crate) struct Journal {
    writer: Writer,
    appended: u64,
    /// Records since the newest snapshot was begun.
    since_snapshot: u64,
    /// When the newest snapshot was begun.
    snapshot_at: Instant,
}

/// Waits for durability without holding the journal.
#[derive(Clone, Debug)]
pub(crate) struct DurableUpTo {
    durable: watch::Receiver<Durable>,
    wanted: u64,
}

impl Journal {
    /// Opens the journal of a run folder. `spec` is the resolved job spec; a journal of another spec is moved aside.
    ///
    /// # Errors
    /// When its files cannot be used. A damaged journal is moved aside, with a note; one that cannot be read for
    /// another reason, a full disk for example, stays in place.
    pub(crate) fn open(
        run_dir: &Path,
        spec: &str,
        epoch: &Epoch,
        room: &Room,
    ) -> Result<(Self, Option<Recovered>, Vec<String>), FileError> {
        let folder = run_dir.join("journal");
        let mut notes = Vec::new();
        let recovered = match recover(&folder, spec) {
            Ok(Found::Recovered(recovered, torn)) => {
                notes.extend(torn);
                Some(*recovered)
            }
            Ok(Found::Nothing) => None,
            Ok(Found::Other(why)) => {
                put_aside(&folder)?;
                notes.push(why);
                None
            }
            Err(error) if error.is_damage() => {
                put_aside(&folder)?;
                notes.push(format!("the journal was moved aside; the run resumes from its newest checkpoint: {error}"));
                None
            }
            Err(error) => return Err(error),
        };
        let journal = Self::start(&folder, spec, epoch, room)?;
        Ok((journal, recovered, notes))
    }

    fn start(folder: &Path, spec: &str, epoch: &Epoch, room: &Room) -> Result<Self, FileError> {
        std::fs::create_dir_all(folder).map_err(FileError::file("create folder", folder))?;
        let database = Database::open(folder)?;
        database.describe(spec)?;
        let appended = database.newest()?;
        let segments = Segments::open(folder)?;
        let writer = Writer::start(database, segments, appended, epoch.clone(), room.clone())
            .map_err(FileError::file("start", folder))?;
        Ok(Self { writer, appended, since_snapshot: 0, snapshot_at: Instant::now() })
    }

    /// Moves the journal aside and starts an empty one.
    pub(crate) fn discard(self, run_dir: &Path, spec: &str, epoch: &Epoch, room: &Room) -> Result<Self, FileError> {
        let folder = run_dir.join("journal");
        drop(self);
        put_aside(&folder)?;
        Self::start(&folder, spec, epoch, room)
    }

    /// Queues a record with its message and frame. Does not wait: [`Self::durable`] does.
    pub(crate) fn append(&mut self, record: &Record, payload: Option<Vec<u8>>, frame: Option<Frame>) {
        self.appended += 1;
        self.since_snapshot += 1;
        let text = serde_json::to_string(record).expect("a record is numbers and texts with names");
        self.writer.append(self.appended, text, payload, frame);
    }

    /// Queues an operator's action for the audit table.
    pub(crate) fn audit(&self, audit: Audit) {
        self.writer.audit(audit);
    }

    /// Begins a snapshot of the machine as it is now; returns the number of the newest record that it covers.
    pub(crate) fn begin_snapshot(&mut self) -> u64 {
        self.since_snapshot = 0;
        self.snapshot_at = Instant::now();
        self.appended
    }

    /// The handle that accepts the snapshot once it is serialized.
    pub(crate) fn snapshots(&self) -> Snapshots {
        Snapshots(self.writer.inbox())
    }

    /// Number of records since the newest snapshot was begun.
    pub(crate) fn since_snapshot(&self) -> u64 {
        self.since_snapshot
    }

    /// Time since the newest snapshot was begun.
    pub(crate) fn snapshot_age(&self) -> Duration {
        self.snapshot_at.elapsed()
    }

    /// A handle that waits until everything queued so far is durable.
    pub(crate) fn durable(&self) -> DurableUpTo {
        DurableUpTo { durable: self.writer.durable(), wanted: self.appended }
    }

    /// Why nothing can be written any more; `None` while writing works.
    pub(crate) fn failure(&self) -> Option<String> {
        self.writer.durable().borrow().failed.clone()
    }

    /// Whether queued records wait for room on the disk.
    pub(crate) fn is_full(&self) -> bool {
        self.writer.durable().borrow().is_full
    }

    /// Stops accepting records; returns the thread, which ends once all pending ones are written.
    pub(crate) fn close(&mut self) -> Option<JoinHandle<()>> {
        self.writer.close()
    }
}

impl DurableUpTo {
    /// Waits for the records to be durable, but not for disk space.
    ///
    /// # Errors
    /// When the disk is full, writing has failed for good, or the deadline passes.
    pub(crate) async fn wait(mut self) -> Result<(), NotDurable> {
        let wanted = self.wanted;
        let is_over = |durable: &Durable| durable.upto >= wanted || durable.failed.is_some() || durable.is_full;
        match tokio::time::timeout(DURABLE_DEADLINE, self.durable.wait_for(is_over)).await {
            Ok(Ok(durable)) if durable.upto >= wanted => Ok(()),
            Ok(Ok(durable)) => Err(durable.failed.clone().map_or(NotDurable::Full, NotDurable::Failed)),
            Ok(Err(_)) => Err(NotDurable::Failed("the journal is closed".to_owned())),
            Err(_) => Err(NotDurable::Failed(late())),
        }
    }

    /// Waits on a blocking thread for the records to be durable; for disk space, without a limit.
    ///
    /// # Errors
    /// When writing has failed for good, or the deadline passes.
    pub(crate) fn wait_blocking(mut self) -> Result<(), String> {
        let (wanted, is_full) = (self.wanted, self.durable.clone());
        let mut deadline = Instant::now() + DURABLE_DEADLINE;
        let mut reached = pin!(self.durable.wait_for(|durable| durable.upto >= wanted || durable.failed.is_some()));
        // Polled by hand, because the runtime may end before this thread does.
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        loop {
            match reached.as_mut().poll(&mut context) {
                Poll::Ready(Ok(durable)) if durable.upto >= wanted => return Ok(()),
                Poll::Ready(Ok(durable)) => return Err(durable.failed.clone().unwrap_or_default()),
                Poll::Ready(Err(_)) => return Err("the journal is closed".to_owned()),
                Poll::Pending => {}
            }
            if is_full.borrow().is_full {
                deadline = Instant::now() + DURABLE_DEADLINE;
            }
            match deadline.checked_duration_since(Instant::now()) {
                // Wakes up now and then to see whether a full disk is the reason.
                Some(left) if !left.is_zero() => std::thread::park_timeout(left.min(LOOK_AGAIN)),
                _ => return Err(late()),
            }
        }
    }
}

/// Interval at which a blocking wait looks for the reason of its delay.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

fn late() -> String {
    format!("the disk has not taken the journal within {} s", DURABLE_DEADLINE.as_secs())
}

/// A waker that unparks a thread.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

enum Found {
    Nothing,
    /// The recovered state, and notes about damage in its files.
    Recovered(Box<Recovered>, Vec<String>),
    /// A journal that this run cannot use, and why.
    Other(String),
}

fn recover(folder: &Path, spec: &str) -> Result<Found, FileError> {
    if !Database::exists(folder) {
        return Ok(Found::Nothing);
    }
    let database = Database::open(folder)?;
    if let Some(difference) = database.difference(spec)? {
        return Ok(Found::Other(format!(
            "the journal was moved aside; the run resumes from its newest checkpoint: {difference}"
        )));
    }
    let Some((machine, extras)) = database.snapshot()? else { return Ok(Found::Nothing) };
    let records = database.records()?;
    let (frames, notes) = Frames::read(folder)?;
    Ok(Found::Recovered(Box::new(Recovered { machine, extras, records, frames }), notes))
}

/// Renames the folder, and removes the one that was moved aside before.
fn put_aside(folder: &Path) -> Result<(), FileError> {
    if !folder.exists() {
        return Ok(());
    }
    let aside = folder.with_file_name("journal-aside");
    if aside.exists() {
        std::fs::remove_dir_all(&aside).map_err(FileError::file("remove folder", &aside))?;
    }
    std::fs::rename(folder, &aside).map_err(FileError::file("rename", folder))
}

/// The channel that tells waiting calls how far the disk is.
fn durable_channel(upto: u64) -> Arc<watch::Sender<Durable>> {
    Arc::new(watch::Sender::new(Durable { upto, is_full: false, failed: None }))
}

/// Writes frames and their record numbers as the journal does, for tests of readers.
#[cfg(test)]
pub(crate) fn write_frames(folder: &Path, frames: &[(u64, Frame)]) -> std::io::Result<()> {
    Segments::open(folder).map_err(std::io::Error::other)?.write(frames)
}

#[cfg(test)]
mod tests;
