//! Clipped importance weights on the log-probs.

use super::grpo;
use crate::{Aggregation, Clip, PolicyConfig, Surrogate};

/// CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): `-A sg(clamp(r, 1 - low, 1 + high)) ln p`, with the advantages of
/// GRPO and the mean over all tokens. A token that has gone far is weighted less than its ratio and never left out.
///
/// There is no lower bound in the paper, which is a `low` of 1 here. It tunes the upper one and gives no number: 4 is chosen,
/// a largest weight of 5, in the middle of what ScaleRL (arXiv 2510.13786) found to make no difference. The paper averages
/// over the tokens of a prompt's answers and then over prompts; here over all tokens of the mini-batch.
#[must_use]
pub fn cispo() -> PolicyConfig {
    PolicyConfig {
        surrogate: Surrogate::Weighted,
        clip: Clip { low: 1.0, high: 4.0, dual: None },
        aggregation: Aggregation::TokenMean,
        ..grpo()
    }
}
