//! The thread that writes the journal in batches.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::database::{Database, Row};
use super::frame::Frame;
use super::segments::Segments;
use super::{Audit, Durable, Snapshot, durable_channel};
use crate::FileError;
use crate::records::{Epoch, Room, is_full};

/// How long a failing disk is retried before the journal gives up. A full disk is retried for as long as the run lasts.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(500);

/// Handle of the writing thread.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Inbox,
    durable: Arc<watch::Sender<Durable>>,
    thread: Option<JoinHandle<()>>,
}

/// The queue, shared by those who fill it and the thread.
pub(super) type Inbox = Arc<Shared>;

#[derive(Debug, Default)]
pub(super) struct Shared {
    pending: Mutex<Pending>,
    wake: Condvar,
}

/// Contents of the next batch. Bounded by the calls in flight, because each waits for its own record before the next.
#[derive(Debug, Default)]
struct Pending {
    rows: Vec<Row>,
    /// Frames, with the numbers of their records.
    frames: Vec<(u64, Frame)>,
    audits: Vec<Audit>,
    snapshot: Option<(u64, Snapshot)>,
    closing: bool,
}

impl Pending {
    /// Approximate size on disk.
    fn bytes(&self) -> u64 {
        let rows = self.rows.iter().map(|row| row.record.len() + row.payload.as_ref().map_or(0, Vec::len));
        let frames = self.frames.iter().map(|(_, frame)| frame.body.len());
        let snapshot = self.snapshot.iter().map(|(_, snapshot)| {
            snapshot.machine.len() + snapshot.extras.iter().map(|(_, value)| value.len()).sum::<usize>()
        });
        rows.chain(frames).chain(snapshot).map(|bytes| bytes as u64).sum()
    }

    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.frames.is_empty() && self.audits.is_empty() && self.snapshot.is_none()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a snapshot; a newer one replaces one that is still queued.
    pub(super) fn snapshot(&self, seq: u64, snapshot: Snapshot) {
        self.lock().snapshot = Some((seq, snapshot));
        self.wake.notify_one();
    }
}

impl Writer {
    pub(super) fn start(
        database: Database,
        segments: Segments,
        upto: u64,
        epoch: Epoch,
        room: Room,
    ) -> io::Result<Self> {
        let (shared, durable) = (Arc::new(Shared::default()), durable_channel(upto));
        let (inbox, told) = (Arc::clone(&shared), Arc::clone(&durable));
        // Ends when the handle is closed, after the last batch.
        let span = tracing::info_span!("journal");
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || {
            let _span = span.entered();
            let _guard = Panicked(&told);
            write_all(&inbox, &told, Disk { database, segments, epoch, room });
        })?;
        Ok(Self { shared, durable, thread: Some(thread) })
    }

    pub(super) fn append(&self, seq: u64, record: String, payload: Option<Vec<u8>>, frame: Option<Frame>) {
        let mut pending = self.shared.lock();
        pending.rows.push(Row { seq, record, payload });
        pending.frames.extend(frame.map(|frame| (seq, frame)));
        self.shared.wake.notify_one();
    }

    pub(super) fn audit(&self, audit: Audit) {
        self.shared.lock().audits.push(audit);
        self.shared.wake.notify_one();
    }

    pub(super) fn inbox(&self) -> Inbox {
        Arc::clone(&self.shared)
    }

    pub(super) fn durable(&self) -> watch::Receiver<Durable> {
        self.durable.subscribe()
    }

    pub(super) fn close(&mut self) -> Option<JoinHandle<()>> {
        self.shared.lock().closing = true;
        self.shared.wake.notify_one();
        self.thread.take()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(thread) = self.close()
            && thread.join().is_err()
        {
            tracing::error!("the journal's thread panicked");
        }
    }
}

/// Marks the journal as failed if the thread panics. Otherwise waiting calls would wait until their deadline, and
/// others would queue what is never written.
struct Panicked<'a>(&'a watch::Sender<Durable>);

impl Drop for Panicked<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let problem = "the journal cannot be written: its thread panicked".to_owned();
            self.0.send_modify(|durable| durable.failed = Some(problem));
        }
    }
}

/// The files that the thread writes.
struct Disk {
    database: Database,
    segments: Segments,
    epoch: Epoch,
    room: Room,
}

fn write_all(shared: &Shared, durable: &watch::Sender<Durable>, mut disk: Disk) {
    loop {
        let mut pending = shared.lock();
        while pending.is_empty() && !pending.closing {
            pending = shared.wake.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
        if pending.is_empty() {
            return;
        }
        // Everything queued during the last write shares one sync, so batches grow with the load.
        let batch = std::mem::take(&mut *pending);
        pending.closing = batch.closing;
        drop(pending);
        let (records, frames) = (batch.rows.len(), batch.frames.len());
        let upto = batch.rows.last().map(|row| row.seq);
        let _span = tracing::debug_span!("batch", records, frames, upto).entered();
        if let Err(problem) = write_patiently(shared, durable, &mut disk, &batch) {
            let problem = match problem {
                Problem::Disk(problem) | Problem::Full(problem) => format!("the journal cannot be written: {problem}"),
                Problem::Taken(problem) => problem,
            };
            tracing::error!("{problem}");
            durable.send_modify(|durable| durable.failed = Some(problem));
            return;
        }
        let newest = batch.rows.last().map(|row| row.seq).max(batch.snapshot.as_ref().map(|(seq, _)| *seq));
        durable.send_modify(|durable| durable.upto = durable.upto.max(newest.unwrap_or(0)));
        if tracing::enabled!(tracing::Level::DEBUG) {
            for (_, frame) in &batch.frames {
                let (sample, what) = (frame.key.sample(), frame.key.name());
                tracing::debug!(group = sample.group.0, sample = sample.index, what, "durable");
            }
        }
        if let Some((seq, snapshot)) = &batch.snapshot {
            let live: HashSet<_> = snapshot.live.iter().copied().collect();
            if let Err(error) = disk.segments.retain(&live, *seq) {
                tracing::warn!("unneeded segments of the journal were not removed: {error}");
            }
        }
    }
}

/// Why a batch could not be written.
enum Problem {
    /// The disk refused, and may accept a retry.
    Disk(String),
    /// The disk is full.
    Full(String),
    /// Another coordinator has taken over the run folder.
    Taken(String),
}

/// Writes a batch, with retries: the frames first, then the records that refer to them.
fn write_patiently(
    shared: &Shared,
    durable: &watch::Sender<Durable>,
    disk: &mut Disk,
    batch: &Pending,
) -> Result<(), Problem> {
    let mut started = Instant::now();
    let mut frames_written = false;
    let result = loop {
        let problem = match disk.write(batch, &mut frames_written) {
            Ok(()) => break Ok(()),
            Err(Problem::Full(problem)) if !shared.lock().closing => {
                let bytes = batch.bytes();
                disk.room.missing("journal", "what has happened", bytes, &problem);
                durable.send_if_modified(|durable| !std::mem::replace(&mut durable.is_full, true));
                // A full disk does not use up the patience for other errors.
                started = Instant::now();
                std::thread::sleep(RETRY);
                continue;
            }
            Err(Problem::Disk(problem) | Problem::Full(problem)) if started.elapsed() <= PATIENCE => problem,
            Err(problem) => break Err(problem),
        };
        tracing::warn!("the journal waits for the disk: {problem}");
        std::thread::sleep(RETRY);
    };
    disk.room.found("journal");
    durable.send_if_modified(|durable| std::mem::take(&mut durable.is_full));
    result
}

impl Disk {
    fn write(&mut self, batch: &Pending, frames_written: &mut bool) -> Result<(), Problem> {
        mine(&self.epoch)?;
        // A retry must not append the frames a second time.
        if !*frames_written {
            let written = self.segments.write(&batch.frames);
            written.map_err(|error| Problem::of(&error, format!("write samples: {error}")))?;
            *frames_written = true;
        }
        let refused = |error| Problem::of(&error, format!("write records: {error}"));
        let transaction = self.database.write(&batch.rows, &batch.audits, batch.snapshot.as_ref()).map_err(refused)?;
        // Checked as late as possible: only the commit remains.
        mine(&self.epoch)?;
        transaction.commit().map_err(refused)
    }
}

impl Problem {
    fn of(error: &(dyn std::error::Error + 'static), text: String) -> Self {
        if is_full(error) { Self::Full(text) } else { Self::Disk(text) }
    }
}

/// Fails if the run folder no longer belongs to this coordinator.
fn mine(epoch: &Epoch) -> Result<(), Problem> {
    epoch.check().map_err(|error| match error {
        FileError::Taken { .. } => Problem::Taken(error.to_string()),
        error => Problem::Disk(error.to_string()),
    })
}
