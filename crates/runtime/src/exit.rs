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
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}
