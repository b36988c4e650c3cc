//! Objectives that see an answer only through its log-prob sum: one coefficient for all of its tokens.

use crate::group::members_by_group;
use crate::{ObjectiveError, Sequence};

/// Result of such an objective for one mini-batch. Vectors are in the order of the sequences.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScalarStep {
    /// Share of each sequence in the loss; the shares add up to it.
    pub loss: Vec<f64>,
    /// Derivative of the loss by the new log-prob of any token of the sequence.
    pub dloss_dlogprob: Vec<f64>,
}

impl ScalarStep {
    /// Averages over prompts a loss that `of_group` computes of a group's answers, with its derivatives by their
    /// log-probs. Members come in an order that depends on their values alone.
    pub(crate) fn by_group(
        sequences: &[Sequence],
        of_group: impl Fn(&[&Sequence]) -> (f64, Vec<f64>),
    ) -> Result<Self, ObjectiveError> {
        check(sequences)?;
        let mut step = Self { loss: vec![0.0; sequences.len()], dloss_dlogprob: vec![0.0; sequences.len()] };
        let groups = members_by_group(sequences);
        let prompts = groups.len() as f64;
        for members in groups.values() {
            let of: Vec<&Sequence> = members.iter().map(|&i| &sequences[i]).collect();
            let (loss, slopes) = of_group(&of);
            for (&i, slope) in members.iter().zip(slopes) {
                step.loss[i] = loss / (members.len() as f64 * prompts);
                step.dloss_dlogprob[i] = slope / prompts;
            }
        }
        step.checked(sequences)
    }

    /// Returns the step if all of its numbers are finite.
    pub(crate) fn checked(self, sequences: &[Sequence]) -> Result<Self, ObjectiveError> {
        let finite = |i: usize| self.loss[i].is_finite() && self.dloss_dlogprob[i].is_finite();
        match (0..sequences.len()).find(|&i| !finite(i)) {
            Some(index) => Err(ObjectiveError::Overflow { index, group: sequences[index].group }),
            None => Ok(self),
        }
    }
}

/// Checks what every objective of this kind requires of its answers.
pub(crate) fn check(sequences: &[Sequence]) -> Result<(), ObjectiveError> {
    if sequences.is_empty() {
        return Err(ObjectiveError::NoSequences);
    }
    sequences.iter().enumerate().try_for_each(|(index, sequence)| super::pacs::check_sequence(index, sequence))
}

/// Computes `ln(sum of exp)` without overflow; terms may be minus infinity.
pub(crate) fn log_sum_exp(terms: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    largest + terms.map(|term| (term - largest).exp()).sum::<f64>().ln()
}
