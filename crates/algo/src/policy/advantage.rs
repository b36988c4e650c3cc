use std::collections::BTreeMap;

use super::returns::{discounted_returns, gae, remax_advantages};
use super::whitening::{Moments, Whitening};
use super::{AdvantageEstimator, KlPlace};
use crate::group::mean_of;
use crate::sequence::Placed;
use crate::{ObjectiveError, PolicyConfig, ScoreEstimator, SequenceInfo, TokenData, estimator};

/// One answer's contribution to the advantages of others: three numbers, gathered once a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct StepSummary {
    /// Sum of its token rewards, including a KL penalty.
    pub reward: f64,
    /// Mean of its advantages before whitening; 0 for estimators that compare within a group.
    pub mean: f64,
    /// Sum of squared distances of its advantages from `mean`.
    pub squares: f64,
}

/// What the advantages of a step share.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepBaseline {
    /// Advantage of each sequence before whitening, for estimators with one advantage per sequence; else empty.
    centred: Vec<f64>,
    whitening: Option<Whitening>,
}

/// Advantages and returns of one answer's tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenAdvantages {
    /// Advantage of each token.
    pub advantages: Vec<f64>,
    /// Return of each token, the target of the value model; empty without one.
    pub returns: Vec<f64>,
}

impl TokenAdvantages {
    /// Returns the advantage of the whole answer: the mean over its tokens. `None` for objectives without advantages.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (!self.advantages.is_empty()).then(|| mean_of(&self.advantages))
    }
}

impl PolicyConfig {
    /// Whether summaries depend on numbers that only one rank has and must be gathered. Otherwise every rank computes
    /// all of them itself.
    #[must_use]
    pub fn exchanges_summaries(&self) -> bool {
        self.kl_at(KlPlace::Reward).is_some() || self.advantage.uses_values()
    }

    /// Returns the summary of one answer at the start of a step, without reading `tokens.new`.
    ///
    /// # Errors
    /// When numbers that the advantages are made of are missing or not finite.
    pub fn summary(
        &self,
        index: usize,
        info: &SequenceInfo,
        tokens: &TokenData<'_>,
    ) -> Result<StepSummary, ObjectiveError> {
        let rewards = self.token_rewards(Placed::new(index, info, tokens))?;
        let raw = self.own_advantages(Placed::new(index, info, tokens), &rewards)?;
        let moments = Moments::of(&raw.advantages);
        Ok(StepSummary { reward: rewards.iter().sum(), mean: moments.mean, squares: moments.squares })
    }

    /// Returns what the advantages of a step share. Takes all answers, in the same order on every rank.
    ///
    /// # Errors
    /// When the config is out of bounds, an answer is unusable, a group has nothing to compare with, or fewer than two
    /// tokens are to be whitened.
    pub fn baseline(&self, infos: &[SequenceInfo], summaries: &[StepSummary]) -> Result<StepBaseline, ObjectiveError> {
        assert_eq!(infos.len(), summaries.len(), "every answer has a summary");
        let centred = if self.advantage.compares_group() { self.centred(infos, summaries)? } else { Vec::new() };
        let counted = (0..infos.len()).filter(|&i| self.counts(&infos[i]));
        let moments = counted.map(|i| {
            let count = f64::from(infos[i].tokens);
            match centred.get(i) {
                Some(&mean) => Moments { count, mean, squares: 0.0 },
                None => Moments { count, mean: summaries[i].mean, squares: summaries[i].squares },
            }
        });
        let moments: Vec<Moments> = moments.collect();
        // Without a counted answer there is nothing to whiten.
        let whitens = self.advantage.whitens() && !moments.is_empty();
        let whitening = whitens.then(|| Whitening::new(&moments)).transpose()?;
        Ok(StepBaseline { centred, whitening })
    }

    /// Returns the advantages of one answer's tokens.
    ///
    /// # Errors
    /// As [`Self::summary`], or when an advantage overflows.
    pub fn advantages(
        &self,
        baseline: &StepBaseline,
        index: usize,
        info: &SequenceInfo,
        tokens: &TokenData<'_>,
    ) -> Result<TokenAdvantages, ObjectiveError> {
        let mut own = match baseline.centred.get(index) {
            Some(&advantage) => {
                TokenAdvantages { advantages: vec![advantage; info.tokens as usize], returns: Vec::new() }
            }
            None => {
                let placed = Placed::new(index, info, tokens);
                self.own_advantages(placed, &self.token_rewards(placed)?)?
            }
        };
        if let Some(whitening) = &baseline.whitening {
            whitening.apply(&mut own.advantages);
        }
        match own.advantages.iter().all(|advantage| advantage.is_finite()) {
            true => Ok(own),
            false => Err(ObjectiveError::Overflow { index, group: info.group }),
        }
    }

    /// Computes the advantages of all sequences within their groups. Rewards are summed in the order of their size, so
    /// no bit depends on the order of the sequences.
    fn centred(&self, infos: &[SequenceInfo], summaries: &[StepSummary]) -> Result<Vec<f64>, ObjectiveError> {
        let mut groups: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (index, info) in infos.iter().enumerate() {
            groups.entry(info.group).or_default().push(index);
        }
        let mut centred = vec![0.0; infos.len()];
        for (group, mut members) in groups {
            if members.len() < 2 {
                return Err(ObjectiveError::LonelySample { group });
            }
            members.sort_by(|&a, &b| summaries[a].reward.total_cmp(&summaries[b].reward));
            let rewards: Vec<f64> = members.iter().map(|&i| summaries[i].reward).collect();
            let labels: f64 = members.iter().map(|&i| infos[i].label).sum();
            let weight = self.group_weight(labels / members.len() as f64);
            for (i, advantage) in members.into_iter().zip(group_advantages(self.advantage, &rewards)) {
                centred[i] = weight * advantage;
            }
        }
        Ok(centred)
    }

    /// Weight of a prompt's advantages, given its mean label `p`. It is 0 where all labels are equal: the formula has
    /// no limit there, and all advantages are 0 anyway.
    fn group_weight(&self, p: f64) -> f64 {
        match self.advantage {
            AdvantageEstimator::WeightedRloo { right: 0.0, wrong: 0.0 } => 1.0,
            AdvantageEstimator::WeightedRloo { right, wrong } if p > 0.0 && p < 1.0 => {
                p.powf(-right) * (1.0 - p).powf(-wrong)
            }
            AdvantageEstimator::WeightedRloo { .. } => 0.0,
            _ => 1.0,
        }
    }

    /// The reward is paid at the last token; a KL penalty in the reward at every token.
    fn token_rewards(&self, answer: Placed<'_>) -> Result<Vec<f64>, ObjectiveError> {
        let mut rewards = vec![0.0; answer.info.tokens as usize];
        if let Some(last) = rewards.last_mut() {
            *last = answer.info.reward;
        }
        if let Some(kl) = self.kl_at(KlPlace::Reward) {
            let old = answer.old_logprobs()?;
            let reference = answer.reference_logprobs()?;
            for (reward, (old, reference)) in rewards.iter_mut().zip(old.iter().zip(reference)) {
                *reward -= kl.coefficient * kl.kind.value(old - reference);
            }
        }
        Ok(rewards)
    }

    /// Computes unwhitened advantages for estimators that look at one answer alone; empty for the others.
    fn own_advantages(&self, answer: Placed<'_>, rewards: &[f64]) -> Result<TokenAdvantages, ObjectiveError> {
        let advantages = match self.advantage {
            AdvantageEstimator::ReinforcePp { gamma } => discounted_returns(rewards, gamma),
            AdvantageEstimator::Remax => {
                let index = answer.index;
                let group = answer.info.group;
                let greedy = answer.info.greedy_reward.filter(|reward| reward.is_finite());
                remax_advantages(rewards, greedy.ok_or(ObjectiveError::GreedyReward { index, group })?)
            }
            AdvantageEstimator::Gae { gamma, lambda } => gae(rewards, answer.values()?, gamma, lambda),
            _ => return Ok(TokenAdvantages::default()),
        };
        let returns = match self.advantage {
            AdvantageEstimator::Gae { .. } => {
                answer.values()?.iter().zip(&advantages).map(|(value, advantage)| value + advantage).collect()
            }
            _ => Vec::new(),
        };
        Ok(TokenAdvantages { advantages, returns })
    }
}

/// Computes the unwhitened advantages of one group from its rewards. Estimators that do not compare within a group
/// return the rewards. For a group of one, published code takes a mean of 0 and a deviation of 1.
#[must_use]
pub fn group_advantages(estimator: AdvantageEstimator, rewards: &[f64]) -> Vec<f64> {
    match (estimator, rewards) {
        (AdvantageEstimator::Grpo, [only]) => vec![only / (1.0 + estimator::STD_EPSILON)],
        (_, [only]) => vec![*only],
        (AdvantageEstimator::Grpo, _) => estimator::scores(ScoreEstimator::Grpo, rewards),
        (AdvantageEstimator::Rloo | AdvantageEstimator::WeightedRloo { .. }, _) => {
            estimator::scores(ScoreEstimator::Rloo, rewards)
        }
        (AdvantageEstimator::MaxRl, _) => {
            let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
            // Without a right answer there is no likelihood to raise.
            let scale = if mean > 0.0 { 1.0 / mean } else { 0.0 };
            estimator::scores(ScoreEstimator::DrGrpo, rewards).iter().map(|centred| centred * scale).collect()
        }
        (AdvantageEstimator::DrGrpo | AdvantageEstimator::ReinforcePpBaseline, _) => {
            estimator::scores(ScoreEstimator::DrGrpo, rewards)
        }
        (AdvantageEstimator::ReinforcePp { .. } | AdvantageEstimator::Remax | AdvantageEstimator::Gae { .. }, _) => {
            rewards.to_vec()
        }
    }
}
