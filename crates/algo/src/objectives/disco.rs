//! Discriminative constrained optimisation.

use super::scalar::{ScalarStep, log_sum_exp};
use crate::{ObjectiveError, Sequence};

/// Hyperparameters of DisCO.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiscoConfig {
    /// Temperature of the mean over wrong answers, above 0. Near 0 only the highest score counts; far above,
    /// all count alike.
    pub tau: f64,
    /// Divergence from the old policy without a penalty (nats per token), 0 or more.
    pub delta: f64,
    /// Weight of the squared divergence beyond `delta`, 0 or more.
    pub penalty: f64,
}

/// DisCO with the log-likelihood as score (Li et al. 2025, arXiv 2505.12366): `s = mean(new)` over an answer's tokens, and the
/// loss of a prompt is `tau ln(mean over wrong of exp(s / tau)) - mean over right of s`, its distributionally robust form; plus
/// `penalty max(0, KL - delta)^2` with KL the mean over the answers of the mini-batch of `mean(old - new)`.
///
/// The loss is the mean over prompts, to which one of equal labels adds nothing. A label between 0 and 1, which the paper does
/// not have, is right by its value and wrong by the rest. The paper's other score, the mean ratio, is not here: it is no
/// function of an answer's log-prob.
#[must_use]
pub fn disco() -> DiscoConfig {
    DiscoConfig { tau: 10.0, delta: 1e-4, penalty: 1e3 }
}

impl DiscoConfig {
    pub(crate) fn evaluate(&self, sequences: &[Sequence]) -> Result<ScalarStep, ObjectiveError> {
        for (name, value, least) in [("tau", self.tau, f64::MIN_POSITIVE), ("delta", self.delta, 0.0)] {
            if !(value.is_finite() && value >= least) {
                return Err(ObjectiveError::Setting { name, value, expected: "above 0, or 0 for delta" });
            }
        }
        if !(self.penalty.is_finite() && self.penalty >= 0.0) {
            return Err(ObjectiveError::Setting { name: "penalty", value: self.penalty, expected: "0 or more" });
        }
        let score = |s: &Sequence| s.new_logprob_sum / f64::from(s.tokens);
        let mut step = ScalarStep::by_group(sequences, |members| {
            let right: f64 = members.iter().map(|s| s.label).sum();
            let wrong: f64 = members.iter().map(|s| 1.0 - s.label).sum();
            if right == 0.0 || wrong == 0.0 {
                return (0.0, vec![0.0; members.len()]);
            }
            let terms: Vec<f64> = members.iter().map(|s| (1.0 - s.label).ln() + score(s) / self.tau).collect();
            let total = log_sum_exp(terms.iter().copied());
            let of_right: f64 = members.iter().map(|s| s.label * score(s)).sum::<f64>() / right;
            let slope = |(term, s): (&f64, &&Sequence)| ((term - total).exp() - s.label / right) / f64::from(s.tokens);
            (self.tau * (total - wrong.ln()) - of_right, terms.iter().zip(members).map(slope).collect())
        })?;
        // Summed in the order of their size, so that no bit depends on the order of the answers.
        let mut divergences: Vec<f64> =
            sequences.iter().map(|s| (s.old_logprob_sum - s.new_logprob_sum) / f64::from(s.tokens)).collect();
        divergences.sort_by(f64::total_cmp);
        let n = sequences.len() as f64;
        let beyond = (divergences.iter().sum::<f64>() / n - self.delta).max(0.0);
        for (i, s) in sequences.iter().enumerate() {
            step.loss[i] += self.penalty * beyond * beyond / n;
            step.dloss_dlogprob[i] -= 2.0 * self.penalty * beyond / (n * f64::from(s.tokens));
        }
        step.checked(sequences)
    }
}
