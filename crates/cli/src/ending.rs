//! Why a coordinator ended: the file `ending` in the run folder, one word. Exit code 75 says that the run may go on; the
//! word says whether anybody else will see to that.

use std::fs;
use std::path::Path;

const FILE: &str = "ending";

/// Why a coordinator ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The job is done.
    Finished,
    /// The run could not go on.
    Failed,
    /// An operator stopped the run: it goes on when somebody wants it to.
    Stopped,
    /// Whoever started the coordinator ended it (SIGTERM), and knows what comes next.
    Terminated,
    /// The time of the job was nearly over (SIGUSR1).
    Warned,
    /// All workers were gone.
    Alone,
    /// The journal could not be written (a full disk).
    Interrupted,
}

impl Ending {
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

/// Writes the word. Launchers do without when it cannot be written: then they take an end for an accident.
pub(crate) fn note(run_dir: &Path, ending: Ending) {
    if let Err(error) = fs::write(run_dir.join(FILE), format!("{}\n", ending.word())) {
        tracing::warn!("`{}` was not written: {error}", run_dir.join(FILE).display());
    }
}

/// The word of a folder; none where there is none, or one that this program does not know.
pub(crate) fn read(run_dir: &Path) -> Option<String> {
    use Ending::{Alone, Failed, Finished, Interrupted, Stopped, Terminated, Warned};
    let word = fs::read_to_string(run_dir.join(FILE)).ok()?;
    let all = [Finished, Failed, Stopped, Terminated, Warned, Alone, Interrupted];
    all.into_iter().map(Ending::word).find(|known| *known == word.trim()).map(str::to_owned)
}

/// Removes the word of an earlier coordinator.
pub(crate) fn forget(run_dir: &Path) {
    // Mostly it is not there.
    let _ = fs::remove_file(run_dir.join(FILE));
}
