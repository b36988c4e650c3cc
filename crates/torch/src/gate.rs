//! The gated activation of the feed-forward block, `silu(gate) * up`, and its backward.

use tch::Tensor;

use crate::element::{Element, by_kind, for_each_instruction_set};
use crate::parallel;
use crate::softmax::{LOWEST, exponential};
use crate::view::ViewError;

/// Fewest elements that are worth a thread.
const SMALLEST_PART: usize = 1 << 13;

/// `silu(gate) * up`, in float32 with one rounding at the end.
///
/// `gate_up`: `[T, 2 F]` contiguous, gates first. Returns `[T, F]`.
///
/// # Errors
/// When the tensor cannot be viewed.
///
/// # Panics
/// When it is not a matrix with an even number of columns.
pub fn silu_gate(gate_up: &Tensor) -> Result<Tensor, ViewError> {
    let (mut output, width) = halves(gate_up);
    by_kind!(gate_up, forward(gate_up, &mut output, width))?;
    Ok(output)
}

/// Backward of [`silu_gate`]: `gate_up` becomes its own gradient; returns the activation once more, `[T, F]`.
///
/// `gradient`: `[T, F]`, by the activation, of the same kind.
///
/// # Errors
/// When a tensor cannot be viewed.
///
/// # Panics
/// When the shapes do not fit.
pub fn silu_gate_backward(gate_up: &mut Tensor, gradient: &Tensor) -> Result<Tensor, ViewError> {
    let (mut output, width) = halves(gate_up);
    assert_eq!(gradient.size(), output.size(), "a gradient has the shape of its output");
    by_kind!(gradient, backward(gate_up, gradient, &mut output, width))?;
    Ok(output)
}

/// An empty `[T, F]` for `[T, 2 F]`, and `F`.
fn halves(gate_up: &Tensor) -> (Tensor, usize) {
    let (rows, columns) = gate_up.size2().expect("gates and ups are a matrix");
    assert!(columns % 2 == 0, "{columns} columns are no pairs");
    (Tensor::empty([rows, columns / 2], (gate_up.kind(), gate_up.device())), (columns / 2) as usize)
}

fn forward<T: Element>(gate_up: &Tensor, output: &mut Tensor, width: usize) -> Result<(), ViewError> {
    let gate_up = T::slice(gate_up)?;
    let output = T::slice_mut(output)?;
    let part = parallel::part_length(output.len(), SMALLEST_PART).next_multiple_of(width);
    let parts = gate_up.chunks(2 * part).zip(output.chunks_mut(part)).collect();
    parallel::map(parts, |(gate_up, output)| forward_rows(gate_up, output, width));
    Ok(())
}

for_each_instruction_set!(forward_rows = forward_plain<T>(gate_up: &[T], output: &mut [T], width: usize));

#[inline(always)]
fn forward_plain<T: Element>(gate_up: &[T], output: &mut [T], width: usize) {
    for (row, output) in gate_up.chunks_exact(2 * width).zip(output.chunks_exact_mut(width)) {
        let (gates, ups) = row.split_at(width);
        for ((output, gate), up) in output.iter_mut().zip(gates).zip(ups) {
            let gate = gate.read();
            *output = T::write(gate * sigmoid(gate) * up.read());
        }
    }
}

fn backward<T: Element>(
    gate_up: &mut Tensor,
    gradient: &Tensor,
    output: &mut Tensor,
    width: usize,
) -> Result<(), ViewError> {
    let gate_up = T::slice_mut(gate_up)?;
    let gradient = T::slice(gradient)?;
    let output = T::slice_mut(output)?;
    let part = parallel::part_length(output.len(), SMALLEST_PART).next_multiple_of(width);
    let parts = gate_up.chunks_mut(2 * part).zip(gradient.chunks(part)).zip(output.chunks_mut(part)).collect();
    parallel::map(parts, |((gate_up, gradient), output)| backward_rows(gate_up, gradient, output, width));
    Ok(())
}

for_each_instruction_set!(backward_rows = backward_plain<T>(
    gate_up: &mut [T], gradient: &[T], output: &mut [T], width: usize,
));

#[inline(always)]
fn backward_plain<T: Element>(gate_up: &mut [T], gradient: &[T], output: &mut [T], width: usize) {
    let rows = gate_up.chunks_exact_mut(2 * width).zip(gradient.chunks_exact(width));
    for ((row, gradient), output) in rows.zip(output.chunks_exact_mut(width)) {
        let (gates, ups) = row.split_at_mut(width);
        for (((gate, up), gradient), output) in gates.iter_mut().zip(ups).zip(gradient).zip(output) {
            let g = gate.read();
            let u = up.read();
            let slope = gradient.read();
            let s = sigmoid(g);
            let silu = g * s;
            *output = T::write(silu * u);
            *gate = T::write(slope * u * (s + silu * (1.0 - s)));
            *up = T::write(slope * silu);
        }
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    let e = exponential((-x.abs()).max(LOWEST));
    let numerator = if x < 0.0 { e } else { 1.0 };
    numerator / (1.0 + e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{difference, random};
    use tch::Kind;

    #[test]
    fn equals_autograd() {
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 8e-3)] {
            for (rows, width) in [(1, 5), (70, 333)] {
                let mut gate_up = random(&[rows, 2 * width], kind) * 4.0;
                let gradient = random(&[rows, width], kind);
                let exact = gate_up.to_kind(Kind::Double).set_requires_grad(true);
                let parts = exact.split(width, 1);
                let expected = parts[0].silu() * &parts[1];
                (&expected * gradient.to_kind(Kind::Double)).sum(Kind::Double).backward();
                assert!(difference(&silu_gate(&gate_up).expect("host"), &expected) < tolerance);
                let again = silu_gate_backward(&mut gate_up, &gradient).expect("host");
                assert!(difference(&again, &expected) < tolerance);
                assert!(difference(&gate_up, &exact.grad()) < tolerance, "{kind:?}");
            }
        }
    }

    #[test]
    fn large_gates_saturate() {
        let gate_up = Tensor::from_slice(&[200.0f32, -200.0, 1.0, 1.0]).view([1, 4]);
        let output = Vec::<f32>::try_from(silu_gate(&gate_up).expect("host").view([-1])).expect("a vector");
        assert_eq!(output[0], 200.0);
        assert!(output[1].abs() < 1e-30);
    }
}
