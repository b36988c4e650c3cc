//! Rewards as labels.

use super::scalar::{ScalarStep, log_sum_exp};
use crate::{ObjectiveError, Sequence};

/// Hyperparameters of REAL.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RealConfig {
    /// Temperature that the mean log-ratio of an answer is divided by; above 0.
    pub tau: f64,
}

/// REAL (arXiv 2602.05630): an answer's logit is `s = mean(new - old) / tau` over its tokens, and the loss of a prompt is
/// `ln(1 + sum over right of exp(-s)) + ln(1 + sum over wrong of exp(s))`. The one in each logarithm is the anchor, a logit
/// of 0, without which a prompt of equal labels would have no loss.
///
/// The loss is the mean over prompts. A label between 0 and 1, which the paper does not have, is right by its value and wrong
/// by the rest.
#[must_use]
pub fn real() -> RealConfig {
    RealConfig { tau: 0.5 }
}

impl RealConfig {
    pub(crate) fn evaluate(&self, sequences: &[Sequence]) -> Result<ScalarStep, ObjectiveError> {
        if !(self.tau.is_finite() && self.tau > 0.0) {
            return Err(ObjectiveError::Setting { name: "tau", value: self.tau, expected: "above 0" });
        }
        let logit = |s: &Sequence| (s.new_logprob_sum - s.old_logprob_sum) / (f64::from(s.tokens) * self.tau);
        ScalarStep::by_group(sequences, |members| {
            let mut loss = 0.0;
            let mut slopes = vec![0.0; members.len()];
            for right in [true, false] {
                let share = |s: &Sequence| if right { s.label } else { 1.0 - s.label };
                let sign = if right { -1.0 } else { 1.0 };
                let terms: Vec<f64> = members.iter().map(|s| share(s).ln() + sign * logit(s)).collect();
                let total = log_sum_exp(terms.iter().copied().chain([0.0]));
                loss += total;
                for (slope, (term, s)) in slopes.iter_mut().zip(terms.iter().zip(members)) {
                    *slope += sign * (term - total).exp() / (f64::from(s.tokens) * self.tau);
                }
            }
            (loss, slopes)
        })
    }
}
