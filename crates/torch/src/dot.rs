//! The dot product of float32 vectors, with one result on every processor.

/// Sums run in this many lanes.
const LANES: usize = 16;

/// Products are summed in sixteen lanes, the lanes as a tree, then the rest.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if crate::element::has_avx512() {
        // SAFETY: the processor has the instructions.
        return unsafe { dot_avx512(a, b) };
    }
    dot_plain(a, b)
}

/// Written out, because the compiler takes the lanes of the plain one apart and adds numbers one by one.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn dot_avx512(a: &[f32], b: &[f32]) -> f32 {
    use std::arch::x86_64::{_mm512_add_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_reduce_add_ps, _mm512_setzero_ps};
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = _mm512_setzero_ps();
    for (a, b) in a.iter().zip(b) {
        // SAFETY: each chunk is sixteen floats.
        let (a, b) = unsafe { (_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr())) };
        // Not fused, so that the result is that of every other processor.
        lanes = _mm512_add_ps(lanes, _mm512_mul_ps(a, b));
    }
    _mm512_reduce_add_ps(lanes) + rest(a_rest, b_rest)
}

fn dot_plain(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0] + rest(a_rest, b_rest)
}

fn rest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_the_same_everywhere_and_right() {
        for length in [0, 1, 15, 16, 64, 576, 1001] {
            let numbers = |seed: u32| (0..length).map(move |i| ((i * 37 + seed) % 101) as f32 / 50.0 - 1.0);
            let (a, b): (Vec<f32>, Vec<f32>) = (numbers(5).collect(), numbers(11).collect());
            let exact: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert_eq!(dot(&a, &b), dot_plain(&a, &b));
            assert!((f64::from(dot(&a, &b)) - exact).abs() < 1e-4);
        }
    }
}
