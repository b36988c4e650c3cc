use std::collections::BTreeSet;

use pacs_types::{Generation, Purpose, WorkerId};

use crate::round::Round;
use crate::{End, TaskKind};

/// Where the run is. Each phase owns its data.
///
/// ```text
/// Assembling -> Preparing -> Sampling (evaluate) -> Sampling (train) -> Training -> Saving -> … -> Ended
///      ^------------------------- a learner is lost -------------------------------------'
/// ```
#[derive(Clone, Debug)]
pub(crate) enum Phase {
    /// Waits for a full generation of learners.
    Assembling,
    /// Ranks load their state.
    Preparing(Task),
    /// Groups are generated and verified.
    Sampling(Round),
    /// Ranks make a step.
    Training(Task),
    /// Ranks write a checkpoint.
    Saving(Task),
    /// The driver makes the written files a checkpoint. Learners may come and go meanwhile.
    Committing { step: u64, model: bool },
    /// The run is over.
    Ended(End),
}

impl Phase {
    /// Name for logs and the status page.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Assembling => "assembling",
            Self::Preparing(_) => "preparing",
            Self::Sampling(round) if round.purpose == Purpose::Evaluate => "evaluating",
            Self::Sampling(_) => "sampling",
            Self::Training(_) => "training",
            Self::Saving(_) => "saving",
            Self::Committing { .. } => "committing",
            Self::Ended(End::Finished) => "finished",
            Self::Ended(End::Stopped) => "stopped",
            Self::Ended(End::Failed { .. }) => "failed",
        }
    }

    /// The task that ranks work on.
    pub(crate) fn task(&self) -> Option<&Task> {
        match self {
            Self::Preparing(task) | Self::Training(task) | Self::Saving(task) => Some(task),
            _ => None,
        }
    }

    /// The task that ranks work on, to note their reports in.
    pub(crate) fn task_mut(&mut self) -> Option<&mut Task> {
        match self {
            Self::Preparing(task) | Self::Training(task) | Self::Saving(task) => Some(task),
            _ => None,
        }
    }
}

/// One piece of work for every rank.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) id: u64,
    pub(crate) kind: TaskKind,
    /// Ranks that have reported it.
    pub(crate) done: BTreeSet<u32>,
    /// Updates that rank 0 skipped.
    pub(crate) skipped_updates: u32,
}

/// One membership of learners.
#[derive(Clone, Debug)]
pub(crate) struct Team {
    pub(crate) generation: Generation,
    /// Workers by rank.
    pub(crate) ranks: Vec<WorkerId>,
}

impl Team {
    /// The rank of a worker.
    pub(crate) fn rank(&self, worker: WorkerId) -> Option<u32> {
        let rank = self.ranks.iter().position(|member| *member == worker)?;
        u32::try_from(rank).ok()
    }
}
