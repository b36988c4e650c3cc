use std::error::Error;
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

    /// Exit code for an error for which the configuration would be blamed: [`Exit::Again`] where the cause is a full disk
    /// or another shortage of the machine, [`Exit::Config`] otherwise.
    #[must_use]
    pub fn of_config(error: &(dyn Error + 'static)) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            let io = error.downcast_ref::<io::Error>();
            if io.is_some_and(is_shortage) {
                return Self::Again;
            }
            // `io::Error::source` skips the error that it wraps.
            next = io.and_then(io::Error::get_ref).map(|inner| inner as _).or_else(|| error.source());
        }
        Self::Config
    }
}

/// Whether the machine lacks something for now: room, a quota, memory, open files, or a device that answers.
fn is_shortage(error: &io::Error) -> bool {
    use io::ErrorKind::*;
    const EIO: i32 = 5;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    matches!(error.kind(), StorageFull | QuotaExceeded | OutOfMemory | StaleNetworkFileHandle)
        || matches!(error.raw_os_error(), Some(EIO | ENFILE | EMFILE))
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

    #[test]
    fn a_shortage_is_not_blamed_on_the_configuration() {
        #[derive(Debug, thiserror::Error)]
        #[error("write a key")]
        struct Outer(#[source] io::Error);

        for (error, exit) in
            [(28, Exit::Again), (122, Exit::Again), (24, Exit::Again), (2, Exit::Config), (13, Exit::Config)]
        {
            let system = || io::Error::from_raw_os_error(error);
            assert_eq!(Exit::of_config(&Outer(system())), exit, "{error}");
            assert_eq!(Exit::of_config(&io::Error::other(Outer(system()))), exit, "{error} within another");
        }
    }
}
