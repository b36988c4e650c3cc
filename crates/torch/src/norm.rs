//! Root-mean-square norm of rows in host memory, and its backward.
//!
//! libtorch composes it of eight operations on a CPU, each a pass over memory and a round of its threads.

use tch::{Kind, Tensor};

use crate::dot::dot;
use crate::element::{Element, by_kind, for_each_instruction_set};
use crate::exact::{add_exact, note_bound};
use crate::fixed::{fixed_units, row_parts};
use crate::parallel;
use crate::view::{ViewError, f32_mut, i64_mut};

/// Fewest elements that are worth a thread.
const SMALLEST_PART: usize = 1 << 14;

/// `x / rms(x) * weight` for every row, in float32 with one rounding at the end.
///
/// `x`: `[.., D]` contiguous; `weight`: `[D]`, of one kind. Returns the shape of `x`.
///
/// # Errors
/// When a tensor cannot be viewed.
pub fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor, ViewError> {
    let mut output = x.empty_like();
    by_kind!(x, forward(None, x, weight, epsilon as f32, &mut output))?;
    Ok(output)
}

/// The sum of two tensors and its norm.
///
/// `x` and `y`: `[T, D]` contiguous, of one kind; `weight`: `[D]`.
///
/// # Errors
/// When a tensor cannot be viewed.
pub fn add_rms_norm(x: &Tensor, y: &Tensor, weight: &Tensor, epsilon: f64) -> Result<(Tensor, Tensor), ViewError> {
    let mut sum = x.empty_like();
    let mut output = x.empty_like();
    by_kind!(x, forward(Some((y, &mut sum)), x, weight, epsilon as f32, &mut output))?;
    Ok((sum, output))
}

fn forward<T: Element>(
    added: Option<(&Tensor, &mut Tensor)>,
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    output: &mut Tensor,
) -> Result<(), ViewError> {
    let (x, weight, output) = (T::slice(x)?, widened::<T>(weight)?, T::slice_mut(output)?);
    let part = parallel::part_length(x.len(), SMALLEST_PART).next_multiple_of(weight.len());
    let added: Vec<Added<'_, T>> = match added {
        Some((y, sum)) => T::slice(y)?.chunks(part).zip(T::slice_mut(sum)?.chunks_mut(part)).map(Some).collect(),
        None => x.chunks(part).map(|_| None).collect(),
    };
    let parts = added.into_iter().zip(x.chunks(part)).zip(output.chunks_mut(part)).collect();
    parallel::map(parts, |((added, x), output)| forward_rows(added, x, &weight, epsilon, output));
    Ok(())
}

/// What is added before the norm, and where the sum goes.
type Added<'a, T> = Option<(&'a [T], &'a mut [T])>;

for_each_instruction_set!(forward_rows = forward_plain<T>(
    added: Added<'_, T>, x: &[T], weight: &[f32], epsilon: f32, output: &mut [T],
));

#[inline(always)]
fn forward_plain<T: Element>(added: Added<'_, T>, x: &[T], weight: &[f32], epsilon: f32, output: &mut [T]) {
    let width = weight.len();
    let mut row = vec![0.0f32; width];
    let mut added = added.map(|(y, sum)| y.chunks_exact(width).zip(sum.chunks_exact_mut(width)));
    for (x, output) in x.chunks_exact(width).zip(output.chunks_exact_mut(width)) {
        match added.as_mut().and_then(Iterator::next) {
            Some((y, sum)) => {
                for (((row, sum), x), y) in row.iter_mut().zip(sum).zip(x).zip(y) {
                    // The norm is of the sum as it is kept, rounded.
                    *sum = T::write(x.read() + y.read());
                    *row = sum.read();
                }
            }
            None => {
                for (row, x) in row.iter_mut().zip(x) {
                    *row = x.read();
                }
            }
        }
        let scale = inverse_rms(&row, epsilon);
        for ((output, row), weight) in output.iter_mut().zip(&row).zip(weight) {
            *output = T::write(row * scale * weight);
        }
    }
}

/// Backward of [`rms_norm`].
///
/// `x`, `gradient` (by the output) and `residual`: `[T, D]` contiguous, of one kind; `residual` is the gradient that
/// flows past the norm, and is added. `weight_gradient`: `[D]` float32, to which the gradient by the weight is added.
/// Returns the gradient by `x`, plus `residual`.
///
/// # Errors
/// When a tensor cannot be viewed.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f64,
    gradient: &Tensor,
    residual: Option<&Tensor>,
    weight_gradient: &mut Tensor,
) -> Result<Tensor, ViewError> {
    let mut output = x.empty_like();
    by_kind!(x, backward(x, weight, epsilon as f32, gradient, residual, weight_gradient, &mut output))?;
    Ok(output)
}

fn backward<T: Element>(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    gradient: &Tensor,
    residual: Option<&Tensor>,
    weight_gradient: &mut Tensor,
    output: &mut Tensor,
) -> Result<(), ViewError> {
    let rows = x.size().first().map_or(0, |rows| *rows as usize);
    let (x, weight, mut output) = (T::slice(x)?, widened::<T>(weight)?, T::slice_mut(output)?);
    // Elements of each part; a sum over rows is rounded part by part, so within units parts are theirs.
    let lengths: Vec<usize> = match fixed_units().filter(|units| units.rows() == rows && rows > 0) {
        Some(units) => row_parts(&units).iter().map(|part| part * (x.len() / rows)).collect(),
        None => {
            let part = parallel::part_length(x.len(), SMALLEST_PART).next_multiple_of(weight.len());
            x.chunks(part).map(<[T]>::len).collect()
        }
    };
    let mut x = x;
    let mut gradient = T::slice(gradient)?;
    let mut residual = residual.map(T::slice).transpose()?;
    let parts = lengths.into_iter().map(|length| {
        let residual = residual.as_mut().map(|residual| residual.split_off(..length).expect("as many rows"));
        let inputs = [&mut x, &mut gradient].map(|whole| whole.split_off(..length).expect("as many rows"));
        (inputs, residual, output.split_off_mut(..length).expect("as many rows"))
    });
    let by_weight = parallel::map(parts.collect(), |([x, gradient], residual, output)| {
        backward_rows(x, &weight, epsilon, gradient, residual, output)
    });
    if weight_gradient.kind() == Kind::Int64 {
        let sums = i64_mut(weight_gradient)?;
        by_weight.iter().for_each(|part| note_bound(add_exact(sums, part)));
        return Ok(());
    }
    let sums = f32_mut(weight_gradient)?;
    for part in by_weight {
        for (sum, value) in sums.iter_mut().zip(part) {
            *sum += value;
        }
    }
    Ok(())
}

for_each_instruction_set!(backward_rows = backward_plain<T>(
    x: &[T], weight: &[f32], epsilon: f32, gradient: &[T], residual: Option<&[T]>, output: &mut [T],
) -> Vec<f32>);

/// Returns the gradient by the weight.
#[inline(always)]
fn backward_plain<T: Element>(
    x: &[T],
    weight: &[f32],
    epsilon: f32,
    gradient: &[T],
    residual: Option<&[T]>,
    output: &mut [T],
) -> Vec<f32> {
    let width = weight.len();
    let mut by_weight = vec![0.0f32; width];
    let mut row = vec![0.0f32; width];
    let mut slope = vec![0.0f32; width];
    let mut residuals = residual.map(|residual| residual.chunks_exact(width));
    let rows = x.chunks_exact(width).zip(gradient.chunks_exact(width));
    for ((x, gradient), output) in rows.zip(output.chunks_exact_mut(width)) {
        for ((row, x), (slope, gradient)) in row.iter_mut().zip(x).zip(slope.iter_mut().zip(gradient)) {
            *row = x.read();
            *slope = gradient.read();
        }
        let scale = inverse_rms(&row, epsilon);
        for (((by_weight, slope), row), weight) in by_weight.iter_mut().zip(&mut slope).zip(&row).zip(weight) {
            *by_weight += *slope * (row * scale);
            *slope *= weight;
        }
        // d/dx of x_i s(x) is s - x_i x_j s^3 / D, with s the inverse of the root mean square.
        let along = dot(&slope, &row) * scale * scale * scale / width as f32;
        match residuals.as_mut().and_then(Iterator::next) {
            Some(residual) => {
                for (((output, slope), row), residual) in output.iter_mut().zip(&slope).zip(&row).zip(residual) {
                    *output = T::write(slope * scale - row * along + residual.read());
                }
            }
            None => {
                for ((output, slope), row) in output.iter_mut().zip(&slope).zip(&row) {
                    *output = T::write(slope * scale - row * along);
                }
            }
        }
    }
    by_weight
}

#[inline(always)]
fn inverse_rms(row: &[f32], epsilon: f32) -> f32 {
    1.0 / (dot(row, row) / row.len() as f32 + epsilon).sqrt()
}

fn widened<T: Element>(tensor: &Tensor) -> Result<Vec<f32>, ViewError> {
    Ok(T::slice(tensor)?.iter().map(|value| value.read()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{difference, random};

    #[test]
    fn equals_autograd() {
        for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)] {
            for (rows, width) in [(1, 64), (37, 72), (301, 576)] {
                let (x, weight) = (random(&[rows, width], kind), random(&[width], kind));
                let (gradient, past) = (random(&[rows, width], kind), random(&[rows, width], kind));
                let exact = |x: &Tensor| x.to_kind(Kind::Double).detach().set_requires_grad(true);
                let (x64, weight64) = (exact(&x), exact(&weight));
                let expected = x64.rms_norm([width], Some(&weight64), 1e-5);
                (&expected * gradient.to_kind(Kind::Double)).sum(Kind::Double).backward();

                let found = rms_norm(&x, &weight, 1e-5).expect("host");
                assert!(difference(&found, &expected) < tolerance, "{kind:?} {rows} {width}");
                let mut by_weight = Tensor::ones([width], (Kind::Float, tch::Device::Cpu));
                let by_x = rms_norm_backward(&x, &weight, 1e-5, &gradient, Some(&past), &mut by_weight).expect("host");
                assert!(difference(&by_x, &(x64.grad() + &past)) < tolerance, "{kind:?} {rows} {width}");
                assert!(difference(&by_weight, &(weight64.grad() + 1.0)) < tolerance, "{kind:?} {rows} {width}");
                let alone = rms_norm_backward(&x, &weight, 1e-5, &gradient, None, &mut by_weight).expect("host");
                assert!(difference(&alone, &x64.grad()) < tolerance, "{kind:?} {rows} {width}");
            }
        }
    }

    #[test]
    fn the_sum_is_kept_and_normed() {
        let (x, y, weight) =
            (random(&[5, 64], Kind::BFloat16), random(&[5, 64], Kind::BFloat16), random(&[64], Kind::BFloat16));
        let (sum, normed) = add_rms_norm(&x, &y, &weight, 1e-6).expect("host");
        assert!(sum.equal(&(&x + &y)));
        assert!(normed.equal(&rms_norm(&sum, &weight, 1e-6).expect("host")));
    }
}
