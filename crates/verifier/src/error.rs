use pacs_runtime::{Exit, JoinError};
use pacs_spec::SpecErrors;

/// Why a verifier worker gave up.
#[derive(Debug, thiserror::Error)]
pub enum VerifierError {
    /// It could not join the run, or not join it again after its registration was lost.
    #[error("join the run")]
    Join(#[from] JoinError),
    /// The coordinator sent a job spec that this program does not understand.
    #[error("read the job spec that the coordinator sent")]
    Spec(#[from] SpecErrors),
    /// A verifier of the job cannot be used at all.
    #[error("use the verifier at `{address}`: {problem}")]
    Address {
        /// As the spec has it.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The machine has no sandbox for programs as the job wants it.
    #[error("prepare a sandbox: {0}")]
    Sandbox(String),
    /// The coordinator refused a call for a reason that trying again cannot cure.
    #[error("call {call} of the coordinator: {code:?}: {message}")]
    Refused {
        /// Name of the call.
        call: &'static str,
        /// Status code of the refusal.
        code: tonic::Code,
        /// What the coordinator said.
        message: String,
    },
}

impl VerifierError {
    /// The exit code that fits.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Join(error) => error.exit(),
            Self::Spec(_) | Self::Address { .. } | Self::Sandbox(_) => Exit::Config,
            Self::Refused { .. } => Exit::Bug,
        }
    }
}
