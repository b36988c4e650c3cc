//! What a learner rank reads of the job spec.

use std::path::PathBuf;
use std::time::Duration;

use pacs_algo::{LearningRate, Objective};
use pacs_shape::{Division, Lora};
use pacs_spec::{JobSpec, ObjectiveKind, ObjectiveSpec, OldLogprobs, OptimizerSpec, RolloutEngineKind};

/// Training settings of one rank, from the job spec.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerSettings {
    /// Objective with its settings.
    pub objective: Objective,
    /// Training steps between resets of the reference policy. With 0, the policy of the first step stays the reference.
    pub reference_reset_steps: u64,
    /// Whether a reset also clears the optimizer's moments.
    pub reset_optimizer: bool,
    /// Learning rate of the value model; unused by objectives without one.
    pub critic_learning_rate: f64,
    /// Program that computes the objective; `None` for built-in objectives.
    pub external: Option<ExternalSettings>,
    /// AdamW hyperparameters, schedule and clipping.
    pub optimizer: OptimizerSpec,
    /// Optimizer updates of the whole job, the length of the learning-rate schedule.
    pub updates: u64,
    /// Temperature of sampling; log-probs are computed at the same one.
    pub temperature: f64,
    /// Tokens of the longest sequence of the job, which decides between the factors of a longrope.
    pub longest_sequence: usize,
    /// Token budget of one forward and backward pass.
    pub micro_batch_tokens: usize,
    /// Source of the old policy's log-probs.
    pub old_logprobs: OldLogprobs,
    /// How training state is divided among ranks, and which part is this rank's.
    pub division: Division,
    /// Whether the weights have the same bits for any number of ranks and threads, any sharding and any pass size.
    /// Every entry of a batch's index then has a unit.
    pub deterministic: bool,
    /// Memory that this rank may use (bytes). Layers whose activations do not fit are recomputed in the backward.
    /// `None` means no limit.
    pub memory_bytes: Option<u64>,
    /// Whether checkpoints are written from a copy of the state while training continues ([`crate::Trainer::capture`]).
    pub saves_in_background: bool,
    /// Peak FLOP/s of one rank's device, for the utilisation metric; `None` omits it.
    pub peak_flops: Option<f64>,
    /// Adapters that are trained in place of the model; `None` when all weights are.
    pub lora: Option<LoraSettings>,
    /// Whether the policy, and its reference, compute every token with the experts that the batch has recorded for it. Without effect on
    /// dense models and on value models.
    pub router_replay: bool,
    /// Whether each step scores one of its sequences, for rollout engines that are checked by it ([`pacs_weights::Probe`]): two short
    /// forward passes. The weights have the same bits with and without.
    pub probe: bool,
}

/// The program of an external objective, from the job spec.
#[derive(Clone, Debug, PartialEq)]
pub struct ExternalSettings {
    /// Program, followed by its arguments.
    pub command: Vec<String>,
    /// Longest time that a reply may take, per update.
    pub timeout: Duration,
}

/// The adapters of a job, and what they start from.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraSettings {
    /// Rank, scale and targets.
    pub adapters: Lora,
    /// Folder of a PEFT adapter to start from; `None` for fresh ones.
    pub path: Option<PathBuf>,
    /// Seed of fresh adapters, the same on every rank.
    pub seed: u64,
}

impl TrainerSettings {
    /// Returns the settings of rank `rank` of `ranks`.
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
            longest_sequence: spec.longest_sequence(),
            micro_batch_tokens: spec.batch.micro_batch_tokens as usize,
            old_logprobs: spec.batch.old_logprobs,
            division: Division { sharding: spec.resources.sharding, rank, ranks },
            deterministic: spec.resources.deterministic,
            memory_bytes: spec.learner_memory(),
            saves_in_background: spec.saves_in_background(),
            peak_flops: spec.resources.peak_flops,
            lora: spec.model.lora.as_ref().map(|lora| LoraSettings {
                adapters: lora.adapters(),
                path: lora.path.clone(),
                seed: spec.seed,
            }),
            router_replay: spec.rollout.router_replay,
            probe: spec.rollout.engine == RolloutEngineKind::Vllm,
        }
    }

    /// Returns the job's schedule with `base` as the learning rate.
    pub(crate) fn rate(&self, base: f64) -> LearningRate {
        let OptimizerSpec { warmup_updates, schedule, final_learning_rate_ratio: final_ratio, .. } = self.optimizer;
        LearningRate { base, warmup_updates, schedule, final_ratio, updates: self.updates }
    }
}

/// Returns the program of an external objective; `objective` has its defaults filled in.
fn external(objective: &ObjectiveSpec) -> Option<ExternalSettings> {
    let is_external = objective.kind == ObjectiveKind::External;
    let (command, seconds) = is_external.then(|| objective.command.clone().zip(objective.timeout_seconds)).flatten()?;
    Some(ExternalSettings { command, timeout: Duration::from_secs_f64(seconds) })
}
