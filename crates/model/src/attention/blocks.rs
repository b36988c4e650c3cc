//! Attention as padded blocks of sequences, with libtorch's operations for tensors of equal lengths.
// Legend: of one block: `B` sequences, `Q` queries and `S` keys of each.

use std::collections::BTreeMap;

use pacs_shape::PassShape;
use pacs_torch::tch::{Device, Kind, Tensor};

use super::{Dims, Gather, Masking, Sequence};

/// Sequences with a prefix of one length (an answer's prompt; none for prompts and plain sequences) and about as many
/// tokens form one block, which is computed at once on padded keys and queries.
#[derive(Debug)]
pub(super) struct Blocks {
    blocks: Vec<Block>,
    /// Rows of `q` that the blocks work on, one block after the other.
    queries: Gather,
    /// Rows of `k` and `v` that the blocks work on.
    keys: Gather,
    /// Where in the blocks' output each token is.
    restore: Gather,
}

impl Blocks {
    pub(super) fn new(sequences: Vec<Sequence>, tokens: usize, dims: Dims, masking: Masking) -> Self {
        let device = masking.device;
        let (mut blocks, mut queries, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        let mut restore = vec![0; tokens];
        for ((prefix, _), sequences) in buckets(sequences) {
            let longest = sequences.iter().map(|sequence| sequence.len).max().unwrap_or(0);
            let first_key = keys.len();
            for sequence in &sequences {
                for i in 0..sequence.len {
                    restore[sequence.start + i] = (queries.len() + i) as i64;
                }
                // Padding follows every real query, so the causal mask hides it.
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
            blocks.push(Block::new(shape, dims, masking));
        }
        let restore = Gather::new(restore, queries.len(), device);
        let gather = |index: Vec<i64>| Gather::new(index, tokens, device);
        Self { blocks, queries: gather(queries), keys: gather(keys), restore }
    }

    /// The same plan for another thread.
    pub(super) fn shallow_clone(&self) -> Self {
        let [queries, keys, restore] = [&self.queries, &self.keys, &self.restore].map(Gather::shallow_clone);
        Self { blocks: self.blocks.iter().map(Block::shallow_clone).collect(), queries, keys, restore }
    }

    pub(super) fn shape(&self) -> PassShape {
        let mut shape = PassShape::default();
        for block in &self.blocks {
            let BlockShape { batch, queries, keys } = block.shape;
            let [batch, queries, keys] = [batch, queries, keys].map(|size| size as u64);
            let rows = match &block.method {
                Method::Plain(_) => {
                    shape.plain_scores += batch * queries * keys;
                    &mut shape.plain_rows
                }
                Method::Folded(_) | Method::Windowed(_) | Method::Causal => &mut shape.fused_rows,
            };
            rows[0] += batch * queries;
            rows[1] += batch * keys;
        }
        shape
    }

    /// Returns `[T, N H]`.
    pub(super) fn attend(&self, q: Tensor, k: Tensor, v: Tensor, dims: Dims) -> Tensor {
        let queries: Vec<i64> = self.blocks.iter().map(|block| block.shape.batch * block.shape.queries).collect();
        let keys: Vec<i64> = self.blocks.iter().map(|block| block.shape.batch * block.shape.keys).collect();
        let q = self.queries.apply(q).split_with_sizes(queries, 0);
        let k = self.keys.apply(k).split_with_sizes(&keys, 0);
        let v = self.keys.apply(v).split_with_sizes(&keys, 0);
        let parts = self.blocks.iter().zip(q).zip(k.into_iter().zip(v));
        let outputs: Vec<Tensor> = parts.map(|((block, q), (k, v))| block.attend(&q, &k, &v, dims)).collect();
        let output = if outputs.len() == 1 { outputs[0].shallow_clone() } else { Tensor::cat(&outputs, 0) };
        self.restore.apply(output)
    }
}

/// Sequences by length of prefix and rounded own length.
fn buckets(sequences: Vec<Sequence>) -> BTreeMap<(usize, usize), Vec<Sequence>> {
    let mut buckets: BTreeMap<_, Vec<Sequence>> = BTreeMap::new();
    for sequence in sequences {
        buckets.entry((sequence.prefix, rounded(sequence.len))).or_default().push(sequence);
    }
    buckets
}

/// Few lengths, so few blocks; at most a quarter of a long block is padding.
fn rounded(len: usize) -> usize {
    len.next_multiple_of((len.next_power_of_two() / 8).max(32))
}

#[derive(Clone, Copy, Debug)]
struct BlockShape {
    batch: i64,
    queries: i64,
    keys: i64,
}

/// Sequences of one shape; query `i` sees the keys up to `S - Q + i`, those of its window where there is one.
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
    /// Fused attention with a mask for all heads, `[Q, S]`: prompts may be long here, and a mask that is folded would be a
    /// group of such masks.
    Windowed(Tensor),
    /// Fused attention that skips what lies above the diagonal.
    Causal,
}

impl Block {
    /// Beyond so many scores in a layer fused attention is no slower, and memory would begin to matter.
    const MOST_PLAIN_SCORES: i64 = 1 << 21;

    fn new(shape: BlockShape, dims: Dims, masking: Masking) -> Self {
        let BlockShape { batch, queries, keys } = shape;
        let scores = batch * dims.n * queries * keys;
        // Nothing fused caps scores.
        let plain = dims.cap.is_some() || masking.device == Device::Cpu && scores <= Self::MOST_PLAIN_SCORES;
        let group = dims.n / dims.k;
        let is_windowed = masking.window.is_some_and(|window| (window as i64) < keys);
        let method = match (plain, queries == keys) {
            (true, _) => Method::Plain(mask(shape, group, Masking { kind: score_kind(masking.kind), ..masking })),
            (false, _) if is_windowed => Method::Windowed(mask(shape, 1, masking)),
            (false, true) => Method::Causal,
            (false, false) => Method::Folded(mask(shape, group, masking)),
        };
        Self { shape, method }
    }

    fn shallow_clone(&self) -> Self {
        let method = match &self.method {
            Method::Plain(mask) => Method::Plain(mask.shallow_clone()),
            Method::Folded(mask) => Method::Folded(mask.shallow_clone()),
            Method::Windowed(mask) => Method::Windowed(mask.shallow_clone()),
            Method::Causal => Method::Causal,
        };
        Self { shape: self.shape, method }
    }

    /// `q`: `[B Q, N, H]`, `k` and `v`: `[B S, K, H]`. Returns `[B Q, N H]`.
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, Dims { n, k: kv, h, cap }: Dims) -> Tensor {
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
                let (k, scale) = (stack(k, keys).transpose(1, 2), (h as f64).powf(-0.5));
                let scores = match cap {
                    Some(cap) => (q.bmm(&k) * (scale / cap)).tanh() * cap + mask,
                    None => mask.baddbmm(&q, &k, 1.0, scale),
                };
                unfold(scores.softmax(-1, score_kind).bmm(&v)).to_kind(kind)
            }
            Method::Folded(mask) => {
                let q = fold(q).reshape([batch, kv, queries * group, h]);
                unfold(fused(&q, &heads_first(k), &heads_first(v), Some(mask)).contiguous())
            }
            Method::Windowed(_) | Method::Causal => {
                let mask = if let Method::Windowed(mask) = &self.method { Some(mask) } else { None };
                let q = q.view([batch, queries, n, h]).transpose(1, 2);
                let output = fused(&q, &heads_first(k), &heads_first(v), mask);
                output.transpose(1, 2).reshape([batch * queries, n * h])
            }
        }
    }
}

/// `[Q G, S]`, zero where query `i` sees key `j`, else minus infinity: `j <= S - Q + i`, and no further back than the window.
fn mask(BlockShape { queries, keys, .. }: BlockShape, group: i64, Masking { kind, device, window }: Masking) -> Tensor {
    let hidden = || Tensor::full([queries, keys], f64::NEG_INFINITY, (Kind::Float, device));
    let later = hidden().triu(keys - queries + 1);
    let hidden = match window {
        Some(window) => later + hidden().tril(keys - queries - window as i64),
        None => later,
    };
    hidden.repeat_interleave_self_int(group, 0, None).to_kind(kind)
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
        let output = Block { shape, method }.attend(&q, &k, &v, Dims { n: 6, k: 2, h: 8, cap: None });
        (&output * output.detach().sin()).sum(Kind::Float).backward();
        vec![output, q.grad(), k.grad(), v.grad()]
    }

    #[test]
    fn the_methods_agree() {
        for (queries, keys) in [(7, 7), (5, 12), (1, 4)] {
            let shape = BlockShape { batch: 3, queries, keys };
            let random = |rows: i64, heads: i64| Tensor::randn([3 * rows, heads, 8], (Kind::Float, Device::Cpu));
            let inputs = [random(queries, 6), random(keys, 2), random(keys, 2)];
            for window in [None, Some(1), Some(3), Some(6)] {
                let masking = Masking { kind: Kind::Float, device: Device::Cpu, window };
                let mask = |group: i64| mask(shape, group, masking);
                let plain = run(Method::Plain(mask(3)), shape, &inputs);
                let mut others =
                    vec![run(Method::Folded(mask(3)), shape, &inputs), run(Method::Windowed(mask(1)), shape, &inputs)];
                if queries == keys && window.is_none() {
                    others.push(run(Method::Causal, shape, &inputs));
                }
                for (a, b) in others.iter().flat_map(|other| plain.iter().zip(other)) {
                    assert!(a.allclose(b, 1e-5, 1e-5, false), "{shape:?}, {window:?}");
                }
            }
        }
    }

    /// Row `i` of a mask for one head: the keys that query `i` sees.
    fn seen(shape: BlockShape, window: Option<usize>, query: i64) -> Vec<i64> {
        let masking = Masking { kind: Kind::Float, device: Device::Cpu, window };
        let row: Vec<f64> = mask(shape, 1, masking).get(query).try_into().unwrap();
        (0..).zip(row).filter(|(_, value)| *value == 0.0).map(|(key, _)| key).collect()
    }

    #[test]
    fn a_window_counts_the_token_itself() {
        let shape = BlockShape { batch: 1, queries: 3, keys: 7 };
        assert_eq!(seen(shape, None, 0), [0, 1, 2, 3, 4]);
        assert_eq!(seen(shape, Some(2), 0), [3, 4]);
        assert_eq!(seen(shape, Some(2), 2), [5, 6]);
        assert_eq!(seen(shape, Some(1), 1), [5]);
    }

    #[test]
    fn rounding_wastes_at_most_a_quarter_of_a_long_block() {
        for len in 1..5000 {
            let rounded = rounded(len);
            assert!(rounded >= len && (rounded - len < 32 || 4 * (rounded - len) <= len), "{len} {rounded}");
        }
    }
}
