//! Keys and values in blocks of host memory: storing new tokens, and attention of one new token a row.
//!
//! `P` blocks, `K` key heads, `N` query heads, `H` head width, `S` tokens of a block. Keys lie as `[P, K, H, S]`: scores of
//! neighbouring tokens are then neighbours in a vector register, and nothing is summed across one. Values lie as
//! `[P, K, S, H]`, so that sums of them are.

use tch::Tensor;

use crate::element::{Element, by_kind, for_each_instruction_set};
use crate::parallel;
use crate::softmax::{exponentials, maximum};
use crate::view::{ViewError, rows_ref};

/// Tokens of a block, `S`.
pub const BLOCK_TOKENS: usize = 32;

/// Consecutive tokens of a row: every block is full but the last.
#[derive(Clone, Copy, Debug)]
pub struct BlockRun<'a> {
    /// Indices of blocks, no fewer than the tokens take.
    pub blocks: &'a [u32],
    /// Tokens in them.
    pub tokens: usize,
}

/// Tokens that a row attends to: those of its prompt, which other rows may share, and its own.
pub type BlockRow<'a> = [BlockRun<'a>; 2];

/// Parts of a batch for each thread, so that none waits long for another.
const PARTS_A_THREAD: usize = 8;

/// Puts the keys and values of new tokens into their places.
///
/// `k` and `v`: `[T, K, H]`, rows may lie apart; `keys`: `[P, K, H, S]` and `values`: `[P, K, S, H]` of one layer,
/// contiguous; `slots`: block and place within it of each token. All of one kind.
///
/// # Errors
/// When a tensor cannot be viewed.
///
/// # Panics
/// When the shapes do not fit, or a slot lies outside the blocks.
pub fn store_blocks(
    (k, v): (&Tensor, &Tensor),
    keys: &mut Tensor,
    values: &mut Tensor,
    slots: &[(u32, u32)],
) -> Result<(), ViewError> {
    let shape = Shape::of(keys, values);
    let (tokens, kv_heads, head_dim) = k.size3().expect("keys are [T, K, H]");
    assert!(k.size() == v.size() && tokens as usize == slots.len(), "{tokens} tokens for {} slots", slots.len());
    assert!(
        (kv_heads as usize, head_dim as usize) == (shape.kv_heads, shape.head_dim),
        "the blocks are of other heads"
    );
    by_kind!(k, store((k, v), keys, values, slots, shape))
}

fn store<T: Element>(
    (k, v): (&Tensor, &Tensor),
    keys: &mut Tensor,
    values: &mut Tensor,
    slots: &[(u32, u32)],
    shape: Shape,
) -> Result<(), ViewError> {
    let Shape { kv_heads, head_dim, .. } = shape;
    let (new_keys, new_values) = (rows_ref::<T>(k)?, rows_ref::<T>(v)?);
    let keys = T::slice_mut(keys)?;
    let values = T::slice_mut(values)?;
    for ((&(block, place), key), value) in slots.iter().zip(new_keys).zip(new_values) {
        let block = block as usize;
        let place = place as usize;
        assert!(place < BLOCK_TOKENS, "a block has no place {place}");
        // Keys are stored transposed: each is written once with a stride, and read again for every later token without one.
        for head in 0..kv_heads {
            let of_head = head * head_dim..(head + 1) * head_dim;
            let start = shape.head_start(block, head);
            let columns = keys[start..start + head_dim * BLOCK_TOKENS].chunks_exact_mut(BLOCK_TOKENS);
            for (column, element) in columns.zip(&key[of_head.clone()]) {
                column[place] = *element;
            }
            values[start + place * head_dim..][..head_dim].copy_from_slice(&value[of_head]);
        }
    }
    Ok(())
}

/// Attention of one query a row over the tokens in its blocks; each key and value is read once for all query heads of
/// its group.
///
/// `q`: `[B, N, H]`, rotated, rows may lie apart; `keys`, `values`: as for [`store_blocks`]; `rows`: `B` of them, none
/// empty; `window`: tokens at the end of a row that its query sees, at least one; none: all. Scores and sums are float32.
/// Query head `n` reads key head `n / (N / K)`. Returns `[B, N H]`.
///
/// # Errors
/// When a tensor cannot be viewed.
///
/// # Panics
/// When the shapes do not fit, or a row names a block that is not there.
pub fn attend_blocks(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    rows: &[BlockRow<'_>],
    window: Option<usize>,
) -> Result<Tensor, ViewError> {
    let shape = Shape::of(keys, values);
    let (batch, heads, head_dim) = q.size3().expect("queries are [B, N, H]");
    assert!(
        head_dim as usize == shape.head_dim && (heads as usize).is_multiple_of(shape.kv_heads),
        "the blocks are of other heads"
    );
    assert!(batch as usize == rows.len(), "{batch} queries for {} rows", rows.len());
    for run in rows.iter().flatten() {
        assert!(run.tokens <= run.blocks.len() * BLOCK_TOKENS, "{} tokens in {} blocks", run.tokens, run.blocks.len());
    }
    assert!(rows.iter().all(|row| row.iter().any(|run| run.tokens > 0)), "a row has no tokens");
    assert!(window != Some(0), "a window of no tokens");
    let group = heads as usize / shape.kv_heads;
    let mut output = Tensor::empty([batch, heads * head_dim], (q.kind(), q.device()));
    by_kind!(q, attend(q, keys, values, (rows, window), Shape { group, ..shape }, &mut output))?;
    Ok(output)
}

#[derive(Clone, Copy)]
struct Shape {
    kv_heads: usize,
    /// Query heads of a key head.
    group: usize,
    head_dim: usize,
}

impl Shape {
    fn of(keys: &Tensor, values: &Tensor) -> Self {
        let (blocks, kv_heads, head_dim, tokens) = keys.size4().expect("keys are [P, K, H, S]");
        assert!(values.size() == [blocks, kv_heads, tokens, head_dim], "values are [P, K, S, H]");
        assert!(tokens as usize == BLOCK_TOKENS, "blocks of {tokens} tokens");
        Self { kv_heads: kv_heads as usize, group: 1, head_dim: head_dim as usize }
    }

    /// Where the keys, and the values, of a head of a block begin.
    fn head_start(self, block: usize, head: usize) -> usize {
        (block * self.kv_heads + head) * self.head_dim * BLOCK_TOKENS
    }
}

/// The query heads of one key head of one row.
struct Unit<'a, T> {
    q: &'a [T],
    row: BlockRow<'a>,
    /// First tokens of the row that are not seen.
    hidden: usize,
    head: usize,
    output: &'a mut [T],
}

fn attend<T: Element>(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    (rows, window): (&[BlockRow<'_>], Option<usize>),
    shape: Shape,
    output: &mut Tensor,
) -> Result<(), ViewError> {
    let width = shape.group * shape.head_dim;
    let queries = rows_ref::<T>(q)?;
    let keys = T::slice(keys)?;
    let values = T::slice(values)?;
    let outputs = T::slice_mut(output)?.chunks_mut(width);
    let of_rows = queries.iter().zip(rows).flat_map(|(q, row)| (0..shape.kv_heads).map(move |head| (q, row, head)));
    let hidden = |row: &BlockRow<'_>| {
        let tokens = row.iter().map(|run| run.tokens).sum::<usize>();
        window.map_or(0, |window| tokens.saturating_sub(window))
    };
    let mut units: Vec<Unit<'_, T>> = of_rows
        .zip(outputs)
        .map(|((q, row, head), output)| {
            let q = &q[head * width..(head + 1) * width];
            Unit { q, row: *row, hidden: hidden(row), head, output }
        })
        .collect();
    // By units and not by rows: with one row, the heads are what can be divided among threads.
    let part = units.len().div_ceil(parallel::threads() * PARTS_A_THREAD).max(1);
    parallel::map(units.chunks_mut(part).collect(), |units| attend_units(units, keys, values, shape));
    Ok(())
}

for_each_instruction_set!(
    attend_units = attend_units_plain<T>(units: &mut [Unit<'_, T>], keys: &[T], values: &[T], shape: Shape)
);

#[inline(always)]
fn attend_units_plain<T: Element>(units: &mut [Unit<'_, T>], keys: &[T], values: &[T], shape: Shape) {
    let mut scratch = Scratch::default();
    for unit in units {
        // Loops over the common head widths are unrolled.
        match shape.head_dim {
            64 => attend_unit::<T, 64>(unit, keys, values, shape, &mut scratch),
            128 => attend_unit::<T, 128>(unit, keys, values, shape, &mut scratch),
            _ => attend_unit::<T, 0>(unit, keys, values, shape, &mut scratch),
        }
    }
}

#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    /// `[group, blocks S]`.
    scores: Vec<f32>,
    /// Weighted sums of values, `[group, H]`.
    sums: Vec<f32>,
    totals: Vec<f32>,
}

/// `WIDTH` is the width of a head, or 0 for any.
#[inline(always)]
fn attend_unit<T: Element, const WIDTH: usize>(
    unit: &mut Unit<'_, T>,
    keys: &[T],
    values: &[T],
    shape: Shape,
    scratch: &mut Scratch,
) {
    let head_dim = if WIDTH == 0 { shape.head_dim } else { WIDTH };
    let scale = 1.0 / (head_dim as f32).sqrt();
    scratch.queries.clear();
    scratch.queries.extend(unit.q.iter().map(|q| q.read() * scale));
    let stride = blocks(&unit.row, unit.hidden).count() * BLOCK_TOKENS;
    scratch.scores.resize(shape.group * stride, 0.0);
    for Visible { slot, block, hidden, tokens } in blocks(&unit.row, unit.hidden) {
        let key = &keys[shape.head_start(block, unit.head)..][..head_dim * BLOCK_TOKENS];
        let mut query = 0;
        while query < shape.group {
            let queries = &scratch.queries[query * head_dim..];
            let scores = &mut scratch.scores[query * stride + slot..];
            // Up to four queries at a time: their lanes stay in registers, and a key is loaded once for all of them.
            query += match shape.group - query {
                1 => score::<T, 1>(queries, key, head_dim, scores, stride),
                2 | 3 => score::<T, 2>(queries, key, head_dim, scores, stride),
                _ => score::<T, 4>(queries, key, head_dim, scores, stride),
            };
        }
        // Places after the last token hold anything.
        for scores in scratch.scores.chunks_exact_mut(stride) {
            scores[slot + tokens..slot + BLOCK_TOKENS].fill(f32::NEG_INFINITY);
            scores[slot..slot + hidden].fill(f32::NEG_INFINITY);
        }
    }
    scratch.totals.clear();
    for scores in scratch.scores.chunks_exact_mut(stride) {
        // All scores of a row are at hand, so this is the plain softmax and not the running one of flash attention, which rescales its
        // sums whenever the maximum grows.
        let max = maximum(scores);
        scratch.totals.push(exponentials(scores, max).0);
    }
    scratch.sums.clear();
    scratch.sums.resize(shape.group * head_dim, 0.0);
    for Visible { slot, block, tokens, .. } in blocks(&unit.row, unit.hidden) {
        let value = &values[shape.head_start(block, unit.head)..][..head_dim * tokens];
        let mut query = 0;
        while query < shape.group {
            let sums = &mut scratch.sums[query * head_dim..];
            let scores = &scratch.scores[query * stride + slot..];
            query += match (shape.group - query, WIDTH) {
                (1, _) | (_, 0) => weigh::<T, 1, WIDTH>(sums, value, head_dim, scores, stride),
                (2 | 3, _) | (_, 128) => weigh::<T, 2, WIDTH>(sums, value, head_dim, scores, stride),
                _ => weigh::<T, 4, WIDTH>(sums, value, head_dim, scores, stride),
            };
        }
    }
    let outputs = unit.output.chunks_exact_mut(head_dim).zip(scratch.sums.chunks_exact(head_dim));
    for ((output, sum), total) in outputs.zip(&scratch.totals) {
        for (output, sum) in output.iter_mut().zip(sum) {
            *output = T::write(sum / total);
        }
    }
}

/// A block of which some tokens are seen.
struct Visible {
    /// Its first score.
    slot: usize,
    block: usize,
    /// First tokens of it that are not seen.
    hidden: usize,
    /// Tokens in it, those not seen included.
    tokens: usize,
}

/// The blocks of a row but for those whose tokens are all among the first `hidden` ones.
#[inline(always)]
fn blocks<'a>(row: &'a BlockRow<'_>, hidden: usize) -> impl Iterator<Item = Visible> + 'a {
    let of_run = |run: &'a BlockRun<'_>| {
        let used = run.blocks[..run.tokens.div_ceil(BLOCK_TOKENS)].iter().enumerate();
        used.map(|(place, block)| (*block as usize, (run.tokens - place * BLOCK_TOKENS).min(BLOCK_TOKENS)))
    };
    let counted = row.iter().flat_map(of_run).scan(hidden, |hidden, (block, tokens)| {
        let of_block = tokens.min(*hidden);
        *hidden -= of_block;
        Some((block, of_block, tokens))
    });
    let seen = counted.filter(|(_, hidden, tokens)| hidden < tokens).enumerate();
    seen.map(|(place, (block, hidden, tokens))| Visible { slot: place * BLOCK_TOKENS, block, hidden, tokens })
}

/// Scores of `Q` queries with the keys of one block; returns `Q`.
#[inline(always)]
fn score<T: Element, const Q: usize>(
    queries: &[f32],
    key: &[T],
    head_dim: usize,
    scores: &mut [f32],
    stride: usize,
) -> usize {
    let mut lanes = [[0.0f32; BLOCK_TOKENS]; Q];
    for (place, column) in key.as_chunks::<BLOCK_TOKENS>().0.iter().enumerate() {
        for (query, lanes) in lanes.iter_mut().enumerate() {
            let q = queries[query * head_dim + place];
            for (lane, key) in lanes.iter_mut().zip(column) {
                *lane += q * key.read();
            }
        }
    }
    for (query, lanes) in lanes.iter().enumerate() {
        scores[query * stride..][..BLOCK_TOKENS].copy_from_slice(lanes);
    }
    Q
}

/// Adds the values of one block to the sums of `Q` queries, by weight; returns `Q`.
#[inline(always)]
fn weigh<T: Element, const Q: usize, const WIDTH: usize>(
    sums: &mut [f32],
    value: &[T],
    head_dim: usize,
    scores: &[f32],
    stride: usize,
) -> usize {
    if WIDTH == 0 {
        for query in 0..Q {
            let sums = &mut sums[query * head_dim..][..head_dim];
            for (value, weight) in value.chunks_exact(head_dim).zip(&scores[query * stride..]) {
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum += weight * value.read();
                }
            }
        }
        return Q;
    }
    let mut lanes = [[0.0f32; WIDTH]; Q];
    for (query, lanes) in lanes.iter_mut().enumerate() {
        lanes.copy_from_slice(&sums[query * WIDTH..][..WIDTH]);
    }
    for (token, value) in value.as_chunks::<WIDTH>().0.iter().enumerate() {
        for (query, lanes) in lanes.iter_mut().enumerate() {
            let weight = scores[query * stride + token];
            for (lane, value) in lanes.iter_mut().zip(value) {
                *lane += weight * value.read();
            }
        }
    }
    for (query, lanes) in lanes.iter().enumerate() {
        sums[query * WIDTH..][..WIDTH].copy_from_slice(lanes);
    }
    Q
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{difference, random};
    use tch::Kind;

    /// Blocks of three rows: two share a prompt, one has none. Everything that is not written is not a number.
    #[test]
    fn equals_attention_of_each_row_alone() {
        tch::manual_seed(4);
        let layout: [(&[u32], usize, &[u32], usize); 3] =
            [(&[4, 0], 40, &[6, 1], 33), (&[4, 0], 40, &[3], 1), (&[], 0, &[5, 2, 8], 96)];
        for (n, kv, h) in [(6i64, 2i64, 24i64), (3, 3, 64), (7, 1, 64), (8, 2, 128)] {
            for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
                let s = BLOCK_TOKENS as i64;
                let unset = |size: &[i64]| Tensor::full(size, f64::NAN, (kind, tch::Device::Cpu));
                let (mut keys, mut values) = (unset(&[9, kv, h, s]), unset(&[9, kv, s, h]));
                let mut held = Vec::new();
                for (prompt, prompt_tokens, own, own_tokens) in layout {
                    let slot =
                        |blocks: &[u32], place: usize| (blocks[place / BLOCK_TOKENS], (place % BLOCK_TOKENS) as u32);
                    let places = (0..prompt_tokens).map(|place| slot(prompt, place));
                    let slots: Vec<_> = places.chain((0..own_tokens).map(|place| slot(own, place))).collect();
                    let new = random(&[slots.len() as i64, 2 * kv, h], kind);
                    let [k, v] = [new.narrow(1, 0, kv), new.narrow(1, kv, kv)];
                    // A shared prompt is written twice; the second time counts for both rows.
                    store_blocks((&k, &v), &mut keys, &mut values, &slots).expect("host");
                    held.push((slots, k, v));
                }
                let (_, k1, v1) = &held[1];
                let shared = |mine: &Tensor, second: &Tensor| {
                    Tensor::cat(&[second.narrow(0, 0, 40), mine.narrow(0, 40, mine.size()[0] - 40)], 0)
                };
                held[0] = (held[0].0.clone(), shared(&held[0].1, k1), shared(&held[0].2, v1));
                let q = random(&[3, n + 1, h], kind).narrow(1, 0, n);
                let rows = layout.map(|(prompt, prompt_tokens, own, own_tokens)| {
                    [BlockRun { blocks: prompt, tokens: prompt_tokens }, BlockRun { blocks: own, tokens: own_tokens }]
                });
                // A window ends within a block, at the end of one, and before the prompt.
                for (window, (row, (_, k, v))) in [None, Some(1), Some(32), Some(50), Some(70), Some(1000)]
                    .into_iter()
                    .flat_map(|window| held.iter().enumerate().map(move |row| (window, row)))
                {
                    let output = attend_blocks(&q, &keys, &values, &rows, window).expect("host");
                    let seen = window.map_or(k.size()[0], |window| k.size()[0].min(window as i64));
                    let heads = |x: &Tensor| {
                        let x = x.narrow(0, x.size()[0] - seen, seen);
                        x.to_kind(Kind::Double).transpose(0, 1).repeat_interleave_self_int(n / kv, 0, None)
                    };
                    let q = q.get(row as i64).to_kind(Kind::Double).unsqueeze(1);
                    let weights = (q.matmul(&heads(k).transpose(1, 2)) / (h as f64).sqrt()).softmax(-1, Kind::Double);
                    let expected = weights.matmul(&heads(v)).view([-1]);
                    let found = difference(&output.get(row as i64), &expected);
                    assert!(
                        found < tolerance,
                        "{kind:?}, {n} heads on {kv} of width {h}, row {row}, {window:?}: {found}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_stored_token_is_found_in_its_place_only() {
        let (mut keys, mut values) = (random(&[3, 2, 8, 32], Kind::Float), random(&[3, 2, 32, 8], Kind::Float));
        let (keys_before, values_before) = (keys.copy(), values.copy());
        let new = random(&[1, 4, 8], Kind::Float);
        let (k, v) = (new.narrow(1, 0, 2), new.narrow(1, 2, 2));
        store_blocks((&k, &v), &mut keys, &mut values, &[(1, 31)]).expect("host");
        assert!(keys.get(1).select(2, 31).equal(&k.get(0)) && values.get(1).select(1, 31).equal(&v.get(0)));
        let changed = |a: &Tensor, b: &Tensor| a.ne_tensor(b).sum(Kind::Int64).int64_value(&[]);
        assert_eq!((changed(&keys, &keys_before), changed(&values, &values_before)), (16, 16));
    }
}
