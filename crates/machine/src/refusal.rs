use std::time::Duration;

use pacs_types::{Generation, LeaseId, Role, SampleId, WeightVersion, WorkerId};

/// Why the machine refuses a call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The caller is not a member and has to register again.
    #[error("worker {0} is not a member (it lapsed, left, was replaced, or the coordinator restarted); register again")]
    UnknownWorker(WorkerId),
    /// Another process has taken over the caller's name.
    #[error("worker {0} was replaced by another process of its name; leave")]
    Replaced(WorkerId),
    /// A live process holds the name that the caller asks for.
    #[error(
        "the name `{name}` belongs to process {pid} on {host}, which was heard {:.1} s ago; give each worker a name of its own",
        heard_ago.as_secs_f64()
    )]
    NameTaken {
        /// The name that the caller asks for.
        name: String,
        /// Host of the holder.
        host: String,
        /// Process id of the holder on that host.
        pid: u32,
        /// Time since the holder's last heartbeat.
        heard_ago: Duration,
    },
    /// The call belongs to another role.
    #[error("worker {worker} is a {role} worker; only a {wanted} worker may call this")]
    WrongRole {
        /// Registration id of the caller.
        worker: WorkerId,
        /// Role of the caller.
        role: Role,
        /// Role that the call belongs to.
        wanted: Role,
    },
    /// The lease has ended, so the result is dropped.
    #[error("{lease} for {sample} has lapsed; drop the sample")]
    StaleLease {
        /// The lease that the caller names.
        lease: LeaseId,
        /// The submitted sample, or that of the verdict.
        sample: SampleId,
    },
    /// The sample was generated with weights that its lease does not allow; the lease is revoked.
    #[error(
        "sample {sample} was generated with weights {found}, but its lease allows {oldest} to {newest}; it is revoked"
    )]
    WrongVersion {
        /// The submitted sample.
        sample: SampleId,
        /// Version that the sample names.
        found: WeightVersion,
        /// Oldest version that the lease allows.
        oldest: WeightVersion,
        /// Newest version that is published.
        newest: WeightVersion,
    },
    /// The caller's generation has ended.
    #[error("{asked} is over, {current} is the newest; join the next generation")]
    StaleGeneration {
        /// Generation that the caller names.
        asked: Generation,
        /// The newest generation.
        current: Generation,
    },
    /// The rank reports a task that it was never given.
    #[error("task {task} was never given to this rank")]
    UnknownTask {
        /// Number that the rank reports.
        task: u64,
    },
    /// The run refuses an operator's command.
    #[error("{problem}")]
    BadCommand {
        /// The reason, and what would be accepted.
        problem: String,
    },
    /// The result does not fit its task.
    #[error("task {task}: {problem}")]
    BadResult {
        /// Number of the task.
        task: u64,
        /// The mismatch, in words.
        problem: String,
    },
}

/// Class of a refusal, which decides the gRPC status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The caller is not a member: it has to register again.
    NotFound,
    /// The caller has to leave; its next heartbeat says the same.
    Replaced,
    /// Another process holds what the caller asks for.
    Taken,
    /// The call comes too late: its lease or generation is over.
    Stale,
    /// The call would be wrong at any time.
    Invalid,
}

impl Refusal {
    /// Class of this refusal.
    #[must_use]
    pub fn kind(&self) -> RefusalKind {
        match self {
            Self::UnknownWorker(_) => RefusalKind::NotFound,
            Self::Replaced(_) => RefusalKind::Replaced,
            Self::NameTaken { .. } => RefusalKind::Taken,
            Self::StaleLease { .. } | Self::WrongVersion { .. } | Self::StaleGeneration { .. } => RefusalKind::Stale,
            Self::WrongRole { .. } | Self::UnknownTask { .. } | Self::BadCommand { .. } | Self::BadResult { .. } => {
                RefusalKind::Invalid
            }
        }
    }
}
