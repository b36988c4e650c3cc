use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use pacs_data::DataError;

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
}

impl FileError {
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
    /// Others would reach it in plain text.
    #[error("listen: {0}")]
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
    /// The problems cannot be loaded.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl StartError {
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let file = FileError::file(action, path);
        move |error| Self::File(file(error))
    }
}
