use super::Aggregation;
use crate::{PolicyConfig, SequenceInfo};

/// Added to the number of tokens that a mean divides by, as in published code.
pub(crate) const MEAN_EPSILON: f64 = 1e-8;

/// Mean of `count` numbers that add up to `sum`; 0 without any.
pub(crate) fn mean(sum: f64, count: f64) -> f64 {
    sum / (count + MEAN_EPSILON)
}

/// Counted sequences and tokens of a mini-batch, over all ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normaliser {
    sequences: f64,
    tokens: f64,
}

impl Normaliser {
    pub(crate) fn new(config: &PolicyConfig, infos: &[SequenceInfo]) -> Self {
        let counted = || infos.iter().filter(|info| config.counts(info));
        Self { sequences: counted().count() as f64, tokens: counted().map(|info| f64::from(info.tokens)).sum() }
    }

    /// Weight of one token's loss in the aggregate, in a counted sequence of `tokens` tokens.
    pub(crate) fn token_weight(&self, aggregation: Aggregation, tokens: u32) -> f64 {
        match aggregation {
            Aggregation::TokenMean => 1.0 / (self.tokens + MEAN_EPSILON),
            Aggregation::SeqMeanTokenMean => 1.0 / (self.sequences * f64::from(tokens)),
            Aggregation::SeqMeanTokenSum => 1.0 / self.sequences,
            Aggregation::SeqMeanTokenSumNorm { length } => 1.0 / (self.sequences * length),
            Aggregation::TokenSumNorm { length } => 1.0 / length,
        }
    }
}

impl PolicyConfig {
    /// Whether the tokens of a sequence take part in the loss.
    #[must_use]
    pub fn counts(&self, info: &SequenceInfo) -> bool {
        !(self.mask_truncated && info.truncated)
    }
}
