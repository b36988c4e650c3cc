//! Group-relative policy optimisation and its variants.

use crate::{AdvantageEstimator, Aggregation, Clip, PolicyConfig, RatioLevel, Surrogate};

/// GRPO (Shao et al. 2024, arXiv 2402.03300): `A = (R - mean) / (std + 1e-6)` within the group, a clipped token ratio,
/// the mean over answers of the mean over their tokens. Without a KL penalty, and with the dual clip of 3, as the PACS
/// paper ran it.
#[must_use]
pub fn grpo() -> PolicyConfig {
    PolicyConfig {
        advantage: AdvantageEstimator::Grpo,
        ratio: RatioLevel::Token,
        surrogate: Surrogate::Clipped,
        clip: Clip { low: 0.2, high: 0.2, dual: Some(3.0) },
        aggregation: Aggregation::SeqMeanTokenMean,
        mask_truncated: false,
        kl: None,
        importance: None,
        entropy: 0.0,
        value: None,
    }
}

/// Dr.GRPO (Liu et al. 2025, arXiv 2503.20783): no division by the deviation, and token losses divided by a constant
/// length instead of each answer's own, so that neither easy questions nor short answers weigh more.
#[must_use]
pub fn dr_grpo(length: f64) -> PolicyConfig {
    PolicyConfig {
        advantage: AdvantageEstimator::DrGrpo,
        aggregation: Aggregation::SeqMeanTokenSumNorm { length },
        clip: Clip { dual: None, ..grpo().clip },
        ..grpo()
    }
}

/// DAPO (Yu et al. 2025, arXiv 2503.14476): an upper bound above the lower one, the mean over all tokens, truncated
/// answers left out. Its fourth part, replacing groups without signal, belongs to sampling and is not here.
#[must_use]
pub fn dapo() -> PolicyConfig {
    PolicyConfig {
        aggregation: Aggregation::TokenMean,
        clip: Clip { low: 0.2, high: 0.28, dual: None },
        mask_truncated: true,
        ..grpo()
    }
}

/// GSPO (Zheng et al. 2025, arXiv 2507.18071): one ratio an answer, the geometric mean of its token ratios.
#[must_use]
pub fn gspo() -> PolicyConfig {
    PolicyConfig { ratio: RatioLevel::Sequence, clip: Clip { low: 3e-4, high: 4e-4, dual: None }, ..grpo() }
}
