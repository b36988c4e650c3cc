use std::io;
use std::process::ExitCode;

/// How a process ends; launchers decide by the code whether to start it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The work is done.
    Done,
    /// The command line is wrong.
    Usage,
    /// A bug, or an error that nobody foresaw.
    Bug,
    /// Interrupted; starting the same command again goes on.
    Again,
    /// The job spec or something it names is wrong; starting again cannot help.
    Config,
}

impl Exit {
    /// The number that the operating system sees.
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

    /// How a process ends whose files the system refuses: what may be otherwise at the next start, on this machine or
    /// another one (a full disk, a device that fails, a server that does not answer), is tried again. What is wrong with the
    /// path itself, somebody has to put right.
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
    fn what_passes_is_tried_again() {
        // Linux: ENOSPC, EDQUOT, EFBIG, EIO, EMFILE, ESTALE; ENOENT, EACCES, ENOTDIR, EROFS, ENAMETOOLONG.
        for (errors, exit) in [(&[28, 122, 27, 5, 24, 116][..], Exit::Again), (&[2, 13, 20, 30, 36], Exit::Config)] {
            for error in errors {
                assert_eq!(Exit::of_file(&io::Error::from_raw_os_error(*error)), exit, "{error}");
            }
        }
    }
}
