//! Maximum likelihood reinforcement learning.

use super::rloo;
use crate::{AdvantageEstimator, PolicyConfig};

/// MaxRL (arXiv 2602.02710): `A = (R - mean) / mean` within the group, 0 where nothing is right. Its expectation over
/// samples is the gradient of the expansion of `ln p` in pass@k, cut after as many terms as there are samples.
///
/// The paper updates once a batch and has neither ratio nor clip; token losses add up, as the estimator asks, and later
/// updates of a batch are clipped as RLOO's are here. The mean is that of the rewards, as in the paper where they are 0 and 1;
/// a mean that is not above 0 counts as nothing right.
#[must_use]
pub fn maxrl() -> PolicyConfig {
    PolicyConfig { advantage: AdvantageEstimator::MaxRl, ..rloo() }
}
