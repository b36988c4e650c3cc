use std::time::Duration;

use pacs_types::{Generation, LeaseId, Role, SampleId, WeightVersion, WorkerId};

/// Why a caller is turned away.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The caller is not a member.
    #[error("worker {0} is not a member (it lapsed, left, was replaced, or the coordinator restarted); register again")]
    UnknownWorker(WorkerId),
    /// Another process has the caller's name.
    #[error("worker {0} was replaced by another process of its name; leave")]
    Replaced(WorkerId),
    /// A live process has the name that the caller wants.
    #[error(
        "the name `{name}` belongs to process {pid} on {host}, which was heard {:.1} s ago; give each worker a name of its own",
        heard_ago.as_secs_f64()
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Where its holder runs.
        host: String,
        /// The holder's process there.
        pid: u32,
        /// Time since its last sign of life.
        heard_ago: Duration,
    },
    /// The call is for another role.
    #[error("worker {worker} is a {role} worker; only a {wanted} worker may call this")]
    WrongRole {
        /// Who called.
        worker: WorkerId,
        /// What it is.
        role: Role,
        /// What it should be.
        wanted: Role,
    },
    /// The loan is over.
    #[error("{lease} for {sample} has lapsed; drop the sample")]
    StaleLease {
        /// The loan.
        lease: LeaseId,
        /// What was handed in.
        sample: SampleId,
    },
    /// The sample was generated with other weights than its lease allows.
    #[error(
        "sample {sample} was generated with weights {found}, but its lease allows {oldest} to {newest}; it is revoked"
    )]
    WrongVersion {
        /// The sample.
        sample: SampleId,
        /// Its weights.
        found: WeightVersion,
        /// The oldest that it may be of.
        oldest: WeightVersion,
        /// The newest that are published.
        newest: WeightVersion,
    },
    /// The generation is over.
    #[error("{asked} is over, {current} is the newest; join the next generation")]
    StaleGeneration {
        /// The caller's.
        asked: Generation,
        /// The newest.
        current: Generation,
    },
    /// There is no such task.
    #[error("task {task} was never given to this rank")]
    UnknownTask {
        /// The number.
        task: u64,
    },
    /// The run does not take the operator's command.
    #[error("{problem}")]
    BadCommand {
        /// Why, and what would be taken.
        problem: String,
    },
    /// The result does not fit the task.
    #[error("task {task}: {problem}")]
    BadResult {
        /// The number.
        task: u64,
        /// What is wrong.
        problem: String,
    },
}

/// What kind of mistake a refusal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The caller is unknown.
    NotFound,
    /// The caller is to leave, as its next heartbeat says.
    Replaced,
    /// Somebody else has what the caller wants.
    Taken,
    /// The call comes too late.
    Stale,
    /// The call is wrong at any time.
    Invalid,
}

impl Refusal {
    /// What kind of mistake it is.
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
