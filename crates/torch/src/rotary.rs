//! Rotary position embedding of the rotate-half kind, in place.

use tch::Tensor;

use crate::element::{Element, by_kind, for_each_instruction_set};
use crate::parallel;
use crate::view::{ViewError, f32_ref, rows_mut};

/// Fewest rows that are worth a thread.
const SMALLEST_PART: usize = 32;

/// Turns every head of `x` in place: element `i` of a head together with element `i + H / 2`.
///
/// `x`: `[T, heads, H]` whose tokens may lie apart; `cos` and `sin`: `[T, H / 2]` float32. `backwards` turns by the
/// negative angle, which is the backward of the rotation.
///
/// # Errors
/// When a tensor cannot be viewed.
///
/// # Panics
/// When the shapes do not fit.
pub fn rotate(x: &mut Tensor, cos: &Tensor, sin: &Tensor, backwards: bool) -> Result<(), ViewError> {
    let (tokens, _heads, head_dim) = x.size3().expect("heads are [T, heads, H]");
    let shape = [tokens, head_dim / 2];
    assert!(cos.size() == shape && sin.size() == shape && head_dim % 2 == 0, "a rotation is [T, H / 2]");
    by_kind!(x, run(x, f32_ref(cos)?, f32_ref(sin)?, head_dim as usize, backwards))
}

fn run<T: Element>(
    x: &mut Tensor,
    cos: &[f32],
    sin: &[f32],
    head_dim: usize,
    backwards: bool,
) -> Result<(), ViewError> {
    let rows: Vec<&mut [T]> = rows_mut(x)?;
    let part = parallel::part_length(rows.len(), SMALLEST_PART);
    let mut parts = Vec::new();
    let mut rows = rows.into_iter().enumerate().peekable();
    while rows.peek().is_some() {
        parts.push(rows.by_ref().take(part).collect::<Vec<_>>());
    }
    let half = head_dim / 2;
    parallel::map(parts, |part| {
        for (token, row) in part {
            let angles = token * half..(token + 1) * half;
            turn_row(row, &cos[angles.clone()], &sin[angles], backwards);
        }
    });
    Ok(())
}

for_each_instruction_set!(turn_row = turn_plain<T>(row: &mut [T], cos: &[f32], sin: &[f32], backwards: bool));

#[inline(always)]
fn turn_plain<T: Element>(row: &mut [T], cos: &[f32], sin: &[f32], backwards: bool) {
    let half = cos.len();
    let sign = if backwards { -1.0 } else { 1.0 };
    for head in row.chunks_exact_mut(2 * half) {
        let (low, high) = head.split_at_mut(half);
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            let a = low.read();
            let b = high.read();
            let sin = sin * sign;
            *low = T::write(a * cos - b * sin);
            *high = T::write(b * cos + a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{difference, random};
    use tch::{Device, Kind};

    #[test]
    fn turns_and_turns_back() {
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 1e-2)] {
            let buffer = random(&[101, 5, 8], kind);
            let before = buffer.copy();
            let angles = Tensor::randn([101, 4], (Kind::Float, Device::Cpu)) * 10.0;
            let (cos, sin) = (angles.cos(), angles.sin());
            // The first three heads only: their tokens lie apart.
            let mut heads = buffer.narrow(1, 0, 3);
            rotate(&mut heads, &cos, &sin, false).expect("host");
            let parts = before.narrow(1, 0, 3).to_kind(Kind::Double).split(4, 2);
            let (c, s) = (cos.unsqueeze(1), sin.unsqueeze(1));
            let expected = Tensor::cat(&[&parts[0] * &c - &parts[1] * &s, &parts[1] * &c + &parts[0] * &s], 2);
            assert!(difference(&heads, &expected) < tolerance);
            assert!(buffer.narrow(1, 3, 2).equal(&before.narrow(1, 3, 2)));
            rotate(&mut heads, &cos, &sin, true).expect("host");
            assert!(difference(&buffer, &before) < tolerance);
        }
    }
}
