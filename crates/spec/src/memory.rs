//! From a job to the memory that a learner rank takes.

use pacs_shape::{Division, ModelConfig, PassShape, StateCopy, TrainingSetup, WINDOWS, head_chunk, unit_tokens};

use crate::{DeviceKind, JobSpec, Precision};

const GIB: f64 = 1_073_741_824.0;

impl JobSpec {
    /// What decides how much memory the first learner rank takes; other ranks take the same.
    ///
    /// `config`: the model's, or that of its adapters ([`ModelSpec::trained`](crate::ModelSpec::trained)). `bf16_on_cpu`: what `model.precision = "auto"` means on a CPU.
    #[must_use]
    pub fn training_setup(&self, config: ModelConfig, bf16_on_cpu: bool) -> TrainingSetup {
        let on_cpu = self.resources.device == DeviceKind::Cpu;
        let bf16 = match self.model.precision {
            Precision::Float32 => false,
            Precision::Bfloat16 => true,
            Precision::Auto => !on_cpu || bf16_on_cpu,
        };
        let objective = self.objective.filled();
        let needs = objective.objective(self.rollout.max_new_tokens).needs();
        TrainingSetup {
            config,
            weight_bytes: if bf16 { 2 } else { 4 },
            division: Division { sharding: self.resources.sharding, rank: 0, ranks: self.resources.learners as usize },
            windows: WINDOWS,
            holds_reference: needs.reference || objective.reference_reset_steps.unwrap_or(0) > 1,
            trains_values: needs.values,
            copy: match (self.saves_in_background(), on_cpu) {
                (false, _) => StateCopy::Absent,
                (true, true) => StateCopy::Here,
                (true, false) => StateCopy::InHostMemory,
            },
            head_chunk: head_chunk(on_cpu),
            has_kernels: true,
            in_host_memory: on_cpu,
            exact_sums: self.resources.deterministic,
        }
    }

    /// The largest pass of the job, with prompts of `prompt_tokens` tokens.
    #[must_use]
    pub fn largest_pass(&self, prompt_tokens: usize) -> PassShape {
        // A unit is in one pass.
        let unit = if self.resources.deterministic { unit_tokens(prompt_tokens) as u64 } else { 0 };
        PassShape::largest(
            u64::from(self.batch.micro_batch_tokens).max(unit),
            prompt_tokens as u64,
            u64::from(self.rollout.max_new_tokens),
            u64::from(self.rollout.samples_per_prompt),
        )
    }

    /// Memory that one learner rank may use (bytes); `None` for what its device has.
    #[must_use]
    pub fn learner_memory(&self) -> Option<u64> {
        let gib = self.resources.learner_memory_gib;
        (gib > 0.0).then_some((gib * GIB) as u64)
    }
}
