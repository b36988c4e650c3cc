//! REINFORCE with advantages whitened over the whole step.

use super::grpo;
use crate::{AdvantageEstimator, Aggregation, PolicyConfig};

/// REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): discounted returns, whitened over all tokens of the step, a clipped
/// ratio, the mean over all tokens. The paper adds a KL penalty to the reward; without a reference model there is none.
#[must_use]
pub fn reinforce_pp() -> PolicyConfig {
    PolicyConfig {
        advantage: AdvantageEstimator::ReinforcePp { gamma: 1.0 },
        aggregation: Aggregation::TokenMean,
        ..grpo()
    }
}

/// Its variant with a baseline: `R` minus the group mean, then whitened.
#[must_use]
pub fn reinforce_pp_baseline() -> PolicyConfig {
    PolicyConfig { advantage: AdvantageEstimator::ReinforcePpBaseline, ..reinforce_pp() }
}
