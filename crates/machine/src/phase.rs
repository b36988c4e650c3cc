use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use pacs_types::{Generation, GroupId, WeightVersion, WorkerId};
use serde::{Deserialize, Serialize};

use crate::pool::{Group, Pool};
use crate::{End, TaskKind};

/// What the learners do. Each phase owns its data; groups and checkpoint in flight are independent of it.
///
/// ```text
/// Assembling -> Preparing -> Evaluating -> Sampling -> Training (-> Ahead) -> Saving -> Committing -> … -> Ended
///      ^----------------------------- a learner is lost ----------------------------------'
/// ```
///
/// With lag, only the evaluation after the last step is a phase; others run concurrently (`evaluation.rs`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// Waits for enough learners to form a generation.
    Assembling,
    /// Ranks load the starting state and publish its weights.
    Preparing(Task),
    /// The policy is evaluated; the learners are idle.
    Evaluating(Evaluation),
    /// The learners wait for a batch.
    Sampling,
    /// Ranks compute a step.
    Training(Training),
    /// All ranks have computed a step, which counts once the concurrent evaluation is complete; the learners are idle.
    Ahead(Training),
    /// Ranks capture their state for a checkpoint, or write it if the save is not in the background.
    Saving(Task),
    /// Nothing can continue before the checkpoint in flight is durable or given up: the run ends after it, the next
    /// checkpoint waits for it, or the learners were lost and resume from it. Learners may join and leave meanwhile.
    Committing,
    /// The run is over.
    Ended(End),
}

/// A phase without its data, for logs, metrics and the status page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PhaseKind {
    /// Waiting for enough learners to form a generation.
    Assembling,
    /// Ranks load the starting state.
    Preparing,
    /// The policy is evaluated, and the learners wait for it.
    Evaluating,
    /// The learners wait for a batch.
    Sampling,
    /// Ranks compute a step.
    Training,
    /// Ranks capture or write their state.
    Saving,
    /// The checkpoint in flight has to become durable first.
    Committing,
    /// Ended: all steps are done.
    Finished,
    /// Ended by an operator.
    Stopped,
    /// Ended by a failure.
    Failed,
}

impl PhaseKind {
    /// Name in logs, metrics and the status.
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
            Self::Evaluating(_) | Self::Ahead(_) => PhaseKind::Evaluating,
            Self::Sampling => PhaseKind::Sampling,
            Self::Training(_) => PhaseKind::Training,
            Self::Saving(_) => PhaseKind::Saving,
            Self::Committing => PhaseKind::Committing,
            Self::Ended(End::Finished) => PhaseKind::Finished,
            Self::Ended(End::Stopped) => PhaseKind::Stopped,
            Self::Ended(End::Failed { .. }) => PhaseKind::Failed,
        }
    }

    /// The task that the ranks work on; `None` in phases without one.
    pub(crate) fn task(&self) -> Option<&Task> {
        match self {
            Self::Preparing(task) | Self::Saving(task) => Some(task),
            Self::Training(training) => Some(&training.task),
            Self::Assembling
            | Self::Evaluating(_)
            | Self::Sampling
            | Self::Ahead(_)
            | Self::Committing
            | Self::Ended(_) => None,
        }
    }

    /// The task of [`Self::task`], to record reports in it.
    pub(crate) fn task_mut(&mut self) -> Option<&mut Task> {
        match self {
            Self::Preparing(task) | Self::Saving(task) => Some(task),
            Self::Training(training) => Some(&mut training.task),
            // `task` names the phases without one, so that a new phase has to decide there.
            _ => None,
        }
    }

    /// The step in training, or the one that is trained and does not count yet; `None` in other phases.
    pub(crate) fn training(&self) -> Option<&Training> {
        match self {
            Self::Training(training) | Self::Ahead(training) => Some(training),
            Self::Assembling
            | Self::Preparing(_)
            | Self::Evaluating(_)
            | Self::Sampling
            | Self::Saving(_)
            | Self::Committing
            | Self::Ended(_) => None,
        }
    }

    /// The evaluation that the learners wait for as a phase of its own; `None` in other phases.
    pub(crate) fn evaluation(&self) -> Option<&Evaluation> {
        match self {
            Self::Evaluating(evaluation) => Some(evaluation),
            Self::Assembling
            | Self::Preparing(_)
            | Self::Sampling
            | Self::Training(_)
            | Self::Ahead(_)
            | Self::Saving(_)
            | Self::Committing
            | Self::Ended(_) => None,
        }
    }

    /// The same for recording results.
    pub(crate) fn evaluation_mut(&mut self) -> Option<&mut Evaluation> {
        match self {
            Self::Evaluating(evaluation) => Some(evaluation),
            Self::Assembling
            | Self::Preparing(_)
            | Self::Sampling
            | Self::Training(_)
            | Self::Ahead(_)
            | Self::Saving(_)
            | Self::Committing
            | Self::Ended(_) => None,
        }
    }
}

/// One piece of work that every rank has to do.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Task {
    pub(crate) id: u64,
    pub(crate) kind: TaskKind,
    /// Ranks that have reported it as done.
    pub(crate) done: BTreeSet<u32>,
    /// Time of the last report, or the start of the task.
    pub(crate) heard: Duration,
    /// Optimizer updates that were skipped, as rank 0 reports.
    pub(crate) skipped_updates: u32,
}

/// The step in training and its batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Training {
    pub(crate) task: Task,
    /// All groups of the step, including `left_out`.
    pub(crate) groups: BTreeMap<GroupId, Group>,
    /// Groups of the step that the learner does not receive.
    pub(crate) left_out: Vec<GroupId>,
    /// Whether the search for a group at fault has chosen these groups, in place of those whose turn it was.
    #[serde(default)]
    pub(crate) is_trial: bool,
}

/// One evaluation of the policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Evaluation {
    pub(crate) pool: Pool,
    /// Version of the weights that every sample must come from.
    pub(crate) version: WeightVersion,
    /// Number of problems to complete.
    pub(crate) wanted: usize,
    /// Problems that are left out because they could not be verified.
    pub(crate) excluded: u32,
    /// When it began, if it runs concurrently with training; phases are timed by the driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) began: Option<Duration>,
}

/// One membership of learner ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Team {
    pub(crate) generation: Generation,
    /// Worker ids, indexed by rank.
    pub(crate) ranks: Vec<WorkerId>,
}

impl Team {
    /// The rank of a worker; `None` if it is no member of the generation.
    pub(crate) fn rank(&self, worker: WorkerId) -> Option<u32> {
        let rank = self.ranks.iter().position(|member| *member == worker)?;
        u32::try_from(rank).ok()
    }
}
