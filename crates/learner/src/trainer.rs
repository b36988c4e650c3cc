//! The training step: an exact update in two phases.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pacs_algo::{Objective, ObjectiveError, ObjectiveMetrics};
use pacs_collective::{Collective, CollectiveError, Operation};
use pacs_model::{ModelConfig, ModelError, Parameters, kernel_shape, load_kernels};
use pacs_shape::{Flops, Sharding};
use pacs_spec::{OldLogprobs, WeightDecayOn};
use pacs_torch::tch::{Device, Kind};
use pacs_torch::{DeviceKernels, LendError, ViewError, with_device_kernels};

use crate::batch::{BatchError, TrainBatch};
use crate::critic::Critic;
use crate::external::{External, ExternalError};
use crate::gradient::{PassTensors, TokenCoefficients, TokenScores};
use crate::memory::{Memory, Trained};
use crate::metrics::StepMetrics;
use crate::network::{Flow, Keeping, Network, Source};
use crate::objective::{Scored, StepObjective, UpdateObjective};
use crate::optimizer::UpdateStep;
use crate::outcomes::outcomes;
use crate::settings::TrainerSettings;
use crate::wire::Wire;

/// Why a training step failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A collective operation failed: a peer was lost, or missed the deadline.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The exchange thread has ended; an earlier error says why.
    #[error("the exchanges with the other ranks have ended")]
    ExchangesEnded,
    /// An exchange is overdue although the communicator should have aborted it by itself.
    #[error(
        "rank {rank} has waited {waited:?} for {operation} of {bytes} bytes with the other ranks, longer than the \
         communicator allows: the ranks have to form a new generation"
    )]
    Overdue {
        /// Rank that waited.
        rank: usize,
        /// Operation that did not end.
        operation: Operation,
        /// Size of its buffer (bytes).
        bytes: u64,
        /// How long the rank waited.
        waited: Duration,
    },
    /// The queue of exchanges is full.
    #[error("{operation} was refused: {most} exchanges with the other ranks are queued already")]
    TooManyExchanges {
        /// Capacity of the queue.
        most: usize,
        /// Operation that was refused.
        operation: Operation,
    },
    /// The objective refused the batch.
    #[error("objective: {0}")]
    Objective(#[from] ObjectiveError),
    /// The program of an external objective gave no valid reply.
    #[error(transparent)]
    External(#[from] ExternalError),
    /// The batch is not cut into units as a deterministic update requires.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The model could not be loaded.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A buffer does not have the device or element type that the update expects.
    #[error(transparent)]
    View(#[from] ViewError),
    /// A buffer could not be exposed to a collective.
    #[error(transparent)]
    Lend(#[from] LendError),
}

/// Outcome of a training step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Metrics by name. Except for times they are the same on every rank.
    pub metrics: BTreeMap<String, f64>,
    /// Number of optimizer updates skipped because the gradient was not finite.
    pub skipped_updates: u32,
}

/// One rank of training: weights, moments and gradient, whole or sharded.
#[derive(Debug)]
pub struct Trainer {
    pub(crate) settings: TrainerSettings,
    memory: Memory,
    pub(crate) network: Network,
    /// Value model; `None` for objectives without one.
    pub(crate) critic: Option<Critic>,
    /// Program of an external objective; only on rank 0, which asks it.
    external: Option<Mutex<External>>,
    flops: Flops,
    /// GPU kernels; `None` on the CPU, or where none fit.
    kernels: Option<Arc<DeviceKernels>>,
    /// Last step that was trained or restored; 0 before the first.
    pub(crate) step: u64,
}

impl Trainer {
    /// Loads the model in `folder` as a trainer at step 0, with adapters where the settings have them.
    ///
    /// # Errors
    /// When the model cannot be loaded.
    pub fn load(folder: &Path, settings: TrainerSettings, kind: Kind, device: Device) -> Result<Self, TrainError> {
        let before = Memory::used(device);
        let network = Network::load(folder, settings.lora.as_ref(), keeping(&settings), kind, device)?;
        Ok(Self::assemble(network, settings, before))
    }

    /// Creates a trainer at step 0 from parameters in memory, in the layout of [`pacs_model::ParameterLayout::new`].
    ///
    /// # Panics
    /// When the settings have adapters ([`Trainer::adapted`]).
    #[must_use]
    pub fn new(config: ModelConfig, parameters: Parameters, settings: TrainerSettings) -> Self {
        assert!(settings.lora.is_none(), "the settings have adapters");
        let bytes = (parameters.flat.numel() * parameters.flat.kind().elt_size_in_bytes()) as u64;
        let before = Memory::used(parameters.flat.device()).saturating_sub(bytes);
        let network = Network::new(config, parameters, keeping(&settings));
        Self::assemble(network, settings, before)
    }

    /// Creates a trainer at step 0 of fresh adapters over `base`, a model in memory.
    ///
    /// # Errors
    /// When the model cannot have the adapters of the settings.
    ///
    /// # Panics
    /// When the settings have none.
    pub fn adapted(config: &ModelConfig, base: Parameters, settings: TrainerSettings) -> Result<Self, TrainError> {
        let lora = settings.lora.as_ref().expect("the settings have adapters");
        let bytes = (base.flat.numel() * base.flat.kind().elt_size_in_bytes()) as u64;
        let before = Memory::used(base.flat.device()).saturating_sub(bytes);
        let adapted = config.with_lora(&lora.adapters).map_err(ModelError::from)?;
        let adapters = Parameters::fresh_adapters(&adapted, base.flat.kind(), base.flat.device(), lora.seed);
        let network = Network::adapted(adapted, base, adapters, keeping(&settings));
        Ok(Self::assemble(network, settings, before))
    }

    fn assemble(network: Network, settings: TrainerSettings, before: u64) -> Self {
        let seed = settings.lora.as_ref().map_or(0, |lora| lora.seed);
        let critic = settings.objective.needs().values.then(|| Critic::new(&network, keeping(&settings), seed));
        let asks = settings.objective == Objective::External && settings.division.rank == 0;
        let program = settings.external.clone().filter(|_| asks);
        let external = program.map(|program| Mutex::new(External::new(program)));
        let flops = Flops::new(&network.config, network.config.vocab_size);
        let kernels = load_kernels(&network.config, network.compute_kind(), network.device()).unwrap_or_else(|error| {
            tracing::warn!("training is slow, without kernels of the GPU: {error}");
            None
        });
        let memory = Memory::new(&network, &settings, before, kernels.is_some());
        Self { settings, memory, network, critic, external, flops, kernels, step: 0 }
    }

    /// Replaces the kernels. On a GPU the trainer loads its own; this is for emulated kernels on a machine without one.
    ///
    /// # Panics
    /// When the kernels were compiled for another model.
    pub fn use_device_kernels(&mut self, kernels: Arc<DeviceKernels>) {
        assert_eq!(
            kernels.shape(),
            kernel_shape(&self.network.config, self.network.compute_kind()),
            "kernels of another model"
        );
        self.kernels = Some(kernels);
    }

    /// Returns the frozen weights that adapters adapt, and the configuration of these; `None` when all weights are trained.
    #[must_use]
    pub fn base(&self) -> Option<(&ModelConfig, &Parameters)> {
        self.network.base.as_ref().map(|base| (&self.network.config, base))
    }

    /// Returns all weights that are trained (with adapters these alone), or `None` unless `wanted`. Collective: every rank has to
    /// call it.
    ///
    /// Replicated weights share storage with the trainer; sharded weights are gathered into host memory.
    ///
    /// # Errors
    /// When a peer was lost.
    pub fn weights(&mut self, collective: &mut dyn Collective, wanted: bool) -> Result<Option<Parameters>, TrainError> {
        self.network.whole(collective, wanted)
    }

    /// Returns the settings, which may be changed between steps.
    pub fn settings_mut(&mut self) -> &mut TrainerSettings {
        &mut self.settings
    }

    /// Trains step `batch.step` together with the other ranks of `collective`.
    ///
    /// # Errors
    /// See [`TrainError`]. After an error the state is that of an unfinished step and has to be reloaded.
    pub fn train(&mut self, batch: &TrainBatch, collective: &mut dyn Collective) -> Result<StepReport, TrainError> {
        match self.kernels.clone() {
            Some(kernels) => with_device_kernels(&kernels, || self.train_with(batch, collective)),
            None => self.train_with(batch, collective),
        }
    }

    fn train_with(&mut self, batch: &TrainBatch, collective: &mut dyn Collective) -> Result<StepReport, TrainError> {
        if self.settings.deterministic {
            batch.check_units()?;
        }
        let started = Instant::now();
        let ranks = collective.world_size() as f64;
        let mut metrics = StepMetrics {
            outcomes: outcomes(&batch.index),
            peak_flops: self.settings.peak_flops.map(|peak| peak * ranks),
            ..StepMetrics::default()
        };
        metrics.traffic = std::thread::scope(|scope| {
            let mut wire = Wire::start(scope, collective);
            let trained = self.train_over(batch, &mut wire, &mut metrics);
            let traffic = wire.close();
            trained.map(|()| traffic)
        })?;
        self.step = batch.step;
        metrics.step_seconds = started.elapsed().as_secs_f64();
        let mut named = metrics.named();
        self.memory.report(self.network.device(), &mut named);
        Ok(StepReport { metrics: named, skipped_updates: metrics.skipped })
    }

    fn train_over(
        &mut self,
        batch: &TrainBatch,
        wire: &mut Wire<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let began = Instant::now();
        let mut objective = StepObjective::new(self.settings.objective, batch)?;
        let needs = objective.needs();
        let reset = self.reset_reference(batch.step);
        // Before the first update the new policy is the old one, so every log-ratio of the first mini-batch is zero.
        let starts_on_policy = reset || !needs.old_is_reference;
        let recorded = self.settings.old_logprobs == OldLogprobs::Rollout;
        if recorded && needs.old {
            for (place, sequence) in batch.sequences.iter().enumerate() {
                objective.set_old(place, &sequence.rollout_logprobs);
            }
        }
        self.score_before_updates(batch, starts_on_policy, &mut objective, wire, metrics)?;
        objective.settle(wire)?;
        for mini_batch in 0..batch.mini_batches() {
            let members = batch.members(mini_batch);
            let is_member = |place: &usize| members.contains(&batch.sequences[*place].position);
            let fresh = starts_on_policy && mini_batch == 0;
            let update = Update {
                batch,
                objective: &objective,
                mine: (0..batch.sequences.len()).filter(is_member).collect(),
                members,
                fresh,
                known: fresh && !recorded && needs.known_on_policy,
            };
            self.update(&update, wire, metrics)?;
        }
        let computed = began.elapsed().saturating_sub(wire.waited());
        exchange_metrics(metrics, computed, wire)
    }

    /// Copies the current policy into the reference if a reset is due before step `step`. Returns whether it was due.
    fn reset_reference(&mut self, step: u64) -> bool {
        let needs = self.settings.objective.needs();
        let due = match self.settings.reference_reset_steps {
            0 => self.network.reference.is_none(),
            steps => (step - 1).is_multiple_of(steps),
        };
        if due && (needs.reference || self.settings.reference_reset_steps > 1) {
            self.network.set_reference();
        }
        if due && self.settings.reset_optimizer && self.step > 0 {
            self.network.optimizer.reset();
        }
        due
    }

    /// Computes log-probs of the old and the reference policy, and values, for those of this rank's answers
    /// that need them.
    fn score_before_updates(
        &mut self,
        batch: &TrainBatch,
        starts_on_policy: bool,
        objective: &mut StepObjective<'_>,
        wire: &mut Wire<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let (needs, started) = (objective.needs(), Instant::now());
        let places = 0..batch.sequences.len();
        // A step that trains only the value model needs old log-probs only if its advantages read them.
        let compares = needs.old && (objective.trains_policy() || needs.summaries_read_old);
        if compares && self.settings.old_logprobs == OldLogprobs::Learner {
            let first = |place: usize| batch.index[batch.sequences[place].position].mini_batch == 0;
            let own_forward = |place: usize| starts_on_policy && first(place) && !needs.summaries_read_old;
            // Answers without an advantage are not known before the summaries are gathered.
            let inert = |place: usize| !needs.summaries && objective.is_inert(place);
            let needed: Vec<usize> = places.clone().filter(|place| !own_forward(*place) && !inert(*place)).collect();
            let held = !starts_on_policy && self.network.reference.is_some();
            let old = if held { Source::Reference } else { Source::Policy };
            self.score(old, batch, &needed, wire, |place, logprobs| {
                objective.set_old(place, logprobs);
                if starts_on_policy && !first(place) {
                    metrics.compare(batch, place, logprobs);
                }
            })?;
        }
        if needs.reference && self.network.reference.is_some() {
            let needed: Vec<usize> = places.collect();
            self.score(Source::Reference, batch, &needed, wire, |place, logprobs| {
                objective.set_reference(place, logprobs);
            })?;
        }
        metrics.add_seconds("old_logprobs", started);
        if let Some(critic) = &mut self.critic {
            let (started, tokens) = (Instant::now(), self.settings.micro_batch_tokens);
            critic.values(batch, tokens, wire, |place, values| objective.set_values(place, values))?;
            metrics.add_seconds("values", started);
        }
        Ok(())
    }

    /// Calls `note` with the log-probs of each answer at `places` under the weights of `source`.
    fn score(
        &mut self,
        source: Source,
        batch: &TrainBatch,
        places: &[usize],
        wire: &mut Wire<'_>,
        mut note: impl FnMut(usize, &[f32]),
    ) -> Result<(), TrainError> {
        let passes = batch.passes(places, self.settings.micro_batch_tokens);
        for round in 0..self.rounds(passes.len(), wire)? {
            let Some(pass) = passes.get(round) else {
                self.network.idle_forward(source, wire)?;
                continue;
            };
            let tensors = PassTensors::new(batch, pass, self.network.device());
            let (model, mut around) = self.network.forward(source, wire);
            let scores = tensors.score(model, self.settings.temperature, &mut around)?;
            for (place, range) in spans(&tensors) {
                note(place, &scores.logprobs[range]);
            }
        }
        Ok(())
    }

    /// Number of passes of all ranks. Where weights are sharded, every rank takes part in each pass, since its
    /// shard is gathered.
    fn rounds(&self, passes: usize, wire: &mut Wire<'_>) -> Result<usize, TrainError> {
        if self.network.division.sharding != Sharding::ShardAll {
            return Ok(passes);
        }
        let most = wire.gather(vec![passes as f64])?.into_iter().flatten().fold(0.0, f64::max);
        Ok(most as usize)
    }

    fn update(
        &mut self,
        update: &Update<'_>,
        wire: &mut Wire<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        if let Some(critic) = &mut self.critic {
            let (started, objective) = (Instant::now(), update.objective.on_policy(update.members.clone())?);
            let (settings, memory) = (&self.settings, &mut self.memory);
            critic.update(update, &objective, settings, memory, wire, metrics)?;
            metrics.add_seconds("value_update", started);
        }
        if !update.objective.trains_policy() {
            return self.compare_one(update, true, wire, metrics);
        }
        let started = Instant::now();
        self.network.clear_gradients();
        if update.known {
            let objective = update.objective.on_policy(update.members.clone())?;
            let mut coefficients = Coefficients::new();
            for &place in &update.mine {
                coefficients.insert(place, objective.known(place, metrics)?);
            }
            self.backward(update, &coefficients, update.fresh, wire, metrics)?;
        } else {
            self.two_phases(update, wire, metrics)?;
        }
        metrics.add_seconds("gradient", started);
        let started = Instant::now();
        self.apply(wire, metrics)?;
        metrics.add_seconds("optimizer", started);
        Ok(())
    }

    /// Scores the answers, evaluates the objective, and runs the backward. A pass keeps its activations in between,
    /// unless the objective couples several passes or the update is deterministic: then a second forward follows.
    fn two_phases(
        &mut self,
        update: &Update<'_>,
        wire: &mut Wire<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let (batch, temperature) = (update.batch, self.settings.temperature);
        let live = update.live(metrics);
        let passes = batch.passes(&live, self.settings.micro_batch_tokens);
        let rounds = self.rounds(passes.len(), wire)?;
        let couples = update.objective.needs().sums;
        // Deterministic: otherwise whether a pass holds an answer that turns out to have no gradient would depend on
        // the number of passes.
        if couples && (rounds != 1 || self.settings.deterministic) {
            let mut scored = Vec::with_capacity(live.len());
            self.score(Source::Policy, batch, &live, wire, |place, logprobs| {
                if update.fresh {
                    metrics.compare(batch, place, logprobs);
                }
                scored.push(Scored { place, logprobs: logprobs.to_vec(), entropies: Vec::new() });
            })?;
            let asked = self.external.as_ref();
            let objective = update.objective.gathered(update.members.clone(), &scored, asked, wire, metrics)?;
            let coefficients = coefficients(&objective, &scored, metrics)?;
            self.compare_one(update, live.is_empty(), wire, metrics)?;
            return self.backward(update, &coefficients, false, wire, metrics);
        }
        let mut objective = match couples {
            true => None,
            false => Some(update.objective.gathered(update.members.clone(), &[], None, wire, metrics)?),
        };
        for round in 0..rounds {
            let flow = if round + 1 == rounds { Flow::Leave } else { Flow::Stay };
            let tensors = passes.get(round).map(|pass| PassTensors::new(batch, pass, self.network.device()));
            let (mut open, mut scored) = (None, Vec::new());
            match &tensors {
                Some(tensors) => {
                    let keep = self.memory.keep(Trained::Policy);
                    let (model, mut around) = self.network.forward(Source::Policy, wire);
                    let pass = tensors.open(model, keep, &mut around)?;
                    let scores = pass.score(model, temperature);
                    let of_span = |(place, range): (usize, Range<usize>)| Scored {
                        place,
                        logprobs: scores.logprobs[range.clone()].to_vec(),
                        entropies: scores.entropies[range].to_vec(),
                    };
                    scored = spans(tensors).map(of_span).collect();
                    if update.fresh {
                        compare_pass(batch, tensors, &scores, metrics);
                    }
                    open = Some(pass);
                }
                None => self.network.idle_forward(Source::Policy, wire)?,
            }
            let objective = match &mut objective {
                Some(objective) => objective,
                None => {
                    let (members, asked) = (update.members.clone(), self.external.as_ref());
                    objective.insert(update.objective.gathered(members, &scored, asked, wire, metrics)?)
                }
            };
            let coefficients = coefficients(objective, &scored, metrics)?;
            let coefficients = tensors.as_ref().map(|tensors| in_order(tensors, &coefficients)).unwrap_or_default();
            match (open, &tensors) {
                (Some(open), Some(tensors)) if coefficients.any() => {
                    let (model, gradients, mut around) = self.network.backward(flow, wire);
                    let scores = open.backward(model, &coefficients, temperature, gradients, &mut around)?;
                    around.finish()?;
                    self.count_trained(tensors, &scores, metrics);
                }
                _ => self.network.idle_backward(flow, wire)?,
            }
        }
        if rounds == 0 {
            self.network.idle_backward(Flow::Leave, wire)?;
        }
        self.compare_one(update, live.is_empty(), wire, metrics)
    }

    /// Accumulates the gradient of this rank's sequences, and skips those whose coefficients are all zero.
    fn backward(
        &mut self,
        update: &Update<'_>,
        coefficients: &Coefficients,
        compares: bool,
        wire: &mut Wire<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let (batch, temperature) = (update.batch, self.settings.temperature);
        let has_gradient = |place: &usize| coefficients.get(place).is_some_and(TokenCoefficients::any);
        let trained: Vec<usize> = update.mine.iter().copied().filter(has_gradient).collect();
        let passes = batch.passes(&trained, self.settings.micro_batch_tokens);
        let rounds = self.rounds(passes.len(), wire)?;
        for round in 0..rounds {
            let flow = if round + 1 == rounds { Flow::Leave } else { Flow::Stay };
            let Some(pass) = passes.get(round) else {
                self.network.idle_forward(Source::Policy, wire)?;
                self.network.idle_backward(flow, wire)?;
                continue;
            };
            let tensors = PassTensors::new(batch, pass, self.network.device());
            let keep = self.memory.keep(Trained::Policy);
            let (model, mut around) = self.network.forward(Source::Policy, wire);
            let open = tensors.open(model, keep, &mut around)?;
            let coefficients = in_order(&tensors, coefficients);
            let (model, gradients, mut around) = self.network.backward(flow, wire);
            let scores = open.backward(model, &coefficients, temperature, gradients, &mut around)?;
            around.finish()?;
            self.count_trained(&tensors, &scores, metrics);
            if compares {
                compare_pass(batch, &tensors, &scores, metrics);
            }
        }
        if rounds == 0 {
            self.network.idle_backward(Flow::Leave, wire)?;
        }
        if compares { self.compare_one(update, trained.is_empty(), wire, metrics) } else { Ok(()) }
    }

    fn count_trained(&self, tensors: &PassTensors, scores: &TokenScores, metrics: &mut StepMetrics) {
        let work = tensors.work();
        metrics.sums.trained_sequences += tensors.spans.len() as f64;
        // An answer's last token is trained on, but is no input.
        metrics.sums.trained_tokens += work.tokens + tensors.spans.len() as f64;
        metrics.sums.flops += self.flops.of(work);
        metrics.sums.scored_tokens += scores.entropies.len() as f64;
        metrics.sums.entropy += sum(&scores.entropies);
    }

    /// Scores one sequence if nothing else of the update was compared with the rollout engine, so that the mismatch
    /// metric never disappears while there are sequences of current weights.
    fn compare_one(
        &mut self,
        update: &Update<'_>,
        is_due: bool,
        wire: &mut Wire<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        if !update.fresh {
            return Ok(());
        }
        let current = || update.mine.iter().copied().find(|place| update.batch.is_current(*place));
        let one: Vec<usize> = is_due.then(current).flatten().into_iter().collect();
        self.score(Source::Policy, update.batch, &one, wire, |place, logprobs| {
            metrics.compare(update.batch, place, logprobs);
        })
    }

    /// Clips, checks and applies the gradient. Every rank computes the same norm, so all ranks decide alike.
    fn apply(&mut self, wire: &mut Wire<'_>, metrics: &mut StepMetrics) -> Result<(), TrainError> {
        let spec = &self.settings.optimizer;
        let norm = self.network.gradient_norm(wire)?;
        metrics.updates += 1;
        if !norm.is_finite() {
            metrics.skipped += 1;
            tracing::warn!(step = self.step + 1, "the gradient is not finite: this update is skipped");
            return Ok(());
        }
        let clip = spec.max_grad_norm > 0.0 && norm > spec.max_grad_norm;
        let grad_scale = if clip { spec.max_grad_norm / (norm + 1e-6) } else { 1.0 };
        metrics.clipped += u32::from(clip);
        metrics.grad_norms.push(norm);
        let rate = self.settings.rate(spec.learning_rate);
        metrics.learning_rate = rate.at(self.network.optimizer.total_updates + 1);
        self.network.apply(&UpdateStep { spec, learning_rate: metrics.learning_rate, grad_scale }, wire)
    }
}

pub(crate) fn keeping(settings: &TrainerSettings) -> Keeping {
    let decays_matrices_only = settings.optimizer.weight_decay_on == WeightDecayOn::Matrices;
    Keeping { division: settings.division, decays_matrices_only, exact_sums: settings.deterministic }
}

/// One optimizer update on one rank.
#[derive(Debug)]
pub(crate) struct Update<'a> {
    pub(crate) batch: &'a TrainBatch,
    objective: &'a StepObjective<'a>,
    /// Positions of the mini-batch's sequences.
    members: Range<usize>,
    /// This rank's sequences of the mini-batch, by place.
    pub(crate) mine: Vec<usize>,
    /// Whether no update has been made since the weights that the step started with.
    fresh: bool,
    /// Whether the coefficients are known before the forward, so that one pass suffices.
    known: bool,
}

impl Update<'_> {
    /// Selects this rank's sequences that may have a gradient, and reports the metrics of the others.
    fn live(&self, metrics: &mut StepMetrics) -> Vec<usize> {
        let (inert, live): (Vec<usize>, Vec<usize>) =
            self.mine.iter().partition(|place| self.objective.is_inert(**place));
        inert.iter().for_each(|place| self.objective.skip(*place, metrics));
        live
    }
}

/// Coefficients of the answer tokens of each sequence, by place.
type Coefficients = HashMap<usize, TokenCoefficients>;

fn coefficients(
    update: &UpdateObjective<'_>,
    scored: &[Scored],
    metrics: &mut StepMetrics,
) -> Result<Coefficients, ObjectiveError> {
    let of = |scored: &Scored| Ok((scored.place, update.coefficients(scored, metrics)?));
    scored.iter().map(of).collect()
}

/// Concatenates the coefficients of a pass in the order of its targets.
fn in_order(tensors: &PassTensors, coefficients: &Coefficients) -> TokenCoefficients {
    let mut all = TokenCoefficients::default();
    tensors.spans.iter().for_each(|(place, _)| all.append(&coefficients[place]));
    all
}

/// Yields each sequence's place with its range among the pass's answer tokens.
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
        metrics.compare(batch, place, &scores.logprobs[range]);
    }
}

/// Adds up the metrics of the ranks. `computed` is the time of this rank without waiting for others.
fn exchange_metrics(metrics: &mut StepMetrics, computed: Duration, wire: &mut Wire<'_>) -> Result<(), TrainError> {
    let mut mine = metrics.sums.to_vec();
    mine.extend([computed.as_secs_f64(), metrics.mismatch_max]);
    let ours = mine.len();
    mine.extend(metrics.objective.to_vec());
    metrics.sums = crate::metrics::Sums::default();
    metrics.objective = ObjectiveMetrics::default();
    for rank in wire.gather(mine)? {
        let (sums, objective) = rank.split_at(ours.min(rank.len()));
        metrics.objective.merge(&ObjectiveMetrics::from_slice(objective));
        let [sums @ .., computed, maximum] = sums else { continue };
        metrics.sums.add(sums);
        metrics.rank_seconds.push(*computed);
        metrics.mismatch_max = metrics.mismatch_max.max(*maximum);
    }
    Ok(())
}
