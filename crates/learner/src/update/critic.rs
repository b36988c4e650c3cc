//! The value model of actor-critic objectives: a copy of the policy's trunk with a scalar head.

use pacs_model::Parameters;
use pacs_shape::{Flops, Sharding};

use super::batch::TrainBatch;
use super::metrics::StepMetrics;
use super::mini_batch::Update;
use super::objective::UpdateObjective;
use super::pass::{PassTensors, spans};
use crate::comm::{CollectiveQueue, Flow, Source};
use crate::error::TrainError;
use crate::settings::TrainerSettings;
use crate::weights::{MemoryPlan, ShardedModel, Storage, Trained};

/// One rank's value model. It is as large as the policy, has moments and a gradient of its own, and is sharded
/// like the policy. Its routers always choose its experts: no rollout engine has computed its values, so there is no choice to replay.
#[derive(Debug)]
pub(crate) struct Critic {
    pub(crate) model: ShardedModel,
    flops: Flops,
}

impl Critic {
    /// Starts a value model from the trunk of `policy`. Its head is zero, so every estimate is 0.
    ///
    /// With adapters it has some of its own, drawn with `seed`, over the base of the policy.
    ///
    /// # Panics
    /// When the weights of `policy` are sharded; a job that asks for both is refused.
    pub(super) fn new(policy: &ShardedModel, storage: Storage, seed: u64) -> Self {
        let flops = Flops::new(&policy.config, 1);
        if let Some(base) = &policy.base {
            let config = policy.config.of_values();
            let kind = policy.compute_kind();
            let device = policy.device();
            let adapters = Parameters::fresh_adapters(&config, kind, device, seed);
            let base = Parameters { layout: base.layout.clone(), flat: base.flat.shallow_clone() };
            return Self { model: ShardedModel::adapted(config, base, adapters, storage), flops };
        }
        assert_ne!(storage.division.sharding, Sharding::ShardAll, "a value model starts from whole weights");
        let parameters = Parameters::of_values(&policy.config, &policy.parameters);
        let model = ShardedModel::new(policy.config.of_values(), parameters, storage);
        Self { model, flops }
    }

    /// Calls `note` with the value estimates of each of this rank's answers, in passes of at most `tokens` tokens.
    pub(super) fn values(
        &mut self,
        batch: &TrainBatch,
        tokens: usize,
        queue: &mut CollectiveQueue<'_>,
        mut note: impl FnMut(usize, &[f32]),
    ) -> Result<(), TrainError> {
        let places: Vec<usize> = (0..batch.sequences.len()).collect();
        for pass in batch.passes(&places, tokens) {
            let tensors = PassTensors::new(batch, &pass, self.model.device(), None);
            let (model, mut hooks) = self.model.forward(Source::Policy, queue);
            let values = tensors.values(model, &mut hooks)?;
            for (place, range) in spans(&tensors) {
                note(place, &values[range]);
            }
        }
        Ok(())
    }

    /// Makes one update from the answers of all ranks; `memory` decides which activations a forward keeps.
    pub(super) fn update(
        &mut self,
        update: &Update<'_>,
        objective: &UpdateObjective<'_>,
        settings: &TrainerSettings,
        memory: &mut MemoryPlan,
        queue: &mut CollectiveQueue<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        self.model.clear_gradients();
        let batch = update.batch;
        let counted: Vec<usize> = update.mine.iter().copied().filter(|place| objective.counts(*place)).collect();
        let passes = batch.passes(&counted, settings.micro_batch_tokens);
        for (i, pass) in passes.iter().enumerate() {
            let flow = if i + 1 == passes.len() { Flow::Reduce } else { Flow::Accumulate };
            let tensors = PassTensors::new(batch, pass, self.model.device(), None);
            let (model, mut hooks) = self.model.forward(Source::Policy, queue);
            let open = tensors.open(model, memory.keep(Trained::Values), &mut hooks)?;
            let values = open.values(model);
            let mut by_value = Vec::with_capacity(values.len());
            for (place, range) in spans(&tensors) {
                by_value.extend(objective.by_values(place, &values[range], metrics)?);
            }
            let (model, gradients, mut hooks) = self.model.backward(flow, queue);
            open.values_backward(model, &by_value, gradients, &mut hooks)?;
            hooks.finish()?;
            metrics.sums.flops += self.flops.of(tensors.work());
        }
        if passes.is_empty() {
            self.model.idle_backward(Flow::Reduce, queue)?;
        }
        metrics.value_updates += 1;
        let rate = settings.rate(settings.critic_learning_rate);
        match self.model.clip_and_step(&settings.optimizer, &rate, queue)? {
            Some(clipped) => metrics.value_grad_norms.push(clipped.norm),
            None => {
                metrics.skipped += 1;
                tracing::warn!(step = batch.step, "the value model's gradient is not finite: this update is skipped");
            }
        }
        Ok(())
    }
}
