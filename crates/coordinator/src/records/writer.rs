//! The thread that owns the run folder: after the start, nothing else writes in it but the journal, which owns `journal/`,
//! and the sweeper, which removes and merges what this thread leaves for it.
//!
//! Jobs are done in the order in which they are handed over, and each is durable before the next one begins. What follows
//! from the order:
//!
//! - A snapshot of the machine is a job, too, and reaches the journal when its turn comes. So it never takes the place of
//!   the record of a step whose samples and line are not on the disk: whatever a crash leaves undone, the journal does again.
//! - A round is archived before the line of its step is written: where the line is, the samples are.
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

/// Jobs that may wait. [`MOST_WAITING`] bounds the steps among them, and the others come with a step or one at a time, so a
/// slow disk does not fill the queue. Should something else do, the process ends, and the next one resumes from the journal:
/// waiting would hold up every call.
const QUEUE: usize = 256;
/// What was done and not noticed yet; full, the thread waits, and nobody waits for it then.
const ENDS: usize = 256;
/// Steps and evaluations that may wait to be written before no step is begun any more: their samples are in memory.
pub(crate) const MOST_WAITING: usize = 4;
/// How long a disk that refuses is tried again; one that is full, without end while the run lasts.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(250);

/// Which lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LinesOf {
    Metrics,
    Evaluations,
    /// One a problem that was measured.
    Problems,
}

/// What is to be done. Jobs of a kind come in the order of their steps.
#[derive(Debug)]
pub(crate) enum Job {
    /// Archive the samples of a step or an evaluation.
    Archive(Round),
    /// Add a line.
    Append {
        to: LinesOf,
        step: u64,
        line: Vec<u8>,
        /// What an evaluation says of its step.
        score: Option<f64>,
    },
    /// Undo: remove the lines and samples of later steps, all where there is none.
    Truncate { steps: Option<u64>, evaluations: Option<u64> },
    /// Make the folder for the ranks' files when there is room for so many bytes.
    Create { step: u64, save: u64, bytes: u64 },
    /// Make a folder a checkpoint.
    Commit { manifest: Box<Manifest>, save: u64, asked: DurableUpTo },
    /// Have the journal put this in the place of its records up to `seq`.
    Keep { seq: u64, machine: Box<Machine>, extras: Extras },
}

impl Job {
    /// Of the log lines that are about it. A job is rare enough for a span that is on at the usual level.
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

/// What has become of a job that somebody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// The line of a step or an evaluation is written, and its samples before it.
    Written,
    /// The folder is there: ranks may write.
    Created { step: u64, save: u64 },
    /// There is a new checkpoint.
    Committed { step: u64, path: PathBuf },
    /// The folder could not be made, or made a checkpoint.
    Refused { step: u64, save: u64, reason: String },
    /// Samples are not archived, and the run continues without them.
    Unarchived { step: u64, reason: String },
    /// Nothing more will be written: only another start can resume the run.
    Failed { reason: String },
}

/// The files of a run folder, open.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) checkpoints: Checkpoints,
    pub(crate) metrics: Lines,
    pub(crate) evaluations: Lines,
    /// Of the same measurements: each problem that was measured.
    pub(crate) problems: Lines,
    pub(crate) archive: Option<Archive>,
}

impl Files {
    /// Removes what was written about later steps; about all steps where there is none.
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

/// Handle of the thread. Dropping it is what a crash is: jobs that wait are not done.
#[derive(Debug)]
pub(crate) struct RunFolder {
    jobs: Option<SyncSender<Job>>,
    abandoned: Arc<AtomicBool>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    archives: bool,
    /// Steps and evaluations handed over and not written yet.
    waiting: usize,
    /// The steps of the last lines, those that wait to be written included.
    steps: Option<u64>,
    evaluations: Option<u64>,
    /// The save whose folder is there.
    folder: Option<(u64, u64)>,
}

impl RunFolder {
    /// Starts the thread. `kept` is how many of the newest and of the best checkpoints stay.
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
            // Ends when the handle is closed, after the last job, or dropped, after the one at hand.
            let span = tracing::info_span!("run folder");
            std::thread::Builder::new().name("run folder".into()).spawn(move || span.in_scope(|| owner.work(&inbox)))
        });
        let (archives, steps, evaluations) = handle;
        let thread = Some(thread.map_err(failed)?);
        let jobs = Some(jobs);
        let this = Self { jobs, abandoned, closing, thread, archives, waiting: 0, steps, evaluations, folder: None };
        Ok((this, done))
    }

    /// Hands a job over without waiting for anything.
    ///
    /// # Errors
    /// When no more jobs are taken.
    pub(crate) fn hand_over(&mut self, job: Job) -> Result<(), String> {
        match &job {
            Job::Append { to, step, .. } => {
                self.waiting += 1;
                match to {
                    LinesOf::Metrics => self.steps = Some(*step),
                    LinesOf::Evaluations => self.evaluations = Some(*step),
                    // The lines of the sets come after these, and say that they are there.
                    LinesOf::Problems => {}
                }
            }
            Job::Truncate { steps, evaluations } => {
                // `None` is less than all steps.
                self.steps = self.steps.min(*steps);
                self.evaluations = self.evaluations.min(*evaluations);
            }
            Job::Create { .. } => self.folder = None,
            Job::Archive(_) | Job::Commit { .. } | Job::Keep { .. } => {}
        }
        match self.jobs.as_ref().map(|jobs| jobs.try_send(job)) {
            Some(Ok(())) => Ok(()),
            Some(Err(TrySendError::Full(_))) => {
                // Nothing may follow what was left out.
                self.jobs = None;
                Err(format!("the disk is {QUEUE} jobs late"))
            }
            Some(Err(TrySendError::Disconnected(_))) => Err("the run folder is not written any more".to_owned()),
            // Closed: what comes now is in the journal alone, and is done at the next start.
            None => Ok(()),
        }
    }

    /// Notes what was done.
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

    /// Steps and evaluations that wait for the disk.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether the line of a step is written, or about to be.
    pub(crate) fn has(&self, lines: LinesOf, step: u64) -> bool {
        let last = match lines {
            LinesOf::Metrics => self.steps,
            LinesOf::Evaluations | LinesOf::Problems => self.evaluations,
        };
        last >= Some(step)
    }

    /// Whether ranks may write the files of a save.
    pub(crate) fn has_folder(&self, step: u64, save: u64) -> bool {
        self.folder == Some((step, save))
    }

    /// Takes no more jobs: the thread ends after those that wait.
    pub(crate) fn close(&mut self) -> Option<JoinHandle<()>> {
        self.jobs = None;
        self.closing.store(true, Ordering::Relaxed);
        self.thread.take()
    }

    /// Lets the thread end after the job at hand, as a crash would: the journal does the others again.
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

/// What evaluations have said of the checkpoints that are there, and of steps that may become one.
fn scores(files: &Files) -> Result<Vec<(u64, f64)>, FileError> {
    let steps = files.checkpoints.steps()?;
    let newest = steps.last().copied().unwrap_or(0);
    let read = files.evaluations.numbers("pass_at_1");
    let mut scores = read.map_err(FileError::file("read", files.evaluations.path()))?;
    scores.retain(|(step, _)| *step >= newest || steps.contains(step));
    Ok(scores)
}

/// Who waits for room.
const WHO: &str = "run folder";

/// Why the thread ends before its time.
enum Stop {
    /// Its handle is gone.
    Abandoned,
    /// For this reason.
    Failed(String),
}

/// The thread at work.
struct Owner {
    checkpoints: Checkpoints,
    metrics: Lines,
    evaluations: Lines,
    problems: Lines,
    archive: Option<Arc<Archive>>,
    retention: Retention,
    /// The step whose checkpoint is being written.
    saving: Option<u64>,
    /// The newest round could not be archived.
    unarchived: bool,
    epoch: Epoch,
    snapshots: Snapshots,
    sweeper: Sweeper,
    ends: mpsc::Sender<Done>,
    abandoned: Arc<AtomicBool>,
    /// The run is over: nobody waits long for what is left.
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
                    tracing::error!("the run folder is not written any more: {reason}");
                    return self.tell(Done::Failed { reason });
                }
            }
        }
    }

    /// Nothing is written unless the run folder is still this coordinator's.
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
                self.sync_lines()?;
                self.snapshots.put(seq, Snapshot::of(&machine, extras));
            }
        }
        Ok(())
    }

    /// Samples are for people to look at: the run continues without them.
    fn archive(&mut self, round: &Round) -> Result<(), Stop> {
        let Some(archive) = self.archive.clone() else { return Ok(()) };
        // A disk that has not taken one round in all that time does not hold up every round.
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

    /// A gap in the lines is for good, so the run does not continue without one.
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
        self.retention.scores.retain(|(step, _)| evaluations.is_some_and(|last| *step <= last));
        let Some(archive) = self.archive.clone() else { return Ok(()) };
        for (purpose, last) in [(Purpose::Train, steps), (Purpose::Evaluate, evaluations)] {
            let cut = self.patiently("fewer samples", 0, |_| archive.truncate(purpose, last))?;
            cut.map_err(|error| Stop::Failed(format!("remove samples in `{}`: {error}", archive.folder().display())))?;
        }
        Ok(())
    }

    fn create(&mut self, step: u64, save: u64, bytes: u64) -> Result<(), Stop> {
        // What earlier saves have left may be what takes the room.
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
        // A checkpoint never comes before the record that asks for it, nor outlives the records of the steps before it.
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

    /// Keeps the scores of checkpoints alone: there may be an evaluation after every step.
    fn note_score(&mut self, step: u64, score: f64) {
        let steps = match self.checkpoints.steps() {
            Ok(steps) => steps,
            // The scores stay: a best checkpoint that is removed is lost for good.
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

    /// Tries again while the disk may yet take it: so many bytes of `what`, 0 where nobody counts them.
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
        // Not a blocking send: who reads the ends may be the one who drops the handle, and waits for this thread.
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
