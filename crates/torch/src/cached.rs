//! Attention of one new token a row over cached keys and values in host memory.

use tch::Tensor;

use crate::dot::dot;
use crate::element::{Element, by_kind, for_each_instruction_set};
use crate::parallel;
use crate::softmax::{exponentials, maximum};
use crate::view::{ViewError, rows_ref};

/// Holds the new key and value of each row behind those it has, and attends to all of them.
///
/// `q`: `[B, N, H]`, `k` and `v`: `[B, K, H]`, rotated, rows may lie apart; `keys` and `values`: the cache of one layer,
/// `[R, C, K, H]` contiguous with room for `C` tokens in each of `R` rows, of which the first `B` are those of `q`;
/// `lengths`: tokens that each row holds already. All of one kind; scores and sums are float32. Query head `n` reads
/// key head `n / (N / K)`. Returns `[B, N H]`.
///
/// # Errors
/// When a tensor cannot be viewed.
///
/// # Panics
/// When the shapes do not fit, or a row is full.
pub fn attend_cached(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    keys: &mut Tensor,
    values: &mut Tensor,
    lengths: &[usize],
) -> Result<Tensor, ViewError> {
    let (batch, heads, head_dim) = q.size3().expect("queries are [B, N, H]");
    let (rows, capacity, kv_heads, width) = keys.size4().expect("a cache is [R, C, K, H]");
    assert!(keys.size() == values.size() && width == head_dim && heads % kv_heads == 0, "the cache is of other heads");
    assert!(lengths.len() as i64 == batch && batch <= rows, "{batch} rows, {} lengths", lengths.len());
    assert!(lengths.iter().all(|length| (*length as i64) < capacity), "a row of the cache is full");
    let shape = Shape {
        capacity: capacity as usize,
        kv_heads: kv_heads as usize,
        group: (heads / kv_heads) as usize,
        head_dim: head_dim as usize,
    };
    let mut output = Tensor::empty([batch, heads * head_dim], (q.kind(), q.device()));
    by_kind!(q, run((q, k, v), keys, values, lengths, shape, &mut output))?;
    Ok(output)
}

#[derive(Clone, Copy)]
struct Shape {
    capacity: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
}

/// One row of the batch.
struct Row<'a, T> {
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    keys: &'a mut [T],
    values: &'a mut [T],
    length: usize,
    output: &'a mut [T],
}

fn run<T: Element>(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    keys: &mut Tensor,
    values: &mut Tensor,
    lengths: &[usize],
    shape: Shape,
    output: &mut Tensor,
) -> Result<(), ViewError> {
    let cached = shape.capacity * shape.kv_heads * shape.head_dim;
    let width = shape.kv_heads * shape.group * shape.head_dim;
    let new = rows_ref::<T>(q)?.into_iter().zip(rows_ref::<T>(k)?).zip(rows_ref::<T>(v)?);
    let held = T::slice_mut(keys)?.chunks_mut(cached).zip(T::slice_mut(values)?.chunks_mut(cached));
    let rows = new.zip(held).zip(lengths).zip(T::slice_mut(output)?.chunks_mut(width));
    let rows =
        rows.map(|(((((q, k), v), (keys, values)), &length), output)| Row { q, k, v, keys, values, length, output });
    parallel::map(rows.collect(), |row| attend_row(row, shape));
    Ok(())
}

for_each_instruction_set!(attend_row = attend_plain<T>(row: Row<'_, T>, shape: Shape));

/// Loops over the common head widths are unrolled.
#[inline(always)]
fn attend_plain<T: Element>(row: Row<'_, T>, shape: Shape) {
    match shape.head_dim {
        64 => attend_sized::<T, 64>(row, shape),
        128 => attend_sized::<T, 128>(row, shape),
        _ => attend_sized::<T, 0>(row, shape),
    }
}

/// `WIDTH` is the width of a head, or 0 for any.
#[inline(always)]
fn attend_sized<T: Element, const WIDTH: usize>(row: Row<'_, T>, shape: Shape) {
    let Shape { kv_heads, group, .. } = shape;
    let head_dim = if WIDTH == 0 { shape.head_dim } else { WIDTH };
    let stride = kv_heads * head_dim;
    let new = row.length * stride..(row.length + 1) * stride;
    row.keys[new.clone()].copy_from_slice(row.k);
    row.values[new].copy_from_slice(row.v);
    let held = row.length + 1;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let mut queries = vec![0.0f32; group * head_dim];
    let mut wide = vec![0.0f32; head_dim];
    let mut scores = vec![0.0f32; group * held];
    let mut sums = vec![0.0f32; group * head_dim];
    for head in 0..kv_heads {
        let of_head = head * group * head_dim..(head + 1) * group * head_dim;
        for (wide, q) in queries.iter_mut().zip(&row.q[of_head.clone()]) {
            *wide = q.read() * scale;
        }
        // Each key and each value is read once, for all query heads of its group.
        for token in 0..held {
            widen(&mut wide, &row.keys[token * stride + head * head_dim..][..head_dim]);
            for (query, scores) in queries.chunks_exact(head_dim).zip(scores.chunks_exact_mut(held)) {
                scores[token] = dot(query, &wide);
            }
        }
        let mut totals = vec![0.0f32; group];
        for (scores, total) in scores.chunks_exact_mut(held).zip(&mut totals) {
            *total = exponentials(scores, maximum(scores)).0;
        }
        sums.fill(0.0);
        for token in 0..held {
            widen(&mut wide, &row.values[token * stride + head * head_dim..][..head_dim]);
            for (sum, scores) in sums.chunks_exact_mut(head_dim).zip(scores.chunks_exact(held)) {
                let weight = scores[token];
                for (sum, value) in sum.iter_mut().zip(&wide) {
                    *sum += weight * value;
                }
            }
        }
        let outputs = row.output[of_head].chunks_exact_mut(head_dim).zip(sums.chunks_exact(head_dim));
        for ((output, sum), total) in outputs.zip(&totals) {
            for (output, sum) in output.iter_mut().zip(sum) {
                *output = T::write(sum / total);
            }
        }
    }
}

#[inline(always)]
fn widen<T: Element>(wide: &mut [f32], narrow: &[T]) {
    for (wide, narrow) in wide.iter_mut().zip(narrow) {
        *wide = narrow.read();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{difference, random};
    use tch::Kind;

    #[test]
    fn equals_attention_of_each_row_alone() {
        let (n, kv, h, rows, capacity) = (6, 2, 24, 4, 20);
        let lengths = [0usize, 3, 19];
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
            let qkv = random(&[3, n + 2 * kv, h], kind);
            let parts = qkv.split_with_sizes([n, kv, kv], 1);
            let mut cache = [random(&[rows, capacity, kv, h], kind), random(&[rows, capacity, kv, h], kind)];
            let before = [cache[0].copy(), cache[1].copy()];
            let [keys, values] = &mut cache;
            let output = attend_cached((&parts[0], &parts[1], &parts[2]), keys, values, &lengths).expect("host");
            for (row, length) in lengths.iter().enumerate() {
                let (row, length) = (row as i64, *length as i64);
                let sequence = |before: &Tensor, new: &Tensor| {
                    let all = Tensor::cat(&[before.get(row).narrow(0, 0, length), new.get(row).unsqueeze(0)], 0);
                    all.to_kind(Kind::Double).transpose(0, 1).repeat_interleave_self_int(n / kv, 0, None)
                };
                let (k, v) = (sequence(&before[0], &parts[1]), sequence(&before[1], &parts[2]));
                let q = parts[0].get(row).to_kind(Kind::Double).unsqueeze(1);
                let weights = (q.matmul(&k.transpose(1, 2)) / (h as f64).sqrt()).softmax(-1, Kind::Double);
                let expected = weights.matmul(&v).view([-1]);
                assert!(difference(&output.get(row), &expected) < tolerance, "{kind:?} row {row}");
                assert!(cache[0].get(row).get(length).equal(&parts[1].get(row)));
            }
            assert!(cache[1].get(3).equal(&before[1].get(3)), "a row that does not run was touched");
        }
    }
}
