//! The training step: the two-phase exact update.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use pacs_algo::{ObjectiveError, PacsStep, RewardMethod, Sequence, pacs, warmup};
use pacs_collective::{Collective, CollectiveError};
use pacs_model::{Keep, Model, ModelConfig, ModelError, Parameters};
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::{ViewError, f32_mut};

use crate::batch::{Pass, TrainBatch};
use crate::gradient::{PassTensors, TokenScores};
use crate::metrics::StepMetrics;
use crate::optimizer::{Optimizer, norm};
use crate::settings::TrainerSettings;

/// Why a training step failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A peer was lost or did not answer.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The objective refused the batch.
    #[error("objective: {0}")]
    Objective(#[from] ObjectiveError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A buffer is not where it should be.
    #[error(transparent)]
    View(#[from] ViewError),
}

/// What a training step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Metrics by name, the same on every rank but for the times.
    pub metrics: BTreeMap<String, f64>,
    /// Optimizer updates that were skipped because the gradient was not finite.
    pub skipped_updates: u32,
}

/// One rank's weights, moments and gradient.
#[derive(Debug)]
pub struct Trainer {
    pub(crate) settings: TrainerSettings,
    pub(crate) config: ModelConfig,
    pub(crate) parameters: Parameters,
    pub(crate) optimizer: Optimizer,
    /// The reference policy, when it lives longer than one step.
    pub(crate) reference: Option<Parameters>,
    /// Steps done.
    pub(crate) step: u64,
    model: Model,
    /// Flat float32, in the layout of the parameters.
    gradients: Tensor,
}

/// One sequence's log-prob sums under the two policies (nats, float64).
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    new: f64,
    old: f64,
}

impl Trainer {
    /// A trainer at step 0 of the model in `folder`.
    ///
    /// # Errors
    /// When the model cannot be loaded.
    pub fn load(folder: &Path, settings: TrainerSettings, kind: Kind, device: Device) -> Result<Self, TrainError> {
        let config = ModelConfig::read(folder)?;
        let parameters = Parameters::load(folder, &config, kind, device)?;
        Ok(Self::new(config, parameters, settings))
    }

    /// A trainer at step 0 of a model in memory.
    #[must_use]
    pub fn new(config: ModelConfig, parameters: Parameters, settings: TrainerSettings) -> Self {
        let model = Model::new(&config, &parameters);
        let gradients = model.zero_gradients();
        let optimizer = Optimizer::new(&parameters);
        Self { settings, config, parameters, optimizer, reference: None, step: 0, model, gradients }
    }

    /// The weights.
    #[must_use]
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The settings, to be changed between steps.
    pub fn settings_mut(&mut self) -> &mut TrainerSettings {
        &mut self.settings
    }

    /// Makes training step `batch.step` together with the other ranks of `collective`.
    ///
    /// # Errors
    /// See [`TrainError`]; the state is then that of an unfinished step and must be loaded afresh.
    pub fn train(&mut self, batch: &TrainBatch, collective: &mut dyn Collective) -> Result<StepReport, TrainError> {
        let mut metrics = StepMetrics::default();
        let reset = (batch.step - 1).is_multiple_of(self.settings.reference_reset_steps);
        if reset {
            self.reset_reference();
        }
        let old = self.old_logprobs(batch, reset, &mut metrics);
        for mini_batch in 0..batch.mini_batches() {
            // Nothing was updated since the reset: old and new policy are one, and every log-ratio is zero.
            let on_policy = reset && mini_batch == 0;
            self.update(batch, mini_batch, on_policy, &old, collective, &mut metrics)?;
        }
        self.step = batch.step;
        exchange_metrics(&mut metrics, collective)?;
        Ok(StepReport { metrics: metrics.named(), skipped_updates: metrics.skipped })
    }

    fn reset_reference(&mut self) {
        if self.settings.reference_reset_steps > 1 {
            self.reference = Some(duplicate(&self.parameters));
        }
        if self.settings.reset_optimizer && self.step > 0 {
            self.optimizer.reset();
        }
    }

    /// Sum of the old log-probs of this rank's sequences, for the mini-batches that need them; `NAN` elsewhere.
    fn old_logprobs(&mut self, batch: &TrainBatch, reset: bool, metrics: &mut StepMetrics) -> Vec<f64> {
        let mut sums = vec![f64::NAN; batch.sequences.len()];
        if self.settings.objective.reward_method == RewardMethod::MeanLogprob {
            return sums;
        }
        let needed: Vec<usize> = (0..batch.sequences.len())
            .filter(|place| !(reset && batch.index[batch.sequences[*place].position].mini_batch == 0))
            .collect();
        let started = Instant::now();
        let current = reset.then_some(&self.model);
        let held = self.reference.as_ref().map(|parameters| Model::new(&self.config, parameters));
        let reference = current.or(held.as_ref()).unwrap_or(&self.model);
        for pass in batch.passes(&needed, self.settings.micro_batch_tokens) {
            let tensors = PassTensors::new(batch, &pass, self.parameters.flat.device());
            let scores = tensors.score(reference, self.settings.temperature);
            for (place, range) in spans(&tensors) {
                sums[place] = sum(&scores.logprobs[range.clone()]);
                if reset {
                    metrics.compare(&scores.logprobs[range], &batch.sequences[place].rollout_logprobs);
                }
            }
        }
        metrics.add_seconds("old_logprobs", started);
        sums
    }

    fn update(
        &mut self,
        batch: &TrainBatch,
        mini_batch: usize,
        on_policy: bool,
        old: &[f64],
        collective: &mut dyn Collective,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let members: Vec<usize> =
            (0..batch.index.len()).filter(|position| batch.index[*position].mini_batch == mini_batch).collect();
        let mine: Vec<usize> = (0..batch.sequences.len())
            .filter(|place| batch.index[batch.sequences[*place].position].mini_batch == mini_batch)
            .collect();
        let started = Instant::now();
        let _ = self.gradients.zero_();
        let known = on_policy && self.settings.objective.reward_method == RewardMethod::LogRatio;
        let outcome = if known {
            let zeros = vec![Sums::default(); members.len()];
            let outcome = self.objective(batch, &members, &zeros)?;
            self.backward(batch, &members, &mine, &outcome, on_policy, metrics)?;
            outcome
        } else {
            self.two_phases(batch, &members, &mine, old, collective, metrics)?
        };
        metrics.add_seconds("gradient", started);
        if !known {
            metrics.scores.extend(&outcome.score);
            metrics.positive.extend(members.iter().map(|position| batch.index[*position].label > 0.5));
        }
        metrics.losses.push(outcome.loss);
        let started = Instant::now();
        self.all_reduce(collective)?;
        metrics.add_seconds("all_reduce", started);
        let started = Instant::now();
        self.apply(metrics)?;
        metrics.add_seconds("optimizer", started);
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

    /// Scores first, then the objective over all ranks, then the backward; a single pass keeps its graph in between.
    fn two_phases(
        &mut self,
        batch: &TrainBatch,
        members: &[usize],
        mine: &[usize],
        old: &[f64],
        collective: &mut dyn Collective,
        metrics: &mut StepMetrics,
    ) -> Result<PacsStep, TrainError> {
        let temperature = self.settings.temperature;
        let passes = batch.passes(mine, self.settings.micro_batch_tokens);
        let mut scored: Vec<f64> = Vec::with_capacity(3 * mine.len());
        let mut note = |tensors: &PassTensors, scores: &TokenScores| {
            for (place, range) in spans(tensors) {
                let old = if old[place].is_nan() { 0.0 } else { old[place] };
                scored.extend([batch.sequences[place].position as f64, sum(&scores.logprobs[range]), old]);
            }
        };
        let tensors: Vec<PassTensors> =
            passes.iter().map(|pass| PassTensors::new(batch, pass, self.parameters.flat.device())).collect();
        if let [only] = &tensors[..] {
            let open = only.open(&self.model, Keep::All);
            note(only, &open.score(&self.model, temperature));
            let outcome = self.exchange(batch, members, &scored, collective, metrics)?;
            let coefficients = coefficients(only, batch, members, &outcome);
            if coefficients.iter().any(|c| *c != 0.0) {
                let scores = open.backward(&self.model, &coefficients, temperature, &self.gradients);
                count_trained(&passes[0], &scores, metrics);
            }
            return Ok(outcome);
        }
        for pass in &tensors {
            note(pass, &pass.score(&self.model, temperature));
        }
        let outcome = self.exchange(batch, members, &scored, collective, metrics)?;
        self.backward(batch, members, mine, &outcome, false, metrics)?;
        Ok(outcome)
    }

    /// Gathers the scalars of all ranks and evaluates the objective on them.
    fn exchange(
        &self,
        batch: &TrainBatch,
        members: &[usize],
        scored: &[f64],
        collective: &mut dyn Collective,
        metrics: &mut StepMetrics,
    ) -> Result<PacsStep, TrainError> {
        let first = members[0];
        let mut sums = vec![Sums::default(); members.len()];
        for rank in collective.all_gather_f64(scored)? {
            for entry in rank.chunks_exact(3) {
                // Positions are small integers, exact in a float64; the members of a mini-batch are consecutive.
                sums[entry[0] as usize - first] = Sums { new: entry[1], old: entry[2] };
            }
        }
        if self.settings.objective.reward_method == RewardMethod::LogRatio {
            metrics.log_ratios.extend(sums.iter().map(|sums| sums.new - sums.old));
        }
        self.objective(batch, members, &sums)
    }

    fn objective(&self, batch: &TrainBatch, members: &[usize], sums: &[Sums]) -> Result<PacsStep, TrainError> {
        let sequences: Vec<Sequence> = members
            .iter()
            .zip(sums)
            .map(|(position, sums)| {
                let entry = &batch.index[*position];
                Sequence {
                    group: entry.group,
                    label: entry.label,
                    new_logprob_sum: sums.new,
                    old_logprob_sum: sums.old,
                    tokens: entry.answer_tokens,
                }
            })
            .collect();
        Ok(pacs(&self.settings.objective, &sequences)?)
    }

    /// Adds up the gradient of this rank's sequences. Those without a coefficient have none and are left out; when that
    /// leaves nothing, one sequence is still scored so that the comparison with the rollout engine never goes dark.
    fn backward(
        &mut self,
        batch: &TrainBatch,
        members: &[usize],
        mine: &[usize],
        outcome: &PacsStep,
        on_policy: bool,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let temperature = self.settings.temperature;
        let device = self.parameters.flat.device();
        let first = members[0];
        let has_gradient = |place: &usize| outcome.dloss_dlogprob[batch.sequences[*place].position - first] != 0.0;
        let trained: Vec<usize> = mine.iter().copied().filter(has_gradient).collect();
        for pass in batch.passes(&trained, self.settings.micro_batch_tokens) {
            let tensors = PassTensors::new(batch, &pass, device);
            let coefficients = coefficients(&tensors, batch, members, outcome);
            let open = tensors.open(&self.model, Keep::All);
            let scores = open.backward(&self.model, &coefficients, temperature, &self.gradients);
            count_trained(&pass, &scores, metrics);
            if on_policy {
                compare_pass(batch, &tensors, &scores, metrics);
            }
        }
        if on_policy && trained.is_empty() && !mine.is_empty() {
            for pass in batch.passes(&mine[..1], self.settings.micro_batch_tokens) {
                let tensors = PassTensors::new(batch, &pass, device);
                let scores = tensors.score(&self.model, temperature);
                compare_pass(batch, &tensors, &scores, metrics);
            }
        }
        Ok(())
    }

    /// Clips, checks and applies the gradient; every rank holds the same one, so every rank decides the same.
    fn apply(&mut self, metrics: &mut StepMetrics) -> Result<(), TrainError> {
        let spec = &self.settings.optimizer;
        let norm = norm(&self.gradients)?;
        metrics.updates += 1;
        if !norm.is_finite() {
            metrics.skipped += 1;
            tracing::warn!(step = self.step + 1, "the gradient is not finite: this update is skipped");
            return Ok(());
        }
        let clip = spec.max_grad_norm > 0.0 && norm > spec.max_grad_norm;
        let scale = if clip { spec.max_grad_norm / (norm + 1e-6) } else { 1.0 };
        metrics.clipped += u32::from(clip);
        metrics.grad_norms.push(norm);
        metrics.learning_rate = warmup(self.optimizer.total_updates + 1, spec.warmup_updates, spec.learning_rate);
        self.optimizer.update(spec, metrics.learning_rate, scale, &self.gradients, &mut self.parameters)?;
        Ok(())
    }
}

/// A copy with storage of its own.
pub(crate) fn duplicate(parameters: &Parameters) -> Parameters {
    Parameters { layout: parameters.layout.clone(), flat: parameters.flat.copy() }
}

/// Coefficient of every answer token of a pass.
fn coefficients(tensors: &PassTensors, batch: &TrainBatch, members: &[usize], outcome: &PacsStep) -> Vec<f32> {
    let first = members[0];
    let of = |place: usize| outcome.dloss_dlogprob[batch.sequences[place].position - first] as f32;
    tensors.spans.iter().flat_map(|&(place, tokens)| std::iter::repeat_n(of(place), tokens)).collect()
}

/// Each sequence's place with its range among the pass's answer tokens.
fn spans(tensors: &PassTensors) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> + '_ {
    tensors.spans.iter().scan(0, |start, &(place, tokens)| {
        let range = *start..*start + tokens;
        *start = range.end;
        Some((place, range))
    })
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum()
}

fn count_trained(pass: &Pass, scores: &TokenScores, metrics: &mut StepMetrics) {
    metrics.sums.trained_sequences += pass.places().count() as f64;
    metrics.sums.trained_tokens += pass.tokens as f64;
    metrics.sums.scored_tokens += scores.entropies.len() as f64;
    metrics.sums.entropy += sum(&scores.entropies);
}

fn compare_pass(batch: &TrainBatch, tensors: &PassTensors, scores: &TokenScores, metrics: &mut StepMetrics) {
    for (place, range) in spans(tensors) {
        metrics.compare(&scores.logprobs[range], &batch.sequences[place].rollout_logprobs);
    }
}

fn exchange_metrics(metrics: &mut StepMetrics, collective: &mut dyn Collective) -> Result<(), CollectiveError> {
    let mut mine = metrics.sums.to_vec();
    mine.push(metrics.mismatch_max);
    metrics.sums = crate::metrics::Sums::default();
    for rank in collective.all_gather_f64(&mine)? {
        let Some((maximum, sums)) = rank.split_last() else { continue };
        metrics.sums.add(sums);
        metrics.mismatch_max = metrics.mismatch_max.max(*maximum);
    }
    Ok(())
}
