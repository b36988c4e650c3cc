//! Drawing tokens from logits in host memory: log-prob, entropy and choice of a row in one go.
//!
//! Tensor operations would write and read `[rows, vocabulary]` eight times over; a row of float32 fits into the cache.

use tch::Tensor;

use crate::element::{Element, by_kind, has_kernels};
use crate::keep::{Filters, Scratch, keep};
use crate::parallel;
use crate::softmax::{BLOCK, SMALLEST_PART, exponentials, maximum};
use crate::view::ViewError;

/// What one row of logits is drawn with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DrawOptions {
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// Where in the cumulative distribution of what is kept the token lies, in `[0, 1)`.
    pub uniform: f64,
    /// What may be drawn.
    pub filters: Filters,
}

/// A drawn token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// Index in the vocabulary.
    pub token: usize,
    /// Its log-probability before anything is cut off (nats).
    pub logprob: f32,
    /// Its log-probability among what is kept (nats): that much more as the log of the share that was cut off.
    pub sampled_logprob: f32,
    /// Entropy of the distribution before anything is cut off (nats).
    pub entropy: f32,
}

/// Whether [`draw`] can read these logits.
#[must_use]
pub fn can_draw(logits: &Tensor) -> bool {
    has_kernels(logits) && logits.is_contiguous()
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
    by_kind!(logits, draw_rows(logits, vocabulary, options))
}

fn draw_rows<T: Element>(logits: &Tensor, vocabulary: usize, options: &[DrawOptions]) -> Result<Vec<Drawn>, ViewError> {
    let part = parallel::part_length(options.len(), SMALLEST_PART);
    let parts = T::slice(logits)?.chunks(part * vocabulary).zip(options.chunks(part)).collect();
    Ok(parallel::map(parts, |(logits, options)| draw_part(logits, vocabulary, options)).concat())
}

fn draw_part<T: Element>(logits: &[T], vocabulary: usize, options: &[DrawOptions]) -> Vec<Drawn> {
    let mut scaled = vec![0.0; vocabulary];
    let mut scratch = Scratch::new();
    let rows = logits.chunks_exact(vocabulary).zip(options);
    rows.map(|(row, options)| {
        let inverse = (1.0 / options.temperature) as f32;
        for (scaled, logit) in scaled.iter_mut().zip(row) {
            *scaled = logit.read() * inverse;
        }
        draw_row(&mut scaled, options, &mut scratch)
    })
    .collect()
}

/// `row` holds scaled logits and is overwritten.
fn draw_row(row: &mut [f32], options: &DrawOptions, scratch: &mut Scratch) -> Drawn {
    let max = maximum(row);
    let mut blocks = Vec::with_capacity(row.len().div_ceil(BLOCK));
    let mut weighted = 0.0;
    for block in row.chunks_mut(BLOCK) {
        let (sum, with_logits) = exponentials(block, max);
        blocks.push(f64::from(sum));
        weighted += f64::from(with_logits);
    }
    let total: f64 = blocks.iter().sum();
    let mut kept = total;
    if options.filters.cut() {
        blocks = keep(row, &options.filters, scratch);
        kept = blocks.iter().sum();
    }
    let token = find(row, &blocks, options.uniform * kept);
    let log_total = total.ln();
    // The exponential is undone rather than the logit kept: both are exact to float32.
    let log_weight = f64::from(row[token]).ln();
    Drawn {
        token,
        logprob: (log_weight - log_total) as f32,
        sampled_logprob: (log_weight - kept.ln()) as f32,
        entropy: (log_total - weighted / total) as f32,
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn statistics_equal_those_of_libtorch() {
        tch::manual_seed(3);
        for (kind, vocabulary) in [(Kind::Float, 49_152), (Kind::Float, 77), (Kind::BFloat16, 5_000)] {
            let logits = (Tensor::randn([5, vocabulary], (Kind::Float, Device::Cpu)) * 4.0).to_kind(kind);
            let options: Vec<DrawOptions> = (0..5)
                .map(|row| DrawOptions {
                    temperature: 0.5 + row as f64 / 4.0,
                    uniform: row as f64 / 5.0,
                    filters: Filters::OFF,
                })
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
            let options = DrawOptions { temperature: 1.0, uniform, filters: Filters::OFF };
            let drawn = draw(&logits, &[options]).expect("host")[0];
            assert!((10..20).contains(&drawn.token), "{drawn:?}");
        }
    }
}
