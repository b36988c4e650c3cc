// Legend: `T` tokens, `M` scored positions, `D` width, `V` vocabulary.

use std::rc::Rc;

use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{device_kernels, fixed_units, linear_float32, wide_linear};

use crate::attention::{Attention, Packed};
use crate::layer::{Activations, Layer, Stream, gradient_kind};
use crate::layer_hooks::{LayerHooks, NoHooks};
use crate::norm::Norm;
use crate::ops::{add_rows, capped};
use crate::parameters::slice;
use crate::rope::{Ropes, Rotation};
use crate::routing::{RecordedRoutes, Replay, Routing};
use crate::{ModelConfig, ParameterLayout, Parameters};
use pacs_shape::{EMBEDDING, FINAL_NORM};

/// A causal language model over views of a flat parameter buffer.
///
/// Works on packed tokens without a batch dimension; which token sees which is the [`Attention`]'s business. An
/// in-place update of [`Parameters::flat`] is seen by the next forward.
///
/// Its backward goes layer by layer and is written by hand: autograd is used at most within attention. So what is kept of a
/// layer's forward, and when its gradients are complete, is decided here and not by a graph.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    layout: ParameterLayout,
    flat: Tensor,
    embedding: Weight,
    /// Embeddings are multiplied by it.
    embedding_factor: f64,
    layers: Vec<Layer>,
    norm: Norm,
    head: Weight,
    ropes: Ropes,
}

/// A view of the parameters, and its place among those that are trained; none where it is frozen.
#[derive(Debug)]
pub(crate) struct Weight {
    pub(crate) tensor: Tensor,
    offset: Option<usize>,
}

impl Weight {
    pub(crate) fn new(tensor: Tensor, offset: Option<usize>) -> Self {
        Self { tensor, offset }
    }

    /// Where its gradient goes: a part of a flat buffer in the layout of the parameters. None where it is frozen.
    pub(crate) fn slot(&self, gradients: &Tensor) -> Option<Tensor> {
        self.offset.map(|offset| slice(gradients, offset, &self.tensor.size()))
    }

    /// The same, and a buffer of its own where it is frozen: for small weights, whose gradient comes with that of the input.
    pub(crate) fn slot_or_scratch(&self, gradients: &Tensor) -> Tensor {
        let scratch = || Tensor::zeros(self.tensor.size(), (gradients.kind(), gradients.device()));
        self.slot(gradients).unwrap_or_else(scratch)
    }
}

/// What is kept of the layers of a forward for its backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// The activations of every layer.
    All,
    /// The activations of the last so many layers; of the others only their input, from which the backward computes
    /// the layer again.
    Last(usize),
}

/// A forward that waits for its backward.
#[derive(Debug)]
pub struct Trace {
    tokens: Tensor,
    rotations: Vec<Rotation>,
    attention: Packed,
    /// Experts that layers are computed with once more; none where routers choose them.
    routes: Option<Rc<RecordedRoutes>>,
    layers: Vec<Kept>,
    /// Residual stream in front of the final norm, `[T, D]`.
    last: Tensor,
    hidden: Tensor,
}

impl Trace {
    /// Hidden state after the final norm, `[T, D]` in the kind of the model.
    pub fn hidden(&self) -> &Tensor {
        &self.hidden
    }
}

#[derive(Debug)]
enum Kept {
    Input(Tensor),
    Activations(Box<Activations>),
}

impl Model {
    /// A model over `parameters`, sharing their storage.
    ///
    /// Where layers take turns in one place ([`ParameterLayout::windowed`]), their weights must be brought there before
    /// each is used ([`LayerHooks`]).
    ///
    /// # Panics
    /// When `config` has adapters, whose model needs its base ([`Model::adapted`]).
    #[must_use]
    pub fn new(config: &ModelConfig, parameters: &Parameters) -> Self {
        assert!(config.lora.is_none(), "adapters need their base");
        Self::build(config, parameters, None)
    }

    /// A model of the frozen weights `base` with `adapters`, sharing the storage of both. Its parameters, and the gradients of its
    /// backward, are those of the adapters.
    ///
    /// `base`: in the layout of [`ModelConfig::base`], of the kind and on the device of the adapters; `adapters` of a value model hold
    /// its head, too, and `base` may be that of the policy.
    ///
    /// # Panics
    /// When `config` has no adapters, or kinds or devices differ.
    #[must_use]
    pub fn adapted(config: &ModelConfig, base: &Parameters, adapters: &Parameters) -> Self {
        assert!(config.lora.is_some(), "the configuration has no adapters");
        let place = |parameters: &Parameters| (parameters.flat.kind(), parameters.flat.device());
        assert_eq!(place(base), place(adapters), "kind and device of base and adapters");
        Self::build(config, adapters, Some(base))
    }

    fn build(config: &ModelConfig, parameters: &Parameters, base: Option<&Parameters>) -> Self {
        let layout = parameters.layout.clone();
        let flat = parameters.flat.shallow_clone();
        let view = |from: &Parameters, name: &str| {
            let leaf = &from.layout.leaves()[from.layout.leaf_of(name)?];
            Some((slice(&from.flat, leaf.offset, &leaf.shape), leaf.offset))
        };
        let find = |name: &str| {
            let trained = view(parameters, name).map(|(tensor, offset)| Weight::new(tensor, Some(offset)));
            let frozen = || view(base?, name).map(|(tensor, _)| Weight::new(tensor, None));
            trained.or_else(frozen)
        };
        let get = |name: &str| find(name).expect("the layout has every parameter of its configuration");
        // The head of a value model is trained with adapters, too.
        let of_head = base.filter(|_| !config.estimates_values).map_or(&layout, |base| &base.layout);
        let (embedding, head) = (get(EMBEDDING), get(&of_head.head().name));
        let norm = Norm::new(get(FINAL_NORM), config.rms_eps, config.architecture.norms_add_one);
        let layers = (0..config.layers).map(|index| Layer::new(config, index, find)).collect();
        let ropes = Ropes::new(config, flat.device());
        let embedding_factor = embedding_factor(config, flat.kind());
        Self { config: config.clone(), layout, flat, embedding, embedding_factor, layers, norm, head, ropes }
    }

    /// What the model was built from.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where each parameter lies.
    #[must_use]
    pub fn layout(&self) -> &ParameterLayout {
        &self.layout
    }

    /// Kind that the model computes in.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.flat.kind()
    }

    /// Device that the model computes on.
    #[must_use]
    pub fn device(&self) -> Device {
        self.flat.device()
    }

    /// A flat buffer of zeros for [`Model::backward`]: float32 (float64 for a float64 model), in the layout of the
    /// parameters. Within [`pacs_torch::with_units`] a backward takes int64 in its place, of which
    /// [`pacs_torch::exact_to_f32`] makes floats.
    pub fn zero_gradients(&self) -> Tensor {
        Tensor::zeros(self.flat.size(), (gradient_kind(self.kind()), self.device()))
    }

    /// The matrix of the LM head, `[V, D]`: the embedding when tied.
    pub fn head_weight(&self) -> &Tensor {
        &self.head.tensor
    }

    /// Where the gradient of [`Model::head_weight`] goes, in a flat buffer as [`Model::zero_gradients`] makes it; none where the head
    /// is frozen.
    pub(crate) fn head_slot(&self, gradients: &Tensor) -> Option<Tensor> {
        self.head.slot(gradients)
    }

    /// Hidden state after the final norm.
    ///
    /// `tokens` and `positions`: `[T]` int64. Returns `[T, D]` in the kind of the model.
    ///
    /// # Panics
    /// When libtorch refuses: a token outside the vocabulary, an attention made for other lengths, no memory.
    pub fn hidden(&self, tokens: &Tensor, positions: &Tensor, attention: &mut dyn Attention) -> Tensor {
        let Ok(hidden) = self.hidden_with_hooks(tokens, positions, attention, &mut Routing::Own, &mut NoHooks);
        hidden
    }

    /// [`Model::hidden`] with something to do before each bucket, and a say in who chooses experts.
    ///
    /// # Errors
    /// As `hooks`.
    ///
    /// # Panics
    /// As [`Model::hidden`], and when routes to be replayed are those of another number of tokens.
    pub fn hidden_with_hooks<S: LayerHooks>(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attention,
        routing: &mut Routing<'_>,
        hooks: &mut S,
    ) -> Result<Tensor, S::Error> {
        let rotations = self.ropes.at(positions);
        hooks.before_forward(0)?;
        let mut stream = self.embed(tokens);
        for (index, layer) in self.layers.iter().enumerate() {
            hooks.before_forward(1 + index)?;
            stream = layer.forward(stream, &rotations, attention, routing);
        }
        hooks.before_forward(1 + self.layers.len())?;
        Ok(stream.normed(&self.norm).1)
    }

    /// Scores of every next token.
    ///
    /// `hidden`: `[M, D]`, rows of [`Model::hidden`]. Returns `[M, V]` in the kind of the model; on a GPU, and for the kernels of
    /// one, in float32 instead of 16 bits. Learner and rollout multiply other numbers of rows at once and round differently,
    /// and logits in bfloat16 would turn that into log-probs that differ by several hundredths.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let is_narrow = matches!(self.kind(), Kind::BFloat16 | Kind::Half);
        let is_wide = device_kernels().is_some() || (is_narrow && matches!(self.device(), Device::Cuda(_)));
        let logits = match fixed_units() {
            Some(_) => wide_linear(hidden, &self.head.tensor),
            None if is_wide => linear_float32(hidden, &self.head.tensor),
            None => hidden.linear(&self.head.tensor, None::<&Tensor>),
        };
        match self.config.logit_cap {
            Some(cap) => capped(&logits, cap),
            None => logits,
        }
    }

    /// Derivative of each logit by what it was before the cap; none where there is no cap.
    pub(crate) fn cap_slope(&self, logits: &Tensor) -> Option<Tensor> {
        let cap = self.config.logit_cap?;
        let ratio = logits / cap;
        Some(1.0 - &ratio * &ratio)
    }

    /// A forward of packed rows that can be followed by a backward.
    ///
    /// `tokens` and `positions`: `[T]` int64, the rows that `attention` was made for.
    ///
    /// # Panics
    /// As [`Model::hidden`].
    #[must_use]
    pub fn forward(&self, tokens: &Tensor, positions: &Tensor, attention: Packed, keep: Keep) -> Trace {
        let routing = &mut Routing::Own;
        let Ok(trace) = self.forward_with_hooks(tokens, positions, attention, keep, routing, &mut NoHooks);
        trace
    }

    /// [`Model::forward`] with something to do before each bucket, and a say in who chooses experts. The backward computes
    /// layers again with the same experts.
    ///
    /// # Errors
    /// As `hooks`.
    ///
    /// # Panics
    /// As [`Model::hidden_with_hooks`].
    pub fn forward_with_hooks<S: LayerHooks>(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        mut attention: Packed,
        keep: Keep,
        routing: &mut Routing<'_>,
        hooks: &mut S,
    ) -> Result<Trace, S::Error> {
        let rotations = self.ropes.at(positions);
        hooks.before_forward(0)?;
        let mut stream = self.embed(tokens);
        let mut layers = Vec::with_capacity(self.layers.len());
        let recomputed = match keep {
            Keep::All => 0,
            Keep::Last(kept) => self.layers.len().saturating_sub(kept),
        };
        for (index, layer) in self.layers.iter().enumerate() {
            hooks.before_forward(1 + index)?;
            if index < recomputed {
                let input = stream.summed();
                layers.push(Kept::Input(input.shallow_clone()));
                let input = Stream { residual: input, pending: None };
                stream = layer.forward(input, &rotations, &mut attention, routing);
            } else {
                let (next, activations) = layer.forward_traced(stream, &rotations, &attention, routing);
                layers.push(Kept::Activations(Box::new(activations)));
                stream = next;
            }
        }
        hooks.before_forward(1 + self.layers.len())?;
        let (last, hidden) = stream.normed(&self.norm);
        let routes = routing.routes();
        Ok(Trace { tokens: tokens.shallow_clone(), rotations, attention, routes, layers, last, hidden })
    }

    /// Adds the gradients of all parameters but the LM head to `gradients`.
    ///
    /// `hidden_gradient`: `[T, D]`, by [`Trace::hidden`]; `gradients`: as [`Model::zero_gradients`] makes it. The
    /// head's own gradient comes from [`head_backward`](crate::logprob::head_backward), which goes first.
    pub fn backward(&self, trace: Trace, hidden_gradient: &Tensor, gradients: &Tensor) {
        let Ok(()) = self.backward_with_hooks(trace, hidden_gradient, gradients, &mut NoHooks);
    }

    /// [`Model::backward`] with something to do around each bucket.
    ///
    /// # Errors
    /// As `hooks`.
    pub fn backward_with_hooks<S: LayerHooks>(
        &self,
        trace: Trace,
        hidden_gradient: &Tensor,
        gradients: &Tensor,
        hooks: &mut S,
    ) -> Result<(), S::Error> {
        no_grad(|| {
            let Trace { tokens, rotations, attention, routes, layers, last, hidden } = trace;
            drop(hidden);
            let mut replay = routes.as_ref().map(Replay::again);
            let mut routing = Routing::replaying(replay.as_mut());
            let end = 1 + self.layers.len();
            hooks.before_backward(end)?;
            let mut gradient = self.norm.backward(&last, hidden_gradient, None, gradients);
            drop(last);
            hooks.after_backward(end)?;
            for ((index, layer), kept) in self.layers.iter().enumerate().zip(layers).rev() {
                hooks.before_backward(1 + index)?;
                let activations = match kept {
                    Kept::Activations(activations) => *activations,
                    Kept::Input(residual) => {
                        let stream = Stream { residual, pending: None };
                        layer.forward_traced(stream, &rotations, &attention, &mut routing).1
                    }
                };
                gradient = layer.backward(activations, &gradient, &rotations, gradients);
                hooks.after_backward(1 + index)?;
            }
            hooks.before_backward(0)?;
            if self.embedding_factor != 1.0 {
                gradient = &gradient * self.embedding_factor;
            }
            if let Some(mut slot) = self.embedding.slot(gradients) {
                add_rows(&mut slot, &tokens, &gradient);
            }
            hooks.after_backward(0)
        })
    }

    fn embed(&self, tokens: &Tensor) -> Stream {
        let mut residual = Tensor::embedding(&self.embedding.tensor, tokens, -1, false, false);
        if self.embedding_factor != 1.0 {
            residual = &residual * self.embedding_factor;
        }
        Stream { residual, pending: None }
    }
}

/// What embeddings are multiplied with, rounded to the kind of the model as in its first training.
fn embedding_factor(config: &ModelConfig, kind: Kind) -> f64 {
    if !config.architecture.scales_embedding {
        return 1.0;
    }
    Tensor::from((config.hidden as f64).sqrt()).to_kind(kind).double_value(&[])
}
