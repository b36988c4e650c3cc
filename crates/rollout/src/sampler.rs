//! From logits to tokens. `B` rows, `V` vocabulary.

use pacs_torch::tch::{Device, Kind, TchError, Tensor};
use pacs_torch::{DeviceKernels, DrawOptions, Drawn, Filters, KernelError, RowDraw, can_draw, draw};

/// What one row of the batch wants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct RowSampling {
    /// Divides the logits.
    pub(crate) temperature: f64,
    /// What may be drawn.
    pub(crate) filters: Filters,
    /// Uniform number in `[0, 1)` that picks the token.
    pub(crate) uniform: f64,
}

/// The tokens of one decode step.
#[derive(Debug)]
pub(crate) struct Sampled {
    /// Chosen token of each row.
    pub(crate) tokens: Vec<i64>,
    /// Its log-probability under the temperature-scaled policy, before top-k, top-p and min-p (nats).
    pub(crate) logprobs: Vec<f32>,
    /// Its log-probability after the filters (nats).
    pub(crate) sampled_logprobs: Vec<f32>,
    /// Entropy of the temperature-scaled policy (nats).
    pub(crate) entropies: Vec<f32>,
}

/// Draws one token a row by inverting the cumulative distribution at the row's uniform number.
///
/// `logits`: `[B, V]`, any float kind, on any device.
pub(crate) fn sample(logits: &Tensor, rows: &[RowSampling]) -> Result<Sampled, TchError> {
    if !can_draw(logits) {
        // Float32 at least before anything is reduced: bfloat16 loses the tail.
        let kind = if logits.device() == Device::Cpu { Kind::Double } else { Kind::Float };
        return sample_by_tensors(logits, rows, kind);
    }
    let options: Vec<DrawOptions> = rows
        .iter()
        .map(|&RowSampling { temperature, filters, uniform }| DrawOptions { temperature, uniform, filters })
        .collect();
    Ok(Sampled::from(draw(logits, &options).expect("such logits can be drawn from")))
}

/// The same by the kernels of a device, which count the noise themselves.
pub(crate) fn sample_on_device(
    kernels: &DeviceKernels,
    logits: &Tensor,
    rows: &[RowDraw],
) -> Result<Sampled, KernelError> {
    Ok(Sampled::from(kernels.draw(&logits.contiguous(), rows)?))
}

impl From<Vec<Drawn>> for Sampled {
    fn from(drawn: Vec<Drawn>) -> Self {
        Self {
            tokens: drawn.iter().map(|drawn| drawn.token as i64).collect(),
            logprobs: drawn.iter().map(|drawn| drawn.logprob).collect(),
            sampled_logprobs: drawn.iter().map(|drawn| drawn.sampled_logprob).collect(),
            entropies: drawn.iter().map(|drawn| drawn.entropy).collect(),
        }
    }
}

/// The same by tensor operations in `kind`, for every device.
fn sample_by_tensors(logits: &Tensor, rows: &[RowSampling], kind: Kind) -> Result<Sampled, TchError> {
    let (_b, vocabulary) = logits.size2()?;
    let device = logits.device();
    let column = |value: fn(&RowSampling) -> f64| {
        let values: Vec<f64> = rows.iter().map(value).collect();
        Tensor::from_slice(&values).to_kind(kind).to_device(device).unsqueeze(-1)
    };
    let mut logits = logits.to_kind(kind);
    if rows.iter().any(|row| row.temperature != 1.0) {
        logits = logits.f_div(&column(|row| row.temperature))?;
    }
    let logprobs = logits.f_log_softmax(-1, kind)?;
    let probabilities = logprobs.f_exp()?;
    let entropies = -(&probabilities * &logprobs).f_sum_dim_intlist(-1, false, kind)?;
    let kept = keep(&probabilities, rows)?;
    let cumulative = kept.as_ref().unwrap_or(&probabilities).f_cumsum(-1, kind)?;
    // The last column is the total that was kept, up to rounding; scaling by it makes every draw fall inside.
    let total = cumulative.f_narrow(-1, vocabulary - 1, 1)?;
    let targets = column(|row| row.uniform) * total;
    let chosen = targets.f_searchsorted(&cumulative, false, true, "right", None::<Tensor>)?;
    // Rounding may put a target on the very end of the distribution.
    let chosen = last_possible(&chosen, &cumulative, vocabulary)?;
    let chosen_logprobs = logprobs.f_gather(-1, &chosen, false)?;
    let sampled_logprobs = match &kept {
        Some(kept) => &chosen_logprobs - kept.f_sum_dim_intlist(-1, true, kind)?.f_log()?,
        None => chosen_logprobs.shallow_clone(),
    };
    let host = |column: &Tensor| Vec::try_from(column.view([-1]).to_kind(Kind::Float));
    Ok(Sampled {
        tokens: Vec::try_from(chosen.squeeze_dim(-1))?,
        logprobs: host(&chosen_logprobs)?,
        sampled_logprobs: host(&sampled_logprobs)?,
        entropies: host(&entropies)?,
    })
}

/// Clamps draws to the last token of non-zero probability.
fn last_possible(chosen: &Tensor, cumulative: &Tensor, vocabulary: i64) -> Result<Tensor, TchError> {
    let total = cumulative.f_narrow(-1, vocabulary - 1, 1)?;
    let last = total.contiguous().f_searchsorted(cumulative, false, false, "left", None::<Tensor>)?;
    chosen.f_minimum(&last)
}

/// Probabilities with everything that each row's filters cut off set to zero; `None` when no row cuts.
///
/// `probabilities`: `[B, V]`. Equal ones are ranked by index. Top-k comes first, then the nucleus of what is left,
/// renormalised, then min-p; the most probable token always stays.
fn keep(probabilities: &Tensor, rows: &[RowSampling]) -> Result<Option<Tensor>, TchError> {
    if !rows.iter().any(|row| row.filters.cut()) {
        return Ok(None);
    }
    let (_b, vocabulary) = probabilities.size2()?;
    let (device, kind) = (probabilities.device(), probabilities.kind());
    let column = |value: fn(&RowSampling) -> f64| {
        let values: Vec<f64> = rows.iter().map(value).collect();
        Tensor::from_slice(&values).to_kind(kind).to_device(device).unsqueeze(-1)
    };
    let (sorted, order) = probabilities.f_sort_stable(true, -1, true)?;
    let ranks = Tensor::f_arange(vocabulary, (Kind::Int64, device))?.unsqueeze(0);
    let limits: Vec<i64> =
        rows.iter().map(|row| if row.filters.top_k == 0 { vocabulary } else { i64::from(row.filters.top_k) }).collect();
    let within_k = ranks.f_lt_tensor(&Tensor::from_slice(&limits).to_device(device).unsqueeze(-1))?;
    let sorted = sorted * within_k.to_kind(kind);
    let sorted = &sorted / sorted.f_sum_dim_intlist(-1, true, kind)?;
    // A token stays while the mass before it is below the nucleus; rounding must not end a nucleus that is off.
    let before = sorted.f_cumsum(-1, kind)? - &sorted;
    let nuclei = column(|row| if row.filters.top_p < 1.0 { row.filters.top_p } else { 2.0 });
    let within_p = before.f_lt_tensor(&nuclei)?;
    let enough = sorted.f_ge_tensor(&(sorted.f_narrow(-1, 0, 1)? * column(|row| row.filters.min_p)))?;
    let first = ranks.f_eq(0)?;
    let stays = within_k.f_logical_and(&within_p)?.f_logical_and(&enough)?.f_logical_or(&first)?;
    let mask = stays.f_zeros_like()?.f_scatter(-1, &order, &stays)?;
    Ok(Some(probabilities * mask.to_kind(kind)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_torch::tch::manual_seed;
    use pacs_types::mix;

    /// A way of sampling.
    type Sampler = fn(&Tensor, &[RowSampling]) -> Result<Sampled, TchError>;

    fn by_tensors(logits: &Tensor, rows: &[RowSampling]) -> Result<Sampled, TchError> {
        sample_by_tensors(logits, rows, Kind::Float)
    }

    fn row(uniform: f64) -> RowSampling {
        RowSampling { temperature: 1.0, filters: Filters::OFF, uniform }
    }

    fn uniforms(n: u64) -> impl Iterator<Item = f64> {
        (0..n).map(|i| (mix(i) >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// Probabilities of the tokens under an option, from its definition.
    fn exact(logits: &[f32], temperature: f64, filters: Filters) -> Vec<f64> {
        let weights: Vec<f64> = logits.iter().map(|logit| (f64::from(*logit) / temperature).exp()).collect();
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
        if filters.top_k > 0 {
            order.truncate(filters.top_k as usize);
        }
        let total: f64 = order.iter().map(|token| weights[*token]).sum();
        let mut before = 0.0;
        order.retain(|token| {
            let stays = before < filters.top_p * total;
            before += weights[*token];
            stays
        });
        let largest = weights[order[0]];
        order.retain(|token| weights[*token] >= filters.min_p * largest);
        let total: f64 = order.iter().map(|token| weights[*token]).sum();
        let mut exact = vec![0.0; weights.len()];
        for token in order {
            exact[token] = weights[token] / total;
        }
        exact
    }

    /// Chi-squared of draws against `expected` probabilities, and its degrees of freedom; a zero probability must never
    /// be drawn, and the log-probs must be those of the two distributions.
    fn chi_squared(sampler: Sampler, logits: &[f32], make: impl Fn(f64) -> RowSampling, n: u64) -> (f64, usize) {
        let rows: Vec<RowSampling> = uniforms(n).map(make).collect();
        let RowSampling { temperature, filters, .. } = rows[0];
        let expected = exact(logits, temperature, filters);
        let plain = exact(logits, temperature, Filters::OFF);
        let logits = Tensor::from_slice(logits).unsqueeze(0).repeat([n as i64, 1]);
        let sampled = sampler(&logits, &rows).expect("samples");
        let mut counts = vec![0.0; expected.len()];
        for (draw, token) in sampled.tokens.iter().enumerate() {
            let token = *token as usize;
            counts[token] += 1.0;
            assert!(expected[token] > 0.0, "{filters:?}: impossible token {token}");
            assert!((f64::from(sampled.logprobs[draw]) - plain[token].ln()).abs() < 1e-5);
            assert!((f64::from(sampled.sampled_logprobs[draw]) - expected[token].ln()).abs() < 1e-5);
        }
        let possible = counts.iter().zip(&expected).filter(|(_, p)| **p > 0.0);
        let terms = possible.map(|(count, p)| (count - p * n as f64).powi(2) / (p * n as f64));
        let freedom = expected.iter().filter(|p| **p > 0.0).count() - 1;
        (terms.sum(), freedom)
    }

    /// Above this a chi-squared variable lies once in ten thousand times (Wilson and Hilferty).
    fn critical(freedom: usize) -> f64 {
        let share = 2.0 / (9.0 * freedom as f64);
        freedom as f64 * (1.0 - share + 3.719 * share.sqrt()).powi(3)
    }

    #[test]
    fn frequencies_follow_the_probabilities_with_every_option() {
        // So small operations are slower on several threads.
        pacs_torch::tch::set_num_threads(1);
        // Twelve tokens, some of them equally probable, in no order.
        let p = [0.02, 0.3, 0.07, 0.01, 0.12, 0.005, 0.2, 0.07, 0.1, 0.07, 0.03, 0.005];
        let logits: Vec<f32> = p.iter().map(|p: &f64| p.ln() as f32 + 3.0).collect();
        let samplers: [(&str, Sampler); 2] = [("fused", sample), ("tensors", by_tensors)];
        for (name, sampler) in samplers {
            for temperature in [0.5, 1.0, 1.7] {
                for top_k in [0, 1, 3, 5] {
                    for top_p in [0.45, 0.83, 1.0] {
                        for min_p in [0.0, 0.15, 0.5] {
                            let filters = Filters { top_k, top_p, min_p };
                            let make = |uniform| RowSampling { temperature, filters, uniform };
                            let (found, freedom) = chi_squared(sampler, &logits, make, 4_000);
                            let limit = if freedom == 0 { 1e-9 } else { critical(freedom) };
                            assert!(found <= limit, "{name}, {temperature}, {filters:?}: {found} above {limit}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn both_ways_of_sampling_agree() {
        manual_seed(9);
        let logits = Tensor::randn([60, 1000], (Kind::Float, Device::Cpu)) * 3.0;
        let filters = [
            Filters::OFF,
            Filters { top_k: 40, ..Filters::OFF },
            Filters { top_p: 0.9, ..Filters::OFF },
            Filters { min_p: 0.05, ..Filters::OFF },
            Filters { top_k: 100, top_p: 0.8, min_p: 0.01 },
        ];
        let rows: Vec<RowSampling> = uniforms(60)
            .enumerate()
            .map(|(i, uniform)| RowSampling { filters: filters[i % 5], temperature: 0.7 + i as f64 / 60.0, uniform })
            .collect();
        let fused = sample(&logits, &rows).expect("samples");
        let exact = sample_by_tensors(&logits, &rows, Kind::Double).expect("samples");
        let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert_eq!(fused.tokens, exact.tokens);
        assert!(close(&fused.logprobs, &exact.logprobs) && close(&fused.sampled_logprobs, &exact.sampled_logprobs));
        assert!(fused.entropies.iter().zip(&exact.entropies).all(|(a, b)| (a - b).abs() < 1e-4));
    }

    #[test]
    fn logprobs_and_entropies_are_of_the_scaled_distribution() {
        let logits = Tensor::from_slice(&[1.0f32, 2.0, 0.5]).unsqueeze(0);
        let options = RowSampling { temperature: 2.0, filters: Filters { top_k: 1, ..Filters::OFF }, uniform: 0.3 };
        for sampled in [sample(&logits, &[options]), by_tensors(&logits, &[options])] {
            let sampled = sampled.expect("samples");
            let scaled = [0.5f64, 1.0, 0.25];
            let log_total = scaled.iter().map(|x| x.exp()).sum::<f64>().ln();
            let entropy: f64 = scaled.iter().map(|x| -(x - log_total).exp() * (x - log_total)).sum();
            assert_eq!((sampled.tokens[0], sampled.sampled_logprobs[0]), (1, 0.0));
            assert!((f64::from(sampled.logprobs[0]) - (1.0 - log_total)).abs() < 1e-6);
            assert!((f64::from(sampled.entropies[0]) - entropy).abs() < 1e-6);
        }
    }

    #[test]
    fn extreme_draws_stay_inside_the_distribution() {
        let logits = Tensor::zeros([1, 50_000], (Kind::Float, Device::Cpu));
        let masked = logits.narrow(-1, 49_990, 10).fill_(f64::from(f32::MIN));
        drop(masked);
        for uniform in [0.0, 1.0 - f64::EPSILON / 2.0] {
            for sampler in [sample, by_tensors] {
                let token = sampler(&logits, &[row(uniform)]).expect("samples").tokens[0];
                assert!((0..49_990).contains(&token), "{token} has no probability");
            }
        }
    }
}
