use pacs_runtime::{Exit, JoinError, Stop};

/// Why a rollout worker ended badly.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// It could not become a member of the run.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The job spec or what it names cannot be used.
    #[error("{0}")]
    Config(String),
    /// The engine failed; the worker process has to be restarted.
    #[error("{0}")]
    Engine(String),
}

impl RolloutError {
    /// The exit code that fits.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Join(error) => error.exit(),
            Self::Config(_) => Exit::Config,
            Self::Engine(_) => Exit::Bug,
        }
    }
}

/// Why serving under one registration stopped.
pub type ServeError = Stop<RolloutError>;
