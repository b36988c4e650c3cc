use serde::{Deserialize, Serialize};

use crate::ImportanceWeights;

/// Hyperparameters of the PACS objective.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PacsConfig {
    /// Scale of the reward proxy; above 0.
    pub beta: f64,
    /// How the reward proxies of a group become scores.
    pub score: ScoreEstimator,
    /// How the reward proxy of a sequence is computed.
    pub reward_method: RewardMethod,
    /// How labels are weighted in the cross entropy.
    pub label_weights: LabelWeights,
    /// Adds the first term of the paper's gradient (eq. 5), which makes every answer less likely in proportion to its
    /// own cross entropy. The reference code leaves it out.
    pub actor_term: bool,
    /// Importance weights `p_old / p_rollout` for samples of older weights; `None` for no correction. They apply to
    /// whole answers, because single tokens have no loss of their own.
    pub importance: Option<ImportanceWeights>,
}

impl PacsConfig {
    /// The objective as published, which is also the default of a job: leave-one-out scores of log-ratios at `beta` 1, and
    /// labels weighted by question.
    #[must_use]
    pub const fn paper() -> Self {
        Self {
            beta: 1.0,
            score: ScoreEstimator::Rloo,
            reward_method: RewardMethod::LogRatio,
            label_weights: LabelWeights::Question,
            actor_term: false,
            importance: None,
        }
    }
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
    /// Returns the smallest group with a gradient: all estimators but `Naive` compare a sample with the others
    /// of its group.
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
    /// Every label has weight 1.
    None,
    /// Right and wrong answers to a question have the same total weight, also with labels between 0 and 1.
    Question,
    /// Only positive labels count.
    OnlyPositive,
    /// Only negative labels count.
    OnlyNegative,
}
