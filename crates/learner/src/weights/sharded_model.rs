//! One rank's weights, gradients and optimizer state, whole or sharded, and the update of the weights.

use std::path::Path;

use pacs_algo::LearningRate;
use pacs_collective::Collective;
use pacs_model::{Model, ModelConfig, ModelError, Parameters, idle_backward, idle_forward};
use pacs_shape::{Division, ParameterLayout, Sharding, WINDOWS};
use pacs_spec::OptimizerSpec;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{bytes, exact_squares, exact_squares_to_f64, i64_ref, is_within_range, take_bound};
use pacs_weights::{Adapted, WeightKind};

use super::optimizer::{Clipped, Optimizer, UpdateStep, sum_of_squares};
use crate::comm::{
    CollectiveQueue, Exchange, Flow, GatheredBuckets, Pending, Segment, ShardHooks, Source, Windows, part, segments,
    zeros,
};
use crate::error::TrainError;
use crate::settings::LoraSettings;

/// How this rank stores the parameters of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Storage {
    pub(crate) division: Division,
    /// Weight decay skips norms and biases.
    pub(crate) decays_matrices_only: bool,
    /// Gradients are summed as integers, so that sums do not depend on their order.
    pub(crate) exact_sums: bool,
}

/// A model on one rank: weights, gradients and optimizer state.
#[derive(Debug)]
pub(crate) struct ShardedModel {
    /// With adapters, the configuration of these: they are the parameters here, and everything below is about them alone.
    pub(crate) config: ModelConfig,
    pub(crate) division: Division,
    /// Frozen weights that adapters adapt, whole on every rank; `None` without adapters.
    pub(crate) base: Option<Parameters>,
    /// What published adapters belong to; on the rank that publishes, where it was loaded from a folder.
    pub(crate) adapted: Option<Adapted>,
    /// Weights that the model computes with: all of them, or the windows that shards are gathered into.
    pub(crate) parameters: Parameters,
    /// This rank's weight shard; `None` where every rank holds all weights.
    pub(crate) shard: Option<Tensor>,
    pub(crate) optimizer: Optimizer,
    /// Frozen weights of the reference: all, or this rank's shard. `None` until they are first set.
    pub(crate) reference: Option<Tensor>,
    model: Model,
    /// Model over the reference; `None` where the reference is gathered into the windows.
    reference_model: Option<Model>,
    /// Gradients in the layout of `parameters`: float32, or int64 where sums are exact.
    gradients: Tensor,
    /// This rank's part of the reduced gradients; `None` where gradients are not sharded.
    gradient_shard: Option<Tensor>,
    /// Layout in which every bucket divides evenly among the ranks.
    divided: ParameterLayout,
    segments: Vec<Segment>,
    held: GatheredBuckets,
}

impl ShardedModel {
    /// Takes ownership of all parameters, in the layout of [`ParameterLayout::new`], and keeps this rank's part.
    pub(crate) fn new(config: ModelConfig, whole: Parameters, storage: Storage) -> Self {
        Self::over(config, None, whole, storage)
    }

    /// The same of adapters over the frozen weights `base`.
    pub(crate) fn adapted(config: ModelConfig, base: Parameters, adapters: Parameters, storage: Storage) -> Self {
        Self::over(config, Some(base), adapters, storage)
    }

    fn over(config: ModelConfig, base: Option<Parameters>, whole: Parameters, storage: Storage) -> Self {
        if storage.division.sharding == Sharding::Replicated {
            return Self::assemble(config, storage, base, whole, None);
        }
        let mut intake = Intake::new(&config, storage.division, whole.flat.kind(), whole.flat.device());
        for bucket in whole.layout.buckets() {
            intake.take(&whole.layout, bucket.offset, &part(&whole.flat, bucket.offset, bucket.numel));
        }
        drop(whole);
        Self::assemble(config, storage, base, intake.parameters, intake.shard)
    }

    /// Loads the weights of a Hugging Face folder and keeps this rank's part; with `lora`, all of them as the base of adapters.
    /// `config` is the folder's.
    ///
    /// # Errors
    /// Those of [`Parameters::load`] and [`Parameters::load_adapters`], and when the model cannot have the adapters.
    pub(crate) fn load(
        folder: &Path,
        config: ModelConfig,
        lora: Option<&LoraSettings>,
        storage: Storage,
        kind: Kind,
        device: Device,
    ) -> Result<Self, TrainError> {
        if let Some(lora) = lora {
            let adapted = config.with_lora(&lora.adapters).map_err(ModelError::from)?;
            let adapters = match &lora.path {
                Some(path) => Parameters::load_adapters(path, &adapted, kind, device)?,
                None => Parameters::fresh_adapters(&adapted, kind, device, lora.seed),
            };
            let base = Parameters::load(folder, &config, kind, device)?;
            let belongs = (storage.division.rank == 0).then(|| belongs_to(&adapted, &base)).transpose()?;
            let sharded = Self::adapted(adapted, base, adapters, storage);
            return Ok(Self { adapted: belongs, ..sharded });
        }
        if storage.division.sharding == Sharding::Replicated {
            let whole = Parameters::load(folder, &config, kind, device)?;
            return Ok(Self::assemble(config, storage, None, whole, None));
        }
        let mut intake = Intake::new(&config, storage.division, kind, device);
        let whole = ParameterLayout::new(&config);
        Parameters::read(folder, &config, |spec, tensor| {
            intake.take(&whole, spec.offset, &tensor.flatten(0, -1));
            Ok(())
        })?;
        Ok(Self::assemble(config, storage, None, intake.parameters, intake.shard))
    }

    fn assemble(
        config: ModelConfig,
        storage: Storage,
        base: Option<Parameters>,
        parameters: Parameters,
        shard: Option<Tensor>,
    ) -> Self {
        let Storage { division, exact_sums, .. } = storage;
        let divided = ParameterLayout::divided(&config, division.parts());
        let kind = parameters.flat.kind();
        let device = parameters.flat.device();
        let own = divided.total() / division.parts();
        let model = model(&config, base.as_ref(), &parameters);
        let mut sharded = Self {
            gradients: if exact_sums { model.zero_gradients().to_kind(Kind::Int64) } else { model.zero_gradients() },
            gradient_shard: shard.as_ref().map(|_| match exact_sums {
                true => Tensor::zeros([own as i64], (Kind::Int64, device)),
                false => zeros(own, device),
            }),
            segments: segments(&config, division, storage.decays_matrices_only),
            optimizer: Optimizer::new(own, kind, device),
            reference: None,
            reference_model: None,
            held: GatheredBuckets::default(),
            config,
            division,
            base,
            adapted: None,
            parameters,
            shard,
            model,
            divided,
        };
        sharded.weights_to_master();
        sharded
    }

    /// Device of the weights, gradients and optimizer state.
    pub(crate) fn device(&self) -> Device {
        self.parameters.flat.device()
    }

    /// Element type that the model computes in; master weights and moments are float32 in any case.
    pub(crate) fn compute_kind(&self) -> Kind {
        self.parameters.flat.kind()
    }

    /// Returns the model for a forward with the weights of `source`, and the hooks of its layers.
    pub(crate) fn forward<'a, 'w>(
        &'a mut self,
        source: Source,
        queue: &'a mut CollectiveQueue<'w>,
    ) -> (&'a Model, ShardHooks<'a, 'w>) {
        let (model, _, hooks) = self.hooks(source, None, queue);
        (model, hooks)
    }

    /// Returns the model for a backward of the policy, the buffer of its gradients, and the hooks of its layers.
    pub(crate) fn backward<'a, 'w>(
        &'a mut self,
        flow: Flow,
        queue: &'a mut CollectiveQueue<'w>,
    ) -> (&'a Model, &'a Tensor, ShardHooks<'a, 'w>) {
        if self.shard.is_some() {
            // Windows of layers are cleared when their turn comes, in the hooks.
            let buckets = self.parameters.layout.buckets();
            for bucket in [buckets[0], buckets[buckets.len() - 1]] {
                let _ = part(&self.gradients, bucket.offset, bucket.room).zero_();
            }
        }
        self.hooks(Source::Policy, Some(flow), queue)
    }

    fn hooks<'a, 'w>(
        &'a mut self,
        source: Source,
        flow: Option<Flow>,
        queue: &'a mut CollectiveQueue<'w>,
    ) -> (&'a Model, &'a Tensor, ShardHooks<'a, 'w>) {
        let weights = match source {
            Source::Policy => self.shard.as_ref(),
            Source::Reference => self.shard.as_ref().and(self.reference.as_ref()),
        };
        let windows = weights.map(|shard| Windows {
            source,
            shard,
            flat: &self.parameters.flat,
            gradient_shard: self.gradient_shard.as_ref(),
            held: &mut self.held,
        });
        let model = match source {
            Source::Policy => &self.model,
            Source::Reference => self.reference_model.as_ref().unwrap_or(&self.model),
        };
        let layout = &self.parameters.layout;
        let divided = &self.divided;
        let hooks =
            ShardHooks::new(self.division, layout, divided, windows, flow.map(|flow| (flow, &self.gradients)), queue);
        (model, &self.gradients, hooks)
    }

    /// Takes part in the exchanges of a forward in which this rank has nothing to compute.
    pub(crate) fn idle_forward(&mut self, source: Source, queue: &mut CollectiveQueue<'_>) -> Result<(), TrainError> {
        let buckets = self.divided.buckets().len();
        idle_forward(buckets, &mut self.forward(source, queue).1)
    }

    /// Takes part in the exchanges of a backward in which this rank has nothing to compute.
    pub(crate) fn idle_backward(&mut self, flow: Flow, queue: &mut CollectiveQueue<'_>) -> Result<(), TrainError> {
        let buckets = self.divided.buckets().len();
        let (_, _, mut hooks) = self.backward(flow, queue);
        idle_backward(buckets, &mut hooks)?;
        hooks.finish()
    }

    /// Zeroes the gradients before an update.
    pub(crate) fn clear_gradients(&mut self) {
        // The bound on exact sums is kept per thread, and may hold a leftover of another model or of
        // an abandoned update.
        let _ = take_bound();
        let _ = self.gradient_shard.as_mut().unwrap_or(&mut self.gradients).zero_();
    }

    /// Returns the Euclidean norm of the gradient, the same on every rank.
    fn gradient_norm(&self, queue: &mut CollectiveQueue<'_>) -> Result<f64, TrainError> {
        if self.gradients.kind() == Kind::Int64 {
            return self.exact_norm(queue);
        }
        let mut squares = 0.0;
        for segment in &self.segments {
            squares += sum_of_squares(&segment.of(self.gradient_shard.as_ref(), &self.gradients))?;
        }
        if self.division.parts() > 1 {
            squares = queue.gather(vec![squares])?.iter().flatten().sum();
        }
        Ok(squares.sqrt())
    }

    /// Returns the norm of exactly summed gradients: infinite if a gradient was not finite or its sum
    /// may have overflowed.
    fn exact_norm(&self, queue: &mut CollectiveQueue<'_>) -> Result<f64, TrainError> {
        let mut squares = 0u128;
        let bound = take_bound();
        for segment in &self.segments {
            let own = segment.of(self.gradient_shard.as_ref(), &self.gradients);
            squares = squares.saturating_add(exact_squares(i64_ref(&own)?));
        }
        // Numbers travel as float64, which holds integers of 53 bits; so they are split into limbs of 32 bits.
        let limb = |value: u128, place: u32| f64::from((value >> (32 * place)) as u32);
        let mine = (0..4).map(|place| limb(squares, place)).chain((0..2).map(|place| limb(bound.into(), place)));
        let whole = |limbs: &[f64]| limbs.iter().rev().fold(0u128, |value, limb| value << 32 | *limb as u128);
        let mut all_squares = 0u128;
        let mut all_bounds = 0u128;
        for (rank, numbers) in queue.gather(mine.collect())?.iter().enumerate() {
            let (squares, bound) = numbers.split_at(4.min(numbers.len()));
            all_bounds = all_bounds.saturating_add(whole(bound));
            // Every rank holds all of a replicated gradient, so it counts once.
            if rank == 0 || self.division.parts() > 1 {
                all_squares = all_squares.saturating_add(whole(squares));
            }
        }
        if !is_within_range(u64::try_from(all_bounds).unwrap_or(u64::MAX)) {
            return Ok(f64::INFINITY);
        }
        Ok(exact_squares_to_f64(all_squares).sqrt())
    }

    /// Clips the gradient and updates the weights. Every rank computes the same norm, so all ranks decide alike; `None` means that
    /// the norm is not finite and the update is skipped.
    pub(crate) fn clip_and_step(
        &mut self,
        spec: &OptimizerSpec,
        rate: &LearningRate,
        queue: &mut CollectiveQueue<'_>,
    ) -> Result<Option<Clipped>, TrainError> {
        let Some(clipped) = Clipped::new(self.gradient_norm(queue)?, spec) else { return Ok(None) };
        let learning_rate = rate.at(self.optimizer.total_updates + 1);
        self.apply(&UpdateStep { spec, learning_rate, grad_scale: clipped.scale }, queue)?;
        Ok(Some(clipped))
    }

    /// Updates this rank's part of the weights, and shares it with the other ranks where they hold whole weights.
    fn apply(&mut self, step: &UpdateStep<'_>, queue: &mut CollectiveQueue<'_>) -> Result<(), TrainError> {
        let Self { optimizer, segments, shard, parameters, gradients, gradient_shard, .. } = self;
        optimizer.update(step, segments, |segment| {
            let weights = segment.of(shard.as_ref(), &parameters.flat);
            (weights, segment.of(gradient_shard.as_ref(), gradients))
        })?;
        match self.division.sharding {
            Sharding::Replicated => Ok(()),
            Sharding::ShardOptimizer => self.exchange_weights(queue),
            Sharding::ShardAll => {
                self.held.forget(Source::Policy);
                Ok(())
            }
        }
    }

    /// All-gathers the updated weights, bucket by bucket.
    fn exchange_weights(&self, queue: &mut CollectiveQueue<'_>) -> Result<(), TrainError> {
        let gather = |buffer| queue.submit(Exchange::AllGather { buffer, part: None });
        let buckets = self.divided.buckets().iter().filter(|bucket| bucket.room > 0);
        let pending: Vec<Pending> =
            buckets.map(|bucket| gather(part(&self.parameters.flat, bucket.offset, bucket.room))).collect();
        pending.into_iter().try_for_each(|pending| queue.wait(pending).map(|_| ()))
    }

    /// Copies the current weights into the reference; with adapters only these, since the base does not change.
    pub(crate) fn set_reference(&mut self) {
        let flat = self.shard.as_ref().unwrap_or(&self.parameters.flat).copy();
        self.hold_reference(flat);
    }

    /// Takes ownership of the reference weights: all, or this rank's shard.
    pub(crate) fn hold_reference(&mut self, flat: Tensor) {
        self.held.forget(Source::Reference);
        if self.shard.is_none() {
            let layout = self.parameters.layout.clone();
            let parameters = Parameters { layout, flat: flat.shallow_clone() };
            self.reference_model = Some(model(&self.config, self.base.as_ref(), &parameters));
        }
        self.reference = Some(flat);
    }

    /// Initialises the master weights from the weights.
    fn weights_to_master(&mut self) {
        let Some(master) = &self.optimizer.master else { return };
        for segment in &self.segments {
            let weights = segment.of(self.shard.as_ref(), &self.parameters.flat);
            part(master, segment.shard, segment.len).copy_(&weights);
        }
    }

    /// The parameter segments that this rank updates.
    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Weights that this rank holds: all, or its shard.
    pub(crate) fn weights(&self) -> &Tensor {
        self.shard.as_ref().unwrap_or(&self.parameters.flat)
    }

    /// Cuts a buffer laid out like the optimizer's into this rank's segments.
    pub(crate) fn optimizer_parts(&self, buffer: &Tensor) -> Vec<Tensor> {
        self.segments.iter().map(|segment| part(buffer, segment.shard, segment.len)).collect()
    }

    /// Cuts a buffer laid out like [`ShardedModel::weights`] into this rank's segments.
    pub(crate) fn own_parts(&self, buffer: &Tensor) -> Vec<Tensor> {
        let shard = self.shard.as_ref().map(|_| buffer);
        self.segments.iter().map(|segment| segment.of(shard, buffer)).collect()
    }

    /// Cuts all of a buffer laid out like [`ShardedModel::weights`] into pieces, each with its place in the layout of
    /// the whole model.
    pub(crate) fn held_parts(&self, buffer: &Tensor) -> Vec<(usize, Tensor)> {
        if self.shard.is_some() {
            return self.segments.iter().map(|segment| segment.index).zip(self.own_parts(buffer)).collect();
        }
        let whole = ParameterLayout::new(&self.config);
        let buckets = self.divided.buckets().iter().zip(whole.buckets());
        buckets.map(|(here, there)| (there.offset, part(buffer, here.offset, here.numel))).collect()
    }

    /// Invalidates gathered weights after they were written from outside.
    pub(crate) fn weights_replaced(&mut self) {
        self.held.forget(Source::Policy);
    }

    /// Returns all weights in the layout of [`ParameterLayout::new`], or `None` unless `wanted`. Collective: every rank
    /// has to call it.
    ///
    /// Sharded weights are gathered into host memory; replicated ones share storage.
    pub(crate) fn whole(
        &mut self,
        collective: &mut dyn Collective,
        wanted: bool,
    ) -> Result<Option<Parameters>, TrainError> {
        if self.division.sharding == Sharding::Replicated {
            let Parameters { layout, flat } = &self.parameters;
            return Ok(wanted.then(|| Parameters { layout: layout.clone(), flat: flat.shallow_clone() }));
        }
        let layout = ParameterLayout::new(&self.config);
        let kind = self.parameters.flat.kind();
        let flat = wanted.then(|| Tensor::zeros([layout.total() as i64], (kind, Device::Cpu)));
        for (divided, bucket) in self.divided.buckets().iter().zip(layout.buckets()).filter(|(all, _)| all.room > 0) {
            let gathered = match &self.shard {
                None => part(&self.parameters.flat, divided.offset, divided.numel),
                Some(shard) => {
                    let length = divided.room / self.division.parts();
                    let mine = part(shard, divided.offset / self.division.parts(), length);
                    let room = Tensor::zeros([divided.room as i64], (kind, shard.device()));
                    Exchange::AllGather { buffer: room.shallow_clone(), part: Some(mine) }.make_now(collective)?;
                    part(&room, 0, divided.numel)
                }
            };
            if let Some(flat) = &flat {
                part(flat, bucket.offset, bucket.numel).copy_(&gathered);
            }
        }
        Ok(flat.map(|flat| Parameters { layout, flat }))
    }
}

/// The element type of published weights of a kind.
pub(crate) fn weight_kind(kind: Kind) -> WeightKind {
    if kind == Kind::Float { WeightKind::Float32 } else { WeightKind::Bfloat16 }
}

/// What adapters of `config` over `base` are published as; reads all of the base.
fn belongs_to(config: &ModelConfig, base: &Parameters) -> Result<Adapted, TrainError> {
    let on_host = base.flat.to_device(Device::Cpu);
    let settings = config.lora.as_ref().map(ToString::to_string).unwrap_or_default();
    Ok(Adapted::of(weight_kind(on_host.kind()), bytes(&on_host)?, settings))
}

/// The model over `parameters`: all weights, or adapters of `base`.
fn model(config: &ModelConfig, base: Option<&Parameters>, parameters: &Parameters) -> Model {
    match base {
        Some(base) => Model::adapted(config, base, parameters),
        None => Model::new(config, parameters),
    }
}

/// Buffers for a rank's part of the weights while they are loaded.
struct Intake {
    division: Division,
    divided: ParameterLayout,
    parameters: Parameters,
    shard: Option<Tensor>,
}

impl Intake {
    fn new(config: &ModelConfig, division: Division, kind: Kind, device: Device) -> Self {
        let divided = ParameterLayout::divided(config, division.parts());
        let zeros = |elements: usize| Tensor::zeros([elements as i64], (kind, device));
        let (layout, shard) = match division.sharding {
            Sharding::ShardAll => {
                let layout = ParameterLayout::windowed(config, division.parts(), WINDOWS);
                (layout, Some(zeros(divided.total() / division.parts())))
            }
            Sharding::Replicated | Sharding::ShardOptimizer => (divided.clone(), None),
        };
        let flat = zeros(layout.total());
        Self { division, divided, parameters: Parameters { layout, flat }, shard }
    }

    /// Copies this rank's part of `values`, which start at `offset` of the layout `whole` and lie within one
    /// bucket of it.
    fn take(&mut self, whole: &ParameterLayout, offset: usize, values: &Tensor) {
        let index = whole.buckets().partition_point(|bucket| bucket.offset <= offset) - 1;
        let start = offset - whole.buckets()[index].offset;
        let bucket = self.divided.buckets()[index];
        let len = values.numel();
        no_grad(|| match &self.shard {
            None => part(&self.parameters.flat, bucket.offset + start, len).copy_(values),
            Some(shard) => {
                let length = bucket.room / self.division.parts();
                let mine = self.division.part() * length;
                let from = start.max(mine);
                let to = (start + len).min(mine + length);
                if from < to {
                    let target = part(shard, bucket.offset / self.division.parts() + from - mine, to - from);
                    target.shallow_clone().copy_(&part(values, from - start, to - from));
                }
            }
        });
    }
}
