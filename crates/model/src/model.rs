// Legend: `T` tokens, `D` width, `N` query heads, `K` key and value heads, `H` head, `V` vocabulary.

use pacs_torch::tch::{Device, Kind, Tensor};

use crate::attention::Attention;
use crate::layout::{EMBEDDING, FINAL_NORM, layer_parameter};
use crate::parameters::slice;
use crate::rope::{Rope, Rotation};
use crate::{LeafSpec, ModelConfig, ParameterLayout, Parameters};

/// A causal language model over views of a flat parameter buffer.
///
/// Works on packed tokens without a batch dimension; which token sees which is the [`Attention`]'s business. An
/// in-place update of [`Parameters::flat`] is seen by the next forward.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    layout: ParameterLayout,
    flat: Tensor,
    requires_grad: bool,
    weights: Weights,
    rope: Rope,
}

/// One leaf of the autograd graph: a contiguous piece of the flat buffer.
#[derive(Debug)]
pub struct Leaf {
    /// First element in the flat buffer.
    pub offset: usize,
    /// Number of elements.
    pub numel: usize,
    /// The leaf variable; its `.grad()` is undefined until a backward has reached it.
    pub tensor: Tensor,
}

#[derive(Debug)]
struct Weights {
    leaves: Vec<Tensor>,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
}

#[derive(Debug)]
struct Layer {
    input_norm: Tensor,
    qkv: Tensor,
    qkv_bias: Option<Tensor>,
    qk_norm: Option<(Tensor, Tensor)>,
    o: Tensor,
    post_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
}

impl Model {
    /// A model over `parameters`, sharing their storage; with `requires_grad` its leaves collect gradients.
    #[must_use]
    pub fn new(config: &ModelConfig, parameters: &Parameters, requires_grad: bool) -> Self {
        let layout = parameters.layout.clone();
        let flat = parameters.flat.shallow_clone();
        let weights = Weights::new(config, &layout, &flat, requires_grad);
        let rope = Rope::new(config, flat.device());
        Self { config: config.clone(), layout, flat, requires_grad, weights, rope }
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

    /// The leaves by offset; every parameter lies in exactly one.
    #[must_use]
    pub fn leaves(&self) -> Vec<Leaf> {
        let leaf = |(spec, tensor): (&LeafSpec, &Tensor)| Leaf {
            offset: spec.offset,
            numel: spec.numel(),
            tensor: tensor.shallow_clone(),
        };
        self.layout.leaves().iter().zip(&self.weights.leaves).map(leaf).collect()
    }

    /// Forgets all gradients, by starting over with fresh leaves: the next backward stores its gradients instead of
    /// adding to zeros. Leaves handed out before keep the old gradients.
    pub fn zero_grad(&mut self) {
        self.weights = Weights::new(&self.config, &self.layout, &self.flat, self.requires_grad);
    }

    /// The matrix of the LM head, `[V, D]`: the embedding when tied.
    pub fn head_weight(&self) -> &Tensor {
        &self.weights.head
    }

    /// Hidden state after the final norm.
    ///
    /// `tokens` and `positions`: `[T]` int64. Returns `[T, D]` in the kind of the model.
    ///
    /// # Panics
    /// When libtorch refuses: a token outside the vocabulary, an attention made for other lengths, no memory.
    pub fn hidden(&self, tokens: &Tensor, positions: &Tensor, attention: &mut dyn Attention) -> Tensor {
        let rotation = self.rope.at(positions, self.kind());
        let mut x = Tensor::embedding(&self.weights.embedding, tokens, -1, false, false);
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let (q, k, v) = self.queries_keys_values(layer, &x, &rotation);
            let attended = attention.attend(index, q, k, v);
            let residual = x + attended.linear(&layer.o, None::<&Tensor>);
            x = &residual + self.feed_forward(layer, &residual);
        }
        self.norm(&x, &self.weights.norm)
    }

    /// Scores of every next token.
    ///
    /// `hidden`: `[M, D]`, rows of [`Model::hidden`]. Returns `[M, V]` in the kind of the model.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        hidden.linear(&self.weights.head, None::<&Tensor>)
    }

    /// Rotated queries `[T, N, H]`, rotated keys and values `[T, K, H]`.
    fn queries_keys_values(&self, layer: &Layer, x: &Tensor, rotation: &Rotation) -> (Tensor, Tensor, Tensor) {
        let (n, k, h) = (self.config.heads, self.config.kv_heads, self.config.head_dim);
        let tokens = x.size()[0];
        let normed = self.norm(x, &layer.input_norm);
        let qkv = normed.linear(&layer.qkv, layer.qkv_bias.as_ref()).view([tokens, n + 2 * k, h]);
        let Some((q_norm, k_norm)) = &layer.qk_norm else {
            let [qk, v] = split(&qkv, [n + k, k]);
            let [q, k] = split(&rotation.apply(&qk), [n, k]);
            return (q, k, v);
        };
        let [q, k, v] = split(&qkv, [n, k, k]);
        (rotation.apply(&self.norm(&q, q_norm)), rotation.apply(&self.norm(&k, k_norm)), v)
    }

    fn feed_forward(&self, layer: &Layer, x: &Tensor) -> Tensor {
        let gate_up = self.norm(x, &layer.post_norm).linear(&layer.gate_up, None::<&Tensor>);
        let [gate, up] = split(&gate_up, [self.config.ffn; 2]);
        (gate.silu() * up).linear(&layer.down, None::<&Tensor>)
    }

    /// Root-mean-square norm over the last dimension; libtorch computes its statistics in float32.
    fn norm(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x.rms_norm(weight.size(), Some(weight), self.config.rms_eps)
    }
}

impl Weights {
    fn new(config: &ModelConfig, layout: &ParameterLayout, flat: &Tensor, requires_grad: bool) -> Self {
        let leaf = |spec: &LeafSpec| slice(flat, spec.offset, &spec.shape).detach().set_requires_grad(requires_grad);
        let leaves: Vec<Tensor> = layout.leaves().iter().map(leaf).collect();
        let find = |name: &str| layout.leaf_of(name).map(|index| leaves[index].shallow_clone());
        let get = |name: &str| find(name).expect("the layout has every parameter of its configuration");
        let layer = |index: usize| {
            let get = |suffix: &str| get(&layer_parameter(index, suffix));
            let find = |suffix: &str| find(&layer_parameter(index, suffix));
            // A fused leaf is found by its first part.
            Layer {
                input_norm: get("input_layernorm.weight"),
                qkv: get("self_attn.q_proj.weight"),
                qkv_bias: find("self_attn.q_proj.bias"),
                qk_norm: find("self_attn.q_norm.weight").zip(find("self_attn.k_norm.weight")),
                o: get("self_attn.o_proj.weight"),
                post_norm: get("post_attention_layernorm.weight"),
                gate_up: get("mlp.gate_proj.weight"),
                down: get("mlp.down_proj.weight"),
            }
        };
        let layers = (0..config.layers).map(layer).collect();
        let (embedding, norm, head) = (get(EMBEDDING), get(FINAL_NORM), get(&layout.head().name));
        Self { leaves, embedding, layers, norm, head }
    }
}

/// Takes `x` apart along its second dimension; one operation, so that backward is one concatenation.
fn split<const PARTS: usize>(x: &Tensor, sizes: [i64; PARTS]) -> [Tensor; PARTS] {
    x.split_with_sizes(sizes, 1).try_into().expect("as many parts as sizes")
}
