//! A trust region of probabilities in the place of a clipped ratio.

use super::grpo;
use crate::{Aggregation, Clip, Divergence, PolicyConfig, Surrogate};

/// DPPO with a binary mask (Qi et al. 2026, arXiv 2602.04879): `-A sg(min(r, 20)) ln p`, with `r` the ratio to the policy of
/// the rollout engine, and nothing for a token whose probability is further than `high` (`low` for a negative advantage)
/// from the engine's and whose update would move it further away. The ratio of a rare token may therefore grow large, while
/// that of a likely token may not.
///
/// What the paper calls binary takes the token and all others together as two outcomes; its top-k masks take whole
/// distributions, and are not here. The threshold of 0.2 is that of the published code; advantages are GRPO's and losses are
/// averaged over all tokens, which is chosen.
#[must_use]
pub fn dppo() -> PolicyConfig {
    PolicyConfig {
        surrogate: Surrogate::Masked { divergence: Divergence::Tv, cap: 20.0 },
        clip: Clip { low: 0.2, high: 0.2, dual: None },
        aggregation: Aggregation::TokenMean,
        ..grpo()
    }
}
