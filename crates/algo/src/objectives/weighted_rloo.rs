//! RLOO with a weight for each prompt by its pass rate: the control of everything that is more than such a weight.

use super::rloo;
use crate::{AdvantageEstimator, PolicyConfig};

/// RLOO with `A = p^-right (1 - p)^-wrong (R - mean of the others)`, `p` the mean label of the group.
///
/// For labels of 0 and 1 its members are, up to one constant for all prompts: RLOO (0, 0); Dr.GRPO (0, 0) times
/// `(n - 1) / n`; MaxRL (1, 0) times `(n - 1) / n`; GRPO (1/2, 1/2) times `sqrt((n - 1) / n) (n - 1) / n`, but for its
/// epsilon; and the first update of PACS after a reference reset with `label_weights = "question"` (1, 1) times `beta / 4`.
/// The difference between PACS and (1, 1) is therefore the effect of its cross entropy. A prompt whose labels are all the same has no
/// advantage, unless both exponents are 0.
#[must_use]
pub fn weighted_rloo(right: f64, wrong: f64) -> PolicyConfig {
    PolicyConfig { advantage: AdvantageEstimator::WeightedRloo { right, wrong }, ..rloo() }
}
