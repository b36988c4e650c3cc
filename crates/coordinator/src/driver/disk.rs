//! The driver's side of the run folder: it queues jobs and handles their results.

use std::time::{Duration, Instant};

use pacs_machine::{Event, PhaseKind, Snapshot, TaskKind, TaskOrder};
use tokio::sync::mpsc;
use tonic::Status;

use super::{Driver, Shared, Wait, no_room};
use crate::progress::{Progress, RunEnd};
use crate::records::{Done, Job, MOST_WAITING, Manifest};

/// Handles the results of the run folder's thread, for as long as both the thread and the driver exist.
pub(crate) fn follow(shared: &Shared, mut done: mpsc::Receiver<Done>) {
    let shared = shared.downgrade();
    // Ends with the thread, or when the run is dropped.
    tokio::spawn(async move {
        while let Some(done) = done.recv().await {
            let Some(shared) = shared.upgrade() else { return };
            let Ok(mut driver) = shared.lock() else { return };
            driver.disk_did(done);
        }
    });
}

/// Interval at which watchers are reminded that the disk is full.
const STILL_AGAIN: Duration = Duration::from_secs(60);

impl Driver {
    /// Queues a job for the run folder.
    pub(crate) fn hand_over(&mut self, job: Job) {
        if let Err(problem) = self.run_folder.hand_over(job) {
            self.interrupt(problem);
        }
    }

    /// Ends this process's part of the run. Everything acknowledged is in the journal, and the
    /// next process resumes from it.
    pub(crate) fn interrupt(&mut self, reason: String) {
        if self.end.borrow().is_none() {
            tracing::error!("the run is interrupted: {reason}");
            self.end.send_replace(Some(RunEnd::Interrupted { reason }));
        }
    }

    pub(crate) fn create_checkpoint(&mut self, step: u64, save: u64) {
        self.saves.begin(Instant::now());
        self.hand_over(Job::Create { step, save, bytes: self.save_bytes });
    }

    pub(crate) fn commit_checkpoint(&mut self, snapshot: Snapshot, model: bool, save: u64) {
        // The files are kept until the checkpoint exists, so that a coordinator that restarts
        // in between can commit again.
        let manifest = Box::new(Manifest::new(snapshot, model, &self.spec, self.saved.clone()));
        let bytes: u64 = self.saved.values().flatten().map(|file| file.bytes).sum();
        self.save_bytes = self.save_bytes.max(bytes);
        // The record that asks for the commit must be durable before the checkpoint is.
        let asked = self.durable();
        self.hand_over(Job::Commit { manifest, save, asked });
    }

    /// Handles the result of a job.
    pub(crate) fn disk_did(&mut self, done: Done) {
        self.run_folder.note(&done);
        match done {
            // A rank may be waiting for the folder of a save, or for a step to be written before the next one.
            Done::Written | Done::Created { .. } => self.notify(Wait::Task),
            Done::Committed { step, path } => {
                let seconds = self.saves.end(Instant::now());
                self.tell_progress(Progress::Saved { step, path, seconds });
                self.tell(Event::CheckpointCommitted { step });
            }
            Done::Refused { step, save, reason } => {
                let committing = self.machine.committing().map(|(snapshot, _, save)| (snapshot.step, save));
                // The learners may be at another save of the same step by now.
                if self.machine.saving().or(committing) == Some((step, save)) {
                    self.tell(Event::CheckpointFailed { step, reason });
                }
            }
            Done::Unarchived { step, reason } => {
                self.note(format!(
                    "the samples of step {step} are not archived, the run continues without them: {reason}"
                ));
            }
            Done::Failed { reason } => self.interrupt(reason),
        }
    }

    /// Whether the disk allows a task to be handed out. A step waits while several earlier ones are not written,
    /// because their samples would fill the memory; a save waits for its folder.
    pub(crate) fn may_hand_out(&self, order: &TaskOrder) -> bool {
        match order.kind {
            TaskKind::Train { .. } => self.run_folder.waiting() < MOST_WAITING,
            TaskKind::Save { step, .. } => self.run_folder.has_folder(step, order.task),
            TaskKind::Prepare | TaskKind::Regroup { .. } => true,
        }
    }

    /// Refuses calls while the disk is full, because the journal could not record them.
    ///
    /// # Errors
    /// When the disk is full.
    pub(crate) fn must_have_room(&self) -> Result<(), Status> {
        if self.journal.is_full() { Err(no_room("for what has happened")) } else { Ok(()) }
    }

    /// Stops the run's clock while it waits for disk space, so that neither liveness timeouts nor the watchdog expire.
    pub(crate) fn mind_room(&mut self) {
        let wanted = self.room.wanted();
        let now = Instant::now();
        match (&wanted, self.still_since) {
            (Some(_), None) => self.still_since = Some(now),
            (None, Some(since)) => {
                self.still_since = None;
                self.told_still = None;
                self.stood_still += now.duration_since(since);
                let seconds = now.duration_since(since).as_secs_f64();
                self.note(format!("there is room on the disk again, after {seconds:.0} s; the run resumes"));
                [Wait::Task, Wait::Generation, Wait::Weights].into_iter().for_each(|wait| self.notify(wait));
            }
            _ => {}
        }
        if let Some(wanted) = wanted.filter(|_| self.told_still.is_none_or(|told| told.elapsed() >= STILL_AGAIN)) {
            self.told_still = Some(now);
            self.tell_progress(Progress::Waiting { sentence: format!("waits for {wanted}") });
        }
    }

    /// What the run waits for, if that is the disk and the machine does not know it.
    pub(crate) fn waits_for_disk(&self) -> Option<String> {
        if let Some(wanted) = self.room.wanted() {
            return Some(format!("waits for {wanted}"));
        }
        let waiting = self.run_folder.waiting();
        if waiting >= MOST_WAITING && self.machine.phase() == PhaseKind::Training {
            return Some(format!("waits for the disk to take {waiting} steps and evaluations before this one"));
        }
        let (step, save) = self.machine.saving()?;
        let is_there = self.run_folder.has_folder(step, save);
        (!is_there).then(|| format!("waits for the disk to make the folder for the checkpoint of step {step}"))
    }
}

#[cfg(test)]
mod tests;
