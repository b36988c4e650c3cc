//! Background checkpoint writes: one at a time, on a thread of its own, while training continues.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use pacs_protocol::v1;
use tokio::sync::oneshot;

use super::Captured;
use crate::error::CheckpointError;

/// Files of a written capture.
pub(crate) type WriteOutcome = Result<Vec<v1::SavedFile>, CheckpointError>;

/// An earlier checkpoint is still being written.
#[derive(Debug, thiserror::Error)]
#[error(
    "the checkpoint of step {step} is still being written after another {waited:?}; look at the disk of the run folder"
)]
pub(crate) struct Busy {
    step: u64,
    waited: Duration,
}

/// Writes captures, one at a time. Dropping it cancels the current write.
#[derive(Debug, Default)]
pub(crate) struct BackgroundWriter {
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    step: u64,
    unwanted: Arc<AtomicBool>,
    /// Disconnects when the thread has ended.
    ended: Receiver<()>,
}

impl BackgroundWriter {
    /// Starts to write a capture into `folder` after the current write has ended. The outcome may be ignored.
    ///
    /// # Errors
    /// When the current write does not end within `patience`.
    pub(crate) fn start(
        &mut self,
        step: u64,
        captured: Captured,
        folder: PathBuf,
        patience: Duration,
    ) -> Result<oneshot::Receiver<WriteOutcome>, Busy> {
        self.settle(patience)?;
        let (tell, outcome) = oneshot::channel();
        let (running, ended) = sync_channel::<()>(0);
        let unwanted = Arc::new(AtomicBool::new(false));
        self.running = Some(Running { step, unwanted: Arc::clone(&unwanted), ended });
        std::thread::spawn(move || {
            let _running = running;
            let written = captured.write(&folder, &unwanted);
            // Freed before the outcome is sent, so that the next capture fits into the memory plan.
            drop(captured);
            let _ = tell.send(written);
        });
        Ok(outcome)
    }

    /// Waits until no write is in progress.
    ///
    /// # Errors
    /// When the write does not end within `patience`.
    pub(crate) fn settle(&mut self, patience: Duration) -> Result<(), Busy> {
        let Some(running) = &self.running else { return Ok(()) };
        match running.ended.recv_timeout(patience) {
            Err(RecvTimeoutError::Timeout) => Err(Busy { step: running.step, waited: patience }),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {
                self.running = None;
                Ok(())
            }
        }
    }

    /// Cancels the current write. The thread stops at its next piece, which a hanging disk may delay.
    pub(crate) fn give_up(&self) {
        if let Some(running) = &self.running {
            running.unwanted.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for BackgroundWriter {
    fn drop(&mut self) {
        self.give_up();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use pacs_collective::HostCollective;
    use pacs_torch::tch::{Device, Kind};

    use super::*;
    use crate::settings::TrainerSettings;
    use crate::update::Trainer;

    fn trainer() -> Trainer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
        let text = "name = 'test'\n[model]\npath = 'm'\n[data.train]\npath = 'x.jsonl'\n[evaluation]\nbefore = false\n\
                    after = false\nevery_steps = 0\n";
        let spec = pacs_spec::parse(text, Path::new("test")).unwrap();
        Trainer::load(&folder, TrainerSettings::new(&spec, 0, 1), Kind::Float, Device::Cpu).unwrap()
    }

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn a_capture_is_the_state_that_a_save_in_the_foreground_writes() {
        let mut trainer = trainer();
        let (front, back) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut writer = BackgroundWriter::default();
        let outcome = writer.start(0, trainer.capture(), back.path().to_owned(), PATIENCE).unwrap();
        let files = trainer.save(front.path(), true, None, &mut HostCollective::alone()).unwrap();
        assert_eq!(outcome.blocking_recv().unwrap().unwrap(), files);
        let content = |folder: &Path| std::fs::read(folder.join(&files[0].path)).unwrap();
        assert!(content(front.path()) == content(back.path()));
        writer.settle(PATIENCE).unwrap();
    }

    #[test]
    fn a_stalled_disk_is_named_and_unwanted_writes_are_abandoned() {
        let trainer = trainer();
        let folder = tempfile::tempdir().unwrap();
        // Opening a pipe without a reader blocks, like a dead file server.
        let pipe = folder.path().join("training-state.safetensors");
        mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let mut writer = BackgroundWriter::default();
        let outcome = writer.start(3, trainer.capture(), folder.path().to_owned(), PATIENCE).unwrap();
        let busy = writer.start(4, trainer.capture(), folder.path().to_owned(), Duration::from_millis(20));
        assert!(busy.is_err_and(|busy| busy.to_string().contains("the checkpoint of step 3 is still being written")));
        writer.give_up();
        let reader = std::fs::File::open(&pipe).unwrap();
        assert!(matches!(outcome.blocking_recv().unwrap(), Err(CheckpointError::Unwanted { .. })));
        writer.settle(PATIENCE).unwrap();
        drop(reader);
    }
}
