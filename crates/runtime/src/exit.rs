use std::io;
use std::process::ExitCode;

/// Exit codes of processes; by these, launchers decide whether to restart them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The work is complete.
    Done,
    /// The command line is invalid.
    Usage,
    /// A bug, or an unforeseen error.
    Bug,
    /// Interrupted; the same command resumes the work.
    Again,
    /// The job spec or something that it names is wrong; a restart cannot help.
    Config,
}

impl Exit {
    /// The number that the process exits with.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Usage => 2,
            Self::Bug => 70,
            Self::Again => 75,
            Self::Config => 78,
        }
    }

    /// Exit code for a failed file operation. Errors that may be gone at the next start, on this machine or another one
    /// (a full disk, a failing device, a server that does not answer), map to [`Exit::Again`]; errors of the path
    /// itself to [`Exit::Config`].
    #[must_use]
    pub fn of_file(error: &io::Error) -> Self {
        use io::ErrorKind::*;
        match error.kind() {
            NotFound | PermissionDenied | AlreadyExists | NotADirectory | IsADirectory | ReadOnlyFilesystem
            | InvalidFilename | InvalidInput | InvalidData | Unsupported => Self::Config,
            _ => Self::Again,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transient_refusals_are_retried() {
        // Linux: ENOSPC, EDQUOT, EFBIG, EIO, EMFILE, ESTALE; ENOENT, EACCES, ENOTDIR, EROFS, ENAMETOOLONG.
        for (errors, exit) in [(&[28, 122, 27, 5, 24, 116][..], Exit::Again), (&[2, 13, 20, 30, 36], Exit::Config)] {
            for error in errors {
                assert_eq!(Exit::of_file(&io::Error::from_raw_os_error(*error)), exit, "{error}");
            }
        }
    }
}
