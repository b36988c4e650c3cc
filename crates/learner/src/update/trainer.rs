//! The training step: an exact update in two phases.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pacs_algo::{Objective, ObjectiveError, ObjectiveMetrics};
use pacs_collective::Collective;
use pacs_model::{ModelConfig, ModelError, Parameters, kernel_shape, load_kernels};
use pacs_shape::{Flops, RouteShape, Sharding};
use pacs_spec::{OldLogprobs, WeightDecayOn};
use pacs_torch::tch::{Device, Kind};
use pacs_torch::{DeviceKernels, with_device_kernels};
use pacs_weights::Probe;

use super::batch::TrainBatch;
use super::critic::Critic;
use super::external::External;
use super::metrics::{StepMetrics, Sums};
use super::mini_batch::Update;
use super::objective::{Scored, StepObjective, UpdateObjective};
use super::outcomes::outcomes;
use super::pass::{AnswerScores, PassTensors, TokenCoefficients, TokenScores, spans};
use super::signals::SampleSignal;
use crate::comm::{CollectiveQueue, Flow, Source};
use crate::error::TrainError;
use crate::settings::TrainerSettings;
use crate::weights::{MemoryPlan, ShardedModel, Storage, Trained};

/// Outcome of a training step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Metrics by name. Except for times they are the same on every rank.
    pub metrics: BTreeMap<String, f64>,
    /// Number of optimizer updates skipped because the gradient was not finite.
    pub skipped_updates: u32,
    /// What the updates made of this rank's answers, in the order of the index. Empty in a step that trains a value
    /// model alone.
    pub signals: Vec<SampleSignal>,
    /// Scores of one sequence before and after the step, the same on every rank; `None` unless [`TrainerSettings::probe`] is set.
    pub probe: Option<Probe>,
}

/// One rank of training: weights, moments and gradient, whole or sharded.
#[derive(Debug)]
pub struct Trainer {
    pub(crate) settings: TrainerSettings,
    memory: MemoryPlan,
    pub(crate) policy: ShardedModel,
    /// Value model; `None` for objectives without one.
    pub(crate) critic: Option<Critic>,
    /// Program of an external objective; only on rank 0, which asks it.
    external: Option<Mutex<External>>,
    flops: Flops,
    /// How the batches' routes are laid out, which all passes of the policy replay; `None` where routers choose experts.
    routes: Option<RouteShape>,
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
        let before = MemoryPlan::used(device);
        let config = ModelConfig::read(folder).map_err(ModelError::from)?.for_sequences(settings.longest_sequence);
        let policy = ShardedModel::load(folder, config, settings.lora.as_ref(), storage(&settings), kind, device)?;
        Ok(Self::assemble(policy, settings, before))
    }

    /// Creates a trainer at step 0 from parameters in memory, in the layout of [`pacs_model::ParameterLayout::new`].
    ///
    /// # Panics
    /// When the settings have adapters ([`Trainer::adapted`]).
    #[must_use]
    pub fn new(config: ModelConfig, parameters: Parameters, settings: TrainerSettings) -> Self {
        assert!(settings.lora.is_none(), "the settings have adapters");
        let bytes = (parameters.flat.numel() * parameters.flat.kind().elt_size_in_bytes()) as u64;
        let before = MemoryPlan::used(parameters.flat.device()).saturating_sub(bytes);
        let policy = ShardedModel::new(config, parameters, storage(&settings));
        Self::assemble(policy, settings, before)
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
        let before = MemoryPlan::used(base.flat.device()).saturating_sub(bytes);
        let adapted = config.with_lora(&lora.adapters).map_err(ModelError::from)?;
        let adapters = Parameters::fresh_adapters(&adapted, base.flat.kind(), base.flat.device(), lora.seed);
        let policy = ShardedModel::adapted(adapted, base, adapters, storage(&settings));
        Ok(Self::assemble(policy, settings, before))
    }

    fn assemble(policy: ShardedModel, settings: TrainerSettings, before: u64) -> Self {
        let seed = settings.lora.as_ref().map_or(0, |lora| lora.seed);
        let critic = settings.objective.needs().values.then(|| Critic::new(&policy, storage(&settings), seed));
        let asks = settings.objective == Objective::External && settings.division.rank == 0;
        let program = settings.external.clone().filter(|_| asks);
        let external = program.map(|program| Mutex::new(External::new(program)));
        let flops = Flops::new(&policy.config, policy.config.vocab_size);
        let routes = if settings.router_replay { RouteShape::of(&policy.config) } else { None };
        let kernels = load_kernels(&policy.config, policy.compute_kind(), policy.device()).unwrap_or_else(|error| {
            tracing::warn!("training is slow, without kernels of the GPU: {error}");
            None
        });
        let memory = MemoryPlan::new(&policy, &settings, before, kernels.is_some());
        Self { settings, memory, policy, critic, external, flops, routes, kernels, step: 0 }
    }

    /// Replaces the kernels. On a GPU the trainer loads its own; this is for emulated kernels on a machine without one.
    ///
    /// # Panics
    /// When the kernels were compiled for another model.
    pub fn use_device_kernels(&mut self, kernels: Arc<DeviceKernels>) {
        assert_eq!(
            kernels.shape(),
            kernel_shape(&self.policy.config, self.policy.compute_kind()),
            "kernels of another model"
        );
        self.kernels = Some(kernels);
    }

    /// Returns the frozen weights that adapters adapt, and the configuration of these; `None` when all weights are trained.
    #[must_use]
    pub fn base(&self) -> Option<(&ModelConfig, &Parameters)> {
        self.policy.base.as_ref().map(|base| (&self.policy.config, base))
    }

    /// Returns all weights that are trained (with adapters these alone), or `None` unless `wanted`. Collective: every rank has to
    /// call it.
    ///
    /// Replicated weights share storage with the trainer; sharded weights are gathered into host memory.
    ///
    /// # Errors
    /// When a peer was lost.
    pub fn weights(&mut self, collective: &mut dyn Collective, wanted: bool) -> Result<Option<Parameters>, TrainError> {
        self.policy.whole(collective, wanted)
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
        if let Some(shape) = &self.routes {
            batch.check_routes(shape)?;
        }
        let started = Instant::now();
        let ranks = collective.world_size() as f64;
        let mut metrics = StepMetrics {
            outcomes: outcomes(&batch.index),
            peak_flops: self.settings.peak_flops.map(|peak| peak * ranks),
            ..StepMetrics::default()
        };
        let (probe, traffic) = std::thread::scope(|scope| {
            let mut queue = CollectiveQueue::start(scope, collective);
            let train =
                |trainer: &mut Self, queue: &mut CollectiveQueue<'_>| trainer.train_over(batch, queue, &mut metrics);
            let probe = self.probed(batch, &mut queue, train);
            let traffic = queue.close();
            probe.map(|probe| (probe, traffic))
        })?;
        metrics.traffic = traffic;
        self.step = batch.step;
        metrics.step_seconds = started.elapsed().as_secs_f64();
        let mut named = metrics.named();
        self.memory.report(self.policy.device(), &mut named);
        let signals = metrics.signals.into_list(batch);
        Ok(StepReport { metrics: named, skipped_updates: metrics.skipped, signals, probe })
    }

    fn train_over(
        &mut self,
        batch: &TrainBatch,
        queue: &mut CollectiveQueue<'_>,
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
        self.score_before_updates(batch, starts_on_policy, &mut objective, queue, metrics)?;
        objective.settle(queue)?;
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
            self.update(&update, queue, metrics)?;
        }
        let computed = began.elapsed().saturating_sub(queue.waited());
        exchange_metrics(metrics, computed, queue)
    }

    /// Copies the current policy into the reference if a reset is due before step `step`. Returns whether it was due.
    fn reset_reference(&mut self, step: u64) -> bool {
        let needs = self.settings.objective.needs();
        let due = match self.settings.reference_reset_steps {
            0 => self.policy.reference.is_none(),
            steps => (step - 1).is_multiple_of(steps),
        };
        if due && (needs.reference || self.settings.reference_reset_steps > 1) {
            self.policy.set_reference();
        }
        if due && self.settings.reset_optimizer && self.step > 0 {
            self.policy.optimizer.reset();
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
        queue: &mut CollectiveQueue<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let needs = objective.needs();
        let started = Instant::now();
        let places = 0..batch.sequences.len();
        // A step that trains only the value model needs old log-probs only if its advantages read them.
        let compares = needs.old && (objective.trains_policy() || needs.summaries_read_old);
        if compares && self.settings.old_logprobs == OldLogprobs::Learner {
            let first = |place: usize| batch.index[batch.sequences[place].position].mini_batch == 0;
            let own_forward = |place: usize| starts_on_policy && first(place) && !needs.summaries_read_old;
            // Answers without an advantage are not known before the summaries are gathered.
            let inert = |place: usize| !needs.summaries && objective.is_inert(place);
            let needed: Vec<usize> = places.clone().filter(|place| !own_forward(*place) && !inert(*place)).collect();
            let held = !starts_on_policy && self.policy.reference.is_some();
            let old = if held { Source::Reference } else { Source::Policy };
            self.score(old, batch, &needed, queue, |place, scores| {
                objective.set_old(place, scores.logprobs);
                if starts_on_policy && !first(place) {
                    metrics.compare(batch, place, scores);
                }
            })?;
        }
        if needs.reference && self.policy.reference.is_some() {
            let needed: Vec<usize> = places.collect();
            self.score(Source::Reference, batch, &needed, queue, |place, scores| {
                objective.set_reference(place, scores.logprobs);
            })?;
        }
        metrics.add_seconds("old_logprobs", started);
        if let Some(critic) = &mut self.critic {
            let started = Instant::now();
            let tokens = self.settings.micro_batch_tokens;
            critic.values(batch, tokens, queue, |place, values| objective.set_values(place, values))?;
            metrics.add_seconds("values", started);
        }
        Ok(())
    }

    /// Calls `note` with the scores of each answer at `places` under the weights of `source`, at the temperature of sampling.
    fn score(
        &mut self,
        source: Source,
        batch: &TrainBatch,
        places: &[usize],
        queue: &mut CollectiveQueue<'_>,
        note: impl FnMut(usize, AnswerScores<'_>),
    ) -> Result<(), TrainError> {
        self.score_at(self.settings.temperature, source, batch, places, queue, note)
    }

    /// As [`Self::score`], at another temperature.
    pub(super) fn score_at(
        &mut self,
        temperature: f64,
        source: Source,
        batch: &TrainBatch,
        places: &[usize],
        queue: &mut CollectiveQueue<'_>,
        mut note: impl FnMut(usize, AnswerScores<'_>),
    ) -> Result<(), TrainError> {
        let passes = batch.passes(places, self.settings.micro_batch_tokens);
        for round in 0..self.rounds(passes.len(), queue)? {
            let Some(pass) = passes.get(round) else {
                self.policy.idle_forward(source, queue)?;
                continue;
            };
            let tensors = PassTensors::new(batch, pass, self.policy.device(), self.routes);
            let (model, mut hooks) = self.policy.forward(source, queue);
            let scores = tensors.score(model, temperature, &mut hooks)?;
            for (place, range) in spans(&tensors) {
                note(place, scores.of(range));
            }
        }
        Ok(())
    }

    /// Number of passes of all ranks. Where weights are sharded, every rank takes part in each pass, since its
    /// shard is gathered.
    fn rounds(&self, passes: usize, queue: &mut CollectiveQueue<'_>) -> Result<usize, TrainError> {
        if self.policy.division.sharding != Sharding::ShardAll {
            return Ok(passes);
        }
        let most = queue.gather(vec![passes as f64])?.into_iter().flatten().fold(0.0, f64::max);
        Ok(most as usize)
    }

    fn update(
        &mut self,
        update: &Update<'_>,
        queue: &mut CollectiveQueue<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        if let Some(critic) = &mut self.critic {
            let started = Instant::now();
            let objective = update.objective.on_policy(update.members.clone())?;
            let settings = &self.settings;
            let memory = &mut self.memory;
            critic.update(update, &objective, settings, memory, queue, metrics)?;
            metrics.add_seconds("value_update", started);
        }
        if !update.objective.trains_policy() {
            return self.compare_one(update, true, queue, metrics);
        }
        let started = Instant::now();
        self.policy.clear_gradients();
        if update.known {
            let objective = update.objective.on_policy(update.members.clone())?;
            let mut coefficients = Coefficients::new();
            for &place in &update.mine {
                coefficients.insert(place, objective.known(place, metrics)?);
            }
            self.backward(update, &coefficients, update.fresh, queue, metrics)?;
        } else {
            self.two_phases(update, queue, metrics)?;
        }
        metrics.add_seconds("gradient", started);
        let started = Instant::now();
        self.apply(queue, metrics)?;
        metrics.add_seconds("optimizer", started);
        Ok(())
    }

    /// Scores the answers, evaluates the objective, and runs the backward. A pass keeps its activations in between,
    /// unless the objective couples several passes or the update is deterministic: then a second forward follows.
    fn two_phases(
        &mut self,
        update: &Update<'_>,
        queue: &mut CollectiveQueue<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let batch = update.batch;
        let temperature = self.settings.temperature;
        let live = update.live(metrics);
        let passes = batch.passes(&live, self.settings.micro_batch_tokens);
        let rounds = self.rounds(passes.len(), queue)?;
        let couples = update.objective.needs().sums;
        // Deterministic: otherwise whether a pass holds an answer that turns out to have no gradient would depend on
        // the number of passes.
        if couples && (rounds != 1 || self.settings.deterministic) {
            let mut scored = Vec::with_capacity(live.len());
            self.score(Source::Policy, batch, &live, queue, |place, scores| {
                if update.fresh {
                    metrics.compare(batch, place, scores);
                }
                scored.push(Scored { place, logprobs: scores.logprobs.to_vec(), entropies: Vec::new() });
            })?;
            let asked = self.external.as_ref();
            let objective = update.objective.gathered(update.members.clone(), &scored, asked, queue, metrics)?;
            let coefficients = coefficients(&objective, &scored, metrics)?;
            self.compare_one(update, live.is_empty(), queue, metrics)?;
            return self.backward(update, &coefficients, false, queue, metrics);
        }
        let mut objective = match couples {
            true => None,
            false => Some(update.objective.gathered(update.members.clone(), &[], None, queue, metrics)?),
        };
        for round in 0..rounds {
            let flow = if round + 1 == rounds { Flow::Reduce } else { Flow::Accumulate };
            let packed = |pass| PassTensors::new(batch, pass, self.policy.device(), self.routes);
            let tensors = passes.get(round).map(packed);
            let mut open = None;
            let mut scored = Vec::new();
            match &tensors {
                Some(tensors) => {
                    let keep = self.memory.keep(Trained::Policy);
                    let (model, mut hooks) = self.policy.forward(Source::Policy, queue);
                    let pass = tensors.open(model, keep, &mut hooks)?;
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
                None => self.policy.idle_forward(Source::Policy, queue)?,
            }
            let objective = match &mut objective {
                Some(objective) => objective,
                None => {
                    let members = update.members.clone();
                    let asked = self.external.as_ref();
                    objective.insert(update.objective.gathered(members, &scored, asked, queue, metrics)?)
                }
            };
            let coefficients = coefficients(objective, &scored, metrics)?;
            let coefficients = tensors.as_ref().map(|tensors| in_order(tensors, &coefficients)).unwrap_or_default();
            match (open, &tensors) {
                (Some(open), Some(tensors)) if coefficients.any() => {
                    let (model, gradients, mut hooks) = self.policy.backward(flow, queue);
                    let scores = open.backward(model, &coefficients, temperature, gradients, &mut hooks)?;
                    hooks.finish()?;
                    self.count_trained(tensors, &scores, metrics);
                }
                _ => self.policy.idle_backward(flow, queue)?,
            }
        }
        if rounds == 0 {
            self.policy.idle_backward(Flow::Reduce, queue)?;
        }
        self.compare_one(update, live.is_empty(), queue, metrics)
    }

    /// Accumulates the gradient of this rank's sequences, and skips those whose coefficients are all zero.
    fn backward(
        &mut self,
        update: &Update<'_>,
        coefficients: &Coefficients,
        compares: bool,
        queue: &mut CollectiveQueue<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        let batch = update.batch;
        let temperature = self.settings.temperature;
        let has_gradient = |place: &usize| coefficients.get(place).is_some_and(TokenCoefficients::any);
        let trained: Vec<usize> = update.mine.iter().copied().filter(has_gradient).collect();
        let passes = batch.passes(&trained, self.settings.micro_batch_tokens);
        let rounds = self.rounds(passes.len(), queue)?;
        for round in 0..rounds {
            let flow = if round + 1 == rounds { Flow::Reduce } else { Flow::Accumulate };
            let Some(pass) = passes.get(round) else {
                self.policy.idle_forward(Source::Policy, queue)?;
                self.policy.idle_backward(flow, queue)?;
                continue;
            };
            let tensors = PassTensors::new(batch, pass, self.policy.device(), self.routes);
            let keep = self.memory.keep(Trained::Policy);
            let (model, mut hooks) = self.policy.forward(Source::Policy, queue);
            let open = tensors.open(model, keep, &mut hooks)?;
            let coefficients = in_order(&tensors, coefficients);
            let (model, gradients, mut hooks) = self.policy.backward(flow, queue);
            let scores = open.backward(model, &coefficients, temperature, gradients, &mut hooks)?;
            hooks.finish()?;
            self.count_trained(&tensors, &scores, metrics);
            if compares {
                compare_pass(batch, &tensors, &scores, metrics);
            }
        }
        if rounds == 0 {
            self.policy.idle_backward(Flow::Reduce, queue)?;
        }
        if compares { self.compare_one(update, trained.is_empty(), queue, metrics) } else { Ok(()) }
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
        queue: &mut CollectiveQueue<'_>,
        metrics: &mut StepMetrics,
    ) -> Result<(), TrainError> {
        if !update.fresh {
            return Ok(());
        }
        let current = || update.mine.iter().copied().find(|place| update.batch.is_current(*place));
        let one: Vec<usize> = is_due.then(current).flatten().into_iter().collect();
        self.score(Source::Policy, update.batch, &one, queue, |place, scores| {
            metrics.compare(update.batch, place, scores);
        })
    }

    /// Clips, checks and applies the gradient.
    fn apply(&mut self, queue: &mut CollectiveQueue<'_>, metrics: &mut StepMetrics) -> Result<(), TrainError> {
        let spec = &self.settings.optimizer;
        let rate = self.settings.rate(spec.learning_rate);
        let learning_rate = rate.at(self.policy.optimizer.total_updates + 1);
        metrics.updates += 1;
        let Some(clipped) = self.policy.clip_and_step(spec, &rate, queue)? else {
            metrics.skipped += 1;
            tracing::warn!(step = self.step + 1, "the gradient is not finite: this update is skipped");
            return Ok(());
        };
        metrics.clipped += u32::from(clipped.is_scaled());
        metrics.grad_norms.push(clipped.norm);
        metrics.learning_rate = learning_rate;
        Ok(())
    }
}

fn storage(settings: &TrainerSettings) -> Storage {
    let decays_matrices_only = settings.optimizer.weight_decay_on == WeightDecayOn::Matrices;
    Storage { division: settings.division, decays_matrices_only, exact_sums: settings.deterministic }
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

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum()
}

fn compare_pass(batch: &TrainBatch, tensors: &PassTensors, scores: &TokenScores, metrics: &mut StepMetrics) {
    for (place, range) in spans(tensors) {
        metrics.compare(batch, place, scores.of(range));
    }
}

/// Adds up the metrics of the ranks. `computed` is the time of this rank without waiting for others.
fn exchange_metrics(
    metrics: &mut StepMetrics,
    computed: Duration,
    queue: &mut CollectiveQueue<'_>,
) -> Result<(), TrainError> {
    let mut mine = metrics.sums.to_vec();
    mine.extend([computed.as_secs_f64(), metrics.mismatch_max]);
    let ours = mine.len();
    mine.extend(metrics.objective.to_vec());
    metrics.sums = Sums::default();
    metrics.objective = ObjectiveMetrics::default();
    for rank in queue.gather(mine)? {
        let (sums, objective) = rank.split_at(ours.min(rank.len()));
        metrics.objective.merge(&ObjectiveMetrics::from_slice(objective));
        let [sums @ .., computed, maximum] = sums else { continue };
        metrics.sums.add(sums);
        metrics.rank_seconds.push(*computed);
        metrics.mismatch_max = metrics.mismatch_max.max(*maximum);
    }
    Ok(())
}
