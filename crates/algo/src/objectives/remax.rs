//! REINFORCE with the greedy answer as baseline.

use super::rloo;
use crate::{AdvantageEstimator, PolicyConfig};

/// ReMax (Li et al. 2023, arXiv 2310.10505): the return minus the reward of the greedy answer to the same prompt.
#[must_use]
pub fn remax() -> PolicyConfig {
    PolicyConfig { advantage: AdvantageEstimator::Remax, ..rloo() }
}
