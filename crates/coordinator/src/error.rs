use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pacs_data::DataError;
use pacs_runtime::Exit;

/// A file of the run that cannot be read or written, or is not what was written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system refuses.
    #[error("{action} `{}`: {error}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// The database of the journal refuses.
    #[error("{action} `{}`: {error}", path.display())]
    Database {
        /// What was tried.
        action: &'static str,
        /// The database.
        path: PathBuf,
        /// Why not.
        error: rusqlite::Error,
    },
    /// What is there is not what was written.
    #[error("`{}` is damaged: {problem}", path.display())]
    Damaged {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Another coordinator has taken the run folder: this one has lost its lock, and writes nothing more.
    #[error("another coordinator has taken over this run folder ({by}), so this one ends")]
    Taken {
        /// Its process and host.
        by: String,
    },
}

impl FileError {
    /// Whether another start, on this machine or another one, may find it otherwise: [`Exit::Again`], else [`Exit::Config`].
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

    /// Whether the file itself is no use any more. What the disk refuses today says nothing of what is on it.
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

/// What an error of the database is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// The disk, the memory, or another process; it may pass.
    Passing,
    /// The file cannot be opened or written by this process.
    Path,
    /// What is in the file.
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

/// Why a run cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another coordinator works in the folder.
    #[error("run folder `{}` is in use by another run; wait for it, or choose another folder", run_dir.display())]
    Busy {
        /// The run folder.
        run_dir: PathBuf,
    },
    /// The address cannot be listened on.
    #[error("listen on {address}: {error}; choose another port, or 0 for any free one")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
    /// What should be the id of the run is none.
    #[error("run id `{given}` is not 32 lower-case hexadecimal digits; `pacs run-id` makes one")]
    RunId {
        /// As given.
        given: String,
    },
    /// The folder belongs to another run than the launcher means.
    #[error(
        "run folder `{}` holds run {found}, and this process was started for run {given}; choose another folder, or take the \
         id that the folder has", run_dir.display()
    )]
    OtherRun {
        /// The run folder.
        run_dir: PathBuf,
        /// The id in the folder.
        found: String,
        /// The id that was given.
        given: String,
    },
    /// Others would reach it in plain text.
    #[error("listen")]
    PlainText(#[from] pacs_runtime::net::PlainText),
    /// A file of the run folder, of the journal or of a checkpoint, cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The job changed in a way that its checkpoint cannot follow.
    #[error(
        "the job spec differs from the one of checkpoint `{}` in what a run must not change:\n  {}\nuse another run \
         folder, or change these back", checkpoint.display(), changes.join("\n  ")
    )]
    SpecChanged {
        /// The checkpoint that the run would go on from.
        checkpoint: PathBuf,
        /// One line each: path, old value, new value.
        changes: Vec<String>,
    },
    /// The problems are not those that the run was begun with.
    #[error(
        "the problems differ from those that checkpoint `{}` was trained with, though the job spec says the same:\n  {}\nput the data \
         files, the model folder and `rollout.max_new_tokens` (which decides what prompts fit) back as they were, or use another run \
         folder, with `model.path` at an exported model to keep what was learnt", checkpoint.display(), changes.join("\n  ")
    )]
    ProblemsChanged {
        /// The checkpoint that the run would resume from.
        checkpoint: PathBuf,
        /// One line each: which set, and how it differs.
        changes: Vec<String>,
    },
    /// There are checkpoints, but none can be used.
    #[error(
        "no checkpoint in `{}` can be used:\n  {}\nremove them to start from the beginning",
        folder.display(), damages.join("\n  ")
    )]
    NoValidCheckpoint {
        /// The folder of checkpoints.
        folder: PathBuf,
        /// One line each: what is wrong.
        damages: Vec<String>,
    },
    /// Something of the job would not fit into the message that carries it.
    #[error("{what} takes {bytes} bytes in a message, and at most {most} are sent; {remedy}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// What it takes.
        bytes: usize,
        /// What it may take.
        most: usize,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The problems cannot be loaded.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl StartError {
    /// How a process ends that cannot start for this reason.
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
