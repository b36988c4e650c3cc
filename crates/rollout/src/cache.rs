//! Keys and values of the tokens that samples have seen, in blocks, and attention over them.
//!
//! `P` blocks of `S` tokens, `B` rows that decode, `T` packed tokens, `N` query heads, `K` key heads, `H` head width. A pass
//! is `B` tokens, one per decoding row, followed by the tokens of chunks. Which blocks belong to whom is the
//! scheduler's business.

use std::sync::Arc;

use pacs_model::{Attention, ModelConfig};
use pacs_torch::tch::{Device, Kind, TchError, Tensor};
use pacs_torch::{
    BLOCK_TOKENS, BlockRun, DecodeSlots, DecodeTable, DeviceKernels, FlashSequences, KernelError, attend_blocks,
    device_kernels, flash_attention, has_flash_attention, has_kernels, store_blocks,
};

/// The cache of all layers.
#[derive(Debug)]
pub(crate) struct KvCache {
    /// `[layers, P, K, H, S]`.
    keys: Tensor,
    /// `[layers, P, K, S, H]`.
    values: Tensor,
    /// How many tokens a token of a layer sees, and how scores are capped.
    sight: Arc<Sight>,
}

/// What attention of the layers sees. Blocks that have left every window stay where they are: layers without a window need them.
#[derive(Debug)]
struct Sight {
    /// Layer `i` has entry `i` modulo their number; none: all before it.
    windows: Vec<Option<usize>>,
    score_cap: Option<f64>,
}

impl Sight {
    fn window(&self, layer: usize) -> Option<usize> {
        self.windows[layer % self.windows.len()]
    }

    /// Every window once.
    fn distinct(&self) -> Vec<Option<usize>> {
        let mut windows = self.windows.clone();
        windows.sort_unstable();
        windows.dedup();
        windows
    }
}

/// The tokens of one row, or of one prompt, as a pass sees them.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    /// Blocks of the prompt, and its tokens.
    pub(crate) prompt: (Arc<[u32]>, usize),
    /// Blocks of the answer, and its tokens.
    pub(crate) answer: (Vec<u32>, usize),
    /// How many of the last tokens this pass brings; the others are in the cache.
    pub(crate) new: usize,
}

impl Span {
    fn tokens(&self) -> usize {
        self.prompt.1 + self.answer.1
    }

    /// Block and place of a token.
    fn slot(&self, position: usize) -> (u32, u32) {
        let (blocks, position) = match position.checked_sub(self.prompt.1) {
            None => (&self.prompt.0[..], position),
            Some(position) => (&self.answer.0[..], position),
        };
        (blocks[position / BLOCK_TOKENS], (position % BLOCK_TOKENS) as u32)
    }

    fn slots(&self, positions: std::ops::Range<usize>) -> impl Iterator<Item = (u32, u32)> + '_ {
        positions.map(|position| self.slot(position))
    }

    fn new_slots(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.slots(self.tokens() - self.new..self.tokens())
    }

    fn runs(&self) -> [BlockRun<'_>; 2] {
        let run = |blocks, tokens| BlockRun { blocks, tokens };
        [run(&self.prompt.0[..], self.prompt.1), run(&self.answer.0[..], self.answer.1)]
    }
}

impl KvCache {
    /// A cache of so many blocks, and a scratch block after them that belongs to no sample.
    ///
    /// Nothing is written, so that on a CPU the system gives memory only to blocks that come to be used.
    pub(crate) fn new(config: &ModelConfig, blocks: usize, kind: Kind, device: Device) -> Result<Self, TchError> {
        let (layers, blocks, tokens) = (config.layers as i64, blocks as i64 + 1, BLOCK_TOKENS as i64);
        let (heads, width) = (config.kv_heads, config.head_dim);
        let keys = Tensor::f_empty([layers, blocks, heads, width, tokens], (kind, device))?;
        let values = Tensor::f_empty([layers, blocks, heads, tokens, width], (kind, device))?;
        let windows = config.layer_kinds.iter().map(|kind| kind.window).collect();
        Ok(Self { keys, values, sight: Arc::new(Sight { windows, score_cap: config.score_cap }) })
    }

    /// Bytes that one token takes, over all layers.
    pub(crate) fn bytes_per_token(config: &ModelConfig, kind: Kind) -> usize {
        2 * config.layers * (config.kv_heads * config.head_dim) as usize * kind.elt_size_in_bytes()
    }

    /// Blocks, with the one that belongs to no sample.
    pub(crate) fn blocks(&self) -> u32 {
        u32::try_from(self.keys.size()[1]).expect("a cache has fewer than 2^32 blocks")
    }

    pub(crate) fn device(&self) -> Device {
        self.keys.device()
    }

    /// The same cache once more.
    pub(crate) fn shared(&self) -> Self {
        let sight = Arc::clone(&self.sight);
        Self { keys: self.keys.shallow_clone(), values: self.values.shallow_clone(), sight }
    }

    /// Keys and values of a layer.
    fn layer(&self, layer: usize) -> (Tensor, Tensor) {
        (self.keys.get(layer as i64), self.values.get(layer as i64))
    }

    /// The attention of a pass: `decode` rows bring one token each, `chunks` bring theirs after them.
    pub(crate) fn pass(&mut self, decode: Vec<Span>, chunks: Vec<Span>) -> Result<Pass<'_>, TchError> {
        let device = self.keys.device();
        let slots: Vec<(u32, u32)> = decode.iter().chain(&chunks).flat_map(|span| span.new_slots()).collect();
        let on_device = device_kernels().map(|kernels| {
            let rows: Vec<[BlockRun<'_>; 2]> = decode.iter().map(Span::runs).collect();
            OnDevice { kernels, slots: DecodeSlots::new(&slots, device), table: DecodeTable::new(&rows, device) }
        });
        let plain = !has_kernels(&self.keys) && on_device.is_none();
        // No kernel caps scores.
        let is_masked = (plain || self.sight.score_cap.is_some()) && !decode.is_empty();
        let masked = if is_masked { Some(Masked::new(&decode, &self.sight, self.keys.kind(), device)?) } else { None };
        let places = plain.then(|| Slots::new(&slots, device));
        let head_dim = self.values.size()[4];
        let has_flash = has_flash_attention(device, self.keys.kind(), head_dim) && self.sight.score_cap.is_none();
        let chunks = Chunks::new(&chunks, has_flash, device);
        Ok(Pass { cache: self, rows: decode.len(), decode, on_device, masked, chunks, slots, places })
    }

    /// The attention of a pass of rows that bring one token each, by the kernels of a device, which have all that they need
    /// to know of them.
    pub(crate) fn recorded_pass(
        &mut self,
        kernels: Arc<DeviceKernels>,
        slots: DecodeSlots,
        table: DecodeTable,
    ) -> Pass<'_> {
        let (rows, on_device) = (table.rows(), Some(OnDevice { kernels, slots, table }));
        let (chunks, decode, slots) = (Chunks::OneByOne(Vec::new()), Vec::new(), Vec::new());
        Pass { cache: self, rows, decode, on_device, masked: None, chunks, slots, places: None }
    }
}

/// Blocks and places as index tensors, `[T]` each.
#[derive(Debug)]
struct Slots {
    blocks: Tensor,
    places: Tensor,
}

impl Slots {
    fn new(slots: &[(u32, u32)], device: Device) -> Self {
        let index = |part: fn(&(u32, u32)) -> u32| {
            let values: Vec<i64> = slots.iter().map(|slot| i64::from(part(slot))).collect();
            Tensor::from_slice(&values).to_device(device)
        };
        Self { blocks: index(|slot| slot.0), places: index(|slot| slot.1) }
    }

    /// Keys `[T, K, H]` of one layer's `[P, K, H, S]`.
    fn keys(&self, keys: &Tensor) -> Tensor {
        keys.index(&[Some(&self.blocks), None, None, Some(&self.places)])
    }

    /// Values `[T, K, H]` of one layer's `[P, K, S, H]`.
    fn values(&self, values: &Tensor) -> Tensor {
        values.index(&[Some(&self.blocks), None, Some(&self.places)])
    }

    fn store(&self, (k, v): (&Tensor, &Tensor), keys: &mut Tensor, values: &mut Tensor) {
        let _ = keys.index_put_(&[Some(&self.blocks), None, None, Some(&self.places)], k, false);
        let _ = values.index_put_(&[Some(&self.blocks), None, Some(&self.places)], v, false);
    }
}

/// The chunks of a pass, and how they attend.
#[derive(Debug)]
enum Chunks {
    /// By one call for all of them.
    Together {
        sequences: FlashSequences,
        /// Of all tokens of all chunks; none where no chunk has context, so that its own keys are all that it sees.
        slots: Option<Slots>,
    },
    OneByOne(Vec<ChunkOf>),
}

impl Chunks {
    fn new(spans: &[Span], has_flash: bool, device: Device) -> Self {
        let slots = |span: &Span| span.slots(0..span.tokens()).collect::<Vec<_>>();
        let context = |span: &Span| span.tokens() - span.new;
        if has_flash && !spans.is_empty() {
            let lengths: Vec<_> = spans.iter().map(|span| [span.new, span.tokens()]).collect();
            let any_context = spans.iter().any(|span| context(span) > 0);
            let slots = any_context.then(|| Slots::new(&spans.iter().flat_map(slots).collect::<Vec<_>>(), device));
            return Self::Together { sequences: FlashSequences::new(&lengths, device), slots };
        }
        let of_chunk = |span: &Span| {
            let slots = if context(span) == 0 { Vec::new() } else { slots(span) };
            ChunkOf { context: context(span), new: span.new, slots: Slots::new(&slots, device) }
        };
        Self::OneByOne(spans.iter().map(of_chunk).collect())
    }

    /// Attention of the tokens of the chunks, whose keys and values are in the cache, too; `[T, N H]` in parts.
    fn attend(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        (keys, values): (&Tensor, &Tensor),
        window: Option<usize>,
        score_cap: Option<f64>,
    ) -> Vec<Tensor> {
        let chunks = match self {
            Self::Together { sequences, slots } => {
                let (k, v) = match slots {
                    Some(slots) => (slots.keys(keys), slots.values(values)),
                    None => (k.shallow_clone(), v.shallow_clone()),
                };
                return vec![flash_attention(q, &k, &v, sequences, window).flatten(1, 2)];
            }
            Self::OneByOne(chunks) => chunks,
        };
        let mut start = 0;
        let attend = |chunk: &ChunkOf| {
            let part = |x: &Tensor| x.narrow(0, start, chunk.new as i64);
            let window = window.filter(|window| *window < chunk.context + chunk.new);
            let context = chunk.context as i64;
            let attended = match (chunk.context, window, score_cap) {
                (0, None, None) => causal(&part(q), &part(k), &part(v)),
                (0, ..) => behind(&part(q), &part(k), &part(v), context, window, score_cap),
                _ => {
                    let (k, v) = (chunk.slots.keys(keys), chunk.slots.values(values));
                    behind(&part(q), &k, &v, context, window, score_cap)
                }
            };
            start += chunk.new as i64;
            attended
        };
        chunks.iter().map(attend).collect()
    }
}

#[derive(Debug)]
struct ChunkOf {
    /// Tokens in the cache before it.
    context: usize,
    new: usize,
    /// Of all its tokens, from the first on; empty without context.
    slots: Slots,
}

/// What the kernels of a device need to know of a pass.
#[derive(Debug)]
struct OnDevice {
    kernels: Arc<DeviceKernels>,
    /// Where each new token goes.
    slots: DecodeSlots,
    /// The blocks of the rows that decode.
    table: DecodeTable,
}

/// States why a launch cannot be refused.
fn launched<T>(result: Result<T, KernelError>) -> T {
    result.expect("the kernels are those of this model, and a device that refuses them computes nothing afterwards")
}

/// Attention of one pass.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    cache: &'a mut KvCache,
    /// Rows that decode.
    rows: usize,
    /// The same, for host memory.
    decode: Vec<Span>,
    /// For devices with kernels.
    on_device: Option<OnDevice>,
    /// For devices without kernels.
    masked: Option<Masked>,
    chunks: Chunks,
    /// Where each new token goes.
    slots: Vec<(u32, u32)>,
    /// The same, for devices without kernels.
    places: Option<Slots>,
}

impl Attention for Pass<'_> {
    fn attend(&mut self, layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let (mut keys, mut values) = self.cache.layer(layer);
        match &self.places {
            Some(places) => places.store((&k, &v), &mut keys, &mut values),
            None => store_blocks((&k, &v), &mut keys, &mut values, &self.slots).expect("the cache is contiguous"),
        }
        self.attended(layer, (&q, &k, &v), &keys, &values)
    }

    fn attend_projected(
        &mut self,
        layer: usize,
        projected: &Tensor,
        norms: Option<(&Tensor, &Tensor, f64)>,
        rotation: (&Tensor, &Tensor),
    ) -> Option<Tensor> {
        let OnDevice { kernels, slots, .. } = self.on_device.as_ref()?;
        let (mut keys, mut values) = self.cache.layer(layer);
        let (q, k) = launched(kernels.rotate_store(projected, norms, rotation, slots, (&mut keys, &mut values)));
        let (kv_heads, before_values) = (k.size()[1], q.size()[1] + k.size()[1]);
        let v = projected.narrow(1, before_values, kv_heads);
        Some(self.attended(layer, (&q, &k, &v), &keys, &values))
    }
}

impl Pass<'_> {
    /// Attention of all tokens of the pass, whose keys and values are in the cache. Returns `[T, N H]`.
    fn attended(&self, layer: usize, (q, k, v): (&Tensor, &Tensor, &Tensor), keys: &Tensor, values: &Tensor) -> Tensor {
        let (window, score_cap) = (self.cache.sight.window(layer), self.cache.sight.score_cap);
        let (tokens, heads, head_dim) = q.size3().expect("queries are [T, N, H]");
        let mut outputs = Vec::new();
        let rows = self.rows as i64;
        if rows > 0 {
            let q = q.narrow(0, 0, rows);
            outputs.push(match (&self.on_device, &self.masked) {
                (Some(OnDevice { kernels, table, .. }), _) => launched(kernels.attend_blocks(&q, keys, values, table)),
                (_, Some(masked)) => masked.attend(&q, keys, values, window, score_cap),
                _ => {
                    let runs: Vec<[BlockRun<'_>; 2]> = self.decode.iter().map(Span::runs).collect();
                    attend_blocks(&q, keys, values, &runs, window).expect("the cache is contiguous")
                }
            });
        }
        if rows < tokens {
            let part = |x: &Tensor| x.narrow(0, rows, tokens - rows);
            let qkv = (&part(q), &part(k), &part(v));
            outputs.extend(self.chunks.attend(qkv, (keys, values), window, score_cap));
        }
        let output = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 0) };
        output.reshape([-1, heads * head_dim])
    }
}

/// Attention of a sequence to itself; `q`: `[T, N, H]`, `k` and `v`: `[T, K, H]`. Returns `[T, N H]`.
fn causal(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let (tokens, heads, head_dim) = q.size3().expect("queries are [T, N, H]");
    let batch = |x: &Tensor| x.transpose(0, 1).unsqueeze(0);
    Tensor::scaled_dot_product_attention(&batch(q), &batch(k), &batch(v), None::<Tensor>, 0.0, true, None, true)
        .squeeze_dim(0)
        .transpose(0, 1)
        .reshape([tokens, heads * head_dim])
}

/// Elements of the largest mask of [`behind`].
const MASK_ELEMENTS: i64 = 1 << 22;

/// Attention of the last tokens of a sequence to all of it, or to a window of it.
///
/// `q`: `[T, N, H]`; `k` and `v`: `[context + T, K, H]`. Returns `[T, N H]`.
fn behind(q: &Tensor, k: &Tensor, v: &Tensor, context: i64, window: Option<usize>, score_cap: Option<f64>) -> Tensor {
    let (tokens, heads, head_dim) = q.size3().expect("queries are [T, N, H]");
    let kv_heads = k.size()[1];
    let group = heads / kv_heads;
    let (k, v) = (k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0));
    let step = (MASK_ELEMENTS / (group * (context + tokens))).max(1);
    let parts: Vec<Tensor> = (0..tokens)
        .step_by(step as usize)
        .map(|start| {
            let queries = step.min(tokens - start);
            let end = context + start + queries;
            // What the first of the queries sees.
            let first = window.map_or(0, |window| (end - queries + 1 - window as i64).max(0));
            let seen = end - first;
            // Query heads that share a key head become queries of it, so that keys need not be repeated.
            let folded = q.narrow(0, start, queries).view([queries, kv_heads, group, head_dim]).transpose(0, 1);
            let folded = folded.reshape([1, kv_heads, queries * group, head_dim]);
            let hidden = || Tensor::full([queries, seen], f64::NEG_INFINITY, (Kind::Float, q.device()));
            let later = hidden().triu(seen - queries + 1);
            let hidden = match window {
                Some(window) => later + hidden().tril(seen - queries - window as i64),
                None => later,
            };
            let mask = hidden.repeat_interleave_self_int(group, 0, None).to_kind(q.kind());
            let (k, v) = (k.narrow(2, first, seen), v.narrow(2, first, seen));
            attend_masked(&folded, &k, &v, &mask, score_cap)
                .view([kv_heads, queries, group, head_dim])
                .transpose(0, 1)
                .reshape([queries, heads * head_dim])
        })
        .collect();
    Tensor::cat(&parts, 0)
}

/// Attention with a mask that is added to the scores, which may be capped before.
///
/// `q`: `[.., Q, H]`, `k` and `v`: `[.., S, H]`, the mask broadcasts to `[.., Q, S]`.
fn attend_masked(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, score_cap: Option<f64>) -> Tensor {
    let Some(cap) = score_cap else {
        return Tensor::scaled_dot_product_attention(q, k, v, Some(mask), 0.0, false, None, false);
    };
    // Scores in float32 at least, as in training.
    let kind = if q.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let scale = (q.size()[q.dim() - 1] as f64).powf(-0.5);
    let scores = q.to_kind(kind).matmul(&k.to_kind(kind).transpose(-2, -1)) * (scale / cap);
    (scores.tanh() * cap + mask).softmax(-1, kind).matmul(&v.to_kind(kind)).to_kind(q.kind())
}

/// What tensor operations need to attend to rows of different lengths.
#[derive(Debug)]
struct Masked {
    /// Slots of `longest` tokens a row; where a row has none, those of its first.
    slots: Slots,
    /// For every window `[B, 1, 1, longest]`: minus infinity where a row has no token, or sees none.
    masks: Vec<(Option<usize>, Tensor)>,
    longest: i64,
}

impl Masked {
    fn new(rows: &[Span], sight: &Sight, kind: Kind, device: Device) -> Result<Self, TchError> {
        let longest = rows.iter().map(Span::tokens).max().unwrap_or(0);
        let padded =
            |row: &Span| (0..longest).map(|i| row.slot(if i < row.tokens() { i } else { 0 })).collect::<Vec<_>>();
        let slots: Vec<(u32, u32)> = rows.iter().flat_map(padded).collect();
        let lengths: Vec<i64> = rows.iter().map(|row| row.tokens() as i64).collect();
        let lengths = Tensor::from_slice(&lengths).to_device(device).unsqueeze(-1);
        let positions = Tensor::f_arange(longest as i64, (Kind::Int64, device))?.unsqueeze(0);
        let missing = positions.f_ge_tensor(&lengths)?;
        let mask = |window: Option<usize>| -> Result<(Option<usize>, Tensor), TchError> {
            let hidden = match window {
                Some(window) => missing.f_logical_or(&positions.f_lt_tensor(&(&lengths - window as i64))?)?,
                None => missing.shallow_clone(),
            };
            let mask = Tensor::f_zeros(hidden.size(), (kind, device))?.f_masked_fill(&hidden, f64::NEG_INFINITY)?;
            Ok((window, mask.unsqueeze(1).unsqueeze(1)))
        };
        let masks = sight.distinct().into_iter().map(mask).collect::<Result<_, _>>()?;
        Ok(Self { slots: Slots::new(&slots, device), masks, longest: longest as i64 })
    }

    fn attend(
        &self,
        q: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        window: Option<usize>,
        score_cap: Option<f64>,
    ) -> Tensor {
        let of_window = self.masks.iter().find(|(found, _)| *found == window);
        let mask = &of_window.expect("there is a mask for every window of the model").1;
        let (batch, heads, head_dim) = q.size3().expect("queries are [B, N, H]");
        let kv_heads = keys.size()[1];
        let rows = |x: Tensor| x.view([batch, self.longest, kv_heads, head_dim]).transpose(1, 2);
        let (keys, values) = (rows(self.slots.keys(keys)), rows(self.slots.values(values)));
        // The query heads of one key head become rows of one query, so that its keys are read once.
        let q = q.reshape([batch, kv_heads, heads / kv_heads, head_dim]);
        attend_masked(&q, &keys, &values, mask, score_cap).reshape([batch, heads * head_dim])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_model::LayerKind;
    use pacs_torch::tch::manual_seed;
    use pacs_torch::{plain, with_emulated_flash};
    use std::path::Path;

    fn config() -> ModelConfig {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        ModelConfig::read(&folder).expect("golden model")
    }

    fn random(config: &ModelConfig, tokens: usize) -> [Tensor; 3] {
        let random = |heads: i64| Tensor::randn([tokens as i64, heads, config.head_dim], (Kind::Float, Device::Cpu));
        [random(config.heads), random(config.kv_heads), random(config.kv_heads)]
    }

    fn span(prompt: usize, answer: usize, new: usize) -> Span {
        Span { prompt: (vec![1, 3].into(), prompt), answer: (vec![2, 0], answer), new }
    }

    /// Attention of a whole sequence at once, in two chunks, and in a chunk and token by token.
    #[test]
    fn pieces_of_a_sequence_are_as_the_whole() {
        for window in [None, Some(1), Some(32), Some(50), Some(80), Some(1000)] {
            for score_cap in [None, Some(1.5)] {
                let layer_kinds = vec![LayerKind::PLAIN, LayerKind { window, ..LayerKind::PLAIN }];
                check_pieces(&ModelConfig { layer_kinds, score_cap, ..config() });
            }
        }
    }

    /// Attention of a sequence to itself by one head after the other.
    fn by_heads(q: &Tensor, k: &Tensor, v: &Tensor, window: Option<usize>, score_cap: Option<f64>) -> Tensor {
        let (tokens, heads, head_dim) = q.size3().expect("queries");
        let group = heads / k.size()[1];
        let all = || Tensor::ones([tokens, tokens], (Kind::Bool, Device::Cpu));
        let seen = window.map_or_else(|| all().tril(0), |window| all().tril(0).triu(1 - window as i64));
        let of_head = |head: i64| {
            let [q, k, v] = [q.select(1, head), k.select(1, head / group), v.select(1, head / group)];
            let scores = q.matmul(&k.tr()) / (head_dim as f64).sqrt();
            let scores = score_cap.map_or_else(|| scores.shallow_clone(), |cap| (&scores / cap).tanh() * cap);
            scores.masked_fill(&seen.logical_not(), f64::NEG_INFINITY).softmax(-1, Kind::Float).matmul(&v)
        };
        Tensor::cat(&(0..heads).map(of_head).collect::<Vec<_>>(), 1)
    }

    fn check_pieces(config: &ModelConfig) {
        manual_seed(2);
        let (prompt, answer) = (45, 40);
        let [q, k, v] = random(config, prompt + answer);
        let (window, score_cap) = (config.layer_kind(1).window, config.score_cap);
        let whole = by_heads(&q, &k, &v, window, score_cap);
        let part = |from: usize, tokens: usize| [&q, &k, &v].map(|x| x.narrow(0, from as i64, tokens as i64));
        let run = |ends: &[usize]| {
            let mut cache = KvCache::new(config, 4, Kind::Float, Device::Cpu).expect("there is room");
            let mut outputs = Vec::new();
            let mut from = 0;
            for &end in ends {
                let span = span(end.min(prompt), end.saturating_sub(prompt), end - from);
                let (decode, chunks) = if end - from == 1 { (vec![span], vec![]) } else { (vec![], vec![span]) };
                let [q, k, v] = part(from, end - from);
                outputs.push(cache.pass(decode, chunks).expect("fits").attend(1, q, k, v));
                from = end;
            }
            Tensor::cat(&outputs, 0)
        };
        let by_tokens: Vec<usize> = [30].into_iter().chain(31..=85).collect();
        for ends in [&[85][..], &[32, 45, 85], &[45, 84, 85], &by_tokens] {
            for found in [run(ends), plain(|| run(ends)), with_emulated_flash(|| run(ends))] {
                let difference = (&found - &whole).abs().max().double_value(&[]);
                assert!(difference < 1e-5, "{window:?}, {score_cap:?}, {ends:?}: {difference}");
            }
        }
    }

    #[test]
    fn rows_and_chunks_of_one_pass_do_not_see_each_other() {
        check_one_pass();
        plain(check_one_pass);
        with_emulated_flash(check_one_pass);
    }

    fn check_one_pass() {
        manual_seed(3);
        let config = config();
        let mut cache = KvCache::new(&config, 9, Kind::Float, Device::Cpu).expect("there is room");
        let rows = [
            Span { prompt: (vec![0].into(), 20), answer: (vec![1], 5), new: 1 },
            Span { prompt: (vec![0].into(), 20), answer: (vec![2], 31), new: 1 },
        ];
        let chunk = Span { prompt: (vec![4, 5].into(), 50), answer: (Vec::new(), 0), new: 10 };
        let whole = Span { prompt: (vec![6].into(), 7), answer: (Vec::new(), 0), new: 7 };
        // What the cache holds before: everything but the last tokens.
        for (spans, skip) in [(&rows[..], 0), (&rows[..], 1), (std::slice::from_ref(&chunk), 0)] {
            let mut span = spans[skip].clone();
            span.new = span.tokens();
            let [q, k, v] = random(&config, span.tokens());
            let _ = cache.pass(Vec::new(), vec![span]).expect("fits").attend(0, q, k, v);
        }
        let [q, k, v] = random(&config, 19);
        let copies = [cache.keys.copy(), cache.values.copy()];
        let mut run = |decode: Vec<Span>, chunks: Vec<Span>, from: i64, tokens: i64| {
            let part = |x: &Tensor| x.narrow(0, from, tokens);
            cache.keys.copy_(&copies[0]);
            cache.values.copy_(&copies[1]);
            cache.pass(decode, chunks).expect("fits").attend(0, part(&q), part(&k), part(&v))
        };
        let together = run(rows.to_vec(), vec![chunk.clone(), whole.clone()], 0, 19);
        let alone = [
            run(vec![rows[0].clone()], Vec::new(), 0, 1),
            run(vec![rows[1].clone()], Vec::new(), 1, 1),
            run(Vec::new(), vec![chunk], 2, 10),
            run(Vec::new(), vec![whole], 12, 7),
        ];
        assert!((together - Tensor::cat(&alone, 0)).abs().max().double_value(&[]) < 1e-6);
    }
}
