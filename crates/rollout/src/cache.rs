//! Keys and values of the tokens that running rows have seen.
//!
//! `B` running rows, `R` rows there is room for, `C` tokens there is room for, `T` packed tokens, `N` query heads,
//! `K` key heads, `H` head width. Running rows are always rows `0..B`: a finished row is replaced by the last one, so
//! that a decode step reads one contiguous block.

use pacs_model::{Attention, ModelConfig};
use pacs_torch::tch::{Device, Kind, TchError, Tensor};
use pacs_torch::{attend_cached, has_kernels};

/// Rows grow in steps of this many tokens, so that a step rarely has to move the cache.
const GROWTH_TOKENS: i64 = 64;

/// The cache of all layers.
#[derive(Debug)]
pub(crate) struct KvCache {
    /// `[layers, 2, R, C, K, H]`.
    data: Tensor,
    /// Tokens held by each running row, `B` of them.
    lengths: Vec<i64>,
}

impl KvCache {
    /// An empty cache with room for `rows` rows.
    pub(crate) fn new(config: &ModelConfig, rows: usize, kind: Kind, device: Device) -> Self {
        let layers = config.layers as i64;
        let (heads, head_dim) = (config.kv_heads, config.head_dim);
        let data = Tensor::zeros([layers, 2, rows as i64, GROWTH_TOKENS, heads, head_dim], (kind, device));
        Self { data, lengths: Vec::new() }
    }

    /// Bytes that one token of one row takes, over all layers.
    pub(crate) fn bytes_per_token(config: &ModelConfig, kind: Kind) -> usize {
        2 * config.layers * (config.kv_heads * config.head_dim) as usize * kind.elt_size_in_bytes()
    }

    /// Makes room for rows of `tokens` tokens.
    fn reserve(&mut self, tokens: i64) -> Result<(), TchError> {
        let mut size = self.data.size();
        if tokens <= size[3] {
            return Ok(());
        }
        let held = size[3];
        // At least half as much again: growing to length n copies O(n) in all.
        size[3] = (tokens.max(held + held / 2) + GROWTH_TOKENS - 1) / GROWTH_TOKENS * GROWTH_TOKENS;
        let grown = Tensor::f_zeros(&size, (self.data.kind(), self.data.device()))?;
        grown.f_narrow(3, 0, held)?.f_copy_(&self.data)?;
        self.data = grown;
        Ok(())
    }

    /// Adds running rows for prompts, `(prompt tokens, rows)` each; the prefill pass fills them.
    pub(crate) fn prefill(&mut self, prompts: &[(usize, usize)]) -> Result<Prefill<'_>, TchError> {
        let longest = prompts.iter().map(|(tokens, _)| *tokens as i64).max().unwrap_or(0);
        self.reserve(longest)?;
        let mut segments = Vec::with_capacity(prompts.len());
        let mut start = 0;
        for &(tokens, rows) in prompts {
            let (tokens, rows) = (tokens as i64, rows as i64);
            segments.push(Segment { start, tokens, first_row: self.lengths.len() as i64, rows });
            self.lengths.extend((0..rows).map(|_| tokens));
            start += tokens;
        }
        Ok(Prefill { data: &self.data, segments })
    }

    /// Makes room for one more token in every running row, for the decode pass that fills it.
    pub(crate) fn decode(&mut self) -> Result<Decode<'_>, TchError> {
        let longest = self.lengths.iter().max().copied().unwrap_or(0) + 1;
        self.reserve(longest)?;
        let masked = if has_kernels(&self.data) { None } else { Some(self.mask(longest)?) };
        let held = self.lengths.iter().map(|length| *length as usize).collect();
        for length in &mut self.lengths {
            *length += 1;
        }
        Ok(Decode { data: &self.data, held, masked })
    }

    /// What tensor operations need to attend to rows of different lengths, up to `longest` with the new token.
    fn mask(&self, longest: i64) -> Result<Masked, TchError> {
        let (device, kind) = (self.data.device(), self.data.kind());
        let capacity = self.data.size()[3];
        let slots: Vec<i64> = self.lengths.iter().enumerate().map(|(row, len)| row as i64 * capacity + len).collect();
        let lengths = Tensor::from_slice(&self.lengths).to_device(device).unsqueeze(-1);
        let positions = Tensor::f_arange(longest, (Kind::Int64, device))?.unsqueeze(0);
        let hidden = positions.f_gt_tensor(&lengths)?;
        let mask = Tensor::f_zeros(hidden.size(), (kind, device))?.f_masked_fill(&hidden, f64::NEG_INFINITY)?;
        let slots = Tensor::from_slice(&slots).to_device(device);
        Ok(Masked { slots, mask: mask.unsqueeze(1).unsqueeze(1), longest })
    }

    /// Removes a row; the last running row takes its place.
    pub(crate) fn swap_remove(&mut self, row: usize) -> Result<(), TchError> {
        let last = self.lengths.len() - 1;
        if row != last {
            let used = self.lengths[last];
            let source = self.data.f_select(2, last as i64)?.f_narrow(2, 0, used)?;
            self.data.f_select(2, row as i64)?.f_narrow(2, 0, used)?.f_copy_(&source)?;
        }
        self.lengths.swap_remove(row);
        Ok(())
    }
}

#[derive(Debug)]
struct Segment {
    start: i64,
    tokens: i64,
    first_row: i64,
    rows: i64,
}

/// Attention of the prefill pass: each prompt stands once among the packed tokens and fills all of its rows.
#[derive(Debug)]
pub(crate) struct Prefill<'a> {
    data: &'a Tensor,
    segments: Vec<Segment>,
}

impl Attention for Prefill<'_> {
    fn attend(&mut self, layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let (tokens, heads, head_dim) = q.size3().expect("queries are [T, N, H]");
        let layer = self.data.select(0, layer as i64);
        let outputs: Vec<Tensor> = self
            .segments
            .iter()
            .map(|segment| {
                let part = |x: &Tensor| x.narrow(0, segment.start, segment.tokens);
                for (which, source) in [(0, &k), (1, &v)] {
                    let rows = layer.select(0, which).narrow(0, segment.first_row, segment.rows);
                    rows.narrow(1, 0, segment.tokens).copy_(&part(source).unsqueeze(0));
                }
                let batch = |x: &Tensor| part(x).transpose(0, 1).unsqueeze(0);
                let (q, k, v) = (batch(&q), batch(&k), batch(&v));
                Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, true, None, true)
                    .squeeze_dim(0)
                    .transpose(0, 1)
            })
            .collect();
        Tensor::cat(&outputs, 0).reshape([tokens, heads * head_dim])
    }
}

/// Attention of a decode step: one new token a running row.
#[derive(Debug)]
pub(crate) struct Decode<'a> {
    data: &'a Tensor,
    /// Tokens that each row held before.
    held: Vec<usize>,
    /// For devices without a kernel.
    masked: Option<Masked>,
}

#[derive(Debug)]
struct Masked {
    /// Where the new token of each row goes, in a flat view of rows and tokens.
    slots: Tensor,
    /// `[B, 1, 1, longest]`: minus infinity where a row has no token.
    mask: Tensor,
    longest: i64,
}

impl Attention for Decode<'_> {
    fn attend(&mut self, layer: usize, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let layer = self.data.select(0, layer as i64);
        let (mut keys, mut values) = (layer.select(0, 0), layer.select(0, 1));
        match &self.masked {
            Some(masked) => masked.attend(&q, &k, &v, &keys, &values),
            None => attend_cached((&q, &k, &v), &mut keys, &mut values, &self.held).expect("the cache is contiguous"),
        }
    }
}

impl Masked {
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, keys: &Tensor, values: &Tensor) -> Tensor {
        let (batch, heads, head_dim) = q.size3().expect("queries are [B, N, H]");
        let key_heads = k.size()[1];
        let hold = |rows: &Tensor, new: &Tensor| {
            let _ = rows.view([-1, key_heads, head_dim]).index_copy_(0, &self.slots, new);
            rows.narrow(0, 0, batch).narrow(1, 0, self.longest).transpose(1, 2)
        };
        let (keys, values) = (hold(keys, k), hold(values, v));
        // The query heads of one key head become rows of one query, so that its keys are read once.
        let q = q.view([batch, key_heads, heads / key_heads, head_dim]);
        Tensor::scaled_dot_product_attention(&q, &keys, &values, Some(&self.mask), 0.0, false, None, false)
            .reshape([batch, heads * head_dim])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_torch::tch::no_grad;
    use std::path::Path;

    #[test]
    fn the_kernel_and_the_mask_agree() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        let config = ModelConfig::read(&folder).expect("golden model");
        let mut cache = KvCache::new(&config, 3, Kind::Float, Device::Cpu);
        drop(cache.prefill(&[(5, 1), (63, 2)]).expect("there is room"));
        let (kv, h) = (config.kv_heads, config.head_dim);
        let _ = no_grad(|| cache.data.normal_(0.0, 1.0));
        let masked = cache.mask(64).expect("host");
        let random = |heads: i64| Tensor::randn([3, heads, h], (Kind::Float, Device::Cpu));
        let (q, k, v) = (random(config.heads), random(kv), random(kv));
        let (keys, values) = (cache.data.select(0, 1).select(0, 0).copy(), cache.data.select(0, 1).select(0, 1).copy());
        let expected = masked.attend(&q, &k, &v, &keys, &values);
        let found = cache.decode().expect("there is room").attend(1, q, k, v);
        assert!((found - expected).abs().max().double_value(&[]) < 1e-5);
        assert!(cache.data.select(0, 1).select(0, 0).equal(&keys), "the new keys are elsewhere");
    }
}
