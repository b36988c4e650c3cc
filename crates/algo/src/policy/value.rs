use super::normaliser::Normaliser;
use super::{TokenAdvantages, ValueConfig};
use crate::sequence::Placed;
use crate::{ObjectiveError, ObjectiveMetrics, PolicyConfig, SequenceInfo, TokenData};

/// Value loss and derivatives of one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValueOutcome {
    /// Share of the mini-batch's value loss.
    pub loss: f64,
    /// Derivative of the value loss by the new value of each token; all 0 for an answer that is masked out.
    pub dloss_dvalue: Vec<f64>,
    /// Metrics of the answer, to be merged.
    pub metrics: ObjectiveMetrics,
}

impl ValueOutcome {
    pub(crate) fn zeroed(tokens: usize) -> Self {
        Self { dloss_dvalue: vec![0.0; tokens], ..Self::default() }
    }
}

impl PolicyConfig {
    /// Returns the value loss of one answer of a mini-batch; 0 without a value model, and for an answer that
    /// is masked out.
    ///
    /// # Errors
    /// When values are missing or not finite, or the arithmetic overflows.
    pub fn value_sequence(
        &self,
        normaliser: &Normaliser,
        index: usize,
        info: &SequenceInfo,
        targets: &TokenAdvantages,
        tokens: &TokenData<'_>,
    ) -> Result<ValueOutcome, ObjectiveError> {
        let Some(config) = self.value.filter(|_| self.counts(info)) else {
            return Ok(ValueOutcome::zeroed(info.tokens as usize));
        };
        let outcome = value_loss(&config, normaliser, Placed::new(index, info, tokens), targets)?;
        let finite = outcome.loss.is_finite() && outcome.dloss_dvalue.iter().all(|derivative| derivative.is_finite());
        if finite { Ok(outcome) } else { Err(ObjectiveError::Overflow { index, group: info.group }) }
    }
}

/// `max((v - R)², (clamp(v, V - c, V + c) - R)²)` per token, without a factor of 1/2: `v` is the new value, `V` the one
/// at the start of the step, `R` the return.
fn value_loss(
    config: &ValueConfig,
    normaliser: &Normaliser,
    answer: Placed<'_>,
    targets: &TokenAdvantages,
) -> Result<ValueOutcome, ObjectiveError> {
    let old = answer.values()?;
    let new = answer.new_values()?;
    let returns = answer.checked("returns", Some(&targets.returns))?;
    let weight = normaliser.token_weight(config.aggregation, answer.info.tokens);
    let mut outcome = ValueOutcome::default();
    for ((&new, &old), &target) in new.iter().zip(old).zip(returns) {
        let held = new.clamp(old - config.clip, old + config.clip);
        let free = (new - target) * (new - target);
        let bounded = (held - target) * (held - target);
        let clipped = bounded > free;
        outcome.loss += weight * free.max(bounded);
        outcome.dloss_dvalue.push(if clipped { 0.0 } else { 2.0 * weight * (new - target) });
        outcome.metrics.add_value(old, target, clipped);
    }
    Ok(outcome)
}
