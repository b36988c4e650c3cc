use std::time::Duration;

use pacs_types::{Outcome, Verdict};
use tonic::Code;

/// Why a verification is inconclusive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The built-in verifier has a bug.
    #[error("the verifier panicked: {0}")]
    Panicked(String),
    /// There is no verdict in time.
    #[error("no verdict within {} s", .0.as_secs_f64())]
    Late(Duration),
    /// The child process cannot be started, or does not say that it is ready.
    #[error("start `{program}`: {problem}")]
    Start {
        /// The program of the command.
        program: String,
        /// What went wrong.
        problem: String,
    },
    /// The child process ended instead of answering.
    #[error("`{program}` {how}{}", if .stderr.is_empty() { String::new() } else { format!("; it wrote: {stderr}") })]
    Ended {
        /// The program of the command.
        program: String,
        /// How it ended.
        how: String,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// The verifier answered with something that is no verdict.
    #[error("the answer of the verifier is not a verdict: {problem}")]
    Garbage {
        /// What is wrong with it.
        problem: String,
    },
    /// The sandbox of a program failed, not the program.
    #[error(transparent)]
    Sandbox(#[from] pacs_sandbox::SandboxError),
    /// The verifier itself says that it failed.
    #[error("the verifier failed: {0}")]
    Reported(String),
    /// The service refused the call.
    #[error("call {address}: {code:?}: {message}")]
    Service {
        /// Where the service listens.
        address: String,
        /// Status code of the refusal.
        code: Code,
        /// What it said.
        message: String,
    },
}

impl From<Fault> for Verdict {
    fn from(fault: Fault) -> Self {
        let outcome = if matches!(fault, Fault::Late(_)) { Outcome::TimedOut } else { Outcome::Failed };
        Self { outcome, label: 0.0, reward: 0.0, extracted: None, rule: fault.to_string() }
    }
}
