use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use pacs_types::{Generation, GroupId, WeightVersion, WorkerId};
use serde::{Deserialize, Serialize};

use crate::pool::{Group, Pool};
use crate::{End, TaskKind};

/// What the learners do. Each phase owns its data; the groups and the checkpoint in flight are beside it.
///
/// ```text
/// Assembling -> Preparing -> Evaluating -> Sampling -> Training -> Saving -> Committing -> … -> Ended
///      ^------------------------- a learner is lost ------------------------------'
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// Waits for a full generation of learners.
    Assembling,
    /// Ranks load their state.
    Preparing(Task),
    /// The policy is measured; the learners wait.
    Evaluating(Evaluation),
    /// The learners wait for a batch.
    Sampling,
    /// Ranks make a step.
    Training(Training),
    /// Ranks capture their state for a checkpoint; one that does not go to the disk in the background, they write.
    Saving(Task),
    /// Nothing can be done before the checkpoint in flight is durable, or given up: the run ends behind it, the next
    /// checkpoint waits for it, or the learners were lost and go back to it. Learners may come and go meanwhile.
    Committing,
    /// The run is over.
    Ended(End),
}

/// What the learners do, without the data: for logs, metrics and the status page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PhaseKind {
    /// Waits for a full generation of learners.
    Assembling,
    /// Ranks load their state.
    Preparing,
    /// The policy is measured.
    Evaluating,
    /// The learners wait for a batch.
    Sampling,
    /// Ranks make a step.
    Training,
    /// Ranks capture or write their state.
    Saving,
    /// The checkpoint in flight has to be durable first.
    Committing,
    /// All steps are made.
    Finished,
    /// An operator ended the run.
    Stopped,
    /// The run cannot go on.
    Failed,
}

impl PhaseKind {
    /// Its name for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Assembling => "assembling",
            Self::Preparing => "preparing",
            Self::Evaluating => "evaluating",
            Self::Sampling => "sampling",
            Self::Training => "training",
            Self::Saving => "saving",
            Self::Committing => "committing",
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for PhaseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Phase {
    pub(crate) fn kind(&self) -> PhaseKind {
        match self {
            Self::Assembling => PhaseKind::Assembling,
            Self::Preparing(_) => PhaseKind::Preparing,
            Self::Evaluating(_) => PhaseKind::Evaluating,
            Self::Sampling => PhaseKind::Sampling,
            Self::Training(_) => PhaseKind::Training,
            Self::Saving(_) => PhaseKind::Saving,
            Self::Committing => PhaseKind::Committing,
            Self::Ended(End::Finished) => PhaseKind::Finished,
            Self::Ended(End::Stopped) => PhaseKind::Stopped,
            Self::Ended(End::Failed { .. }) => PhaseKind::Failed,
        }
    }

    /// The task that ranks work on.
    pub(crate) fn task(&self) -> Option<&Task> {
        match self {
            Self::Preparing(task) | Self::Saving(task) => Some(task),
            Self::Training(training) => Some(&training.task),
            Self::Assembling | Self::Evaluating(_) | Self::Sampling | Self::Committing | Self::Ended(_) => None,
        }
    }

    /// The task that ranks work on, to note their reports in.
    pub(crate) fn task_mut(&mut self) -> Option<&mut Task> {
        match self {
            Self::Preparing(task) | Self::Saving(task) => Some(task),
            Self::Training(training) => Some(&mut training.task),
            Self::Assembling | Self::Evaluating(_) | Self::Sampling | Self::Committing | Self::Ended(_) => None,
        }
    }

    /// The step in the making.
    pub(crate) fn training(&self) -> Option<&Training> {
        match self {
            Self::Training(training) => Some(training),
            Self::Assembling
            | Self::Preparing(_)
            | Self::Evaluating(_)
            | Self::Sampling
            | Self::Saving(_)
            | Self::Committing
            | Self::Ended(_) => None,
        }
    }

    /// The measurement that is being made.
    pub(crate) fn evaluation(&self) -> Option<&Evaluation> {
        match self {
            Self::Evaluating(evaluation) => Some(evaluation),
            Self::Assembling
            | Self::Preparing(_)
            | Self::Sampling
            | Self::Training(_)
            | Self::Saving(_)
            | Self::Committing
            | Self::Ended(_) => None,
        }
    }

    /// The same, to take in what comes.
    pub(crate) fn evaluation_mut(&mut self) -> Option<&mut Evaluation> {
        match self {
            Self::Evaluating(evaluation) => Some(evaluation),
            Self::Assembling
            | Self::Preparing(_)
            | Self::Sampling
            | Self::Training(_)
            | Self::Saving(_)
            | Self::Committing
            | Self::Ended(_) => None,
        }
    }
}

/// One piece of work for every rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) id: u64,
    pub(crate) kind: TaskKind,
    /// Ranks that have reported it.
    pub(crate) done: BTreeSet<u32>,
    /// When a rank reported last, or the task began.
    pub(crate) heard: Duration,
    /// Updates that rank 0 skipped.
    pub(crate) skipped_updates: u32,
}

/// A step in the making.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Training {
    pub(crate) task: Task,
    /// Its groups, those included that the learner does not get.
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// Those.
    pub(crate) left_out: Vec<GroupId>,
}

/// One measurement of the policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Evaluation {
    pub(crate) pool: Pool,
    /// The weights that every sample must come from.
    pub(crate) version: WeightVersion,
    /// Problems that are measured.
    pub(crate) wanted: usize,
    /// Problems left out for want of verdicts.
    pub(crate) excluded: u32,
}

/// One membership of learners.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
