//! Why a coordinator ended: one word in the file `ending` of the run folder. Exit code 75 says that the run can resume; the
//! word tells launchers whether another process will restart it.

use std::fs;
use std::path::Path;

use pacs_coordinator::RunEnd;

const FILE: &str = "ending";

/// The reasons, one word each in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All steps and evaluations of the job are done.
    Finished,
    /// The run failed, or the driver panicked; a restart would fail again.
    Failed,
    /// An operator stopped the run (`pacs stop`); it stays down until it is started again.
    Stopped,
    /// The launcher ended the coordinator (SIGTERM) and decides itself whether to restart it.
    Terminated,
    /// The job's time limit was near (SIGUSR1).
    Warned,
    /// All workers had been gone for `--alone-timeout`.
    Alone,
    /// The journal could not be written, for example because the disk failed.
    Interrupted,
}

impl Ending {
    /// The reason of a run that ended without a signal of its launcher.
    pub(crate) fn of(end: &RunEnd) -> Self {
        match end {
            RunEnd::Finished { .. } => Self::Finished,
            RunEnd::Stopped { .. } => Self::Stopped,
            RunEnd::Failed { .. } | RunEnd::Panicked { .. } => Self::Failed,
            RunEnd::Interrupted { .. } => Self::Interrupted,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
            Self::Terminated => "terminated",
            Self::Warned => "warned",
            Self::Alone => "alone",
            Self::Interrupted => "interrupted",
        }
    }
}

/// Writes the word, best effort. Launchers treat a missing file as a crash.
pub(crate) fn note(run_dir: &Path, ending: Ending) {
    if let Err(error) = fs::write(run_dir.join(FILE), format!("{}\n", ending.word())) {
        tracing::warn!("`{}` was not written: {error}", run_dir.join(FILE).display());
    }
}

/// Reads the word; `None` when the file is missing or holds a word that this version does not know.
pub(crate) fn read(run_dir: &Path) -> Option<String> {
    use Ending::{Alone, Failed, Finished, Interrupted, Stopped, Terminated, Warned};
    let word = fs::read_to_string(run_dir.join(FILE)).ok()?;
    let all = [Finished, Failed, Stopped, Terminated, Warned, Alone, Interrupted];
    all.into_iter().map(Ending::word).find(|known| *known == word.trim()).map(str::to_owned)
}

/// Removes the word of an earlier coordinator, so that a crash of this one is not mistaken for that end.
pub(crate) fn forget(run_dir: &Path) {
    // Usually there is no such file.
    let _ = fs::remove_file(run_dir.join(FILE));
}
