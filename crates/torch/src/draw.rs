//! Drawing tokens from logits in host memory: log-prob, entropy and choice of a row in one go.
//!
//! Tensor operations would write and read `[rows, vocabulary]` eight times over; a row of float32 fits into the cache.

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::view::{ViewError, bf16_ref, f32_ref};

/// What one row of logits is drawn with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawOptions {
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// Where in the cumulative distribution the token lies, in `[0, 1)`.
    pub uniform: f64,
}

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Index in the vocabulary.
    pub token: usize,
    /// Its log-probability (nats).
    pub logprob: f32,
    /// Entropy of the distribution (nats).
    pub entropy: f32,
}

/// Whether [`draw`] can read these logits.
#[must_use]
pub fn can_draw(logits: &Tensor) -> bool {
    logits.device() == Device::Cpu && logits.is_contiguous() && matches!(logits.kind(), Kind::Float | Kind::BFloat16)
}

/// Draws one token a row by inverting the cumulative distribution.
///
/// `logits`: `[B, V]` float32 or bfloat16, contiguous in host memory; `options`: one a row.
///
/// # Errors
/// When the logits cannot be viewed.
///
/// # Panics
/// When there are not as many options as rows.
pub fn draw(logits: &Tensor, options: &[DrawOptions]) -> Result<Vec<Drawn>, ViewError> {
    let sizes = logits.size();
    assert!(sizes.len() == 2 && sizes[0] as usize == options.len(), "logits {sizes:?} for {} rows", options.len());
    let vocabulary = sizes[1] as usize;
    match logits.kind() {
        Kind::BFloat16 => Ok(draw_rows(bf16_ref(logits)?, vocabulary, options, |x| bf16_to_f32(*x))),
        _ => Ok(draw_rows(f32_ref(logits)?, vocabulary, options, |x| *x)),
    }
}

fn draw_rows<T: Sync>(
    logits: &[T],
    vocabulary: usize,
    options: &[DrawOptions],
    read: impl Fn(&T) -> f32 + Copy + Send,
) -> Vec<Drawn> {
    let draw_part = move |logits: &[T], options: &[DrawOptions]| -> Vec<Drawn> {
        let mut scratch = vec![0.0; vocabulary];
        let rows = logits.chunks_exact(vocabulary).zip(options);
        rows.map(|(row, options)| {
            let inverse = (1.0 / options.temperature) as f32;
            for (scaled, logit) in scratch.iter_mut().zip(row) {
                *scaled = read(logit) * inverse;
            }
            draw_row(&mut scratch, options.uniform)
        })
        .collect()
    };
    let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1);
    let rows = options.len().div_ceil(threads).max(4);
    std::thread::scope(|scope| {
        let mut parts = logits.chunks(rows * vocabulary).zip(options.chunks(rows));
        let Some((first_logits, first_options)) = parts.next() else { return Vec::new() };
        let others: Vec<_> = parts.map(|(logits, options)| scope.spawn(move || draw_part(logits, options))).collect();
        let mut drawn = draw_part(first_logits, first_options);
        for part in others {
            drawn.extend(part.join().expect("drawing does not panic"));
        }
        drawn
    })
}

fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Elements whose sum is kept, so that a draw searches one block only.
const BLOCK: usize = 1024;

/// `row` holds scaled logits and is overwritten.
fn draw_row(row: &mut [f32], uniform: f64) -> Drawn {
    let max = maximum(row);
    let mut blocks = Vec::with_capacity(row.len().div_ceil(BLOCK));
    let mut weighted = 0.0;
    for block in row.chunks_mut(BLOCK) {
        let (sum, with_logits) = exponentials(block, max);
        blocks.push(f64::from(sum));
        weighted += f64::from(with_logits);
    }
    let total: f64 = blocks.iter().sum();
    let token = find(row, &blocks, uniform * total);
    let log_total = total.ln();
    // The exponential is undone rather than the logit kept: both are exact to float32.
    let logprob = f64::from(row[token]).ln() - log_total;
    Drawn { token, logprob: logprob as f32, entropy: (log_total - weighted / total) as f32 }
}

/// First element at which the running sum passes `target`; the last possible one when rounding keeps it below.
fn find(row: &[f32], blocks: &[f64], mut target: f64) -> usize {
    for (block, sum) in blocks.iter().enumerate() {
        if target >= *sum {
            target -= sum;
            continue;
        }
        let start = block * BLOCK;
        let end = row.len().min(start + BLOCK);
        for (offset, weight) in row[start..end].iter().enumerate() {
            target -= f64::from(*weight);
            if target < 0.0 {
                return start + offset;
            }
        }
        // The float32 sum of the block was a little larger than its elements.
        if let Some(offset) = row[start..end].iter().rposition(|weight| *weight > 0.0) {
            return start + offset;
        }
    }
    row.iter().rposition(|weight| *weight > 0.0).unwrap_or(0)
}

macro_rules! for_each_instruction_set {
    ($name:ident, $plain:ident, ($($argument:ident: $kind:ty),*) -> $result:ty) => {
        fn $name($($argument: $kind),*) -> $result {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f")]
                fn avx512($($argument: $kind),*) -> $result {
                    $plain($($argument),*)
                }

                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $kind),*) -> $result {
                    $plain($($argument),*)
                }

                if std::arch::is_x86_feature_detected!("avx512f") {
                    // SAFETY: the processor has the instructions.
                    return unsafe { avx512($($argument),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has the instructions.
                    return unsafe { avx2($($argument),*) };
                }
            }
            $plain($($argument),*)
        }
    };
}

for_each_instruction_set!(maximum, maximum_plain, (row: &[f32]) -> f32);
for_each_instruction_set!(exponentials, exponentials_plain, (block: &mut [f32], max: f32) -> (f32, f32));

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
const LOWEST: f32 = -80.0;

/// `exp(x)` for `x` in `[LOWEST, 0]`, to about two units in the last place: `2^n` times a polynomial in the rest.
#[inline(always)]
fn exponential(x: f32) -> f32 {
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
    fn statistics_equal_those_of_libtorch() {
        tch::manual_seed(3);
        for (kind, vocabulary) in [(Kind::Float, 49_152), (Kind::Float, 77), (Kind::BFloat16, 5_000)] {
            let logits = (Tensor::randn([5, vocabulary], (Kind::Float, Device::Cpu)) * 4.0).to_kind(kind);
            let options: Vec<DrawOptions> = (0..5)
                .map(|row| DrawOptions { temperature: 0.5 + row as f64 / 4.0, uniform: row as f64 / 5.0 })
                .collect();
            for (row, (drawn, options)) in draw(&logits, &options).expect("host").iter().zip(&options).enumerate() {
                let scaled = logits.get(row as i64).to_kind(Kind::Double) / options.temperature;
                let logprobs = scaled.log_softmax(-1, Kind::Double);
                let entropy = -(&logprobs * logprobs.exp()).sum(Kind::Double).double_value(&[]);
                let logprob = logprobs.double_value(&[drawn.token as i64]);
                let before = logprobs.exp().narrow(0, 0, drawn.token as i64).sum(Kind::Double).double_value(&[]);
                assert!((f64::from(drawn.logprob) - logprob).abs() < 1e-5, "{} {logprob}", drawn.logprob);
                assert!((f64::from(drawn.entropy) - entropy).abs() < 1e-4, "{} {entropy}", drawn.entropy);
                assert!(before <= options.uniform + 1e-5 && options.uniform <= before + logprob.exp() + 1e-5);
            }
        }
    }

    #[test]
    fn a_draw_never_has_probability_zero() {
        let mut row = vec![-200.0f32; 5_000];
        row[10..20].fill(0.0);
        let logits = Tensor::from_slice(&row).unsqueeze(0);
        for uniform in [0.0, 0.5, 1.0 - f64::EPSILON / 2.0] {
            let drawn = draw(&logits, &[DrawOptions { temperature: 1.0, uniform }]).expect("host")[0];
            assert!((10..20).contains(&drawn.token), "{drawn:?}");
        }
    }
}
