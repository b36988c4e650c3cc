use std::fmt;
use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::DeviceError;

/// What a rank was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Joining the generation.
    Connect,
    /// [`crate::Collective::all_reduce_sum`].
    AllReduceSum,
    /// [`crate::Collective::reduce_scatter_sum`].
    ReduceScatterSum,
    /// [`crate::Collective::all_gather`].
    AllGather,
    /// [`crate::Collective::all_gather_f64`].
    AllGatherF64,
    /// [`crate::Collective::broadcast`].
    Broadcast,
    /// [`crate::Collective::barrier`].
    Barrier,
}

impl Operation {
    /// By code.
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

/// Why a collective operation failed, and where. The communicator is of no further use; form a new generation.
#[derive(Debug, Error)]
#[error("{operation} on rank {rank}{}: {kind}", with_peer(*.peer))]
pub struct CollectiveError {
    /// What was being done.
    pub operation: Operation,
    /// The rank that reports it.
    pub rank: usize,
    /// The other rank, when the fault lies between two.
    pub peer: Option<usize>,
    /// What happened.
    pub kind: ErrorKind,
}

/// What went wrong inside an operation; the communicator adds the rest.
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

/// What happened to a collective operation.
#[derive(Debug, Error)]
pub enum ErrorKind {
    /// The operation did not end in time; `waiting_for` says on what it waited last.
    #[error("not done within {timeout:?}, waiting for {waiting_for}")]
    TimedOut {
        /// The time that an operation has.
        timeout: Duration,
        /// What was missing.
        waiting_for: String,
    },
    /// The peer ended, failed, or gave this generation up.
    #[error("the peer closed the connection")]
    PeerClosed,
    /// The connection broke.
    #[error("the connection failed: {0}")]
    Io(io::Error),
    /// The peer does not want this rank: another job, another generation, another place in the ring.
    #[error("refused by the peer: {reason}")]
    Refused {
        /// The peer's words.
        reason: String,
    },
    /// The ranks do not call the same operation with the same sizes.
    #[error("out of step: this rank is at {ours}, the peer at {theirs}")]
    OutOfStep {
        /// What this rank expected.
        ours: String,
        /// What the peer sent.
        theirs: String,
    },
    /// The caller passed something that no rank could carry out.
    #[error("{0}")]
    Invalid(String),
    /// CUDA or NCCL failed, or is missing.
    #[error(transparent)]
    Device(DeviceError),
    /// The ranks do not run the same libraries; a mixture hangs or corrupts at its leisure.
    #[error("rank {rank} has {theirs}, this rank {ours}; give every rank the same image or environment")]
    Mixture {
        /// The other rank.
        rank: usize,
        /// Its versions.
        theirs: String,
        /// This rank's versions.
        ours: String,
    },
    /// [`crate::AbortHandle::abort`] was called.
    #[error("aborted: {reason}")]
    Aborted {
        /// The reason that was given there.
        reason: String,
    },
    /// An earlier operation failed.
    #[error("the communicator ended earlier: {first}")]
    Ended {
        /// The first error.
        first: String,
    },
}

/// Why a rank cannot listen for its peer.
#[derive(Debug, Error)]
#[error("listen for the peer rank on `{address}`")]
pub struct ListenError {
    /// The address that was asked for.
    pub address: String,
    /// What the system said.
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
