//! The thread that writes to the run folder. After the start nothing else writes there except the journal, which owns
//! `journal/`, and the sweeper, which removes and merges what this thread leaves for it.
//!
//! Jobs are done in the order in which they are queued, and each is durable before the next begins. This guarantees:
//!
//! - A snapshot of the machine is a job, too, and reaches the journal when its turn comes. So it never replaces the
//!   record of a step whose samples and line are not on disk: the journal replays what a crash leaves undone.
//! - A round is archived before the line of its step is written: where there is a line, there are samples.
//! - A checkpoint is committed after the lines of the steps before it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pacs_machine::Machine;
use pacs_runtime::Exit;
use pacs_types::Purpose;
use tokio::sync::mpsc;
use tracing::Span;

use super::fault::Fault;
use super::sweep::Sweeper;
use super::{Archive, Checkpoints, Epoch, Lines, Manifest, Retention, Room, Round, is_full};
use crate::FileError;
use crate::journal::{DurableUpTo, Extras, Snapshot, Snapshots};

/// Bound on queued jobs. [`MOST_WAITING`] bounds the steps among them, and the others come with a step or one at a
/// time, so a slow disk does not fill the queue. If it is full anyway, the process ends and the next one resumes from
/// the journal, because waiting would block every call.
const QUEUE: usize = 256;
/// Bound on unread results. When it is reached the thread waits, and no caller waits for the thread then.
const ENDS: usize = 256;
/// Steps and evaluations that may wait for the disk before the next step is held back: their samples are in memory.
pub(crate) const MOST_WAITING: usize = 4;
/// How long a failing disk is retried. A full disk is retried for as long as the run lasts.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(250);

/// A file of lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinesOf {
    Metrics,
    Evaluations,
    /// One line per evaluated problem.
    Problems,
}

/// A job for the thread. Jobs of one kind are queued in the order of their steps.
#[derive(Debug)]
pub(crate) enum Job {
    /// Archive the samples of a step or evaluation.
    Archive(Round),
    /// Append a line to one of the files.
    Append {
        to: LinesOf,
        step: u64,
        line: Vec<u8>,
        /// The step's evaluation score, if the line has one.
        score: Option<f64>,
    },
    /// Remove the lines and samples of later steps; all of them where the step is `None`.
    Truncate { steps: Option<u64>, evaluations: Option<u64> },
    /// Create the folder for the ranks' files, once there is space for `bytes`.
    Create { step: u64, save: u64, bytes: u64 },
    /// Turn a folder into a checkpoint, once the record that asks for it is durable.
    Commit { manifest: Box<Manifest>, save: u64, asked: DurableUpTo },
    /// Hand the journal a snapshot that replaces its records up to `seq`.
    Keep { seq: u64, machine: Box<Machine>, extras: Extras },
}

impl Job {
    /// Span for the log lines of the job. Jobs are rare enough for a span at level info.
    fn span(&self) -> Span {
        match self {
            Self::Archive(Round { step, .. }) => tracing::info_span!("archive", step),
            Self::Append { to, step, .. } => tracing::info_span!("append", ?to, step),
            Self::Truncate { steps, evaluations } => tracing::info_span!("truncate", steps, evaluations),
            Self::Create { step, save, bytes } => tracing::info_span!("create", step, save, bytes),
            Self::Commit { manifest, save, .. } => tracing::info_span!("commit", step = manifest.step, save),
            Self::Keep { seq, .. } => tracing::info_span!("snapshot", seq),
        }
    }
}

/// Result of a job that somebody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// The line of a step or evaluation is durable, and its samples before it.
    Written,
    /// The folder exists, so ranks may write.
    Created { step: u64, save: u64 },
    /// The checkpoint is committed.
    Committed { step: u64, path: PathBuf },
    /// The folder could not be created or committed.
    Refused { step: u64, save: u64, reason: String },
    /// Samples could not be archived; the run continues without them.
    Unarchived { step: u64, reason: String },
    /// The thread has ended with an error: only another start can resume the run.
    Failed { reason: String },
}

/// The open files of a run folder.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) checkpoints: Checkpoints,
    pub(crate) metrics: Lines,
    pub(crate) evaluations: Lines,
    /// Lines of the evaluated problems.
    pub(crate) problems: Lines,
    pub(crate) archive: Option<Archive>,
}

impl Files {
    /// Removes the lines and samples of later steps; all of them where the step is `None`.
    pub(crate) fn truncate(&mut self, steps: Option<u64>, evaluations: Option<u64>) -> io::Result<()> {
        self.metrics.truncate(steps)?;
        self.evaluations.truncate(evaluations)?;
        self.problems.truncate(evaluations)?;
        if let Some(archive) = &self.archive {
            archive.truncate(Purpose::Train, steps)?;
            archive.truncate(Purpose::Evaluate, evaluations)?;
        }
        Ok(())
    }
}

/// Handle of the thread. Dropping it acts like a crash: queued jobs are not done.
#[derive(Debug)]
pub(crate) struct RunFolder {
    jobs: Option<SyncSender<Job>>,
    abandoned: Arc<AtomicBool>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    archives: bool,
    /// Steps and evaluations that are queued.
    waiting: usize,
    /// Step of the last line, including queued ones.
    steps: Option<u64>,
    evaluations: Option<u64>,
    /// The save whose folder exists.
    folder: Option<(u64, u64)>,
}

impl RunFolder {
    /// Starts the thread. `kept` holds the numbers of newest and of best checkpoints to keep.
    pub(crate) fn start(
        files: Files,
        kept: (usize, usize),
        epoch: Epoch,
        snapshots: Snapshots,
        room: Room,
        fault: Fault,
    ) -> Result<(Self, mpsc::Receiver<Done>), FileError> {
        let scores = scores(&files)?;
        let folder = files.checkpoints.folder().to_owned();
        let (jobs, inbox) = sync_channel(QUEUE);
        let (ends, done) = mpsc::channel(ENDS);
        let (abandoned, closing) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let Files { checkpoints, metrics, evaluations, problems, archive } = files;
        let archive = archive.map(Arc::new);
        let handle = (archive.is_some(), metrics.last_step(), evaluations.last_step());
        let failed = FileError::file("start the threads of", &folder);
        let thread = Sweeper::start(checkpoints.clone(), archive.clone()).and_then(|sweeper| {
            let (newest, best) = kept;
            let mut owner = Owner {
                checkpoints,
                metrics,
                evaluations,
                problems,
                archive,
                retention: Retention { newest, best, scores },
                saving: None,
                unarchived: false,
                epoch,
                snapshots,
                sweeper,
                ends,
                abandoned: Arc::clone(&abandoned),
                closing: Arc::clone(&closing),
                room,
                fault,
            };
            // Ends after the last job when the handle is closed, or after the current one when it is dropped.
            let span = tracing::info_span!("run folder");
            std::thread::Builder::new().name("run folder".into()).spawn(move || span.in_scope(|| owner.work(&inbox)))
        });
        let (archives, steps, evaluations) = handle;
        let thread = Some(thread.map_err(failed)?);
        let jobs = Some(jobs);
        let this = Self { jobs, abandoned, closing, thread, archives, waiting: 0, steps, evaluations, folder: None };
        Ok((this, done))
    }

    /// Queues a job without waiting.
    ///
    /// # Errors
    /// When the thread accepts no more jobs.
    pub(crate) fn hand_over(&mut self, job: Job) -> Result<(), String> {
        match &job {
            Job::Append { to, step, .. } => {
                self.waiting += 1;
                match to {
                    LinesOf::Metrics => self.steps = Some(*step),
                    LinesOf::Evaluations => self.evaluations = Some(*step),
                    // The lines of the sets follow these, and mark them as complete.
                    LinesOf::Problems => {}
                }
            }
            Job::Truncate { steps, evaluations } => {
                // `None` is ordered before all steps.
                self.steps = self.steps.min(*steps);
                self.evaluations = self.evaluations.min(*evaluations);
            }
            Job::Create { .. } => self.folder = None,
            Job::Archive(_) | Job::Commit { .. } | Job::Keep { .. } => {}
        }
        match self.jobs.as_ref().map(|jobs| jobs.try_send(job)) {
            Some(Ok(())) => Ok(()),
            Some(Err(TrySendError::Full(_))) => {
                // A job was lost, so no later one may follow.
                self.jobs = None;
                Err(format!("the disk is {QUEUE} jobs late"))
            }
            Some(Err(TrySendError::Disconnected(_))) => Err("the run folder is no longer written".to_owned()),
            // Closed: later jobs are in the journal only, and are done at the next start.
            None => Ok(()),
        }
    }

    /// Updates the handle's state with a result.
    pub(crate) fn note(&mut self, done: &Done) {
        match done {
            Done::Written => self.waiting = self.waiting.saturating_sub(1),
            Done::Created { step, save } => self.folder = Some((*step, *save)),
            Done::Committed { .. } | Done::Refused { .. } | Done::Unarchived { .. } | Done::Failed { .. } => {}
        }
    }

    /// Whether samples are archived.
    pub(crate) fn archives(&self) -> bool {
        self.archives
    }

    /// Number of steps and evaluations that wait for the disk.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether the line of a step is written or queued.
    pub(crate) fn has(&self, lines: LinesOf, step: u64) -> bool {
        let last = match lines {
            LinesOf::Metrics => self.steps,
            LinesOf::Evaluations | LinesOf::Problems => self.evaluations,
        };
        last >= Some(step)
    }

    /// Whether the folder of a save exists, so that ranks may write.
    pub(crate) fn has_folder(&self, step: u64, save: u64) -> bool {
        self.folder == Some((step, save))
    }

    /// Stops accepting jobs; the thread ends after the queued ones.
    pub(crate) fn close(&mut self) -> Option<JoinHandle<()>> {
        self.jobs = None;
        self.closing.store(true, Ordering::Relaxed);
        self.thread.take()
    }

    /// Ends the thread after the current job, as a crash would; the journal replays the others.
    pub(crate) fn abandon(&mut self) -> Option<JoinHandle<()>> {
        self.abandoned.store(true, Ordering::Relaxed);
        self.close()
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if let Some(thread) = self.abandon()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the run folder panicked");
        }
    }
}

/// Evaluation scores of existing checkpoints, and of steps that may become one.
fn scores(files: &Files) -> Result<Vec<(u64, f64)>, FileError> {
    let steps = files.checkpoints.steps()?;
    let newest = steps.last().copied().unwrap_or(0);
    let read = files.evaluations.numbers("pass_at_1");
    let mut scores = read.map_err(FileError::file("read", files.evaluations.path()))?;
    scores.retain(|(step, _)| *step >= newest || steps.contains(step));
    Ok(scores)
}

/// Name of this thread in `Room`.
const WHO: &str = "run folder";

/// Why the thread ends early.
enum Stop {
    /// Its handle was dropped.
    Abandoned,
    /// An error, in words.
    Failed(String),
}

/// State of the working thread.
struct Owner {
    checkpoints: Checkpoints,
    metrics: Lines,
    evaluations: Lines,
    problems: Lines,
    archive: Option<Arc<Archive>>,
    retention: Retention,
    /// The step whose checkpoint is being written.
    saving: Option<u64>,
    /// Whether the newest round could not be archived.
    unarchived: bool,
    epoch: Epoch,
    snapshots: Snapshots,
    sweeper: Sweeper,
    ends: mpsc::Sender<Done>,
    abandoned: Arc<AtomicBool>,
    /// Whether the run has ended, so that the rest must not take long.
    closing: Arc<AtomicBool>,
    room: Room,
    fault: Fault,
}

impl Owner {
    fn work(&mut self, jobs: &Receiver<Job>) {
        for job in jobs {
            let _span = job.span().entered();
            self.fault.strike();
            match self.mine().and_then(|()| self.carry_out(job)) {
                Ok(()) if self.is_abandoned() => return,
                Ok(()) => tracing::debug!("done"),
                Err(Stop::Abandoned) => return,
                Err(Stop::Failed(reason)) => {
                    tracing::error!("the run folder is no longer written: {reason}");
                    return self.tell(Done::Failed { reason });
                }
            }
        }
    }

    /// Fails unless the run folder is still this coordinator's.
    fn mine(&self) -> Result<(), Stop> {
        if self.is_abandoned() {
            return Err(Stop::Abandoned);
        }
        self.epoch.check().map_err(|error| Stop::Failed(error.to_string()))
    }

    fn carry_out(&mut self, job: Job) -> Result<(), Stop> {
        match job {
            Job::Archive(round) => self.archive(&round)?,
            Job::Append { to, step, line, score } => self.append(to, step, &line, score)?,
            Job::Truncate { steps, evaluations } => self.truncate(steps, evaluations)?,
            Job::Create { step, save, bytes } => self.create(step, save, bytes)?,
            Job::Commit { manifest, save, asked } => self.commit(&manifest, save, asked)?,
            Job::Keep { seq, machine, extras } => {
                // The snapshot replaces the records of these lines, so they have to be durable first.
                self.sync_lines()?;
                self.snapshots.put(seq, Snapshot::of(&machine, extras));
            }
        }
        Ok(())
    }

    /// Archives a round. Samples are kept for people to look at, so the run continues without them.
    fn archive(&mut self, round: &Round) -> Result<(), Stop> {
        let Some(archive) = self.archive.clone() else { return Ok(()) };
        // After one round has failed for the whole time, later ones are tried once each, so that the disk does not
        // delay them all.
        let written = match self.unarchived {
            true => archive.write(round),
            false => self.patiently("the samples of a step", 0, |_| archive.write(round))?,
        };
        self.unarchived = written.is_err();
        if let Err(error) = written {
            let (step, folder) = (round.step, archive.folder().display());
            let reason = format!("write to `{folder}`: {error}");
            tracing::warn!(step, "samples were not archived: {reason}");
            self.tell(Done::Unarchived { step, reason });
        }
        self.sweeper.look();
        Ok(())
    }

    /// Appends a line. A missing line could never be added later, so the run does not continue without one.
    fn append(&mut self, to: LinesOf, step: u64, line: &[u8], score: Option<f64>) -> Result<(), Stop> {
        let appended =
            self.patiently("the line of a step", line.len() as u64, |owner| owner.lines(to).append(step, line))?;
        self.or_failed(appended, to, "write")?;
        if let Some(score) = score {
            self.note_score(step, score);
        }
        self.tell(Done::Written);
        Ok(())
    }

    fn truncate(&mut self, steps: Option<u64>, evaluations: Option<u64>) -> Result<(), Stop> {
        let cuts = [(LinesOf::Metrics, steps), (LinesOf::Evaluations, evaluations), (LinesOf::Problems, evaluations)];
        for (to, last) in cuts {
            let cut = self.patiently("the end of its lines", 0, |owner| owner.lines(to).truncate(last))?;
            self.or_failed(cut, to, "cut")?;
        }
        // Scores of undone evaluations must not decide about checkpoints of the repeated steps.
        self.retention.scores.retain(|(step, _)| evaluations.is_some_and(|last| *step <= last));
        let Some(archive) = self.archive.clone() else { return Ok(()) };
        for (purpose, last) in [(Purpose::Train, steps), (Purpose::Evaluate, evaluations)] {
            let cut = self.patiently("fewer samples", 0, |_| archive.truncate(purpose, last))?;
            cut.map_err(|error| Stop::Failed(format!("remove samples in `{}`: {error}", archive.folder().display())))?;
        }
        Ok(())
    }

    fn create(&mut self, step: u64, save: u64, bytes: u64) -> Result<(), Stop> {
        // Leftovers of earlier saves may be what fills the disk.
        let mut created = self.checkpoints.create(step, save);
        self.sweeper.look();
        let what = format!("the checkpoint of step {step}");
        let room = self.patiently(&what, bytes, |owner| owner.room.must_take(bytes))?;
        if let (Ok(()), Err(error)) = (&created, room) {
            created = Err(FileError::file("write", self.checkpoints.folder())(error));
        }
        self.saving = Some(step);
        self.sweeper.look();
        self.tell(match created {
            Ok(()) => Done::Created { step, save },
            Err(error) => Done::Refused { step, save, reason: error.to_string() },
        });
        Ok(())
    }

    fn commit(&mut self, manifest: &Manifest, save: u64, asked: DurableUpTo) -> Result<(), Stop> {
        // A checkpoint must neither precede the record that asks for it, nor lack the records of the steps before it.
        asked.wait_blocking().map_err(Stop::Failed)?;
        self.sync_lines()?;
        let step = manifest.step;
        let done = match self.checkpoints.commit(manifest, save, &self.retention, &self.epoch) {
            Ok(path) => Done::Committed { step, path },
            Err(error @ FileError::Taken { .. }) => return Err(Stop::Failed(error.to_string())),
            Err(error) => Done::Refused { step, save, reason: error.to_string() },
        };
        self.saving = None;
        self.sweeper.look();
        self.tell(done);
        Ok(())
    }

    /// Keeps scores of checkpoints only, because there may be an evaluation after every step.
    fn note_score(&mut self, step: u64, score: f64) {
        let steps = match self.checkpoints.steps() {
            Ok(steps) => steps,
            // The scores are kept, because a best checkpoint that is removed is lost for good.
            Err(error) => return tracing::warn!("checkpoints cannot be listed: {error}"),
        };
        let saving = self.saving;
        self.retention.scores.retain(|(step, _)| saving == Some(*step) || steps.contains(step));
        self.retention.scores.push((step, score));
    }

    fn sync_lines(&mut self) -> Result<(), Stop> {
        for to in [LinesOf::Metrics, LinesOf::Problems, LinesOf::Evaluations] {
            let synced = self.patiently("the lines of its steps", 0, |owner| owner.lines(to).sync())?;
            self.or_failed(synced, to, "sync")?;
        }
        Ok(())
    }

    fn lines(&mut self, to: LinesOf) -> &mut Lines {
        match to {
            LinesOf::Metrics => &mut self.metrics,
            LinesOf::Evaluations => &mut self.evaluations,
            LinesOf::Problems => &mut self.problems,
        }
    }

    fn or_failed<T>(&mut self, result: io::Result<T>, to: LinesOf, what: &str) -> Result<T, Stop> {
        let path = self.lines(to).path().display();
        result.map_err(|error| Stop::Failed(format!("{what} `{path}`: {error}")))
    }

    /// Retries an operation while the disk may recover. It writes `bytes` of `what`; 0 if the size is not known.
    fn patiently<T>(
        &mut self,
        what: &str,
        bytes: u64,
        mut attempt: impl FnMut(&mut Self) -> io::Result<T>,
    ) -> Result<io::Result<T>, Stop> {
        let mut began = Instant::now();
        let done = loop {
            let result = attempt(self);
            match &result {
                Err(error) if is_full(error) && !self.closing.load(Ordering::Relaxed) => {
                    self.room.missing(WHO, what, bytes, error);
                    began = Instant::now();
                }
                Err(error) if Exit::of_file(error) == Exit::Again && began.elapsed() < PATIENCE => {
                    tracing::warn!("the run folder waits for the disk: {error}");
                }
                _ => break Ok(result),
            }
            if self.is_abandoned() {
                break Err(Stop::Abandoned);
            }
            std::thread::sleep(RETRY);
        };
        self.room.found(WHO);
        done
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Relaxed)
    }

    fn tell(&self, done: Done) {
        let mut done = done;
        // Not a blocking send: the reader may be the one that drops the handle and waits for this thread.
        while let Err(mpsc::error::TrySendError::Full(back)) = self.ends.try_send(done) {
            if self.is_abandoned() {
                return;
            }
            done = back;
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests;
