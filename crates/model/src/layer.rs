//! One transformer layer: forward, and backward by hand, which hands each gradient over as soon as it is known.
//!
//! The residual stream comes in as two parts whose sum is the input, so that the addition and the norm behind it are
//! one pass over memory.
// Legend: `T` tokens, `D` width, `F` feed-forward width, `N` query heads, `K` key and value heads, `H` head.

use pacs_torch::tch::{Kind, Tensor};

use crate::ModelConfig;
use crate::attention::{Attention, AttentionTrace, Packed};
use crate::model::Weight;
use crate::ops::{
    add_column_sums, add_rms_norm, add_weight_gradient, linear, matmul, rms_norm, rms_norm_backward, silu_gate,
    silu_gate_backward,
};
use crate::rope::Rotation;
use pacs_shape::layer_parameter;

/// The weights of a layer; fused leaves are found by their first part.
#[derive(Debug)]
pub(crate) struct Layer {
    index: usize,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    epsilon: f64,
    input_norm: Weight,
    qkv: Weight,
    qkv_bias: Option<Weight>,
    qk_norm: Option<(Weight, Weight)>,
    o: Weight,
    post_norm: Weight,
    gate_up: Weight,
    down: Weight,
}

/// The residual stream, `[T, D]`, and what is still to be added to it.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) residual: Tensor,
    pub(crate) pending: Option<Tensor>,
}

impl Stream {
    /// Adds what is pending.
    pub(crate) fn summed(self) -> Tensor {
        match self.pending {
            Some(pending) => self.residual + pending,
            None => self.residual,
        }
    }

    /// Adds what is pending; returns the sum and its norm.
    pub(crate) fn normed(self, weight: &Weight, epsilon: f64) -> (Tensor, Tensor) {
        match self.pending {
            Some(pending) => add_rms_norm(&self.residual, &pending, &weight.tensor, epsilon),
            None => {
                let normed = rms_norm(&self.residual, &weight.tensor, epsilon);
                (self.residual, normed)
            }
        }
    }
}

/// What a layer's backward needs of its forward; norms and the activation are cheap to compute again.
#[derive(Debug)]
pub(crate) struct Activations {
    /// Input of the layer, `[T, D]`.
    input: Tensor,
    /// Projections before the head norms, `[T, N + 2 K, H]`; only where heads are normed.
    projections: Option<Tensor>,
    attention: AttentionTrace,
    /// Residual stream behind the attention, `[T, D]`.
    middle: Tensor,
    /// `[T, 2 F]`.
    gate_up: Tensor,
}

impl Layer {
    pub(crate) fn new(config: &ModelConfig, index: usize, find: impl Fn(&str) -> Option<Weight>) -> Self {
        let find = |suffix: &str| find(&layer_parameter(index, suffix));
        let get = |suffix: &str| find(suffix).expect("the layout has every parameter of its configuration");
        Self {
            index,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            epsilon: config.rms_eps,
            input_norm: get("input_layernorm.weight"),
            qkv: get("self_attn.q_proj.weight"),
            qkv_bias: find("self_attn.q_proj.bias"),
            qk_norm: find("self_attn.q_norm.weight").zip(find("self_attn.k_norm.weight")),
            o: get("self_attn.o_proj.weight"),
            post_norm: get("post_attention_layernorm.weight"),
            gate_up: get("mlp.gate_proj.weight"),
            down: get("mlp.down_proj.weight"),
        }
    }

    /// The stream behind the layer; nothing is kept.
    pub(crate) fn forward(&self, stream: Stream, rotation: &Rotation, attention: &mut dyn Attention) -> Stream {
        let (input, normed) = stream.normed(&self.input_norm, self.epsilon);
        let projected = self.project(&normed);
        let norms = self.qk_norm.as_ref().map(|(q, k)| (&q.tensor, &k.tensor, self.epsilon));
        let attended = match attention.attend_projected(self.index, &projected, norms, rotation.parts()) {
            Some(attended) => attended,
            None => {
                let (q, k, v) = self.rotated(projected, rotation);
                attention.attend(self.index, q, k, v)
            }
        };
        let (middle, gate_up) = self.gates(&input, &attended);
        let pending = self.down.apply(&silu_gate(&gate_up));
        Stream { residual: middle, pending: Some(pending) }
    }

    /// The same, with what [`Layer::backward`] needs.
    pub(crate) fn forward_traced(&self, stream: Stream, rotation: &Rotation, packed: &Packed) -> (Stream, Activations) {
        let (input, normed) = stream.normed(&self.input_norm, self.epsilon);
        let projected = self.project(&normed);
        // Without head norms the rotation works in place, and nobody asks for the projections again.
        let projections = self.qk_norm.is_some().then(|| projected.shallow_clone());
        let attention = AttentionTrace::new(packed, self.rotated(projected, rotation));
        let (middle, gate_up) = self.gates(&input, &attention.output());
        let pending = self.down.apply(&silu_gate(&gate_up));
        let stream = Stream { residual: middle.shallow_clone(), pending: Some(pending) };
        (stream, Activations { input, projections, attention, middle, gate_up })
    }

    /// `[T, N + 2 K, H]`.
    fn project(&self, normed: &Tensor) -> Tensor {
        let bias = self.qkv_bias.as_ref().map(|bias| &bias.tensor);
        linear(normed, &self.qkv.tensor, bias).view([-1, self.heads + 2 * self.kv_heads, self.head_dim])
    }

    /// Rotated queries `[T, N, H]`, rotated keys and values `[T, K, H]`; takes the projections over.
    fn rotated(&self, projected: Tensor, rotation: &Rotation) -> (Tensor, Tensor, Tensor) {
        let (n, k) = (self.heads, self.kv_heads);
        let Some((q_norm, k_norm)) = &self.qk_norm else {
            let [qk, v] = split(&projected, [n + k, k]);
            let [q, k] = split(&rotation.apply(qk), [n, k]);
            return (q, k, v);
        };
        let [q, k, v] = split(&projected, [n, k, k]);
        let norm = |x: &Tensor, weight: &Weight| rotation.apply(rms_norm(x, &weight.tensor, self.epsilon));
        (norm(&q, q_norm), norm(&k, k_norm), v)
    }

    /// Residual stream behind the attention, and gates and ups of the feed-forward block.
    fn gates(&self, input: &Tensor, attended: &Tensor) -> (Tensor, Tensor) {
        let (middle, normed) = add_rms_norm(input, &self.o.apply(attended), &self.post_norm.tensor, self.epsilon);
        let gate_up = self.gate_up.apply(&normed);
        (middle, gate_up)
    }

    /// Gradient by the layer's input, from the `gradient` by its output, both `[T, D]`; adds the gradients of the
    /// weights to the flat buffer `gradients`.
    pub(crate) fn backward(
        &self,
        activations: Activations,
        gradient: &Tensor,
        rotation: &Rotation,
        gradients: &Tensor,
    ) -> Tensor {
        let Activations { input, projections, attention, middle, gate_up } = activations;
        let (by_gate_up, activation) = silu_gate_backward(gate_up, &self.down.backward_input(gradient));
        self.down.add(gradients, gradient, &activation);
        drop(activation);
        let normed = rms_norm(&middle, &self.post_norm.tensor, self.epsilon);
        self.gate_up.add(gradients, &by_gate_up, &normed);
        let by_normed = self.gate_up.backward_input(&by_gate_up);
        drop((by_gate_up, normed));
        let by_middle = self.norm_backward(&middle, &self.post_norm, &by_normed, Some(gradient), gradients);

        self.o.add(gradients, &by_middle, &attention.output());
        let by_attended = attention.backward(&self.o.backward_input(&by_middle));
        let by_projected = self.projections_backward(by_attended, projections, rotation, gradients);
        let normed = rms_norm(&input, &self.input_norm.tensor, self.epsilon);
        self.qkv.add(gradients, &by_projected, &normed);
        if let Some(bias) = &self.qkv_bias {
            add_column_sums(&mut bias.slot(gradients), &by_projected);
        }
        let by_normed = self.qkv.backward_input(&by_projected);
        self.norm_backward(&input, &self.input_norm, &by_normed, Some(&by_middle), gradients)
    }

    /// Gradient by the projections, `[T, (N + 2 K) H]`, from those by rotated queries, keys and by values.
    fn projections_backward(
        &self,
        [by_q, by_k, by_v]: [Tensor; 3],
        projections: Option<Tensor>,
        rotation: &Rotation,
        gradients: &Tensor,
    ) -> Tensor {
        let (n, k) = (self.heads, self.kv_heads);
        let (Some((q_norm, k_norm)), Some(projections)) = (&self.qk_norm, projections) else {
            let all = Tensor::cat(&[by_q, by_k, by_v], 1);
            let [by_qk, by_v] = split(&all, [n + k, k]);
            let turned = rotation.undo(by_qk);
            // In host memory the rotation worked in place, on a part of `all`.
            let all = if turned.data_ptr() == all.data_ptr() { all } else { Tensor::cat(&[turned, by_v], 1) };
            return all.flatten(1, 2);
        };
        let [q, k, _] = split(&projections, [n, k, k]);
        let norm = |x: &Tensor, weight: &Weight, by: Tensor| {
            let by = rotation.undo(by.contiguous());
            self.norm_backward(x, weight, &by, None, gradients)
        };
        Tensor::cat(&[norm(&q, q_norm, by_q), norm(&k, k_norm, by_k), by_v], 1).flatten(1, 2)
    }

    fn norm_backward(
        &self,
        x: &Tensor,
        weight: &Weight,
        gradient: &Tensor,
        past: Option<&Tensor>,
        gradients: &Tensor,
    ) -> Tensor {
        rms_norm_backward(x, &weight.tensor, self.epsilon, gradient, past, &mut weight.slot(gradients))
    }
}

impl Weight {
    /// `x W^T`.
    fn apply(&self, x: &Tensor) -> Tensor {
        linear(x, &self.tensor, None)
    }

    /// Gradient by the input of [`Weight::apply`].
    fn backward_input(&self, gradient: &Tensor) -> Tensor {
        matmul(gradient, &self.tensor)
    }

    /// Adds the gradient of a matrix: `gradient` by its output, `input` it was applied to.
    fn add(&self, gradients: &Tensor, gradient: &Tensor, input: &Tensor) {
        add_weight_gradient(&mut self.slot(gradients), gradient, input);
    }
}

/// Takes `x` apart along its second dimension.
fn split<const PARTS: usize>(x: &Tensor, sizes: [i64; PARTS]) -> [Tensor; PARTS] {
    x.split_with_sizes(sizes, 1).try_into().expect("as many parts as sizes")
}

/// Kind that gradients are summed in.
pub(crate) fn gradient_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}
