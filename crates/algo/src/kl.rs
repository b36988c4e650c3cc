use serde::{Deserialize, Serialize};

/// Estimators of the divergence of a policy from a reference, from the log-probs of one sampled token; `x` is the log
/// of the policy's probability over the reference's (Schulman, "Approximating KL divergence", 2020).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlKind {
    /// `x`: unbiased as a value. As a loss it is useless, for its expected gradient is 0.
    K1,
    /// `|x|`, where `x` is the log-ratio to the reference: always positive, and biased.
    Abs,
    /// `x² / 2`: biased as a value, its gradient is that of the divergence.
    K2,
    /// `exp(-x) + x - 1`, held within -10 and 10: unbiased below the bound, never negative.
    K3,
}

/// Bound of the third estimator, beyond which its gradient is 0.
const K3_BOUND: f64 = 10.0;

impl KlKind {
    /// Returns the estimate for one token (nats).
    #[must_use]
    pub fn value(self, x: f64) -> f64 {
        match self {
            Self::K1 => x,
            Self::Abs => x.abs(),
            Self::K2 => x * x / 2.0,
            Self::K3 => k3(x).min(K3_BOUND),
        }
    }

    /// Returns the derivative of the estimate by the policy's log-prob.
    #[must_use]
    pub fn slope(self, x: f64) -> f64 {
        match self {
            Self::K1 => 1.0,
            Self::Abs if x == 0.0 => 0.0,
            Self::Abs => x.signum(),
            Self::K2 => x,
            Self::K3 if k3(x) > K3_BOUND => 0.0,
            Self::K3 => -(-x).exp_m1(),
        }
    }
}

/// Computes `exp(-x) - 1 + x` without cancellation near 0; never negative.
fn k3(x: f64) -> f64 {
    (-x).exp_m1() + x
}
