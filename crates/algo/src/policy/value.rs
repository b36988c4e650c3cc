use super::normaliser::Normaliser;
use super::{TokenAdvantages, ValueConfig};
use crate::ObjectiveError;
use crate::sequence::Placed;

/// The value loss of one answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct ValueOutcome {
    /// Its share of the mini-batch's value loss.
    pub(crate) loss: f64,
    /// Derivative of the value loss by the new value of each token.
    pub(crate) dloss_dvalue: Vec<f64>,
    /// Tokens whose bounded value decides.
    pub(crate) clipped: f64,
}

/// `max((v - R)², (clamp(v, V - c, V + c) - R)²)` a token, without a factor of a half: `v` the new value, `V` the one
/// at the start of the step, `R` the return.
pub(crate) fn value_loss(
    config: &ValueConfig,
    normaliser: &Normaliser,
    answer: Placed<'_>,
    targets: &TokenAdvantages,
) -> Result<ValueOutcome, ObjectiveError> {
    let (old, new) = (answer.values()?, answer.new_values()?);
    let returns = answer.checked("returns", Some(&targets.returns))?;
    let weight = normaliser.token_weight(config.aggregation, answer.info.tokens);
    let mut outcome = ValueOutcome::default();
    for ((&new, &old), &target) in new.iter().zip(old).zip(returns) {
        let held = new.clamp(old - config.clip, old + config.clip);
        let (free, bounded) = ((new - target) * (new - target), (held - target) * (held - target));
        let clipped = bounded > free;
        outcome.loss += weight * free.max(bounded);
        outcome.dloss_dvalue.push(if clipped { 0.0 } else { 2.0 * weight * (new - target) });
        outcome.clipped += f64::from(u8::from(clipped));
    }
    Ok(outcome)
}
