use crate::{ScoreEstimator, group::centred};

/// Added to the standard deviation before dividing by it.
pub(crate) const STD_EPSILON: f64 = 1e-6;

/// Computes the scores of a group from its reward proxies.
pub(crate) fn scores(estimator: ScoreEstimator, proxies: &[f64]) -> Vec<f64> {
    match estimator {
        ScoreEstimator::Naive => proxies.to_vec(),
        ScoreEstimator::DrGrpo => centred(proxies),
        ScoreEstimator::Rloo => leave_one_out(proxies),
        ScoreEstimator::Grpo => {
            let deviations = centred(proxies);
            let scale = sample_std(&deviations) + STD_EPSILON;
            deviations.iter().map(|deviation| deviation / scale).collect()
        }
    }
}

/// Computes the derivatives of the loss by a group's proxies from those by its scores. Baseline and standard deviation
/// are differentiated through; nothing counts as a constant.
pub(crate) fn backward(estimator: ScoreEstimator, proxies: &[f64], dloss_dscore: &[f64]) -> Vec<f64> {
    match estimator {
        ScoreEstimator::Naive => dloss_dscore.to_vec(),
        // Subtracting the mean, of all or of the others, is a symmetric linear map: it is its own transpose.
        ScoreEstimator::DrGrpo => centred(dloss_dscore),
        ScoreEstimator::Rloo => leave_one_out(dloss_dscore),
        ScoreEstimator::Grpo => standardised_backward(proxies, dloss_dscore),
    }
}

/// Subtracts from each value the mean of the others: `n / (n - 1)` times its distance to the mean of all.
fn leave_one_out(values: &[f64]) -> Vec<f64> {
    let n = values.len() as f64;
    centred(values).iter().map(|deviation| deviation * n / (n - 1.0)).collect()
}

fn standardised_backward(proxies: &[f64], dloss_dscore: &[f64]) -> Vec<f64> {
    let deviations = centred(proxies);
    let std = sample_std(&deviations);
    let scale = std + STD_EPSILON;
    let along: f64 = dloss_dscore.iter().zip(&deviations).map(|(gradient, deviation)| gradient * deviation).sum();
    // The standard deviation has no derivative at 0; the convention is to hold it constant there.
    let through_std = if std == 0.0 { 0.0 } else { along / ((proxies.len() as f64 - 1.0) * std * scale) };
    let gradients = centred(dloss_dscore);
    gradients
        .iter()
        .zip(&deviations)
        .map(|(gradient, deviation)| (gradient - deviation * through_std) / scale)
        .collect()
}

/// Sample standard deviation (divisor n - 1) of values that were already centred.
fn sample_std(deviations: &[f64]) -> f64 {
    let squares: f64 = deviations.iter().map(|deviation| deviation * deviation).sum();
    (squares / (deviations.len() as f64 - 1.0)).sqrt()
}
