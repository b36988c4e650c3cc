//! One transformer layer: forward, and backward by hand, which hands each gradient over as soon as it is known.
//!
//! What families differ in is in [`Architecture`]: where there are norms, how heads are normed, which activation. The residual
//! stream comes in as two parts whose sum is the input, so that the addition and the norm after it are one pass over memory.
// Legend: `T` tokens, `D` width, `N` query heads, `K` key and value heads, `H` head.

use pacs_shape::{Architecture, HeadNorms, LinearModule, layer_parameter};
use pacs_torch::tch::{Kind, Tensor};

use crate::ModelConfig;
use crate::attention::{Attention, AttentionTrace, Packed};
use crate::feed_forward::{FeedForward, FeedForwardTrace};
use crate::linear::Linear;
use crate::model::Weight;
use crate::norm::Norm;
use crate::ops::add_column_sums;
use crate::rope::Rotation;
use crate::routing::Routing;

/// The weights of a layer; fused leaves are found by their first part.
#[derive(Debug)]
pub(crate) struct Layer {
    index: usize,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
    norms: Norms,
    qkv: Linear,
    qkv_bias: Option<Weight>,
    head_norms: Option<HeadNormWeights>,
    /// Which of the rotations of a pass is the layer's.
    rotation: usize,
    rotates_partly: bool,
    /// Queries are multiplied by it.
    query_factor: f64,
    o: Linear,
    feed_forward: FeedForward,
}

/// The norms of a layer; none where its family has none.
#[derive(Debug)]
struct Norms {
    before_attention: Option<Norm>,
    after_attention: Option<Norm>,
    before_ffn: Option<Norm>,
    after_ffn: Option<Norm>,
}

/// Norms of queries and keys.
#[derive(Debug)]
struct HeadNormWeights {
    queries: Norm,
    keys: Norm,
    /// All heads are normed together.
    together: bool,
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
    pub(crate) fn normed(self, norm: &Norm) -> (Tensor, Tensor) {
        match self.pending {
            Some(pending) => norm.apply_to_sum(&self.residual, &pending),
            None => {
                let normed = norm.apply(&self.residual);
                (self.residual, normed)
            }
        }
    }

    /// The same where there may be no norm.
    fn maybe_normed(self, norm: Option<&Norm>) -> (Tensor, Tensor) {
        match norm {
            Some(norm) => self.normed(norm),
            None => {
                let sum = self.summed();
                (sum.shallow_clone(), sum)
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
    /// Output of attention before its norm, `[T, D]`; only where there is such a norm.
    attention_output: Option<Tensor>,
    /// Residual stream after the attention, `[T, D]`.
    middle: Tensor,
    feed_forward: FeedForwardTrace,
    /// Output of the feed-forward block before its norm, `[T, D]`; only where there is such a norm.
    ffn_output: Option<Tensor>,
}

impl Layer {
    pub(crate) fn new(config: &ModelConfig, index: usize, find: impl Fn(&str) -> Option<Weight>) -> Self {
        let architecture = config.architecture;
        let find = &|suffix: &str| find(&layer_parameter(index, suffix));
        let get = |suffix: &str| find(suffix).expect("the layout has every parameter of its configuration");
        let norm = |name: &str| Norm::new(get(name), config.rms_eps, architecture.norms_add_one);
        let head_norms = |together| HeadNormWeights {
            queries: norm("self_attn.q_norm.weight"),
            keys: norm("self_attn.k_norm.weight"),
            together,
        };
        let Architecture { norms, .. } = architecture;
        let [qkv, o, gate_up, down] = config.linear_modules();
        let linear = |modules: &[LinearModule]| Linear::new(modules, config.lora.as_ref(), find);
        Self {
            index,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            norms: Norms {
                before_attention: norms.before_attention.map(norm),
                after_attention: norms.after_attention.map(norm),
                before_ffn: norms.before_ffn.map(norm),
                after_ffn: norms.after_ffn.map(norm),
            },
            qkv: linear(&qkv),
            qkv_bias: find("self_attn.q_proj.bias"),
            head_norms: match architecture.head_norms {
                HeadNorms::Absent => None,
                HeadNorms::EachHead => Some(head_norms(false)),
                HeadNorms::Width => Some(head_norms(true)),
            },
            // The entry after the rotary embeddings is the identity.
            rotation: config.layer_kind(index).rotary.unwrap_or(config.rotary.len()),
            rotates_partly: config.rotates_partly(),
            query_factor: config.query_factor(),
            o: linear(&o),
            feed_forward: FeedForward::new(config, index, [&gate_up[..], &down[..]], find),
        }
    }

    /// The residual stream after the layer; no activation is kept.
    pub(crate) fn forward(
        &self,
        stream: Stream,
        rotations: &[Rotation],
        attention: &mut dyn Attention,
        routing: &mut Routing<'_>,
    ) -> Stream {
        let rotation = &rotations[self.rotation];
        let (input, normed) = stream.maybe_normed(self.norms.before_attention.as_ref());
        let projected = self.project(&normed);
        let attended = match self.attend_projected(&projected, rotation, attention) {
            Some(attended) => attended,
            None => {
                let (q, k, v) = self.rotated(projected, rotation);
                attention.attend(self.index, q, k, v)
            }
        };
        let added = maybe(self.norms.after_attention.as_ref(), self.o.apply(&attended, None));
        let (middle, normed) = self.middle(input, added);
        let pending = maybe(self.norms.after_ffn.as_ref(), self.feed_forward.forward(normed, routing));
        Stream { residual: middle, pending: Some(pending) }
    }

    /// Attention that norms and rotates heads itself, where it can and heads are as it does it.
    fn attend_projected(
        &self,
        projected: &Tensor,
        rotation: &Rotation,
        attention: &mut dyn Attention,
    ) -> Option<Tensor> {
        if self.rotates_partly || self.query_factor != 1.0 {
            return None;
        }
        let norms = match &self.head_norms {
            None => None,
            Some(HeadNormWeights { queries, keys, together: false }) => {
                let ((queries, epsilon), (keys, _)) = queries.plain().zip(keys.plain())?;
                Some((queries, keys, epsilon))
            }
            Some(HeadNormWeights { together: true, .. }) => return None,
        };
        attention.attend_projected(self.index, projected, norms, rotation.parts())
    }

    /// The same, with what [`Layer::backward`] needs.
    pub(crate) fn forward_traced(
        &self,
        stream: Stream,
        rotations: &[Rotation],
        packed: &Packed,
        routing: &mut Routing<'_>,
    ) -> (Stream, Activations) {
        let (input, normed) = stream.maybe_normed(self.norms.before_attention.as_ref());
        let projected = self.project(&normed);
        drop(normed);
        // Without head norms the rotation works in place, and nobody asks for the projections again.
        let projections = self.head_norms.is_some().then(|| projected.shallow_clone());
        let qkv = self.rotated(projected, &rotations[self.rotation]);
        let attention = AttentionTrace::new(packed, self.index, qkv);
        let (attention_output, added) =
            kept(self.norms.after_attention.as_ref(), self.o.apply(&attention.output(), None));
        let (middle, normed) = self.middle(input.shallow_clone(), added);
        let (output, feed_forward) = self.feed_forward.forward_traced(normed, routing);
        let (ffn_output, pending) = kept(self.norms.after_ffn.as_ref(), output);
        let stream = Stream { residual: middle.shallow_clone(), pending: Some(pending) };
        (stream, Activations { input, projections, attention, attention_output, middle, feed_forward, ffn_output })
    }

    /// `[T, N + 2 K, H]`.
    fn project(&self, normed: &Tensor) -> Tensor {
        let bias = self.qkv_bias.as_ref().map(|bias| &bias.tensor);
        self.qkv.apply(normed, bias).view([-1, self.heads + 2 * self.kv_heads, self.head_dim])
    }

    /// Rotated queries `[T, N, H]`, rotated keys and values `[T, K, H]`; takes the projections over.
    fn rotated(&self, projected: Tensor, rotation: &Rotation) -> (Tensor, Tensor, Tensor) {
        let (n, k) = (self.heads, self.kv_heads);
        let Some(norms) = &self.head_norms else {
            let [qk, v] = split(&projected, [n + k, k]);
            let [q, k] = split(&rotation.apply(qk), [n, k]);
            return (self.scaled(q), k, v);
        };
        let [q, k, v] = split(&projected, [n, k, k]);
        let [q, k] = [(&norms.queries, q), (&norms.keys, k)].map(|(norm, x)| {
            let normed = norm.apply(&norms.as_normed(&x)).view_as(&x);
            rotation.apply(normed)
        });
        (self.scaled(q), k, v)
    }

    /// Queries, or the gradient by them, with their factor.
    fn scaled(&self, q: Tensor) -> Tensor {
        if self.query_factor == 1.0 { q } else { q * self.query_factor }
    }

    /// Residual stream after the attention, and the input of the feed-forward block, from the layer's input and what attention adds.
    fn middle(&self, input: Tensor, added: Tensor) -> (Tensor, Tensor) {
        Stream { residual: input, pending: Some(added) }.maybe_normed(self.norms.before_ffn.as_ref())
    }

    /// Gradient by the layer's input, from the `gradient` by its output, both `[T, D]`; adds the gradients of the
    /// weights to the flat buffer `gradients`.
    pub(crate) fn backward(
        &self,
        activations: Activations,
        gradient: &Tensor,
        rotations: &[Rotation],
        gradients: &Tensor,
    ) -> Tensor {
        let Activations { input, projections, attention, attention_output, middle, feed_forward, ffn_output } =
            activations;
        let Norms { before_attention, after_attention, before_ffn, after_ffn } = &self.norms;
        let by_ffn = output_gradient(after_ffn.as_ref(), ffn_output, gradient, gradients);
        let normed = || maybe(before_ffn.as_ref(), middle.shallow_clone());
        let by_normed = self.feed_forward.backward(feed_forward, by_ffn, normed, gradients);
        let by_middle = input_gradient(before_ffn.as_ref(), &middle, by_normed, gradient, gradients);

        let by_added = output_gradient(after_attention.as_ref(), attention_output, &by_middle, gradients);
        let (by_attended, by_low) = self.o.backward_input(&by_added);
        self.o.add(gradients, &by_added, &attention.output(), by_low);
        drop(by_added);
        let by_attended = attention.backward(&by_attended);
        let by_projected = self.projections_backward(by_attended, projections, &rotations[self.rotation], gradients);
        let normed = maybe(before_attention.as_ref(), input.shallow_clone());
        let (by_normed, by_low) = self.qkv.backward_input(&by_projected);
        self.qkv.add(gradients, &by_projected, &normed, by_low);
        if let Some(mut slot) = self.qkv_bias.as_ref().and_then(|bias| bias.slot(gradients)) {
            add_column_sums(&mut slot, &by_projected);
        }
        input_gradient(before_attention.as_ref(), &input, by_normed, &by_middle, gradients)
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
        let by_q = self.scaled(by_q);
        let (Some(norms), Some(projections)) = (&self.head_norms, projections) else {
            let all = Tensor::cat(&[by_q, by_k, by_v], 1);
            let [by_qk, by_v] = split(&all, [n + k, k]);
            let turned = rotation.undo(by_qk);
            // In host memory the rotation worked in place, on a part of `all`.
            let all = if turned.data_ptr() == all.data_ptr() { all } else { Tensor::cat(&[turned, by_v], 1) };
            return all.flatten(1, 2);
        };
        let [q, k, _] = split(&projections, [n, k, k]);
        let [by_q, by_k] = [(&norms.queries, q, by_q), (&norms.keys, k, by_k)].map(|(norm, x, by)| {
            let by = rotation.undo(by.contiguous());
            norm.backward(&norms.as_normed(&x), &norms.as_normed(&by), None, gradients).view_as(&x)
        });
        Tensor::cat(&[by_q, by_k, by_v], 1).flatten(1, 2)
    }
}

impl HeadNormWeights {
    /// Heads, `[T, heads, H]`, as the norm takes them: `[T, heads H]` where all are normed together.
    fn as_normed(&self, heads: &Tensor) -> Tensor {
        if self.together { heads.flatten(1, 2) } else { heads.shallow_clone() }
    }
}

/// `x` after a norm, where there is one.
fn maybe(norm: Option<&Norm>, x: Tensor) -> Tensor {
    match norm {
        Some(norm) => norm.apply(&x),
        None => x,
    }
}

/// The same, and what the backward of the norm needs.
fn kept(norm: Option<&Norm>, x: Tensor) -> (Option<Tensor>, Tensor) {
    match norm {
        Some(norm) => {
            let normed = norm.apply(&x);
            (Some(x), normed)
        }
        None => (None, x),
    }
}

/// Gradient by the output of a block, from that by what is added to the stream; `x` is that output, kept where it is normed.
fn output_gradient(norm: Option<&Norm>, x: Option<Tensor>, gradient: &Tensor, gradients: &Tensor) -> Tensor {
    match norm.zip(x) {
        Some((norm, x)) => norm.backward(&x, gradient, None, gradients),
        None => gradient.shallow_clone(),
    }
}

/// Gradient by the stream before a block: that by the block's input, through its norm, plus what flows past the block.
fn input_gradient(norm: Option<&Norm>, x: &Tensor, by_input: Tensor, past: &Tensor, gradients: &Tensor) -> Tensor {
    match norm {
        Some(norm) => norm.backward(x, &by_input, Some(past), gradients),
        None => by_input + past,
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
