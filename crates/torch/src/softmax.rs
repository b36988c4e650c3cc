//! Softmax over rows of logits in host memory, and its backward in place.
//!
//! The vocabulary-wide tensors of a training pass are the largest it has; tensor operations would make half a dozen
//! float32 copies of them. Here a row of float32 lives in the cache, and the logits become their gradient in place.

use tch::Tensor;

use crate::element::{Element, by_kind, for_each_instruction_set};
use crate::parallel;
use crate::view::ViewError;

/// What a row of logits says of its target token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TargetScore {
    /// Log-probability of the target (nats).
    pub logprob: f32,
    /// Entropy of the distribution (nats).
    pub entropy: f32,
}

/// Scores the target of every row, and replaces the logits by the gradient of a loss that depends on the targets'
/// log-probabilities and on the rows' entropies `H`:
/// `(coefficient * (one-hot - softmax) - entropy_coefficient * softmax * (log-softmax + H)) / temperature`.
///
/// `logits`: `[C, V]` float32 or bfloat16, contiguous in host memory; `targets` and `coefficients` (d loss / d logprob):
/// `C` each; `entropy_coefficients` (d loss / d entropy): `C`, or none where the loss does not depend on entropies.
///
/// # Errors
/// When the logits cannot be viewed.
///
/// # Panics
/// When the lengths differ or a target lies outside the vocabulary.
pub fn target_gradient(
    logits: &mut Tensor,
    targets: &[i64],
    coefficients: &[f32],
    entropy_coefficients: &[f32],
    temperature: f64,
) -> Result<Vec<TargetScore>, ViewError> {
    let sizes = logits.size();
    let fits = sizes.len() == 2
        && sizes[0] as usize == targets.len()
        && targets.len() == coefficients.len()
        && (entropy_coefficients.is_empty() || entropy_coefficients.len() == targets.len());
    assert!(fits, "logits {sizes:?} for {} targets and {} coefficients", targets.len(), coefficients.len());
    let rows = Targets {
        vocabulary: sizes[1] as usize,
        targets,
        coefficients,
        entropy_coefficients,
        inverse: (1.0 / temperature) as f32,
    };
    by_kind!(logits, run(rows, logits))
}

#[derive(Clone, Copy)]
struct Targets<'a> {
    vocabulary: usize,
    targets: &'a [i64],
    coefficients: &'a [f32],
    /// Empty, or as many as there are targets.
    entropy_coefficients: &'a [f32],
    inverse: f32,
}

fn run<T: Element>(rows: Targets<'_>, logits: &mut Tensor) -> Result<Vec<TargetScore>, ViewError> {
    let part = parallel::part_length(rows.targets.len(), SMALLEST_PART);
    let starts = (0..rows.targets.len()).step_by(part);
    let parts = T::slice_mut(logits)?.chunks_mut(part * rows.vocabulary).zip(starts).collect();
    let scores = parallel::map(parts, |(logits, start)| rows.part(start, part).run_part(logits));
    Ok(scores.concat())
}

impl Targets<'_> {
    /// Those of at most `length` rows from row `start` on.
    fn part(self, start: usize, length: usize) -> Self {
        let range = start..(start + length).min(self.targets.len());
        let entropy_coefficients = self.entropy_coefficients.get(range.clone()).unwrap_or_default();
        Self {
            targets: &self.targets[range.clone()],
            coefficients: &self.coefficients[range],
            entropy_coefficients,
            ..self
        }
    }

    fn run_part<T: Element>(self, logits: &mut [T]) -> Vec<TargetScore> {
        let mut scratch = vec![0.0; self.vocabulary];
        let rows = logits.chunks_exact_mut(self.vocabulary).zip(self.targets.iter().zip(self.coefficients));
        rows.enumerate()
            .map(|(i, (row, (target, coefficient)))| {
                let target = usize::try_from(*target).expect("a target is an index");
                for (scaled, logit) in scratch.iter_mut().zip(row.iter()) {
                    *scaled = logit.read() * self.inverse;
                }
                let target_logit = scratch[target];
                let max = maximum(&scratch);
                let mut total = 0.0;
                let mut weighted = 0.0;
                for block in scratch.chunks_mut(BLOCK) {
                    let (sum, with_logits) = exponentials(block, max);
                    total += f64::from(sum);
                    weighted += f64::from(with_logits);
                }
                let slope = coefficient * self.inverse;
                let scale = -slope / total as f32;
                let entropy_slope = self.entropy_coefficients.get(i).map_or(0.0, |slope| slope * self.inverse);
                if entropy_slope == 0.0 {
                    for (logit, weight) in row.iter_mut().zip(&scratch) {
                        *logit = T::write(weight * scale);
                    }
                    row[target] = T::write(scratch[target] * scale + slope);
                } else {
                    // The logarithm of a probability plus the entropy is the distance of its logit from the mean logit.
                    let mean = max + (weighted / total) as f32;
                    let entropy_scale = -entropy_slope / total as f32;
                    let of_target = row[target].read() * self.inverse;
                    for (logit, weight) in row.iter_mut().zip(&scratch) {
                        let distance = logit.read() * self.inverse - mean;
                        // Where nothing is left of the probability nothing is left of the product, however far the logit.
                        let by_entropy = if *weight > 0.0 { weight * entropy_scale * distance } else { 0.0 };
                        *logit = T::write(weight * scale + by_entropy);
                    }
                    let weight = scratch[target];
                    let by_entropy = if weight > 0.0 { weight * entropy_scale * (of_target - mean) } else { 0.0 };
                    row[target] = T::write(weight * scale + by_entropy + slope);
                }
                TargetScore {
                    logprob: (f64::from(target_logit - max) - total.ln()) as f32,
                    entropy: (total.ln() - weighted / total) as f32,
                }
            })
            .collect()
    }
}

/// Fewest rows of logits that are worth a thread.
pub(crate) const SMALLEST_PART: usize = 2;

/// Elements whose sum is kept, in float32 before it goes into a float64 total.
pub(crate) const BLOCK: usize = 1024;

for_each_instruction_set!(pub(crate) maximum = maximum_plain(row: &[f32]) -> f32);
for_each_instruction_set!(pub(crate) exponentials = exponentials_plain(block: &mut [f32], max: f32) -> (f32, f32));

/// Sums run in this many lanes, in one order on every instruction set.
const LANES: usize = 16;

#[inline(always)]
fn maximum_plain(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for values in whole {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, value| max.max(*value))
}

/// Replaces each `x` by `exp(x - max)`; returns their sum, and the sum of each times its `x - max`.
#[inline(always)]
fn exponentials_plain(block: &mut [f32], max: f32) -> (f32, f32) {
    let mut sums = [0.0f32; LANES];
    let mut weighted = [0.0f32; LANES];
    let (whole, rest) = block.as_chunks_mut::<LANES>();
    for values in whole {
        for ((value, sum), weighted) in values.iter_mut().zip(&mut sums).zip(&mut weighted) {
            let x = (*value - max).max(LOWEST);
            let weight = exponential(x);
            *sum += weight;
            *weighted += weight * x;
            *value = weight;
        }
    }
    let (mut sum, mut with_logits) = (sums.iter().sum::<f32>(), weighted.iter().sum::<f32>());
    for value in rest {
        let x = (*value - max).max(LOWEST);
        let weight = exponential(x);
        sum += weight;
        with_logits += weight * x;
        *value = weight;
    }
    (sum, with_logits)
}

/// Below this the exponential is zero here: together the tokens beneath weigh less than rounding.
pub(crate) const LOWEST: f32 = -80.0;

/// `exp(x)` for `x` in `[LOWEST, 0]`, to about two units in the last place: `2^n` times a polynomial in the rest.
#[inline(always)]
pub(crate) fn exponential(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN2_HIGH - n * LN2_LOW;
    // Taylor coefficients to the seventh power: the remainder at |r| = ln(2)/2 is 5e-9.
    let mut polynomial = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        polynomial = polynomial * r + coefficient;
    }
    // The low bits of the rounded sum are the integer itself; no conversion keeps this in vector registers.
    let power = f32::from_bits(rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
    if x > LOWEST { polynomial * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn the_exponential_is_exact_to_float32() {
        for i in 0..=80_000 {
            let x = -f64::from(i) / 1000.0 + 1e-4;
            let x = (x.min(0.0)) as f32;
            let (ours, exact) = (f64::from(exponential(x)), f64::from(x).exp());
            assert!(x <= LOWEST || (ours / exact - 1.0).abs() < 3e-7, "exp({x}) = {ours}, not {exact}");
        }
        assert_eq!(exponential(-1e3_f32.max(LOWEST)), 0.0);
    }

    #[test]
    fn scores_and_gradients_equal_those_of_autograd() {
        tch::manual_seed(5);
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::BFloat16, 4e-3)] {
            let logits = (Tensor::randn([9, 3_001], (Kind::Float, Device::Cpu)) * 5.0).to_kind(kind);
            let targets: Vec<i64> = (0..9).map(|row| row * 300).collect();
            let coefficients: Vec<f32> = (0..9).map(|row| row as f32 / 4.0 - 1.0).collect();
            let by_entropy: Vec<f32> = (0..9).map(|row| if row < 2 { 0.0 } else { 0.5 - row as f32 / 5.0 }).collect();
            let exact = logits.to_kind(Kind::Double).set_requires_grad(true);
            let logprobs = (&exact / 0.7).log_softmax(-1, Kind::Double);
            let chosen = logprobs.gather(1, &Tensor::from_slice(&targets).unsqueeze(1), false).squeeze_dim(1);
            let entropies = -(&logprobs * logprobs.exp()).sum_dim_intlist(-1, false, Kind::Double);
            let loss = &chosen * Tensor::from_slice(&coefficients) + &entropies * Tensor::from_slice(&by_entropy);
            loss.sum(Kind::Double).backward();
            let mut gradient = logits.copy();
            let scores = target_gradient(&mut gradient, &targets, &coefficients, &by_entropy, 0.7).expect("host");
            for (row, score) in scores.iter().enumerate() {
                assert!((f64::from(score.logprob) - chosen.double_value(&[row as i64])).abs() < 1e-5);
                assert!((f64::from(score.entropy) - entropies.double_value(&[row as i64])).abs() < 1e-4);
            }
            let difference = (gradient.to_kind(Kind::Double) - exact.grad()).abs().max().double_value(&[]);
            assert!(difference < tolerance, "{kind:?}: gradients differ by {difference}");
        }
    }
}
