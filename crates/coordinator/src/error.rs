use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pacs_data::DataError;
use pacs_runtime::Exit;

/// A file of the run that cannot be accessed, or whose content is not what was written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system refused an operation.
    #[error("{action} `{}`: {error}", path.display())]
    File {
        /// The operation, as a verb phrase.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Error of the file system.
        error: std::io::Error,
    },
    /// The database of the journal refused an operation.
    #[error("{action} `{}`: {error}", path.display())]
    Database {
        /// The operation, as a verb phrase.
        action: &'static str,
        /// The database file.
        path: PathBuf,
        /// Error of SQLite.
        error: rusqlite::Error,
    },
    /// The content differs from what was written.
    #[error("`{}` is damaged: {problem}", path.display())]
    Damaged {
        /// The damaged file or folder.
        path: PathBuf,
        /// The damage, in words.
        problem: String,
    },
    /// Another coordinator has taken over the run folder; this one has lost its lock and writes nothing more.
    #[error("another coordinator has taken over this run folder ({by}), so this one ends")]
    Taken {
        /// Process and host of the other coordinator.
        by: String,
    },
}

impl FileError {
    /// How the process exits: [`Exit::Again`] if another start, on this machine or another one, may
    /// succeed, otherwise [`Exit::Config`].
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::File { error, .. } => Exit::of_file(error),
            Self::Database { error, .. } => match Trouble::of(error) {
                Trouble::Passing => Exit::Again,
                Trouble::Path | Trouble::Damage => Exit::Config,
            },
            Self::Damaged { .. } => Exit::Config,
            Self::Taken { .. } => Exit::Again,
        }
    }

    /// Whether the file itself is unusable. A refusal of the disk says nothing about the content.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Self::File { .. } | Self::Taken { .. } => false,
            Self::Database { error, .. } => Trouble::of(error) == Trouble::Damage,
            Self::Damaged { .. } => true,
        }
    }

    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::File { action, path, error }
    }

    pub(crate) fn database(action: &'static str, path: &Path) -> impl FnOnce(rusqlite::Error) -> Self {
        let path = path.to_owned();
        move |error| Self::Database { action, path, error }
    }

    pub(crate) fn damaged(path: &Path, problem: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), problem: problem.into() }
    }
}

/// Cause of a database error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// The disk, the memory or another process; it may pass.
    Passing,
    /// This process cannot open or write the file.
    Path,
    /// The content of the file.
    Damage,
}

impl Trouble {
    fn of(error: &rusqlite::Error) -> Self {
        use rusqlite::ErrorCode::*;
        match error.sqlite_error_code() {
            Some(
                DiskFull
                | SystemIoFailure
                | DatabaseBusy
                | DatabaseLocked
                | FileLockingProtocolFailed
                | OutOfMemory
                | OperationInterrupted
                | OperationAborted,
            ) => Self::Passing,
            Some(CannotOpen | PermissionDenied | ReadOnly) => Self::Path,
            _ => Self::Damage,
        }
    }
}

/// Why a coordinator cannot start a run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another coordinator holds the lock of the folder.
    #[error("run folder `{}` is in use by another run; wait for it, or choose another folder", run_dir.display())]
    Busy {
        /// The run folder.
        run_dir: PathBuf,
    },
    /// The address cannot be listened on.
    #[error("listen on {address}: {error}; choose another port, or 0 for any free one")]
    Listen {
        /// The address from the options.
        address: SocketAddr,
        /// Error of the network stack.
        error: std::io::Error,
    },
    /// The model cannot have the adapters of `[model.lora]`.
    #[error(transparent)]
    Adapters(pacs_shape::ShapeError),
    /// The routes of the model cannot be recorded (`rollout.router_replay`).
    #[error("{0}")]
    Routes(String),
    /// The given run id is malformed.
    #[error("run id `{given}` is not 32 lower-case hexadecimal digits; `pacs run-id` makes one")]
    RunId {
        /// The run id as given.
        given: String,
    },
    /// The folder belongs to another run than the one that was asked for.
    #[error(
        "run folder `{}` holds run {found}, and this process was started for run {given}; choose another folder, or take the \
         id that the folder has", run_dir.display()
    )]
    OtherRun {
        /// The run folder.
        run_dir: PathBuf,
        /// Id of the run in the folder.
        found: String,
        /// Id that was given.
        given: String,
    },
    /// The service would be reachable from other hosts in plain text.
    #[error("listen")]
    PlainText(#[from] pacs_runtime::net::PlainText),
    /// A file of the run folder, journal or checkpoint cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The job spec has changed in a way that the checkpoint does not allow.
    #[error(
        "the job spec differs from the one of checkpoint `{}` in what a run must not change:\n  {}\nuse another run \
         folder, or change these back", checkpoint.display(), changes.join("\n  ")
    )]
    SpecChanged {
        /// The checkpoint that the run would resume from.
        checkpoint: PathBuf,
        /// One line per change: path, old value, new value.
        changes: Vec<String>,
    },
    /// The problems are not those that the run was started with.
    #[error(
        "the problems differ from those that checkpoint `{}` was trained with, though the job spec says the same:\n  {}\nput the data \
         files, the model folder and `rollout.max_new_tokens` (which decides what prompts fit) back as they were, or use another run \
         folder, with `model.path` at an exported model to keep what was learnt", checkpoint.display(), changes.join("\n  ")
    )]
    ProblemsChanged {
        /// The checkpoint that the run would resume from.
        checkpoint: PathBuf,
        /// One line per set, with the difference.
        changes: Vec<String>,
    },
    /// There are checkpoints, but none of them is valid.
    #[error(
        "no checkpoint in `{}` can be used:\n  {}\nremove them to start from the beginning",
        folder.display(), damages.join("\n  ")
    )]
    NoValidCheckpoint {
        /// The folder of checkpoints.
        folder: PathBuf,
        /// One line per checkpoint, with its damage.
        damages: Vec<String>,
    },
    /// A part of the job does not fit into the message that carries it.
    #[error("{what} takes {bytes} bytes in a message, and at most {most} are sent; {remedy}")]
    TooLarge {
        /// The part that is too large.
        what: String,
        /// Its size in bytes.
        bytes: usize,
        /// Largest size allowed.
        most: usize,
        /// How to make it fit.
        remedy: &'static str,
    },
    /// The problems cannot be loaded.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl StartError {
    /// Exit code of a process that cannot start for this reason.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Busy { .. } | Self::Listen { .. } => Exit::Again,
            Self::File(error) => error.exit(),
            Self::RunId { .. }
            | Self::OtherRun { .. }
            | Self::PlainText(_)
            | Self::SpecChanged { .. }
            | Self::ProblemsChanged { .. }
            | Self::NoValidCheckpoint { .. }
            | Self::TooLarge { .. }
            | Self::Adapters(_)
            | Self::Routes(_)
            | Self::Data(_) => Exit::Config,
        }
    }

    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let file = FileError::file(action, path);
        move |error| Self::File(file(error))
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::ffi;

    use super::*;

    #[test]
    fn what_the_disk_refuses_is_no_damage() {
        let path = Path::new("journal.db");
        for (code, exit, is_damage) in [
            (ffi::SQLITE_FULL, Exit::Again, false),
            (ffi::SQLITE_IOERR, Exit::Again, false),
            (ffi::SQLITE_IOERR_WRITE, Exit::Again, false),
            (ffi::SQLITE_BUSY, Exit::Again, false),
            (ffi::SQLITE_NOMEM, Exit::Again, false),
            (ffi::SQLITE_CANTOPEN, Exit::Config, false),
            (ffi::SQLITE_READONLY, Exit::Config, false),
            (ffi::SQLITE_CORRUPT, Exit::Config, true),
            (ffi::SQLITE_NOTADB, Exit::Config, true),
        ] {
            let error = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
            let error = FileError::database("open", path)(error);
            assert_eq!((error.exit(), error.is_damage()), (exit, is_damage), "{code}: {error}");
        }
        let damaged = FileError::damaged(path, "is short");
        assert_eq!((damaged.exit(), damaged.is_damage()), (Exit::Config, true));
    }
}
