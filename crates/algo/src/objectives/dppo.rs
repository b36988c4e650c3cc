//! A trust region on probabilities instead of a clipped ratio.

use super::grpo;
use crate::{Aggregation, Clip, Divergence, PolicyConfig, Surrogate};

/// DPPO with a binary mask (Qi et al. 2026, arXiv 2602.04879): `-A sg(min(r, 20)) ln p`, with `r` the ratio to the
/// policy of the rollout engine. A token has no loss if its probability is further than `high` (`low` for a negative
/// advantage) from the engine's and its update would move it further away. The ratio of a rare token may therefore grow
/// large, while that of a likely token may not.
///
/// Binary means that the token and all others together count as two outcomes; the paper's top-k masks compare whole
/// distributions and are not implemented. The threshold of 0.2 is that of the published code. GRPO's advantages and the
/// mean over all tokens are our choice.
#[must_use]
pub fn dppo() -> PolicyConfig {
    PolicyConfig {
        surrogate: Surrogate::Masked { divergence: Divergence::Tv, cap: 20.0 },
        clip: Clip { low: 0.2, high: 0.2, dual: None },
        aggregation: Aggregation::TokenMean,
        ..grpo()
    }
}
