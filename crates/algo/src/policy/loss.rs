use super::importance::{Weights, weights};
use super::surrogate::Ratio;
use super::{KlPlace, Normaliser, RatioLevel, Surrogate, TokenAdvantages};
use crate::metrics::ObjectiveMetrics;
use crate::sequence::{Placed, check_infos};
use crate::{ObjectiveError, PolicyConfig, SequenceInfo, SequenceOutcome, TokenData};

impl PolicyConfig {
    /// Returns the divisors of a mini-batch's losses, over all ranks.
    ///
    /// # Errors
    /// When the config is out of bounds or an answer is unusable.
    pub fn normaliser(&self, infos: &[SequenceInfo]) -> Result<Normaliser, ObjectiveError> {
        self.check()?;
        check_infos(infos)?;
        Ok(Normaliser::new(self, infos))
    }

    /// Returns the loss and derivatives of one answer of a mini-batch.
    ///
    /// # Errors
    /// When numbers that the objective reads are missing or not finite, or the arithmetic overflows.
    pub fn sequence(
        &self,
        normaliser: &Normaliser,
        index: usize,
        info: &SequenceInfo,
        targets: &TokenAdvantages,
        tokens: &TokenData<'_>,
    ) -> Result<SequenceOutcome, ObjectiveError> {
        let mut outcome = SequenceOutcome::zeroed(info.tokens as usize);
        outcome.score = targets.mean();
        if !self.counts(info) {
            outcome.metrics.masked += 1.0;
            outcome.dloss_dvalue = self.value.map(|_| vec![0.0; info.tokens as usize]);
            return Ok(outcome);
        }
        let answer = Placed::new(index, info, tokens);
        self.add_policy_loss(normaliser, answer, targets, &mut outcome)?;
        self.add_kl_loss(normaliser, answer, &mut outcome)?;
        self.add_entropy(normaliser, answer, &mut outcome)?;
        if self.value.is_some() {
            let step = self.value_sequence(normaliser, index, info, targets, tokens)?;
            outcome.value_loss = step.loss;
            outcome.metrics.merge(&step.metrics);
            outcome.dloss_dvalue = Some(step.dloss_dvalue);
        }
        outcome.finite(index, info.group)
    }

    /// Returns the metrics of an answer that has no gradient at any log-probs; `None` for others.
    pub(crate) fn inert(&self, info: &SequenceInfo, targets: &TokenAdvantages) -> Option<ObjectiveMetrics> {
        let mut metrics = ObjectiveMetrics::default();
        if !self.counts(info) {
            metrics.masked += 1.0;
            return Some(metrics);
        }
        let alone = self.kl.is_none() && self.entropy == 0.0 && self.value.is_none();
        let nothing = alone && targets.advantages.iter().all(|advantage| *advantage == 0.0);
        metrics.add_advantages(&targets.advantages);
        nothing.then_some(metrics)
    }

    fn add_policy_loss(
        &self,
        normaliser: &Normaliser,
        answer: Placed<'_>,
        targets: &TokenAdvantages,
        outcome: &mut SequenceOutcome,
    ) -> Result<(), ObjectiveError> {
        // A mask's trust region surrounds the policy that sampled.
        let old = match self.surrogate {
            Surrogate::Masked { .. } => answer.rollout_logprobs()?,
            Surrogate::Clipped | Surrogate::Weighted => answer.old_logprobs()?,
        };
        let new = answer.new_logprobs()?;
        let advantages = answer.checked("advantages", Some(&targets.advantages))?;
        let log_ratios: Vec<f64> = new.iter().zip(old).map(|(new, old)| new - old).collect();
        let importance = match &self.importance {
            Some(config) => weights(config, old, answer.rollout_logprobs()?),
            None => Weights { weight: vec![1.0; new.len()], cut: 0 },
        };
        let metrics = &mut outcome.metrics;
        metrics.add_ratios(&log_ratios);
        metrics.add_advantages(advantages);
        if self.importance.is_some() {
            metrics.add_importance(&importance.weight, importance.cut);
        }
        let scale = normaliser.token_weight(self.aggregation, answer.info.tokens);
        let mean_log_ratio = log_ratios.iter().sum::<f64>() / log_ratios.len() as f64;
        let mut slope_of_sequence = 0.0;
        for (t, (&advantage, weight)) in advantages.iter().zip(&importance.weight).enumerate() {
            let log_ratio = match self.ratio {
                RatioLevel::Token => log_ratios[t],
                RatioLevel::Sequence => mean_log_ratio,
            };
            let step = self.surrogate(advantage, Ratio { log_ratio, new: new[t] });
            outcome.loss += scale * weight * step.loss;
            metrics.clipped += f64::from(u8::from(step.clipped));
            metrics.dual_clipped += f64::from(u8::from(step.dual_clipped));
            match self.ratio {
                RatioLevel::Token => outcome.dloss_dlogprob[t] += scale * weight * step.slope,
                RatioLevel::Sequence => slope_of_sequence += scale * weight * step.slope,
            }
        }
        if self.ratio == RatioLevel::Sequence {
            // Every token has an equal share in the mean log-ratio.
            let share = slope_of_sequence / log_ratios.len() as f64;
            outcome.dloss_dlogprob.iter_mut().for_each(|coefficient| *coefficient += share);
        }
        Ok(())
    }

    fn add_kl_loss(
        &self,
        normaliser: &Normaliser,
        answer: Placed<'_>,
        outcome: &mut SequenceOutcome,
    ) -> Result<(), ObjectiveError> {
        let Some(kl) = self.kl else { return Ok(()) };
        let scale = normaliser.token_weight(self.aggregation, answer.info.tokens) * kl.coefficient;
        let new = answer.new_logprobs()?;
        let reference = answer.reference_logprobs()?;
        for (t, (new, reference)) in new.iter().zip(reference).enumerate() {
            let estimate = kl.kind.value(new - reference);
            outcome.metrics.reference_kl += estimate;
            if kl.place == KlPlace::Loss {
                outcome.loss += scale * estimate;
                outcome.dloss_dlogprob[t] += scale * kl.kind.slope(new - reference);
            }
        }
        outcome.metrics.reference_tokens += new.len() as f64;
        Ok(())
    }

    fn add_entropy(
        &self,
        normaliser: &Normaliser,
        answer: Placed<'_>,
        outcome: &mut SequenceOutcome,
    ) -> Result<(), ObjectiveError> {
        if self.entropy == 0.0 {
            return Ok(());
        }
        outcome.dloss_dentropy = -self.entropy * normaliser.token_weight(self.aggregation, answer.info.tokens);
        outcome.loss += outcome.dloss_dentropy * answer.entropies()?.iter().sum::<f64>();
        Ok(())
    }
}

impl ObjectiveMetrics {
    fn add_advantages(&mut self, advantages: &[f64]) {
        for advantage in advantages {
            self.advantages += advantage;
            self.advantage_squares += advantage * advantage;
            self.advantage_max = self.advantage_max.max(advantage.abs());
        }
        self.advantage_tokens += advantages.len() as f64;
    }

    pub(crate) fn add_importance(&mut self, weights: &[f64], cut: usize) {
        for weight in weights {
            self.importance += weight;
            self.importance_squares += weight * weight;
            self.importance_max = self.importance_max.max(*weight);
        }
        self.importance_tokens += weights.len() as f64;
        self.importance_cut += cut as f64;
    }
}
