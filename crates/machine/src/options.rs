use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pacs_order::{Curriculum, History};
use pacs_types::GroupId;
use serde::{Deserialize, Serialize};

use crate::{Contrast, Counters, LogLevel};

/// Job parameters of the machine; fixed for its lifetime except for what operators may set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Full size of a learner generation, at least 1.
    pub learners: u32,
    /// Ranks that are enough when the others do not join within `learner_wait`; 1 to `learners`.
    pub min_learners: u32,
    /// How long a short generation waits for the missing learners.
    pub learner_wait: Duration,
    /// Samples of a training group, at least 1.
    pub samples_per_prompt: u32,
    /// Groups of a training step, at least 1.
    pub prompts_per_step: u32,
    /// Training steps of the whole job.
    pub total_steps: u64,
    /// Lag bound: versions that the oldest token of a trained group may trail the newest weights
    /// by. 0 is the synchronous loop.
    pub max_lag: u32,
    /// Bound on training groups in flight, including those in training: `prompts_per_step` to
    /// `(max_lag + 1) * prompts_per_step`.
    pub slots: u32,
    /// What happens to a group that would exceed `max_lag`.
    pub staleness: Staleness,
    /// What happens to a group without contrast between its samples.
    pub uniform_groups: UniformGroups,
    /// The quantity whose equality makes a group uniform.
    #[serde(default)]
    pub uniform_by: UniformBy,
    /// Uniform groups that one step may refill; further ones are kept.
    pub max_refills: u32,
    /// Least number of groups in a batch after uniform ones are dropped; at most `prompts_per_step`.
    pub min_batch_groups: u32,
    /// The level at which label variance is needed for a non-zero gradient.
    pub contrast: Contrast,
    /// Which draws are skipped, by the history of their problems; `None`: no draw is.
    #[serde(default)]
    pub curriculum: Option<Curriculum>,
    /// Schedule and size of the evaluation of the unnamed set.
    pub evaluation: EvaluationPlan,
    /// Further evaluation sets, each with its own schedule.
    #[serde(default)]
    pub evaluation_sets: Vec<EvaluationSetPlan>,
    /// The job evaluates a model that every rollout worker can load, and ends: no learner, step or checkpoint.
    #[serde(default)]
    pub evaluation_only: bool,
    /// Steps between checkpoints; 0: only at the end and on a stop.
    pub checkpoint_every_steps: u64,
    /// Whether intermediate checkpoints are written while training continues.
    pub background_saves: bool,
    /// Silence after which a checkpoint is given up while ranks write it, or ends the run while the disk commits it.
    pub checkpoint_timeout: Duration,
    /// Failed verifications of one sample after which it is given up; at least 1.
    pub max_attempts: u32,
    /// Samples that may be given up at one position of a training group before the group is dropped.
    pub max_replacements: u32,
    /// Time from the first lease of a group to its last verdict, after which its open work is reissued.
    pub group_timeout: Duration,
    /// Times that a group may exceed `group_timeout` before the next prompt replaces it; at least 1.
    pub max_group_attempts: u32,
    /// Rollout workers that may die while holding a group before it is quarantined, and verifiers that may die while
    /// holding a sample before it is replaced; at least 1. Before the last of these deaths the suspect is leased in
    /// isolation, so that it is not blamed for another one.
    pub max_worker_losses: u32,
    /// Optimizer updates that may be skipped before the run fails.
    pub max_skipped_updates: u64,
    /// Time without a report of any rank after which a learner task counts as stuck: the ranks that have not reported
    /// are restarted, and a new generation forms.
    pub task_timeout: Duration,
    /// Time without progress, while no rank works on a task, after which the run counts as stalled.
    pub stall_timeout: Duration,
    /// Consecutive stalls without progress before the run fails.
    pub max_stalls: u32,
    /// Generations that may be lost in a row without a finished step before the run fails.
    pub max_lost_generations: u32,
    /// Generations that may be lost while saving, without a committed checkpoint in between, before the run fails.
    pub max_lost_saves: u32,
    /// Silence after which a worker is removed from the members.
    pub heartbeat_timeout: Duration,
    /// Time without a finished sample after which a group's lease lapses although its worker is alive.
    pub rollout_lease_timeout: Duration,
    /// Time without a verdict after which a sample's lease lapses although its worker is alive.
    pub verifier_lease_timeout: Duration,
    /// Fence: new worker, lease and task ids are greater, so that ids of an earlier process
    /// are never mistaken for them.
    pub ids_above: u64,
    /// Fence: new generations are greater, for the same reason.
    pub generations_above: u64,
    /// Position at which the machine starts.
    pub start: Snapshot,
    /// Whether `start` is a committed checkpoint that holds the exported model.
    pub exported: bool,
    /// Steps whose evaluation is recorded already.
    pub evaluated: BTreeSet<u64>,
}

impl Options {
    /// A small job for tests here and in the crates that drive a machine: one learner, three steps of two groups of two
    /// samples, no evaluation, and only the final checkpoint.
    #[doc(hidden)]
    #[must_use]
    pub fn small() -> Self {
        let seconds = Duration::from_secs;
        Self {
            learners: 1,
            min_learners: 1,
            learner_wait: seconds(60),
            samples_per_prompt: 2,
            prompts_per_step: 2,
            total_steps: 3,
            max_lag: 0,
            slots: 2,
            staleness: Staleness::Wait,
            uniform_groups: UniformGroups::Keep,
            uniform_by: UniformBy::Labels,
            max_refills: 0,
            min_batch_groups: 1,
            contrast: Contrast::Group,
            curriculum: None,
            evaluation: EvaluationPlan::default(),
            evaluation_sets: Vec::new(),
            evaluation_only: false,
            checkpoint_every_steps: 0,
            background_saves: false,
            checkpoint_timeout: seconds(600),
            max_attempts: 3,
            max_replacements: 0,
            group_timeout: seconds(600),
            max_group_attempts: 2,
            max_worker_losses: 3,
            max_skipped_updates: 10,
            task_timeout: seconds(900),
            stall_timeout: seconds(100_000),
            max_stalls: 3,
            max_lost_generations: 5,
            max_lost_saves: 3,
            heartbeat_timeout: seconds(10),
            rollout_lease_timeout: seconds(60),
            verifier_lease_timeout: seconds(60),
            ids_above: 0,
            generations_above: 0,
            start: Snapshot::default(),
            exported: false,
            evaluated: BTreeSet::new(),
        }
    }
}

/// A further evaluation set and its schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvaluationSetPlan {
    /// Number of its first problem among those of all sets. Sets do not overlap; that of
    /// [`Options::evaluation`] starts at 0.
    pub first: u64,
    /// When it is evaluated, and with how many samples.
    pub plan: EvaluationPlan,
}

/// When the policy is evaluated on a set of problems, and with how many samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvaluationPlan {
    /// Held-out problems; 0 turns evaluation off.
    pub problems: u32,
    /// Samples per problem.
    pub samples_per_problem: u32,
    /// Steps between evaluations during training; 0: none.
    pub every_steps: u64,
    /// Whether to evaluate before the first step.
    pub before: bool,
    /// Whether to evaluate after the last step.
    pub after: bool,
}

impl Options {
    /// The sets that are due for evaluation when `step` steps are done.
    pub(crate) fn due_sets(&self, step: u64) -> impl Iterator<Item = EvaluationSetPlan> {
        let unnamed = EvaluationSetPlan { first: 0, plan: self.evaluation };
        let total = self.total_steps;
        let sets = std::iter::once(unnamed).chain(self.evaluation_sets.iter().copied());
        sets.filter(move |set| set.plan.is_due(step, total))
    }
}

impl EvaluationPlan {
    /// Whether an evaluation is due when `step` of `total` steps are done.
    #[must_use]
    pub fn is_due(&self, step: u64, total: u64) -> bool {
        if self.problems == 0 || self.samples_per_problem == 0 {
            return false;
        }
        match step {
            0 => self.before,
            _ if step >= total => self.after,
            _ => self.every_steps > 0 && step.is_multiple_of(self.every_steps),
        }
    }
}

/// What happens to a group that would exceed `max_lag`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Staleness {
    /// The step waits for the group.
    #[default]
    Wait,
    /// The group is generated again with the newest weights.
    Evict,
    /// The group is trained on at any age.
    Accept,
}

/// The quantity that an objective contrasts between the samples of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniformBy {
    /// The verifier's labels.
    #[default]
    Labels,
    /// The rewards, of which the label may be one part: equal labels with different rewards still carry gradient.
    Rewards,
}

/// What happens to a group without contrast between its samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniformGroups {
    /// It is trained on like any other group.
    #[default]
    Keep,
    /// It counts as one of the step's groups, but the learner does not receive it.
    Drop,
    /// The next prompt replaces it.
    Refill,
}

/// Progress of a job between two steps: all that a resumed machine needs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Training steps done.
    pub step: u64,
    /// Number of draws that are decided, as a group or as skipped; also the id of the next training group.
    pub cursor: u64,
    /// Training groups that were drawn but not trained on. They are drawn first, even if the curriculum has learned
    /// since that it would skip them.
    #[serde(default)]
    pub requeued: BTreeSet<GroupId>,
    /// Draws at or after the cursor that are decided already: groups that survived a rewind of the steps before them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ahead: BTreeSet<GroupId>,
    /// Outcomes of trained groups by problem; kept only for a curriculum.
    #[serde(default, skip_serializing_if = "History::is_empty")]
    pub history: History,
    /// Quarantined groups, which are not tried again, with the reason.
    #[serde(default)]
    pub set_aside: BTreeMap<GroupId, String>,
    /// Learning rate that an operator has set; `None`: that of the job spec.
    #[serde(default)]
    pub learning_rate: Option<f64>,
    /// Log level that an operator has set; `None`: that of each process.
    #[serde(default)]
    pub log_level: Option<LogLevel>,
    /// Optimizer updates that were skipped since the start of the job.
    pub skipped_updates: u64,
    /// Consecutive steps whose labels carried no gradient.
    pub collapsed_steps: u64,
    /// Counts since the start of the job.
    pub counters: Counters,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evaluations_are_due_before_during_and_after() {
        let plan = EvaluationPlan { problems: 4, samples_per_problem: 1, every_steps: 2, before: true, after: true };
        let due = |plan: &EvaluationPlan| -> Vec<u64> { (0..=5).filter(|step| plan.is_due(*step, 5)).collect() };
        assert_eq!(due(&plan), [0, 2, 4, 5]);
        assert_eq!(due(&EvaluationPlan { before: false, ..plan }), [2, 4, 5]);
        assert_eq!(due(&EvaluationPlan { every_steps: 0, ..plan }), [0, 5]);
        assert_eq!(due(&EvaluationPlan { after: false, ..plan }), [0, 2, 4]);
        assert_eq!(due(&EvaluationPlan { problems: 0, ..plan }), Vec::<u64>::new());
    }
}
