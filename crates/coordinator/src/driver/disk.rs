//! The run folder as the driver sees it: jobs go out, what became of them comes back.

use std::time::Instant;

use pacs_machine::{Event, Snapshot, TaskKind, TaskOrder};
use tokio::sync::mpsc;

use super::{Driver, Shared, Wait};
use crate::progress::{Progress, RunEnd};
use crate::records::{Done, Job, MOST_WAITING, Manifest};

/// Follows what the thread of the run folder does, as long as both the thread and the driver are there.
pub(crate) fn follow(shared: &Shared, mut done: mpsc::Receiver<Done>) {
    let shared = shared.downgrade();
    // Ends with the thread, or when the run is gone.
    tokio::spawn(async move {
        while let Some(done) = done.recv().await {
            let Some(shared) = shared.upgrade() else { return };
            let Ok(mut driver) = shared.lock() else { return };
            driver.disk_did(done);
        }
    });
}

impl Driver {
    /// Has something done in the run folder, in its turn.
    pub(crate) fn hand_over(&mut self, job: Job) {
        if let Err(problem) = self.run_folder.hand_over(job) {
            self.interrupt(problem);
        }
    }

    /// Ends this process's part: what was acknowledged is in the journal, and another process resumes from there.
    pub(crate) fn interrupt(&mut self, reason: String) {
        if self.end.borrow().is_none() {
            tracing::error!("the run is interrupted: {reason}");
            self.end.send_replace(Some(RunEnd::Interrupted { reason }));
        }
    }

    pub(crate) fn create_checkpoint(&mut self, step: u64, save: u64) {
        self.saves.begin(Instant::now());
        self.hand_over(Job::Create { step, save });
    }

    pub(crate) fn commit_checkpoint(&mut self, snapshot: Snapshot, model: bool, save: u64) {
        // The files stay noted until there is a checkpoint: a coordinator that starts in the middle of this does it again.
        let manifest = Box::new(Manifest::new(snapshot, model, &self.spec, self.saved.clone()));
        let asked = self.durable();
        self.hand_over(Job::Commit { manifest, save, asked });
    }

    /// Takes in what became of a job.
    pub(crate) fn disk_did(&mut self, done: Done) {
        self.run_folder.note(&done);
        match done {
            // Ranks may have waited for it: for the folder of a save, or for room for the next step.
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

    /// Whether a task may be handed out as far as the disk is concerned: a step is not begun while several
    /// before it wait to be written, whose samples would fill the memory; and nobody writes to a folder that is not there.
    pub(crate) fn may_hand_out(&self, order: &TaskOrder) -> bool {
        match order.kind {
            TaskKind::Train { .. } => self.run_folder.waiting() < MOST_WAITING,
            TaskKind::Save { step, .. } => self.run_folder.has_folder(step, order.task),
            TaskKind::Prepare | TaskKind::Regroup { .. } => true,
        }
    }

    /// What the run waits for, if that is the disk and the machine does not know.
    pub(crate) fn waits_for_disk(&self) -> Option<String> {
        let waiting = self.run_folder.waiting();
        if waiting >= MOST_WAITING && self.machine.training().is_some() {
            return Some(format!("waits for the disk to take {waiting} steps and evaluations before this one"));
        }
        let (step, save) = self.machine.saving()?;
        let is_there = self.run_folder.has_folder(step, save);
        (!is_there).then(|| format!("waits for the disk to make the folder for the checkpoint of step {step}"))
    }
}

#[cfg(test)]
mod tests;
