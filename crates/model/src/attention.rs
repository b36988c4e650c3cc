//! Which token sees which: the interface between the model and its users, and the packed rows of training.
// Legend: `T` tokens, `N` query heads, `K` key and value heads, `G = N / K`, `H` head; of one block: `B` sequences,
// `Q` queries and `S` keys of each.

use std::collections::BTreeMap;

use pacs_shape::PassShape;
use pacs_torch::tch::{Device, Kind, Tensor, with_grad};

use crate::Model;

/// Computes attention for the model, layer by layer; generation keeps its KV cache behind it.
pub trait Attention {
    /// Attends in one layer.
    ///
    /// `q`: `[T, N, H]`, `k` and `v`: `[T, K, H]`; queries and keys are rotated. Returns `[T, N H]`.
    fn attend(&mut self, layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor;

    /// The same from projections whose heads are neither normed nor rotated, where that is faster; `None` leaves both to
    /// the layer, which then calls [`Attention::attend`].
    ///
    /// `projected`: `[T, N + 2 K, H]`, queries, keys and values; `norms`: weights of queries and keys, `[H]` each, and
    /// their epsilon, where heads are normed; `rotation`: cosines and sines, `[T, H / 2]` float32 each.
    fn attend_projected(
        &mut self,
        _layer: usize,
        _projected: &Tensor,
        _norms: Option<(&Tensor, &Tensor, f64)>,
        _rotation: (&Tensor, &Tensor),
    ) -> Option<Tensor> {
        None
    }
}

/// A prompt followed by its answers, each of which sees the prompt and itself, not the other answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedRow {
    /// Tokens of the prompt that the answers share.
    pub prompt_len: usize,
    /// Tokens of each answer. None: the row is the prompt alone. One: it is a plain sequence.
    pub answer_lens: Vec<usize>,
}

impl PackedRow {
    /// Tokens of the row.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.prompt_len + self.answer_lens.iter().sum::<usize>()
    }
}

/// Positions of packed rows: every answer goes on from its prompt.
#[must_use]
pub fn packed_positions(rows: &[PackedRow]) -> Vec<i64> {
    let mut positions = Vec::with_capacity(rows.iter().map(PackedRow::tokens).sum());
    for row in rows {
        positions.extend(0..row.prompt_len as i64);
        for &answer in &row.answer_lens {
            positions.extend((row.prompt_len..row.prompt_len + answer).map(|position| position as i64));
        }
    }
    positions
}

/// Attention of packed rows; equals running each prompt with each answer alone.
///
/// Every prompt and every answer is one sequence of queries. Sequences with a prefix of one length (an answer's prompt;
/// none for prompts and plain sequences) and about as many tokens form one block, which is computed at once on padded
/// keys and queries.
#[derive(Debug)]
pub struct Packed {
    blocks: Vec<Block>,
    /// Rows of `q` that the blocks work on, one block behind the other.
    queries: Gather,
    /// Rows of `k` and `v` that the blocks work on.
    keys: Gather,
    /// Where in the blocks' output each token is.
    restore: Gather,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

impl Packed {
    /// Plans the attention of `rows`, whose tokens lie one row behind the other: a prompt, then its answers.
    #[must_use]
    pub fn new(rows: &[PackedRow], model: &Model) -> Self {
        let (config, device) = (model.config(), model.device());
        let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
        let tokens: usize = rows.iter().map(PackedRow::tokens).sum();
        let (mut blocks, mut queries, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        let mut restore = vec![0; tokens];
        for ((prefix, _), sequences) in buckets(rows) {
            let longest = sequences.iter().map(|sequence| sequence.len).max().unwrap_or(0);
            let first_key = keys.len();
            for sequence in &sequences {
                for i in 0..sequence.len {
                    restore[sequence.start + i] = (queries.len() + i) as i64;
                }
                // Padding lies behind every real query, so the causal mask hides it.
                let padded = (0..longest).map(|i| (sequence.start + if i < sequence.len { i } else { 0 }) as i64);
                keys.extend((sequence.prefix_start..sequence.prefix_start + prefix).map(|key| key as i64));
                keys.extend(padded.clone());
                queries.extend(padded);
            }
            let shape = BlockShape {
                batch: sequences.len() as i64,
                queries: longest as i64,
                keys: (keys.len() - first_key) as i64 / sequences.len() as i64,
            };
            blocks.push(Block::new(shape, heads, kv_heads, model.kind(), device));
        }
        let gather = |index: Vec<i64>| Gather::new(index, tokens, device);
        let restored = Gather::new(restore, queries.len(), device);
        Self { blocks, queries: gather(queries), keys: gather(keys), restore: restored, heads, kv_heads, head_dim }
    }
}

impl Packed {
    /// What attention over the rows works on, for planning memory; the rest of the shape is 0.
    #[must_use]
    pub fn shape(&self) -> PassShape {
        let mut shape = PassShape::default();
        for block in &self.blocks {
            let BlockShape { batch, queries, keys } = block.shape;
            let [batch, queries, keys] = [batch, queries, keys].map(|size| size as u64);
            let rows = match &block.method {
                Method::Plain(_) => {
                    shape.plain_scores += batch * queries * keys;
                    &mut shape.plain_rows
                }
                Method::Folded(_) | Method::Causal => &mut shape.fused_rows,
            };
            rows[0] += batch * queries;
            rows[1] += batch * keys;
        }
        shape
    }
}

impl Attention for Packed {
    fn attend(&mut self, _layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        self.all(q, k, v)
    }
}

impl Packed {
    /// Attends; every layer in the same way.
    fn all(&self, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let tokens = q.size()[0];
        let queries: Vec<i64> = self.blocks.iter().map(|block| block.shape.batch * block.shape.queries).collect();
        let keys: Vec<i64> = self.blocks.iter().map(|block| block.shape.batch * block.shape.keys).collect();
        let q = self.queries.apply(q).split_with_sizes(queries, 0);
        let k = self.keys.apply(k).split_with_sizes(&keys, 0);
        let v = self.keys.apply(v).split_with_sizes(&keys, 0);
        let dims = Dims { n: self.heads, k: self.kv_heads, h: self.head_dim };
        let parts = self.blocks.iter().zip(q).zip(k.into_iter().zip(v));
        let outputs: Vec<Tensor> = parts.map(|((block, q), (k, v))| block.attend(&q, &k, &v, dims)).collect();
        let output = if outputs.len() == 1 { outputs[0].shallow_clone() } else { Tensor::cat(&outputs, 0) };
        self.restore.apply(output).view([tokens, self.heads * self.head_dim])
    }
}

/// The attention of one layer, with the part of the autograd graph that its backward needs.
#[derive(Debug)]
pub(crate) struct AttentionTrace {
    /// Leaves of the graph: rotated queries `[T, N, H]`, rotated keys and values `[T, K, H]`.
    inputs: [Tensor; 3],
    /// `[T, N H]`, with its graph.
    output: Tensor,
}

impl AttentionTrace {
    pub(crate) fn new(packed: &Packed, (q, k, v): (Tensor, Tensor, Tensor)) -> Self {
        let inputs = [q, k, v].map(|x| x.detach().set_requires_grad(true));
        let [q, k, v] = inputs.each_ref().map(Tensor::shallow_clone);
        let output = with_grad(|| packed.all(q, k, v));
        Self { inputs, output }
    }

    pub(crate) fn output(&self) -> Tensor {
        self.output.detach()
    }

    /// Gradients by queries, keys and values, from that by the output.
    pub(crate) fn backward(self, gradient: &Tensor) -> [Tensor; 3] {
        // A scalar whose derivative by the output is the gradient.
        with_grad(|| (&self.output * gradient).sum(gradient.kind())).backward();
        self.inputs.map(|input| input.grad())
    }
}

/// A run of tokens with causal attention among themselves and full attention to a prefix elsewhere.
struct Sequence {
    prefix_start: usize,
    start: usize,
    len: usize,
}

/// Sequences by length of prefix and rounded own length.
fn buckets(rows: &[PackedRow]) -> BTreeMap<(usize, usize), Vec<Sequence>> {
    let mut buckets: BTreeMap<_, Vec<Sequence>> = BTreeMap::new();
    let mut push = |prefix: usize, sequence: Sequence| {
        if sequence.len > 0 {
            buckets.entry((prefix, rounded(sequence.len))).or_default().push(sequence);
        }
    };
    let mut row_start = 0;
    for row in rows {
        if row.answer_lens.len() < 2 {
            push(0, Sequence { prefix_start: row_start, start: row_start, len: row.tokens() });
        } else {
            push(0, Sequence { prefix_start: row_start, start: row_start, len: row.prompt_len });
            let mut start = row_start + row.prompt_len;
            for &len in &row.answer_lens {
                push(row.prompt_len, Sequence { prefix_start: row_start, start, len });
                start += len;
            }
        }
        row_start += row.tokens();
    }
    buckets
}

/// Few lengths, so few blocks; at most a quarter of a long block is padding.
fn rounded(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 8).max(32))
}

/// Rows picked by index, or all of them in order.
#[derive(Debug)]
struct Gather(Option<Tensor>);

impl Gather {
    fn new(index: Vec<i64>, source: usize, device: Device) -> Self {
        let identity = index.len() == source && index.iter().enumerate().all(|(i, &row)| row == i as i64);
        Self((!identity).then(|| Tensor::from_slice(&index).to_device(device)))
    }

    fn apply(&self, x: Tensor) -> Tensor {
        match &self.0 {
            Some(index) => x.index_select(0, index),
            None => x,
        }
    }
}

#[derive(Clone, Copy)]
struct Dims {
    n: i64,
    k: i64,
    h: i64,
}

#[derive(Clone, Copy, Debug)]
struct BlockShape {
    batch: i64,
    queries: i64,
    keys: i64,
}

/// Sequences of one shape; query `i` sees the keys up to `S - Q + i`.
#[derive(Debug)]
struct Block {
    shape: BlockShape,
    method: Method,
}

#[derive(Debug)]
enum Method {
    /// Scores as one matrix in float32: on a CPU the fastest way for short sequences, and more exact than bfloat16
    /// scores; it keeps them for the backward. Holds the mask `[Q G, S]`.
    Plain(Tensor),
    /// Fused attention with the heads of one group folded into queries. Holds the mask `[Q G, S]`.
    Folded(Tensor),
    /// Fused attention that skips what is behind the diagonal.
    Causal,
}

impl Block {
    /// Beyond so many scores in a layer fused attention is no slower, and memory would begin to matter.
    const MOST_PLAIN_SCORES: i64 = 1 << 21;

    fn new(shape: BlockShape, heads: i64, kv_heads: i64, kind: Kind, device: Device) -> Self {
        let BlockShape { batch, queries, keys } = shape;
        let scores = batch * heads * queries * keys;
        let plain = device == Device::Cpu && scores <= Self::MOST_PLAIN_SCORES;
        let group = heads / kv_heads;
        let method = match (plain, queries == keys) {
            (true, _) => Method::Plain(mask(shape, group, score_kind(kind), device)),
            (false, true) => Method::Causal,
            (false, false) => Method::Folded(mask(shape, group, kind, device)),
        };
        Self { shape, method }
    }

    /// `q`: `[B Q, N, H]`, `k` and `v`: `[B S, K, H]`. Returns `[B Q, N H]`.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, Dims { n, k: kv, h }: Dims) -> Tensor {
        let BlockShape { batch, queries, keys } = self.shape;
        let group = n / kv;
        let heads_first = |x: &Tensor| x.view([batch, keys, kv, h]).transpose(1, 2);
        // Query heads that share a key head become queries of it, so that keys need not be repeated.
        let fold = |q: &Tensor| q.view([batch, queries, kv, group, h]).transpose(1, 2);
        let unfold =
            |x: Tensor| x.view([batch, kv, queries, group, h]).transpose(1, 2).reshape([batch * queries, n * h]);
        match &self.method {
            Method::Plain(mask) => {
                let (kind, score_kind) = (q.kind(), score_kind(q.kind()));
                let stack = |x: Tensor, rows: i64| x.to_kind(score_kind).reshape([batch * kv, rows, h]);
                let (q, k, v) = (stack(fold(q), queries * group), heads_first(k), stack(heads_first(v), keys));
                let scores = mask.baddbmm(&q, &stack(k, keys).transpose(1, 2), 1.0, (h as f64).powf(-0.5));
                unfold(scores.softmax(-1, score_kind).bmm(&v)).to_kind(kind)
            }
            Method::Folded(mask) => {
                let q = fold(q).reshape([batch, kv, queries * group, h]);
                unfold(fused(&q, &heads_first(k), &heads_first(v), Some(mask)).contiguous())
            }
            Method::Causal => {
                let q = q.view([batch, queries, n, h]).transpose(1, 2);
                let output = fused(&q, &heads_first(k), &heads_first(v), None);
                output.transpose(1, 2).reshape([batch * queries, n * h])
            }
        }
    }
}

/// `[Q G, S]`, zero where query `i` sees key `j <= S - Q + i`, else minus infinity.
fn mask(BlockShape { queries, keys, .. }: BlockShape, group: i64, kind: Kind, device: Device) -> Tensor {
    Tensor::full([queries, keys], f64::NEG_INFINITY, (Kind::Float, device))
        .triu(keys - queries + 1)
        .repeat_interleave_self_int(group, 0, None)
        .to_kind(kind)
}

/// Kind of the scores: float32 for the 16-bit kinds.
fn score_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Fused attention over `[B, heads, length, H]`; without a mask it is causal.
fn fused(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Tensor {
    Tensor::scaled_dot_product_attention(q, k, v, mask, 0.0, mask.is_none(), None, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Output and gradients of one block under a method.
    fn run(method: Method, shape: BlockShape, inputs: &[Tensor; 3]) -> Vec<Tensor> {
        let [q, k, v] = inputs.each_ref().map(|x| x.detach().set_requires_grad(true));
        let output = Block { shape, method }.attend(&q, &k, &v, Dims { n: 6, k: 2, h: 8 });
        (&output * output.detach().sin()).sum(Kind::Float).backward();
        vec![output, q.grad(), k.grad(), v.grad()]
    }

    #[test]
    fn the_methods_agree() {
        for (queries, keys) in [(7, 7), (5, 12), (1, 4)] {
            let shape = BlockShape { batch: 3, queries, keys };
            let random = |rows: i64, heads: i64| Tensor::randn([3 * rows, heads, 8], (Kind::Float, Device::Cpu));
            let inputs = [random(queries, 6), random(keys, 2), random(keys, 2)];
            let mask = || mask(shape, 3, Kind::Float, Device::Cpu);
            let plain = run(Method::Plain(mask()), shape, &inputs);
            let mut others = vec![run(Method::Folded(mask()), shape, &inputs)];
            if queries == keys {
                others.push(run(Method::Causal, shape, &inputs));
            }
            for (a, b) in others.iter().flat_map(|other| plain.iter().zip(other)) {
                assert!(a.allclose(b, 1e-5, 1e-5, false), "{shape:?}");
            }
        }
    }

    #[test]
    fn positions_restart_at_every_answer() {
        let rows =
            [PackedRow { prompt_len: 2, answer_lens: vec![3, 1] }, PackedRow { prompt_len: 1, answer_lens: vec![] }];
        assert_eq!(packed_positions(&rows), [0, 1, 2, 3, 4, 2, 0]);
    }

    #[test]
    fn rounding_wastes_at_most_a_quarter_of_a_long_block() {
        for len in 1..5000 {
            let rounded = rounded(len);
            assert!(rounded >= len && (rounded - len < 32 || 4 * (rounded - len) <= len), "{len} {rounded}");
        }
    }
}
