//! The training step: the two-phase exact update.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use pacs_algo::{ObjectiveError, ObjectiveMetrics, warmup};
use pacs_collective::{Collective, CollectiveError};
use pacs_model::{Keep, Model, ModelConfig, ModelError, Parameters};
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::{ViewError, f32_mut};

use crate::batch::TrainBatch;
use crate::critic::Critic;
use crate::gradient::{PassTensors, TokenCoefficients, TokenScores};
use crate::metrics::StepMetrics;
use crate::objective::{Scored, StepObjective, UpdateObjective};
use crate::optimizer::{Optimizer, norm};
use crate::outcomes::outcomes;
use crate::settings::TrainerSettings;
use crate::work::Flops;

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
    /// The value model, for objectives that have one.
    pub(crate) critic: Option<Critic>,
    /// Steps done.
    pub(crate) step: u64,
    model: Model,
    flops: Flops,
    /// Flat float32, in the layout of the parameters.
    gradients: Tensor,
}

impl Trainer {
    /// A trainer at step 0 of the model in `folder`.
    ///
    /// # Errors
    /// When the model cannot be loaded.
    pub fn load(folder: &Path, settings: TrainerSettings, kind: Kind, device: Device) -> Result<Self, TrainError> {
        let config = ModelConfig::read(folder).map_err(ModelError::from)?;
        let parameters = Parameters::load(folder, &config, kind, device)?;
        Ok(Self::new(config, parameters, settings))
    }

    /// A trainer at step 0 of a model in memory.
    #[must_use]
    pub fn new(config: ModelConfig, parameters: Parameters, settings: TrainerSettings) -> Self {
        let model = Model::new(&config, &parameters);
        let gradients = model.zero_gradients();
        let optimizer = Optimizer::new(&parameters);
        let critic = settings.objective.needs().values.then(|| Critic::new(&config, &parameters));
        let flops = Flops::new(&config, config.vocab_size);
        Self { settings, config, parameters, optimizer, reference: None, critic, step: 0, model, flops, gradients }
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
        let started = Instant::now();
        let mut metrics = StepMetrics { outcomes: outcomes(&batch.index), ..StepMetrics::default() };
        let mut objective = StepObjective::new(self.settings.objective, batch)?;
        let needs = objective.needs();
        let reset = self.reset_reference(batch.step);
        // Nothing was updated yet: in the first mini-batch old and new policy are one, and every log-ratio is zero.
        let starts_on_policy = reset || !needs.old_is_reference;
        self.score_before_updates(batch, starts_on_policy, &mut objective, &mut metrics);
        objective.settle(collective)?;
        for mini_batch in 0..batch.mini_batches() {
            let on_policy = starts_on_policy && mini_batch == 0;
            self.update(batch, mini_batch, on_policy, &objective, collective, &mut metrics)?;
        }
        self.step = batch.step;
        metrics.peak_flops = self.settings.peak_flops.map(|peak| peak * collective.world_size() as f64);
        exchange_metrics(&mut metrics, collective)?;
        metrics.step_seconds = started.elapsed().as_secs_f64();
        Ok(StepReport { metrics: metrics.named(), skipped_updates: metrics.skipped })
    }

    /// Makes the current policy the reference where that is due before step `step`, and says whether it was.
    fn reset_reference(&mut self, step: u64) -> bool {
        let needs = self.settings.objective.needs();
        let due = match self.settings.reference_reset_steps {
            0 => self.reference.is_none(),
            steps => (step - 1).is_multiple_of(steps),
        };
        if due && (needs.reference || self.settings.reference_reset_steps > 1) {
            self.reference = Some(duplicate(&self.parameters));
        }
        if due && self.settings.reset_optimizer && self.step > 0 {
            self.optimizer.reset();
        }
        due
    }

    /// Log-probs under the old and the reference policy of those of this rank's answers that need them.
    fn score_before_updates(
        &self,
        batch: &TrainBatch,
        starts_on_policy: bool,
        objective: &mut StepObjective<'_>,
        metrics: &mut StepMetrics,
    ) {
        let (needs, started) = (objective.needs(), Instant::now());
        let held = self.reference.as_ref().map(|parameters| Model::new(&self.config, parameters));
        let places = 0..batch.sequences.len();
        // A step that trains the value model alone compares policies only where advantages do.
        if needs.old && (objective.trains_policy() || needs.summaries_read_old) {
            let first = |place: usize| batch.index[batch.sequences[place].position].mini_batch == 0;
            let own_forward = |place: usize| starts_on_policy && first(place) && !needs.summaries_read_old;
            // Before summaries are gathered it is not known which answers will have no advantage.
            let inert = |place: usize| !needs.summaries && objective.is_inert(place);
            let needed: Vec<usize> = places.clone().filter(|place| !own_forward(*place) && !inert(*place)).collect();
            let old = if starts_on_policy { &self.model } else { held.as_ref().unwrap_or(&self.model) };
            self.score(old, batch, &needed, |place, logprobs| {
                objective.set_old(place, logprobs);
                if starts_on_policy && !first(place) {
                    metrics.compare(logprobs, &batch.sequences[place].rollout_logprobs);
                }
            });
        }
        if let Some(reference) = held.filter(|_| needs.reference) {
            let needed: Vec<usize> = places.collect();
            self.score(&reference, batch, &needed, |place, logprobs| objective.set_reference(place, logprobs));
        }
        metrics.add_seconds("old_logprobs", started);
        if let Some(critic) = &self.critic {
            let started = Instant::now();
            critic.values(batch, self.settings.micro_batch_tokens, |place, values| objective.set_values(place, values));
            metrics.add_seconds("values", started);
        }
    }

    /// Calls `note` with the log-probs of each of the answers at `places` under `model`.
    fn score(&self, model: &Model, batch: &TrainBatch, places: &[usize], mut note: impl FnMut(usize, &[f32])) {
        for pass in batch.passes(places, self.settings.micro_batch_tokens) {
            let tensors = PassTensors::new(batch, &pass, self.parameters.flat.device());
            let scores = tensors.score(model, self.settings.temperature);
            for (place, range) in spans(&tensors) {
                note(place, &scores.logprobs[range]);
            }
        }
    }

    fn update(
        &mut self,
        batch: &TrainBatch,
        mini_batch: usize,
        on_policy: bool,
        objective: &StepObjective<'_>,
        collective: &mut dyn Collective,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let members = batch.members(mini_batch);
        let mine: Vec<usize> =
            (0..batch.sequences.len()).filter(|place| members.contains(&batch.sequences[*place].position)).collect();
        if let Some(critic) = &mut self.critic {
            let (started, state) = (Instant::now(), objective.on_policy(members.clone())?);
            critic.update(batch, &mine, &state, &self.settings, collective, metrics)?;
            metrics.add_seconds("value_update", started);
        }
        if !objective.trains_policy() {
            if on_policy {
                self.compare_one(batch, &mine, metrics);
            }
            return Ok(());
        }
        let started = Instant::now();
        let _ = self.gradients.zero_();
        if on_policy && objective.needs().known_on_policy {
            let update = objective.on_policy(members)?;
            let mut coefficients = Coefficients::new();
            for &place in &mine {
                coefficients.insert(place, update.known(place, metrics)?);
            }
            self.backward(batch, &mine, &coefficients, on_policy, metrics)?;
        } else {
            self.two_phases(batch, members, &mine, on_policy, objective, collective, metrics)?;
        }
        metrics.add_seconds("gradient", started);
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

    /// Scores first, then the objective, then the backward. A pass keeps its graph in between, unless the objective takes
    /// the scores of other passes or ranks too and there are several.
    #[expect(clippy::too_many_arguments, reason = "the parts of one update")]
    fn two_phases(
        &mut self,
        batch: &TrainBatch,
        members: Range<usize>,
        mine: &[usize],
        on_policy: bool,
        objective: &StepObjective<'_>,
        collective: &mut dyn Collective,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let temperature = self.settings.temperature;
        let (inert, live): (Vec<usize>, Vec<usize>) = mine.iter().partition(|place| objective.is_inert(**place));
        inert.iter().for_each(|place| objective.skip(*place, metrics));
        let passes = batch.passes(&live, self.settings.micro_batch_tokens);
        let couples = objective.needs().sums;
        if couples && passes.len() != 1 {
            let mut scored = Vec::with_capacity(live.len());
            self.score(&self.model, batch, &live, |place, logprobs| {
                scored.push(Scored { place, logprobs: logprobs.to_vec(), entropies: Vec::new() });
            });
            let update = objective.gathered(members, &scored, collective, metrics)?;
            let coefficients = coefficients(&update, &scored, metrics)?;
            return self.backward(batch, &live, &coefficients, false, metrics);
        }
        let mut update = match couples {
            true => None,
            false => Some(objective.gathered(members.clone(), &[], collective, metrics)?),
        };
        for pass in &passes {
            let tensors = PassTensors::new(batch, pass, self.parameters.flat.device());
            let open = tensors.open(&self.model, Keep::All);
            let scores = open.score(&self.model, temperature);
            let scored: Vec<Scored> = spans(&tensors)
                .map(|(place, range)| Scored {
                    place,
                    logprobs: scores.logprobs[range.clone()].to_vec(),
                    entropies: scores.entropies[range].to_vec(),
                })
                .collect();
            if on_policy {
                compare_pass(batch, &tensors, &scores, metrics);
            }
            let update = match &mut update {
                Some(update) => update,
                None => update.insert(objective.gathered(members.clone(), &scored, collective, metrics)?),
            };
            let coefficients = in_order(&tensors, &coefficients(update, &scored, metrics)?);
            if coefficients.any() {
                let scores = open.backward(&self.model, &coefficients, temperature, &self.gradients);
                self.count_trained(&tensors, &scores, metrics);
            }
        }
        if on_policy && live.is_empty() {
            self.compare_one(batch, mine, metrics);
        }
        Ok(())
    }

    /// Adds up the gradient of this rank's sequences. Those without a coefficient have none and are left out.
    fn backward(
        &mut self,
        batch: &TrainBatch,
        mine: &[usize],
        coefficients: &Coefficients,
        on_policy: bool,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let temperature = self.settings.temperature;
        let device = self.parameters.flat.device();
        let has_gradient = |place: &usize| coefficients[place].any();
        let trained: Vec<usize> = mine.iter().copied().filter(has_gradient).collect();
        for pass in batch.passes(&trained, self.settings.micro_batch_tokens) {
            let tensors = PassTensors::new(batch, &pass, device);
            let open = tensors.open(&self.model, Keep::All);
            let coefficients = in_order(&tensors, coefficients);
            let scores = open.backward(&self.model, &coefficients, temperature, &self.gradients);
            self.count_trained(&tensors, &scores, metrics);
            if on_policy {
                compare_pass(batch, &tensors, &scores, metrics);
            }
        }
        if on_policy && trained.is_empty() {
            self.compare_one(batch, mine, metrics);
        }
        Ok(())
    }

    fn count_trained(&self, tensors: &PassTensors, scores: &TokenScores, metrics: &mut StepMetrics) {
        let work = tensors.work();
        metrics.sums.trained_sequences += tensors.spans.len() as f64;
        // The last token of an answer is trained on and predicts nothing.
        metrics.sums.trained_tokens += work.tokens + tensors.spans.len() as f64;
        metrics.sums.flops += self.flops.of(work);
        metrics.sums.scored_tokens += scores.entropies.len() as f64;
        metrics.sums.entropy += sum(&scores.entropies);
    }

    /// Scores the first of the sequences at `places`, so that the comparison with the rollout engine never goes dark.
    fn compare_one(&self, batch: &TrainBatch, places: &[usize], metrics: &mut StepMetrics) {
        for pass in batch.passes(&places[..places.len().min(1)], self.settings.micro_batch_tokens) {
            let tensors = PassTensors::new(batch, &pass, self.parameters.flat.device());
            let scores = tensors.score(&self.model, self.settings.temperature);
            compare_pass(batch, &tensors, &scores, metrics);
        }
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

/// Coefficients of the answer tokens of sequences, by place.
type Coefficients = HashMap<usize, TokenCoefficients>;

fn coefficients(
    update: &UpdateObjective<'_>,
    scored: &[Scored],
    metrics: &mut StepMetrics,
) -> Result<Coefficients, ObjectiveError> {
    let of = |scored: &Scored| Ok((scored.place, update.coefficients(scored, metrics)?));
    scored.iter().map(of).collect()
}

/// Coefficients of every answer token of a pass.
fn in_order(tensors: &PassTensors, coefficients: &Coefficients) -> TokenCoefficients {
    let mut all = TokenCoefficients::default();
    tensors.spans.iter().for_each(|(place, _)| all.append(&coefficients[place]));
    all
}

/// Each sequence's place with its range among the pass's answer tokens.
pub(crate) fn spans(tensors: &PassTensors) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> + '_ {
    tensors.spans.iter().scan(0, |start, &(place, tokens)| {
        let range = *start..*start + tokens;
        *start = range.end;
        Some((place, range))
    })
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum()
}

fn compare_pass(batch: &TrainBatch, tensors: &PassTensors, scores: &TokenScores, metrics: &mut StepMetrics) {
    for (place, range) in spans(tensors) {
        metrics.compare(&scores.logprobs[range], &batch.sequences[place].rollout_logprobs);
    }
}

fn exchange_metrics(metrics: &mut StepMetrics, collective: &mut dyn Collective) -> Result<(), CollectiveError> {
    let mut mine = metrics.sums.to_vec();
    mine.push(metrics.mismatch_max);
    let ours = mine.len();
    mine.extend(metrics.objective.to_vec());
    metrics.sums = crate::metrics::Sums::default();
    metrics.objective = ObjectiveMetrics::default();
    for rank in collective.all_gather_f64(&mine)? {
        let (sums, objective) = rank.split_at(ours.min(rank.len()));
        metrics.objective.merge(&ObjectiveMetrics::from_slice(objective));
        let Some((maximum, sums)) = sums.split_last() else { continue };
        metrics.sums.add(sums);
        metrics.mismatch_max = metrics.mismatch_max.max(*maximum);
    }
    Ok(())
}
