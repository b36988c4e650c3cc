//! Why training, an external objective or a checkpoint failed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pacs_algo::ObjectiveError;
use pacs_collective::{CollectiveError, Operation};
use pacs_model::ModelError;
use pacs_torch::{ExposeError, ViewError};

/// Why a training step failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A collective operation failed: a peer was lost, or missed the deadline.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The exchange thread has ended; an earlier error says why.
    #[error("the exchanges with the other ranks have ended")]
    ExchangesEnded,
    /// An exchange is overdue although the communicator should have aborted it by itself.
    #[error(
        "rank {rank} has waited {waited:?} for {operation} of {bytes} bytes with the other ranks, longer than the \
         communicator allows: the ranks have to form a new generation"
    )]
    Overdue {
        /// Rank that waited.
        rank: usize,
        /// Operation that did not end.
        operation: Operation,
        /// Size of its buffer (bytes).
        bytes: u64,
        /// How long the rank waited.
        waited: Duration,
    },
    /// The queue of exchanges is full.
    #[error("{operation} was refused: {most} exchanges with the other ranks are queued already")]
    TooManyExchanges {
        /// Capacity of the queue.
        most: usize,
        /// Operation that was refused.
        operation: Operation,
    },
    /// The objective refused the batch.
    #[error("objective: {0}")]
    Objective(#[from] ObjectiveError),
    /// The program of an external objective gave no valid reply.
    #[error(transparent)]
    External(#[from] ExternalError),
    /// The batch is not cut into units as a deterministic update requires.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A buffer does not have the device or element type that the update expects.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A buffer could not be exposed to a collective.
    #[error(transparent)]
    Expose(#[from] ExposeError),
}

/// Error for a batch that contradicts itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("batch of step {step}: {problem}")]
pub struct BatchError {
    /// Step of the batch.
    pub step: u64,
    /// What is wrong, as part of a sentence.
    pub problem: String,
}

/// Why the program gave no objective. `program` is its command line.
#[derive(Debug, thiserror::Error)]
pub enum ExternalError {
    /// The program could not be started.
    #[error("start the objective `{program}`: {error}")]
    Start {
        /// Command line of the program.
        program: String,
        /// Error of the operating system.
        error: std::io::Error,
    },
    /// The program has exited, or its pipes are closed.
    #[error(
        "the objective `{program}` has ended without an answer; its standard error is in the log of this learner: {problem}"
    )]
    Ended {
        /// Command line of the program.
        program: String,
        /// How the end was noticed.
        problem: String,
    },
    /// The program did not reply in time.
    #[error(
        "the objective `{program}` gave no answer within {timeout:?} (`objective.timeout_seconds`); does it flush its output?"
    )]
    Silent {
        /// Command line of the program.
        program: String,
        /// How long the reply was waited for.
        timeout: Duration,
    },
    /// The reply is not valid, or reports an error of the program.
    #[error("the objective `{program}` answered {problem}; expected {{\"losses\": [..], \"coefficients\": [..]}}")]
    Answer {
        /// Command line of the program.
        program: String,
        /// What is wrong with the reply.
        problem: String,
    },
}

/// Why writing or reading a checkpoint failed.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file system returned an error.
    #[error("{}: {error}", path.display())]
    File {
        /// File or folder of the failed call.
        path: PathBuf,
        /// Error of the operating system.
        error: std::io::Error,
    },
    /// The file exists, but its content cannot be used.
    #[error("{}: {problem}", path.display())]
    Content {
        /// File that was read.
        path: PathBuf,
        /// What is wrong with its content.
        problem: String,
    },
    /// Writing was cancelled: its generation is over, or the checkpoint was given up.
    #[error("{}: abandoned half-written, because it is no longer wanted", path.display())]
    Unwanted {
        /// File that is incomplete.
        path: PathBuf,
    },
    /// Exporting the model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A tensor to be written is not in host memory.
    #[error(transparent)]
    View(#[from] ViewError),
    /// Gathering sharded weights from the other ranks failed.
    #[error("gather the weights: {0}")]
    Gather(#[source] Box<TrainError>),
}

pub(crate) fn file_error(path: &Path, error: std::io::Error) -> CheckpointError {
    CheckpointError::File { path: path.to_owned(), error }
}
