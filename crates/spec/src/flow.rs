//! How groups flow from the rollout workers to the learners.

use serde::{Deserialize, Serialize};

/// How far generation may run ahead of training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AsynchronySpec {
    /// How many weight versions behind the newest the oldest token of a trained group may be, the time that the group
    /// waited included. Default 0: the synchronous loop; at most 64.
    pub max_lag: u32,
    /// Room for groups in flight, those in training included. Default `(max_lag + 1) * batch.prompts_per_step`, which is
    /// also the most; at least `batch.prompts_per_step`.
    pub slots: Option<u32>,
    /// What happens to a group that would become too old. Default `wait`.
    pub staleness: StalenessKind,
}

/// What happens to a group that would become too old.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StalenessKind {
    /// The step waits for it: the learners pause, nothing is discarded.
    #[default]
    Wait,
    /// It is regenerated with the newest weights, up to three times; then the step waits for it.
    Evict,
    /// It is trained on however old it is; for objectives with importance weights only.
    Accept,
}

/// What happens to groups without signal, and to groups that are not completed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupsSpec {
    /// What happens to a group whose samples do not differ in what the objective contrasts: labels for `pacs`, rewards
    /// for the others. Default `keep`, as in the paper; `ppo` and `reinforce_pp` allow nothing else, because they
    /// compare beyond the group.
    pub uniform: UniformKind,
    /// `uniform = "refill"`: groups that are refilled in one step before the rest is kept. Default 3 times
    /// `batch.prompts_per_step`; 1 to 1,000,000.
    pub max_refills: Option<u32>,
    /// Seconds from the first lease of a group to its last verdict, after which its open work is issued again. Default
    /// 7200, 1 to 1,000,000.
    pub timeout_seconds: u32,
    /// How often a group may exceed that time before the next prompt replaces it. Default 3, 1 to 100.
    pub max_attempts: u32,
    /// Rollout workers that may die while they hold a group before it is quarantined, and verifiers that may die while
    /// they hold a sample before another one takes its place (`verifier.max_replacements`). Default 3, 1 to 100. Before
    /// the last of them it is leased in isolation, so that it is not blamed for another one.
    pub max_worker_losses: u32,
}

impl Default for GroupsSpec {
    fn default() -> Self {
        Self {
            uniform: UniformKind::Keep,
            max_refills: None,
            timeout_seconds: 7200,
            max_attempts: 3,
            max_worker_losses: 3,
        }
    }
}

/// When a run counts as stuck, and what is tried before it ends with an error that says so.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct WatchdogSpec {
    /// Seconds without a fresh sample, verdict, step, measurement or checkpoint after which the watchdog acts: first
    /// all leases are revoked and the work is issued again, then the workers that hold it are restarted. Default 1800,
    /// 30 to 1,000,000. It has to be longer than the longest answer takes to generate and to grade.
    pub stall_seconds: u32,
    /// Seconds without a report of any learner rank after which its task (loading, a step, a checkpoint) counts as
    /// stuck: the ranks that owe one are restarted and form a new generation. Default 7200, 30 to 1,000,000. It has to
    /// be longer than a step takes.
    pub task_seconds: u32,
    /// Times in a row that the watchdog acts without progress between them; the next time ends the run. Default 3, 1 to 100.
    pub max_stalls: u32,
}

impl Default for WatchdogSpec {
    fn default() -> Self {
        Self { stall_seconds: 1800, task_seconds: 7200, max_stalls: 3 }
    }
}

/// What happens to a group whose labels are all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniformKind {
    /// It is trained on like any other.
    #[default]
    Keep,
    /// It counts as one of the step's groups, but the learner does not get it, as long as others are left for every
    /// mini-batch and rank.
    Drop,
    /// The next prompt takes its place.
    Refill,
}
