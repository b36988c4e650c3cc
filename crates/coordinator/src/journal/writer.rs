//! The thread that writes, in batches.

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

/// How long a full disk is tried again before the journal gives up.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(500);

/// Handle of the thread.
#[derive(Debug)]
pub(super) struct Writer {
    shared: Arc<Shared>,
    durable: Arc<watch::Sender<Durable>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    pending: Mutex<Pending>,
    wake: Condvar,
}

/// What is to be written next. Bounded by the calls in flight: each waits for its own record before the next one.
#[derive(Debug, Default)]
struct Pending {
    rows: Vec<Row>,
    frames: Vec<Frame>,
    audits: Vec<Audit>,
    snapshot: Option<(u64, Snapshot)>,
    closing: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.frames.is_empty() && self.audits.is_empty() && self.snapshot.is_none()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writer {
    pub(super) fn start(database: Database, segments: Segments, upto: u64) -> io::Result<Self> {
        let (shared, durable) = (Arc::new(Shared::default()), durable_channel(upto));
        let (inbox, told) = (Arc::clone(&shared), Arc::clone(&durable));
        // Ends when it is closed, after the last batch.
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || {
            write_all(&inbox, &told, database, segments);
        })?;
        Ok(Self { shared, durable, thread: Some(thread) })
    }

    pub(super) fn append(&self, seq: u64, record: String, payload: Option<Vec<u8>>, frame: Option<Frame>) {
        let mut pending = self.shared.lock();
        pending.rows.push(Row { seq, record, payload });
        pending.frames.extend(frame);
        self.shared.wake.notify_one();
    }

    pub(super) fn audit(&self, audit: Audit) {
        self.shared.lock().audits.push(audit);
        self.shared.wake.notify_one();
    }

    pub(super) fn snapshot(&self, seq: u64, snapshot: Snapshot) {
        self.shared.lock().snapshot = Some((seq, snapshot));
        self.shared.wake.notify_one();
    }

    pub(super) fn durable(&self) -> watch::Receiver<Durable> {
        self.durable.subscribe()
    }

    pub(super) fn close(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the journal's thread panicked");
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

fn write_all(shared: &Shared, durable: &watch::Sender<Durable>, mut database: Database, mut segments: Segments) {
    loop {
        let mut pending = shared.lock();
        while pending.is_empty() && !pending.closing {
            pending = shared.wake.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
        if pending.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut *pending);
        pending.closing = batch.closing;
        drop(pending);
        if let Err(problem) = write_patiently(&mut database, &mut segments, &batch) {
            tracing::error!("the journal cannot be written: {problem}");
            durable.send_modify(|durable| durable.failed = Some(format!("the journal cannot be written: {problem}")));
            return;
        }
        let newest = batch.rows.last().map(|row| row.seq).max(batch.snapshot.as_ref().map(|(seq, _)| *seq));
        durable.send_modify(|durable| durable.upto = durable.upto.max(newest.unwrap_or(0)));
        if let Some((_, snapshot)) = &batch.snapshot {
            // What came behind the snapshot is in this batch, or not written yet.
            let newer = batch.frames.iter().map(|frame| frame.key.sample().group);
            let live: HashSet<_> = snapshot.live.iter().copied().chain(newer).collect();
            if let Err(error) = segments.retain(&live) {
                tracing::warn!("segments of the journal that nobody needs were not removed: {error}");
            }
        }
    }
}

/// Writes a batch: the frames first, then the records that rely on them.
fn write_patiently(database: &mut Database, segments: &mut Segments, batch: &Pending) -> Result<(), String> {
    let started = Instant::now();
    let mut frames_written = false;
    loop {
        let problem = match write(database, segments, batch, &mut frames_written) {
            Ok(()) => return Ok(()),
            Err(problem) => problem,
        };
        if started.elapsed() > PATIENCE {
            return Err(problem);
        }
        tracing::warn!("the journal waits for the disk: {problem}");
        std::thread::sleep(RETRY);
    }
}

fn write(
    database: &mut Database,
    segments: &mut Segments,
    batch: &Pending,
    frames_written: &mut bool,
) -> Result<(), String> {
    if !*frames_written {
        if let Err(error) = segments.write(&batch.frames) {
            segments.abandon();
            return Err(format!("write samples: {error}"));
        }
        *frames_written = true;
    }
    database
        .commit(&batch.rows, &batch.audits, batch.snapshot.as_ref())
        .map_err(|error| format!("write records: {error}"))
}
