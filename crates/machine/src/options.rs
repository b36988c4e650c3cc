use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pacs_order::{Curriculum, History};
use pacs_types::GroupId;
use serde::{Deserialize, Serialize};

use crate::{Contrast, Counters, LogLevel};

/// What a run is to do; fixed while the machine lives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Learner ranks of a generation, at least 1.
    pub learners: u32,
    /// So many ranks are enough when the others do not come, 1 to `learners`.
    pub min_learners: u32,
    /// Time that the others are waited for.
    pub learner_wait: Duration,
    /// Samples of a training group, at least 1.
    pub samples_per_prompt: u32,
    /// Groups of a training step, at least 1.
    pub prompts_per_step: u32,
    /// Training steps of the whole job.
    pub total_steps: u64,
    /// How many versions behind the newest weights the oldest token of a trained group may be; 0: none, the synchronous
    /// loop.
    pub max_lag: u32,
    /// Room for training groups in flight, those in training included: `prompts_per_step` to
    /// `(max_lag + 1) * prompts_per_step`.
    pub slots: u32,
    /// What happens to a group that would become too old.
    pub staleness: Staleness,
    /// What happens to a group in which nothing differs that the objective contrasts.
    pub uniform_groups: UniformGroups,
    /// What that is.
    #[serde(default)]
    pub uniform_by: UniformBy,
    /// Uniform groups that are refilled in one step before the rest is kept.
    pub max_refills: u32,
    /// A batch from which uniform groups are dropped keeps at least so many groups, at most `prompts_per_step`.
    pub min_batch_groups: u32,
    /// Where labels have to differ for a step to teach anything.
    pub contrast: Contrast,
    /// Which draws are worth a group, by how their problems came out before; none: all are.
    #[serde(default)]
    pub curriculum: Option<Curriculum>,
    /// When and on how much the policy is measured.
    pub evaluation: EvaluationPlan,
    /// Further sets of problems that it is measured on, each by a schedule of its own.
    #[serde(default)]
    pub evaluation_sets: Vec<EvaluationSetPlan>,
    /// The job measures a model that every rollout worker has, and ends: no learner, no step, no checkpoint.
    #[serde(default)]
    pub evaluation_only: bool,
    /// Steps between checkpoints; 0: only at the end and on a stop.
    pub checkpoint_every_steps: u64,
    /// Checkpoints on the way are written while training goes on.
    pub background_saves: bool,
    /// Silence after which a checkpoint that is being written is given up, or one that is being committed ends the run.
    pub checkpoint_timeout: Duration,
    /// Verifications of one sample that may fail before it is given up, at least 1.
    pub max_attempts: u32,
    /// Samples that may be given up in one place of a training group before the group is dropped.
    pub max_replacements: u32,
    /// Time from the first lease of a group to its last verdict, after which its open work is issued again.
    pub group_timeout: Duration,
    /// So often a group may run out of that time before the next prompt takes its place, at least 1.
    pub max_group_attempts: u32,
    /// Rollout workers that may die while they hold a group before it is set aside, and verifiers that may die while they
    /// hold a sample before another one takes its place; at least 1. Before the last of them, it is lent alone, so that it
    /// does not answer for another one.
    pub max_worker_losses: u32,
    /// Optimizer updates that may be skipped before the run fails.
    pub max_skipped_updates: u64,
    /// Time without a report of any rank after which a task of the learners counts as stuck: those that have not reported
    /// are started again, and a new generation is formed.
    pub task_timeout: Duration,
    /// Time in which nothing comes of anything, while no rank is at a task, after which the run counts as stuck.
    pub stall_timeout: Duration,
    /// Times in a row that a run may be stuck, without progress between them, before it fails.
    pub max_stalls: u32,
    /// Generations that may be lost in a row, without a finished training step between them, before the run fails.
    pub max_lost_generations: u32,
    /// Generations that may be lost while they save, without a committed checkpoint between them, before the run fails.
    pub max_lost_saves: u32,
    /// Silence after which a worker is given up.
    pub heartbeat_timeout: Duration,
    /// Time without a finished sample after which a group's lease lapses although its worker lives.
    pub rollout_lease_timeout: Duration,
    /// Time without a verdict after which a sample's lease lapses although its worker lives.
    pub verifier_lease_timeout: Duration,
    /// Worker, lease and task ids are greater than this: those of an earlier process are never mistaken for new ones.
    pub ids_above: u64,
    /// Generations are greater than this, for the same reason.
    pub generations_above: u64,
    /// Where the job stands when the machine starts.
    pub start: Snapshot,
    /// Whether `start` is a committed checkpoint that holds the exported model too.
    pub exported: bool,
    /// Steps whose evaluation is on record already.
    pub evaluated: BTreeSet<u64>,
}

impl Options {
    /// A small job, for tests here and in the crates that drive a machine: one learner, steps of two groups of two samples,
    /// three of them, no evaluation, no checkpoint but the last.
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

/// A further set of problems, and when it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvaluationSetPlan {
    /// Number of its first problem among those of all sets; no two sets overlap, and that of [`Options::evaluation`] begins at 0.
    pub first: u64,
    /// When, and how much.
    pub plan: EvaluationPlan,
}

/// When and on how much the policy is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvaluationPlan {
    /// Held-out problems; 0 turns evaluation off.
    pub problems: u32,
    /// Samples of each.
    pub samples_per_problem: u32,
    /// Steps between evaluations; 0 turns those during training off.
    pub every_steps: u64,
    /// Measure before the first step.
    pub before: bool,
    /// Measure after the last step.
    pub after: bool,
}

impl Options {
    /// The sets that are measured when `step` steps are done.
    pub(crate) fn due_sets(&self, step: u64) -> impl Iterator<Item = EvaluationSetPlan> {
        let unnamed = EvaluationSetPlan { first: 0, plan: self.evaluation };
        let total = self.total_steps;
        let sets = std::iter::once(unnamed).chain(self.evaluation_sets.iter().copied());
        sets.filter(move |set| set.plan.is_due(step, total))
    }
}

impl EvaluationPlan {
    /// Whether the policy is measured when `step` of `total` steps are done.
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

/// What happens to a group that would become older than `max_lag`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Staleness {
    /// The step waits for it.
    #[default]
    Wait,
    /// It starts again with the newest weights.
    Evict,
    /// It is trained on however old it is.
    Accept,
}

/// What an objective contrasts between the samples of a group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniformBy {
    /// The labels of its verifier.
    #[default]
    Labels,
    /// The rewards, of which the label may be one part: equal labels with different rewards are something to learn from.
    Rewards,
}

/// What happens to a group in which nothing differs that the objective contrasts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniformGroups {
    /// It is trained on like any other.
    #[default]
    Keep,
    /// It counts as one of the step's groups, but the learner does not get it.
    Drop,
    /// The next prompt takes its place.
    Refill,
}

/// Where a job stands between two steps: all that a resumed machine has to know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Training steps done.
    pub step: u64,
    /// Draws that are over, taken or skipped; also the id of the next training group.
    pub cursor: u64,
    /// Training groups that were drawn and not trained on, ascending: they are drawn first, and whatever was learnt of their
    /// problems since does not change that.
    #[serde(default)]
    pub requeued: BTreeSet<GroupId>,
    /// Draws at the cursor or behind it that are over, too: groups that outlived the steps before them.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ahead: BTreeSet<GroupId>,
    /// How the groups that were trained on came out; kept while a curriculum asks for it.
    #[serde(default, skip_serializing_if = "History::is_empty")]
    pub history: History,
    /// Groups that killed their workers and are not tried again, with what happened.
    #[serde(default)]
    pub set_aside: BTreeMap<GroupId, String>,
    /// Learning rate that an operator has set, instead of the job spec's.
    #[serde(default)]
    pub learning_rate: Option<f64>,
    /// What the processes log since an operator has said so.
    #[serde(default)]
    pub log_level: Option<LogLevel>,
    /// Optimizer updates that were skipped.
    pub skipped_updates: u64,
    /// Steps in a row whose labels could teach nothing.
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
