use std::time::Duration;

use pacs_algo::{LearningRate, Objective};
use pacs_shape::Division;
use pacs_spec::{JobSpec, ObjectiveKind, ObjectiveSpec, OldLogprobs, OptimizerSpec};

use crate::external::ExternalSettings;

/// What the job spec says about training, as the trainer needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerSettings {
    /// The objective.
    pub objective: Objective,
    /// Training steps between resets of the reference policy; 0: it stays what it was at the first step.
    pub reference_reset_steps: u64,
    /// Clear the moments at a reset.
    pub reset_optimizer: bool,
    /// Learning rate of the value model, for objectives that have one.
    pub critic_learning_rate: f64,
    /// The program that computes the objective, where one does.
    pub external: Option<ExternalSettings>,
    /// AdamW.
    pub optimizer: OptimizerSpec,
    /// Optimizer updates of the job, over which the learning rate follows its schedule.
    pub updates: u64,
    /// Temperature that samples are drawn at and log-probs are taken at.
    pub temperature: f64,
    /// Most tokens of one forward and backward.
    pub micro_batch_tokens: usize,
    /// Whose log-probs are those of the old policy.
    pub old_logprobs: OldLogprobs,
    /// What of the training state is this rank's.
    pub division: Division,
    /// Weights get the same bits from a batch whatever the number of ranks, the division of the state, the size of passes and
    /// the number of threads. Every entry of a batch's index then has a unit.
    pub deterministic: bool,
    /// Memory that this rank may use (bytes). Layers whose activations do not fit are computed again in the backward.
    /// `None`: there is enough for all.
    pub memory_bytes: Option<u64>,
    /// Checkpoints are written from a copy of the state while training goes on ([`crate::Trainer::capture`]).
    pub saves_in_background: bool,
    /// Floating-point operations a second that one rank's device is capable of, if utilisation is to be reported.
    pub peak_flops: Option<f64>,
}

impl TrainerSettings {
    /// The settings of one rank of a job.
    #[must_use]
    pub fn new(spec: &JobSpec, rank: usize, ranks: usize) -> Self {
        let objective = spec.objective.filled();
        Self {
            objective: objective.objective(spec.rollout.max_new_tokens),
            reference_reset_steps: objective.reference_reset_steps.unwrap_or(0),
            reset_optimizer: objective.reset_optimizer.unwrap_or(false),
            critic_learning_rate: objective.critic_learning_rate.unwrap_or(spec.optimizer.learning_rate),
            external: external(&objective),
            optimizer: spec.optimizer.clone(),
            updates: spec.batch.steps.saturating_mul(u64::from(spec.batch.mini_batches)),
            temperature: spec.rollout.temperature,
            micro_batch_tokens: spec.batch.micro_batch_tokens as usize,
            old_logprobs: spec.batch.old_logprobs,
            division: Division { sharding: spec.resources.sharding, rank, ranks },
            deterministic: spec.resources.deterministic,
            memory_bytes: spec.learner_memory(),
            saves_in_background: spec.saves_in_background(),
            peak_flops: spec.resources.peak_flops,
        }
    }

    /// The schedule of the job at a learning rate.
    pub(crate) fn rate(&self, base: f64) -> LearningRate {
        let OptimizerSpec { warmup_updates, schedule, final_learning_rate_ratio: final_ratio, .. } = self.optimizer;
        LearningRate { base, warmup_updates, schedule, final_ratio, updates: self.updates }
    }
}

/// The program of an objective whose settings are all there.
fn external(objective: &ObjectiveSpec) -> Option<ExternalSettings> {
    let is_external = objective.kind == ObjectiveKind::External;
    let (command, seconds) = is_external.then(|| objective.command.clone().zip(objective.timeout_seconds)).flatten()?;
    Some(ExternalSettings { command, timeout: Duration::from_secs_f64(seconds) })
}
