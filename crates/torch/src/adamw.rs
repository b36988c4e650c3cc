//! AdamW (Loshchilov and Hutter 2019) over flat buffers, one pass over memory.
//!
//! At a hundred million parameters the update is bound by memory bandwidth; separate tensor operations would read and
//! write every buffer several times.

use half::bf16;

use crate::dither::to_bf16;
use crate::element::for_each_instruction_set;
use crate::parallel;

/// Fewest elements that are worth a thread.
const SMALLEST_PART: usize = 1 << 15;

/// Hyper-parameters of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this update.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Number of this update, counted from 1; drives the bias correction.
    pub update: u64,
    /// Gradients are multiplied by this first (clipping).
    pub grad_scale: f32,
}

/// What an update multiplies by.
#[derive(Clone, Copy)]
pub(crate) struct Factors {
    pub(crate) keep: f32,
    pub(crate) beta1: f32,
    pub(crate) beta2: f32,
    pub(crate) epsilon: f32,
    pub(crate) step_size: f32,
    pub(crate) root_correction: f32,
    pub(crate) grad_scale: f32,
}

impl AdamW {
    pub(crate) fn factors(&self) -> Factors {
        let update = i32::try_from(self.update).unwrap_or(i32::MAX);
        let correction1 = 1.0 - f64::from(self.beta1).powi(update);
        let correction2 = 1.0 - f64::from(self.beta2).powi(update);
        Factors {
            keep: 1.0 - self.learning_rate * self.weight_decay,
            beta1: self.beta1,
            beta2: self.beta2,
            epsilon: self.epsilon,
            step_size: (f64::from(self.learning_rate) / correction1) as f32,
            root_correction: (1.0 / correction2.sqrt()) as f32,
            grad_scale: self.grad_scale,
        }
    }
}

/// Updates `weights`, `moment1` and `moment2` in place from `grads`, all of one length; writes the new weights to
/// `compute` as well when the model computes in bfloat16, rounded as [`dithered_bf16`](crate::dithered_bf16) does:
/// `compute` comes with the index of its first element among all weights.
///
/// # Panics
/// When the lengths differ.
pub fn adamw(
    options: &AdamW,
    weights: &mut [f32],
    moment1: &mut [f32],
    moment2: &mut [f32],
    grads: &[f32],
    compute: Option<(&mut [bf16], usize)>,
) {
    let length = weights.len();
    assert!(moment1.len() == length && moment2.len() == length && grads.len() == length, "buffers differ in length");
    let factors = options.factors();
    let chunk = parallel::part_length(length, SMALLEST_PART);
    let compute = match compute {
        Some((buffer, first)) => {
            assert_eq!(buffer.len(), length, "buffers differ in length");
            let indices = (first..).step_by(chunk.max(1));
            buffer.chunks_mut(chunk).zip(indices).map(Some).collect::<Vec<_>>()
        }
        None => (0..length.div_ceil(chunk)).map(|_| None).collect(),
    };
    let moments = moment1.chunks_mut(chunk).zip(moment2.chunks_mut(chunk));
    let parts = weights.chunks_mut(chunk).zip(moments).zip(grads.chunks(chunk).zip(compute)).collect();
    parallel::map(parts, |((weights, (moment1, moment2)), (grads, compute))| {
        update_chunk(factors, weights, moment1, moment2, grads, compute);
    });
}

/// Sum of the squares, in float64.
#[must_use]
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let chunk = parallel::part_length(values.len(), SMALLEST_PART);
    parallel::map(values.chunks(chunk).collect(), squares_chunk).iter().sum()
}

fn squares_chunk(values: &[f32]) -> f64 {
    // Blocks keep the float32 partial sums short; their float64 total keeps the precision.
    let block_sum = |block: &[f32]| {
        let mut lanes = [0.0f32; 16];
        let (whole, rest) = block.as_chunks::<16>();
        for values in whole {
            for (lane, value) in lanes.iter_mut().zip(values) {
                *lane += value * value;
            }
        }
        f64::from(lanes.iter().sum::<f32>() + rest.iter().map(|value| value * value).sum::<f32>())
    };
    values.chunks(1024).map(block_sum).sum()
}

/// Where the new compute weights go, and the index of the first one in the whole buffer.
type Compute<'a> = Option<(&'a mut [bf16], usize)>;

for_each_instruction_set!(update_chunk = update_plain(
    f: Factors, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], c: Compute<'_>,
));

/// The update itself; compiled once per instruction set, with identical results (no fused multiply-add is used).
#[inline(always)]
fn update_plain(f: Factors, w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32], c: Compute<'_>) {
    let n1 = 1.0 - f.beta1;
    let n2 = 1.0 - f.beta2;
    for (((w, m), v), g) in w.iter_mut().zip(m.iter_mut()).zip(v.iter_mut()).zip(g) {
        let g = *g * f.grad_scale;
        *m = f.beta1 * *m + n1 * g;
        *v = f.beta2 * *v + n2 * g * g;
        let denominator = v.sqrt() * f.root_correction + f.epsilon;
        *w = *w * f.keep - f.step_size * (*m / denominator);
    }
    if let Some((c, first)) = c {
        for (offset, (c, w)) in c.iter_mut().zip(w.iter()).enumerate() {
            *c = to_bf16(*w, first + offset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::nn::{self, OptimizerConfig};
    use tch::{Device, Kind, Tensor};

    #[test]
    fn equals_libtorch_over_five_updates() {
        let n = 10_000usize;
        let store = nn::VarStore::new(Device::Cpu);
        let parameter = store.root().var("w", &[n as i64], nn::Init::Randn { mean: 0.0, stdev: 1.0 });
        let config = nn::AdamW { beta1: 0.9, beta2: 0.999, wd: 0.01, eps: 1e-8, amsgrad: false };
        let mut reference = config.build(&store, 1e-2).expect("optimizer");
        let mut weights = Vec::<f32>::try_from(&parameter).expect("float32");
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let mut compute = vec![bf16::ZERO; n];
        for update in 1..=5 {
            let grads = Tensor::randn([n as i64], (Kind::Float, Device::Cpu));
            reference.zero_grad();
            (&parameter * &grads).sum(Kind::Float).backward();
            reference.step();
            let options = AdamW {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.01,
                update,
                grad_scale: 1.0,
            };
            let grads = Vec::<f32>::try_from(grads).expect("float32");
            adamw(&options, &mut weights, &mut m, &mut v, &grads, Some((&mut compute, 7)));
        }
        let expected = Vec::<f32>::try_from(&parameter).expect("float32");
        for (index, ((ours, theirs), compute)) in weights.iter().zip(&expected).zip(&compute).enumerate() {
            assert!((ours - theirs).abs() < 2e-6, "{ours} against {theirs}");
            assert_eq!(*compute, to_bf16(*ours, 7 + index));
        }
    }

    #[test]
    fn sums_squares_in_double_precision() {
        let values = vec![0.1f32; 3_000_001];
        let expected = 3_000_001.0 * f64::from(0.1f32) * f64::from(0.1f32);
        assert!((sum_of_squares(&values) / expected - 1.0).abs() < 1e-6);
        assert_eq!(sum_of_squares(&[]), 0.0);
    }
}
