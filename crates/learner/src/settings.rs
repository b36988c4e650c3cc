use pacs_algo::Objective;
use pacs_spec::{JobSpec, OptimizerSpec};

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
    /// AdamW.
    pub optimizer: OptimizerSpec,
    /// Temperature that samples are drawn at and log-probs are taken at.
    pub temperature: f64,
    /// Most tokens of one forward and backward.
    pub micro_batch_tokens: usize,
    /// Floating-point operations a second that one rank's device is capable of, if utilisation is to be reported.
    pub peak_flops: Option<f64>,
}

impl From<&JobSpec> for TrainerSettings {
    fn from(spec: &JobSpec) -> Self {
        let objective = spec.objective.filled();
        Self {
            objective: objective.objective(spec.rollout.max_new_tokens),
            reference_reset_steps: objective.reference_reset_steps.unwrap_or(0),
            reset_optimizer: objective.reset_optimizer.unwrap_or(false),
            critic_learning_rate: objective.critic_learning_rate.unwrap_or(spec.optimizer.learning_rate),
            optimizer: spec.optimizer.clone(),
            temperature: spec.rollout.temperature,
            micro_batch_tokens: spec.batch.micro_batch_tokens as usize,
            peak_flops: spec.resources.peak_flops,
        }
    }
}
