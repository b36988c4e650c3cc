//! From logits to tokens. `B` rows, `V` vocabulary.

use pacs_torch::tch::{Kind, TchError, Tensor};
use pacs_torch::{DrawOptions, can_draw, draw};

/// What one row of the batch wants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowSampling {
    /// Divides the logits.
    pub(crate) temperature: f64,
    /// Nucleus; 1 is off.
    pub(crate) top_p: f64,
    /// Most probable tokens kept; 0 is off.
    pub(crate) top_k: u32,
    /// Uniform number in `[0, 1)` that picks the token.
    pub(crate) uniform: f64,
}

impl RowSampling {
    fn filters(&self) -> bool {
        self.top_k != 0 || self.top_p < 1.0
    }
}

/// The tokens of one decode step.
#[derive(Debug)]
pub(crate) struct Sampled {
    /// Chosen token of each row.
    pub(crate) tokens: Vec<i64>,
    /// Its log-probability under the temperature-scaled policy, before top-k and top-p (nats).
    pub(crate) logprobs: Vec<f32>,
    /// Entropy of the same distribution (nats).
    pub(crate) entropies: Vec<f32>,
}

/// Draws one token a row by inverting the cumulative distribution at the row's uniform number.
///
/// `logits`: `[B, V]`, any float kind, on any device.
pub(crate) fn sample(logits: &Tensor, rows: &[RowSampling]) -> Result<Sampled, TchError> {
    let filters = rows.iter().any(RowSampling::filters);
    if !filters && can_draw(logits) {
        let options: Vec<DrawOptions> =
            rows.iter().map(|row| DrawOptions { temperature: row.temperature, uniform: row.uniform }).collect();
        let drawn = draw(logits, &options).expect("such logits can be drawn from");
        return Ok(Sampled {
            tokens: drawn.iter().map(|drawn| drawn.token as i64).collect(),
            logprobs: drawn.iter().map(|drawn| drawn.logprob).collect(),
            entropies: drawn.iter().map(|drawn| drawn.entropy).collect(),
        });
    }
    sample_by_tensors(logits, rows)
}

/// The same by tensor operations: for every device, and with top-k and top-p.
fn sample_by_tensors(logits: &Tensor, rows: &[RowSampling]) -> Result<Sampled, TchError> {
    let (_b, vocabulary) = logits.size2()?;
    let device = logits.device();
    let column = |values: Vec<f64>| Tensor::from_slice(&values).to_kind(Kind::Float).to_device(device).unsqueeze(-1);
    // Float32 before anything is reduced: bfloat16 loses the tail.
    let mut logits = logits.to_kind(Kind::Float);
    if rows.iter().any(|row| row.temperature != 1.0) {
        logits = logits.f_div(&column(rows.iter().map(|row| row.temperature).collect()))?;
    }
    let logprobs = logits.f_log_softmax(-1, Kind::Float)?;
    let probabilities = logprobs.f_exp()?;
    let entropies = -(&probabilities * &logprobs).f_sum_dim_intlist(-1, false, Kind::Float)?;
    let kept = keep(&probabilities, rows)?;
    let cumulative = kept.as_ref().unwrap_or(&probabilities).f_cumsum(-1, Kind::Float)?;
    // The last column is the total that was kept, up to rounding; scaling by it makes every draw fall inside.
    let total = cumulative.f_narrow(-1, vocabulary - 1, 1)?;
    let targets = column(rows.iter().map(|row| row.uniform).collect()) * total;
    let chosen = targets.f_searchsorted(&cumulative, false, true, "right", None::<Tensor>)?;
    // Rounding may put a target on the very end of the distribution.
    let chosen = last_possible(&chosen, &cumulative, vocabulary)?;
    let chosen_logprobs = logprobs.f_gather(-1, &chosen, false)?;
    Ok(Sampled {
        tokens: Vec::try_from(chosen.squeeze_dim(-1))?,
        logprobs: Vec::try_from(chosen_logprobs.squeeze_dim(-1))?,
        entropies: Vec::try_from(entropies)?,
    })
}

/// Moves draws behind the last token of non-zero probability onto it.
fn last_possible(chosen: &Tensor, cumulative: &Tensor, vocabulary: i64) -> Result<Tensor, TchError> {
    let total = cumulative.f_narrow(-1, vocabulary - 1, 1)?;
    let last = total.contiguous().f_searchsorted(cumulative, false, false, "left", None::<Tensor>)?;
    chosen.f_minimum(&last)
}

/// Probabilities with everything outside each row's top-k and nucleus set to zero; `None` when no row filters.
///
/// `probabilities`: `[B, V]` float32. Top-k comes first, then the nucleus of what is left, renormalised; the most
/// probable token always stays.
fn keep(probabilities: &Tensor, rows: &[RowSampling]) -> Result<Option<Tensor>, TchError> {
    if !rows.iter().any(RowSampling::filters) {
        return Ok(None);
    }
    let (_b, vocabulary) = probabilities.size2()?;
    let device = probabilities.device();
    let (sorted, order) = probabilities.f_sort(-1, true)?;
    let ranks = Tensor::f_arange(vocabulary, (Kind::Int64, device))?.unsqueeze(0);
    let limits: Vec<i64> =
        rows.iter().map(|row| if row.top_k == 0 { vocabulary } else { i64::from(row.top_k) }).collect();
    let within_k = ranks.f_lt_tensor(&Tensor::from_slice(&limits).to_device(device).unsqueeze(-1))?;
    let sorted = sorted * within_k.to_kind(Kind::Float);
    let sorted = &sorted / sorted.f_sum_dim_intlist(-1, true, Kind::Float)?;
    // A token stays while the mass before it is below the nucleus.
    let before = sorted.f_cumsum(-1, Kind::Float)? - &sorted;
    let nuclei: Vec<f64> = rows.iter().map(|row| row.top_p).collect();
    let nuclei = Tensor::from_slice(&nuclei).to_kind(Kind::Float).to_device(device).unsqueeze(-1);
    let within_p = before.f_lt_tensor(&nuclei)?;
    let stays = within_k.f_logical_and(&within_p)?;
    let mask = stays.f_zeros_like()?.f_scatter(-1, &order, &stays)?;
    Ok(Some(probabilities * mask.to_kind(Kind::Float)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_torch::tch::Device;
    use pacs_types::mix;

    fn row(uniform: f64) -> RowSampling {
        RowSampling { temperature: 1.0, top_p: 1.0, top_k: 0, uniform }
    }

    fn uniforms(n: u64) -> impl Iterator<Item = f64> {
        (0..n).map(|i| (mix(i) >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// Chi-squared of `n` draws against `expected` probabilities; a zero probability must never be drawn.
    fn chi_squared(logits: &[f32], make: impl Fn(f64) -> RowSampling, expected: &[f64], n: u64) -> f64 {
        let rows: Vec<RowSampling> = uniforms(n).map(make).collect();
        let logits = Tensor::from_slice(logits).unsqueeze(0).expand([n as i64, logits.len() as i64], false);
        let mut counts = vec![0.0; expected.len()];
        for token in sample(&logits, &rows).expect("samples").tokens {
            counts[token as usize] += 1.0;
        }
        let mut total = 0.0;
        for (count, p) in counts.iter().zip(expected) {
            if *p == 0.0 {
                assert_eq!(*count, 0.0, "an impossible token was drawn");
            } else {
                total += (count - p * n as f64).powi(2) / (p * n as f64);
            }
        }
        total
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let p = [0.5, 0.25, 0.15, 0.07, 0.03];
        let logits: Vec<f32> = p.iter().map(|p: &f64| p.ln() as f32 + 3.0).collect();
        let options = |temperature, top_p, top_k| move |uniform| RowSampling { temperature, top_p, top_k, uniform };
        // 4 degrees of freedom: 23.5 has probability 1e-4.
        assert!(chi_squared(&logits, options(1.0, 1.0, 0), &p, 40_000) < 23.5);
        let squared: Vec<f64> = p.iter().map(|p| p * p).collect();
        let norm: f64 = squared.iter().sum();
        let sharp: Vec<f64> = squared.iter().map(|p| p / norm).collect();
        assert!(chi_squared(&logits, options(0.5, 1.0, 0), &sharp, 40_000) < 23.5);
        let top2 = [0.5 / 0.75, 0.25 / 0.75, 0.0, 0.0, 0.0];
        assert!(chi_squared(&logits, options(1.0, 1.0, 2), &top2, 40_000) < 23.5);
        let nucleus = [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0, 0.0];
        assert!(chi_squared(&logits, options(1.0, 0.8, 0), &nucleus, 40_000) < 23.5);
    }

    #[test]
    fn both_ways_of_sampling_agree() {
        let logits = Tensor::randn([40, 1000], (Kind::Float, Device::Cpu)) * 3.0;
        let rows: Vec<RowSampling> = uniforms(40).map(row).collect();
        let (fused, plain) =
            (sample(&logits, &rows).expect("samples"), sample_by_tensors(&logits, &rows).expect("samples"));
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert_eq!(fused.tokens, plain.tokens);
        assert!(close(&fused.logprobs, &plain.logprobs) && close(&fused.entropies, &plain.entropies));
    }

    #[test]
    fn logprobs_and_entropies_are_of_the_scaled_distribution() {
        let logits = Tensor::from_slice(&[1.0f32, 2.0, 0.5]).unsqueeze(0);
        let options = RowSampling { temperature: 2.0, top_k: 1, ..row(0.3) };
        let sampled = sample(&logits, &[options]).expect("samples");
        let scaled = [0.5f64, 1.0, 0.25];
        let log_total = scaled.iter().map(|x| x.exp()).sum::<f64>().ln();
        let entropy: f64 = scaled.iter().map(|x| -(x - log_total).exp() * (x - log_total)).sum();
        assert_eq!(sampled.tokens, [1]);
        assert!((f64::from(sampled.logprobs[0]) - (1.0 - log_total)).abs() < 1e-6);
        assert!((f64::from(sampled.entropies[0]) - entropy).abs() < 1e-6);
    }

    #[test]
    fn extreme_draws_stay_inside_the_distribution() {
        let logits = Tensor::zeros([1, 50_000], (Kind::Float, Device::Cpu));
        let masked = logits.narrow(-1, 49_990, 10).fill_(f64::from(f32::MIN));
        drop(masked);
        for uniform in [0.0, 1.0 - f64::EPSILON / 2.0] {
            let token = sample(&logits, &[row(uniform)]).expect("samples").tokens[0];
            assert!((0..49_990).contains(&token), "{token} has no probability");
        }
    }
}
