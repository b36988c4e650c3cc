//! The value model of objectives that estimate advantages with one: a copy of the policy's trunk with a head of one row.

use pacs_algo::warmup;
use pacs_collective::Collective;
use pacs_model::{Keep, Model, ModelConfig, Parameters};
use pacs_torch::f32_mut;
use pacs_torch::tch::{Device, Tensor};

use crate::batch::TrainBatch;
use crate::gradient::PassTensors;
use crate::metrics::StepMetrics;
use crate::objective::UpdateObjective;
use crate::optimizer::{Optimizer, norm};
use crate::settings::TrainerSettings;
use crate::trainer::{TrainError, spans};
use crate::work::Flops;

/// One rank's value model: as large as the policy, with moments and a gradient of its own.
#[derive(Debug)]
pub(crate) struct Critic {
    pub(crate) parameters: Parameters,
    pub(crate) optimizer: Optimizer,
    model: Model,
    flops: Flops,
    /// Flat float32, in the layout of the parameters.
    gradients: Tensor,
}

impl Critic {
    /// A value model that starts from `policy` and says 0 of everything.
    pub(crate) fn new(config: &ModelConfig, policy: &Parameters) -> Self {
        let parameters = Parameters::of_values(config, policy);
        let model = Model::new(&config.of_values(), &parameters);
        let (optimizer, gradients) = (Optimizer::new(&parameters), model.zero_gradients());
        Self { parameters, optimizer, model, flops: Flops::new(config, 1), gradients }
    }

    /// Calls `note` with the values of each of this rank's answers, `tokens` of them at once.
    pub(crate) fn values(&self, batch: &TrainBatch, tokens: usize, mut note: impl FnMut(usize, &[f32])) {
        let places: Vec<usize> = (0..batch.sequences.len()).collect();
        for pass in batch.passes(&places, tokens) {
            let tensors = PassTensors::new(batch, &pass, self.parameters.flat.device());
            let values = tensors.values(&self.model);
            for (place, range) in spans(&tensors) {
                note(place, &values[range]);
            }
        }
    }

    /// Makes one update with the answers at the places `mine` of every rank.
    pub(crate) fn update(
        &mut self,
        batch: &TrainBatch,
        mine: &[usize],
        objective: &UpdateObjective<'_>,
        settings: &TrainerSettings,
        collective: &mut dyn Collective,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let _ = self.gradients.zero_();
        let counted: Vec<usize> = mine.iter().copied().filter(|place| objective.counts(*place)).collect();
        for pass in batch.passes(&counted, settings.micro_batch_tokens) {
            let tensors = PassTensors::new(batch, &pass, self.parameters.flat.device());
            let open = tensors.open(&self.model, Keep::All);
            let values = open.values(&self.model);
            let mut by_value = Vec::with_capacity(values.len());
            for (place, range) in spans(&tensors) {
                by_value.extend(objective.by_values(place, &values[range], metrics)?);
            }
            open.values_backward(&self.model, &by_value, &self.gradients);
            metrics.sums.flops += self.flops.of(tensors.work());
        }
        self.all_reduce(collective)?;
        let norm = norm(&self.gradients)?;
        metrics.value_updates += 1;
        if !norm.is_finite() {
            metrics.skipped += 1;
            tracing::warn!(step = batch.step, "the value model's gradient is not finite: this update is skipped");
            return Ok(());
        }
        metrics.value_grad_norms.push(norm);
        let spec = &settings.optimizer;
        let clip = spec.max_grad_norm > 0.0 && norm > spec.max_grad_norm;
        let scale = if clip { spec.max_grad_norm / (norm + 1e-6) } else { 1.0 };
        let rate = warmup(self.optimizer.total_updates + 1, spec.warmup_updates, settings.critic_learning_rate);
        self.optimizer.update(spec, rate, scale, &self.gradients, &mut self.parameters)?;
        Ok(())
    }

    /// Adds up the gradients of all ranks, on every rank.
    fn all_reduce(&mut self, collective: &mut dyn Collective) -> Result<(), TrainError> {
        if self.gradients.device() == Device::Cpu {
            collective.all_reduce_sum(f32_mut(&mut self.gradients)?)?;
        } else if collective.world_size() > 1 {
            let mut host = self.gradients.to_device(Device::Cpu);
            collective.all_reduce_sum(f32_mut(&mut host)?)?;
            self.gradients.copy_(&host);
        }
        Ok(())
    }
}
