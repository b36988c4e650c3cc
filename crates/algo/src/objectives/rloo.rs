//! REINFORCE with a leave-one-out baseline.

use super::grpo;
use crate::{AdvantageEstimator, Aggregation, PolicyConfig};

/// RLOO (Ahmadian et al. 2024, arXiv 2402.14740): `A = R - mean of the others`, an answer is one action, so its token
/// losses add up. The paper updates once a batch and clips nothing; here the ratio of later updates is clipped, which
/// on policy makes no difference.
#[must_use]
pub fn rloo() -> PolicyConfig {
    PolicyConfig { advantage: AdvantageEstimator::Rloo, aggregation: Aggregation::SeqMeanTokenSum, ..grpo() }
}
