use serde::{Deserialize, Serialize};

use crate::ImportanceWeights;

/// Settings of the PACS objective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PacsConfig {
    /// Scale of the reward proxy, above 0.
    pub beta: f64,
    /// How a group's proxies become scores.
    pub score: ScoreEstimator,
    /// What the proxy is.
    pub reward_method: RewardMethod,
    /// Weights of the labels.
    pub label_weights: LabelWeights,
    /// Add the first term of the paper's gradient (eq. 5): every answer becomes less likely in proportion to its own
    /// cross entropy. The reference code leaves it out.
    pub actor_term: bool,
    /// Weights `p_old / p_rollout` of whole answers, for samples that older weights have drawn; never of single tokens, which
    /// have no loss of their own.
    pub importance: Option<ImportanceWeights>,
}

/// How a group's reward proxies become scores (paper eq. 6, 9, 10).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreEstimator {
    /// Proxy minus the mean of the others.
    Rloo,
    /// Proxy minus the group mean, over the group's deviation.
    Grpo,
    /// Proxy minus the group mean.
    DrGrpo,
    /// The proxy itself.
    Naive,
}

impl ScoreEstimator {
    /// The smallest group that can teach anything: all but `Naive` compare a sample with the others of its group.
    #[must_use]
    pub fn min_group_size(self) -> usize {
        match self {
            Self::Rloo | Self::Grpo | Self::DrGrpo => 2,
            Self::Naive => 1,
        }
    }
}

/// What the reward proxy of a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardMethod {
    /// `beta * sum(new log-prob - old log-prob)` (paper eq. 7).
    LogRatio,
    /// `beta * mean(new log-prob)`; the reference code's second method.
    MeanLogprob,
}

/// Weights of the labels in the cross entropy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelWeights {
    /// All one.
    None,
    /// What is right and what is wrong of a question weigh the same: for labels between 0 and 1, too.
    Question,
    /// Only positive labels count.
    OnlyPositive,
    /// Only negative labels count.
    OnlyNegative,
}
