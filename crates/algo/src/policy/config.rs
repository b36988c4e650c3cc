use serde::{Deserialize, Serialize};

use crate::{KlKind, ObjectiveError};

/// Hyperparameters of the clipped policy gradient. GRPO, PPO, RLOO, REINFORCE++ and their variants are special cases,
/// whose published settings the functions of their names return ([`grpo`](crate::grpo), …).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyConfig {
    /// How rewards become advantages.
    pub advantage: AdvantageEstimator,
    /// Level at which new and old policy are compared.
    pub ratio: RatioLevel,
    /// What the loss makes of a token's ratio.
    pub surrogate: Surrogate,
    /// Bounds of the ratio; for DPPO those of the probability's distance.
    pub clip: Clip,
    /// How token losses become one number.
    pub aggregation: Aggregation,
    /// Whether tokens of truncated answers are left out of the loss, its normaliser and whitening. Their rewards still
    /// count in the baseline of their group.
    pub mask_truncated: bool,
    /// Penalty for diverging from a reference policy; `None` for none.
    pub kl: Option<KlPenalty>,
    /// Importance weights for the mismatch of rollout engine and learner; `None` for none.
    pub importance: Option<ImportanceWeights>,
    /// Weight of the mean entropy, which is subtracted from the loss; 0 disables it.
    pub entropy: f64,
    /// Value loss; `None` without a value model.
    pub value: Option<ValueConfig>,
}

/// How rewards become advantages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AdvantageEstimator {
    /// Reward minus the group mean, over the group's deviation.
    Grpo,
    /// Reward minus the group mean.
    DrGrpo,
    /// Reward minus the mean of the others of the group.
    Rloo,
    /// As `Rloo`, times `p^-right (1 - p)^-wrong`, with `p` the mean label of the group.
    WeightedRloo {
        /// Exponent of the share of right answers.
        right: f64,
        /// Exponent of the share of wrong answers.
        wrong: f64,
    },
    /// Reward minus the group mean, over that mean.
    MaxRl,
    /// Discounted return, whitened over all tokens of the step.
    ReinforcePp {
        /// Discount per token; above 0, at most 1.
        gamma: f64,
    },
    /// Reward minus the group mean, whitened over all tokens of the step.
    ReinforcePpBaseline,
    /// Return minus the reward of the greedy answer.
    Remax,
    /// Generalised advantage estimation on a value model, whitened over all tokens of the step.
    Gae {
        /// Discount per token; above 0, at most 1.
        gamma: f64,
        /// Weight of looking one token further, 0 to 1.
        lambda: f64,
    },
}

impl AdvantageEstimator {
    /// Whether it subtracts a baseline that the samples of a prompt share, so that a single sample has nothing to
    /// be compared with.
    #[must_use]
    pub fn compares_group(self) -> bool {
        matches!(
            self,
            Self::Grpo
                | Self::DrGrpo
                | Self::Rloo
                | Self::WeightedRloo { .. }
                | Self::MaxRl
                | Self::ReinforcePpBaseline
        )
    }

    /// Whether advantages are whitened over all tokens of the step.
    #[must_use]
    pub fn whitens(self) -> bool {
        matches!(self, Self::ReinforcePp { .. } | Self::ReinforcePpBaseline | Self::Gae { .. })
    }

    /// Whether it reads the estimates of a value model.
    #[must_use]
    pub fn uses_values(self) -> bool {
        matches!(self, Self::Gae { .. })
    }
}

/// What is compared between the new and the old policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// The probability of each token.
    Token,
    /// The geometric mean of the token ratios of an answer (GSPO).
    Sequence,
}

/// What the loss makes of a token's ratio.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Surrogate {
    /// The ratio itself; its gradient vanishes beyond the bounds (PPO).
    Clipped,
    /// The log-prob, weighted by the clipped ratio as a constant; every token keeps a gradient (CISPO).
    Weighted,
    /// The log-prob, weighted by the ratio to the rollout engine's policy as a constant. No gradient where the
    /// probability has moved too far and would move further (DPPO).
    Masked {
        /// Measure of how far the probability has moved.
        divergence: Divergence,
        /// Largest weight; at least 1.
        cap: f64,
    },
}

/// Distance of two policies at one token, with the token on one side and all others together on the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// Total variation: the difference of the token's probabilities.
    Tv,
    /// Kullback-Leibler divergence of the rollout engine's policy from the one being trained, nats.
    Kl,
}

/// Bounds of the ratio of new to old probability, beyond which the gradient vanishes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// Distance of the lower bound from 1, which lies at `1 - low`; 0 to 1.
    pub low: f64,
    /// Distance of the upper bound from 1, which lies at `1 + high`; 0 or more.
    pub high: f64,
    /// Largest loss of a negative advantage, in units of that advantage; above 1. `None` for no bound.
    pub dual: Option<f64>,
}

/// How token losses become one number. `N` sequences count, and sequence `i` has `L_i` tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Aggregation {
    /// Mean over all tokens.
    TokenMean,
    /// Mean over sequences of the mean over their tokens.
    SeqMeanTokenMean,
    /// Mean over sequences of the sum over their tokens.
    SeqMeanTokenSum,
    /// As `SeqMeanTokenSum`, divided by a constant length: the unbiased form of Dr.GRPO.
    SeqMeanTokenSumNorm {
        /// Constant length (tokens); above 0.
        length: f64,
    },
    /// Sum over all tokens divided by a constant length, not by `N`: what the PACS paper's scripts ran its baselines
    /// with. The gradient grows with the number of sequences.
    TokenSumNorm {
        /// Constant length (tokens); above 0.
        length: f64,
    },
}

/// Penalty for diverging from a reference policy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlPenalty {
    /// Weight of the penalty; 0 or more.
    pub coefficient: f64,
    /// Estimator of the divergence.
    pub kind: KlKind,
    /// Whether it is part of the loss or of the reward.
    pub place: KlPlace,
}

/// Where the penalty enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlPlace {
    /// Added to the loss: the new policy against the reference.
    Loss,
    /// Subtracted from the reward of each token: the old policy against the reference.
    Reward,
}

/// Weights `p_old / p_rollout` on the policy loss. The rollout engine samples from its own probabilities, which differ
/// from the learner's by rounding, kernels, or the age of its weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ImportanceWeights {
    /// Whether tokens or whole answers are weighted.
    pub level: ImportanceLevel,
    /// How weights beyond the cap are treated.
    pub mode: ImportanceMode,
    /// Largest weight; at least 1.
    pub cap: f64,
}

/// What is weighted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceLevel {
    /// Each token by its own weight: low variance, a small bias.
    Token,
    /// All tokens of an answer by the product of theirs: unbiased before the cap, of a variance that grows with length.
    Sequence,
    /// One weight for all tokens of an answer, the geometric mean of theirs: its scale does not depend on the length, but it is biased.
    Geometric,
}

/// What happens to weights that are too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceMode {
    /// Weights above the cap become the cap.
    Truncate,
    /// Weights above the cap or below its inverse become 0.
    Mask,
}

/// Settings of the value loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ValueConfig {
    /// How far a value may move from that at the start of the step; above 0.
    pub clip: f64,
    /// How token losses become one number.
    pub aggregation: Aggregation,
    /// Number of steps at the start that train only the value model.
    pub warmup_steps: u64,
}

impl PolicyConfig {
    /// Whether step `step` (from 1) trains the policy; steps before that train only the value model.
    #[must_use]
    pub fn trains_policy(&self, step: u64) -> bool {
        self.value.is_none_or(|value| step > value.warmup_steps)
    }

    /// Checks the bounds that the fields document.
    ///
    /// # Errors
    /// [`ObjectiveError::Setting`] for the first bound that is violated.
    pub fn check(&self) -> Result<(), ObjectiveError> {
        let share = |name, value: f64| bound(name, value, (0.0..=1.0).contains(&value), "0 to 1");
        let positive = |name, value: f64| bound(name, value, value > 0.0 && value.is_finite(), "above 0");
        let not_negative = |name, value: f64| bound(name, value, value >= 0.0 && value.is_finite(), "0 or more");
        match self.advantage {
            AdvantageEstimator::ReinforcePp { gamma } => positive("gamma", gamma).and(share("gamma", gamma))?,
            AdvantageEstimator::Gae { gamma, lambda } => {
                positive("gamma", gamma).and(share("gamma", gamma)).and(share("lambda", lambda))?;
            }
            AdvantageEstimator::WeightedRloo { right, wrong } => {
                not_negative("pass_exponent", right).and(not_negative("fail_exponent", wrong))?;
            }
            _ => {}
        }
        if let Surrogate::Masked { cap, .. } = self.surrogate {
            bound("ratio_cap", cap, cap >= 1.0 && cap.is_finite(), "1 or more")?;
        }
        share("clip_low", self.clip.low).and(not_negative("clip_high", self.clip.high))?;
        if let Some(dual) = self.clip.dual {
            bound("dual_clip", dual, dual > 1.0 && dual.is_finite(), "above 1")?;
        }
        positive("the length of the aggregation", self.aggregation.length())?;
        if let Some(kl) = self.kl {
            not_negative("kl_coefficient", kl.coefficient)?;
        }
        if let Some(weights) = self.importance {
            bound("importance_cap", weights.cap, weights.cap >= 1.0 && weights.cap.is_finite(), "1 or more")?;
        }
        not_negative("entropy", self.entropy)?;
        if let Some(value) = self.value {
            positive("value_clip", value.clip)
                .and(positive("the length of the value aggregation", value.aggregation.length()))?;
        }
        Ok(())
    }

    /// Whether its trust region surrounds the policy of the rollout engine.
    pub(crate) fn is_masked(&self) -> bool {
        matches!(self.surrogate, Surrogate::Masked { .. })
    }

    pub(crate) fn kl_at(&self, place: KlPlace) -> Option<KlPenalty> {
        self.kl.filter(|kl| kl.place == place)
    }
}

impl Aggregation {
    fn length(self) -> f64 {
        match self {
            Self::SeqMeanTokenSumNorm { length } | Self::TokenSumNorm { length } => length,
            Self::TokenMean | Self::SeqMeanTokenMean | Self::SeqMeanTokenSum => 1.0,
        }
    }
}

fn bound(name: &'static str, value: f64, holds: bool, expected: &'static str) -> Result<(), ObjectiveError> {
    if holds { Ok(()) } else { Err(ObjectiveError::Setting { name, value, expected }) }
}
