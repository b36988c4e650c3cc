use std::fmt;
use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::DeviceError;

/// The operation that a rank was in, for error messages and deadlines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Joining a generation, before any collective operation.
    Connect,
    /// Summing a buffer over all ranks, [`crate::Collective::all_reduce_sum`].
    AllReduceSum,
    /// Summing a buffer and keeping one part of it, [`crate::Collective::reduce_scatter_sum`].
    ReduceScatterSum,
    /// Gathering equal parts of a buffer, [`crate::Collective::all_gather`].
    AllGather,
    /// Gathering lists of numbers, [`crate::Collective::all_gather_f64`].
    AllGatherF64,
    /// Copying a buffer of one rank to all, [`crate::Collective::broadcast`].
    Broadcast,
    /// Waiting for all ranks, [`crate::Collective::barrier`].
    Barrier,
}

impl Operation {
    /// Every operation, at the index of its code in message headers.
    pub(crate) const ALL: [Self; 7] = [
        Self::Connect,
        Self::AllReduceSum,
        Self::ReduceScatterSum,
        Self::AllGather,
        Self::AllGatherF64,
        Self::Broadcast,
        Self::Barrier,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::AllReduceSum => "all_reduce_sum",
            Self::ReduceScatterSum => "reduce_scatter_sum",
            Self::AllGather => "all_gather",
            Self::AllGatherF64 => "all_gather_f64",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a collective operation failed, and where. The communicator is unusable afterwards; form a new generation.
#[derive(Debug, Error)]
#[error("{operation} on rank {rank}{}: {kind}", with_peer(*.peer))]
pub struct CollectiveError {
    /// Operation that failed.
    pub operation: Operation,
    /// Rank that reports the error.
    pub rank: usize,
    /// The other rank, if the fault lies between two.
    pub peer: Option<usize>,
    /// Cause of the failure.
    pub kind: ErrorKind,
}

/// Cause of a failure and the peer at fault; the communicator adds operation and rank.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) peer: Option<usize>,
    pub(crate) kind: ErrorKind,
}

impl Fault {
    pub(crate) fn with(peer: usize, kind: ErrorKind) -> Self {
        Self { peer: Some(peer), kind }
    }

    pub(crate) fn own(kind: ErrorKind) -> Self {
        Self { peer: None, kind }
    }
}

fn with_peer(peer: Option<usize>) -> String {
    peer.map(|peer| format!(", with rank {peer}")).unwrap_or_default()
}

/// Cause of a failed collective operation.
#[derive(Debug, Error)]
pub enum ErrorKind {
    /// The operation missed its deadline.
    #[error("not done within {timeout:?}, waiting for {waiting_for}")]
    TimedOut {
        /// Deadline of the operation, from its start.
        timeout: Duration,
        /// What the operation waited for last.
        waiting_for: String,
    },
    /// The peer ended, failed, or left this generation.
    #[error("the peer closed the connection")]
    PeerClosed,
    /// The connection failed otherwise.
    #[error("the connection failed: {0}")]
    Io(io::Error),
    /// The peer refused this rank, which belongs to another job, generation, or place in the ring.
    #[error("refused by the peer: {reason}")]
    Refused {
        /// Reason that the peer gave.
        reason: String,
    },
    /// The ranks call different operations, or the same one with different sizes.
    #[error("out of step: this rank is at {ours}, the peer at {theirs}")]
    OutOfStep {
        /// Call that this rank is in.
        ours: String,
        /// Call that the peer's message belongs to.
        theirs: String,
    },
    /// The caller's arguments are invalid on any rank.
    #[error("{0}")]
    Invalid(String),
    /// CUDA or NCCL failed, or is missing.
    #[error(transparent)]
    Device(DeviceError),
    /// The ranks have different versions of NCCL or CUDA, which may hang or corrupt data.
    #[error("rank {rank} has {theirs}, this rank {ours}; give every rank the same image or environment")]
    Mixture {
        /// Rank with other versions.
        rank: usize,
        /// Versions of that rank.
        theirs: String,
        /// Versions of this rank.
        ours: String,
    },
    /// [`crate::AbortHandle::abort`] was called.
    #[error("aborted: {reason}")]
    Aborted {
        /// Reason passed to the handle.
        reason: String,
    },
    /// An earlier operation has ended the communicator.
    #[error("the communicator ended earlier: {first}")]
    Ended {
        /// Message of the first error.
        first: String,
    },
}

/// Why a listener could not be opened.
#[derive(Debug, Error)]
#[error("listen for the peer rank on `{address}`")]
pub struct ListenError {
    /// Address that was asked for.
    pub address: String,
    /// Error of the operating system.
    #[source]
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_where_and_what() {
        let error = |peer, kind| CollectiveError { operation: Operation::AllReduceSum, rank: 1, peer, kind };
        let closed = error(Some(0), ErrorKind::PeerClosed);
        assert_eq!(closed.to_string(), "all_reduce_sum on rank 1, with rank 0: the peer closed the connection");
        let ended = error(None, ErrorKind::Ended { first: closed.to_string() });
        assert!(ended.to_string().starts_with("all_reduce_sum on rank 1: the communicator ended earlier: all_reduce"));
        let alone = error(None, ErrorKind::Aborted { reason: "gen-3 began".to_owned() });
        assert_eq!(alone.to_string(), "all_reduce_sum on rank 1: aborted: gen-3 began");
    }
}
