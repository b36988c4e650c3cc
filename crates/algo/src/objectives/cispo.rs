//! Clipped importance weights on the log-probs.

use super::grpo;
use crate::{Aggregation, Clip, PolicyConfig, Surrogate};

/// CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): `-A sg(clamp(r, 1 - low, 1 + high)) ln p`, with the advantages of
/// GRPO and the mean over all tokens. A token whose ratio has moved far is weighted less than its ratio, but never left
/// out.
///
/// The paper has no lower bound, which is a `low` of 1 here. It tunes the upper bound without giving a number: 4 is our
/// choice, a largest weight of 5, in the middle of the range that ScaleRL (arXiv 2510.13786) found to make no
/// difference. The paper averages over the tokens of a prompt's answers and then over prompts; here the mean is over
/// all tokens of the mini-batch.
#[must_use]
pub fn cispo() -> PolicyConfig {
    PolicyConfig {
        surrogate: Surrogate::Weighted,
        clip: Clip { low: 1.0, high: 4.0, dual: None },
        aggregation: Aggregation::TokenMean,
        ..grpo()
    }
}
