//! The value model of actor-critic objectives: a copy of the policy's trunk with a scalar head.

use pacs_model::Parameters;
use pacs_shape::{Flops, Sharding};

use crate::batch::TrainBatch;
use crate::gradient::PassTensors;
use crate::memory::{Memory, Trained};
use crate::metrics::StepMetrics;
use crate::network::{Flow, Keeping, Network, Source};
use crate::objective::UpdateObjective;
use crate::optimizer::UpdateStep;
use crate::settings::TrainerSettings;
use crate::trainer::{TrainError, Update, spans};
use crate::wire::Wire;

/// One rank's value model. It is as large as the policy, has moments and a gradient of its own, and is sharded
/// like the policy.
#[derive(Debug)]
pub(crate) struct Critic {
    pub(crate) network: Network,
    flops: Flops,
}

impl Critic {
    /// Starts a value model from the trunk of `policy`. Its head is zero, so every estimate is 0.
    ///
    /// With adapters it has some of its own, drawn with `seed`, over the base of the policy.
    ///
    /// # Panics
    /// When the weights of `policy` are sharded; a job that asks for both is refused.
    pub(crate) fn new(policy: &Network, keeping: Keeping, seed: u64) -> Self {
        let flops = Flops::new(&policy.config, 1);
        if let Some(base) = &policy.base {
            let (config, kind, device) = (policy.config.of_values(), policy.compute_kind(), policy.device());
            let adapters = Parameters::fresh_adapters(&config, kind, device, seed);
            let base = Parameters { layout: base.layout.clone(), flat: base.flat.shallow_clone() };
            return Self { network: Network::adapted(config, base, adapters, keeping), flops };
        }
        assert_ne!(keeping.division.sharding, Sharding::ShardAll, "a value model starts from whole weights");
        let parameters = Parameters::of_values(&policy.config, &policy.parameters);
        let network = Network::new(policy.config.of_values(), parameters, keeping);
        Self { network, flops }
    }

    /// Calls `note` with the value estimates of each of this rank's answers, in passes of at most `tokens` tokens.
    pub(crate) fn values(
        &mut self,
        batch: &TrainBatch,
        tokens: usize,
        wire: &mut Wire<'_>,
        mut note: impl FnMut(usize, &[f32]),
    ) -> Result<(), TrainError> {
        let places: Vec<usize> = (0..batch.sequences.len()).collect();
        for pass in batch.passes(&places, tokens) {
            let tensors = PassTensors::new(batch, &pass, self.network.device());
            let (model, mut around) = self.network.forward(Source::Policy, wire);
            let values = tensors.values(model, &mut around)?;
            for (place, range) in spans(&tensors) {
                note(place, &values[range]);
            }
        }
        Ok(())
    }

    /// Makes one update from the answers of all ranks; `memory` decides which activations a forward keeps.
    pub(crate) fn update(
        &mut self,
        update: &Update<'_>,
        objective: &UpdateObjective<'_>,
        settings: &TrainerSettings,
        memory: &mut Memory,
        wire: &mut Wire<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        self.network.clear_gradients();
        let batch = update.batch;
        let counted: Vec<usize> = update.mine.iter().copied().filter(|place| objective.counts(*place)).collect();
        let passes = batch.passes(&counted, settings.micro_batch_tokens);
        for (i, pass) in passes.iter().enumerate() {
            let flow = if i + 1 == passes.len() { Flow::Leave } else { Flow::Stay };
            let tensors = PassTensors::new(batch, pass, self.network.device());
            let (model, mut around) = self.network.forward(Source::Policy, wire);
            let open = tensors.open(model, memory.keep(Trained::Values), &mut around)?;
            let values = open.values(model);
            let mut by_value = Vec::with_capacity(values.len());
            for (place, range) in spans(&tensors) {
                by_value.extend(objective.by_values(place, &values[range], metrics)?);
            }
            let (model, gradients, mut around) = self.network.backward(flow, wire);
            open.values_backward(model, &by_value, gradients, &mut around)?;
            around.finish()?;
            metrics.sums.flops += self.flops.of(tensors.work());
        }
        if passes.is_empty() {
            self.network.idle_backward(Flow::Leave, wire)?;
        }
        let norm = self.network.gradient_norm(wire)?;
        metrics.value_updates += 1;
        if !norm.is_finite() {
            metrics.skipped += 1;
            tracing::warn!(step = batch.step, "the value model's gradient is not finite: this update is skipped");
            return Ok(());
        }
        metrics.value_grad_norms.push(norm);
        let spec = &settings.optimizer;
        let clip = spec.max_grad_norm > 0.0 && norm > spec.max_grad_norm;
        let grad_scale = if clip { spec.max_grad_norm / (norm + 1e-6) } else { 1.0 };
        let rate = settings.rate(settings.critic_learning_rate);
        let learning_rate = rate.at(self.network.optimizer.total_updates + 1);
        self.network.apply(&UpdateStep { spec, learning_rate, grad_scale }, wire)
    }
}
