//! What an update makes of each answer, for people who look at samples: nothing here has a part in training.

use std::collections::BTreeMap;

use pacs_algo::SequenceOutcome;

use super::batch::TrainBatch;

/// What the last update of a step that an answer was in made of it.
///
/// A step trains on each answer in one update, that of its mini-batch. The numbers are those that the update was
/// computed with, also where the optimizer skipped it because its gradient was not finite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleSignal {
    /// Position of the answer in [`TrainBatch::index`].
    pub position: usize,
    /// What the objective compared with the verdict ([`SequenceOutcome::score`]).
    pub score: Option<f32>,
    /// Weight of the answer's log-prob in the update; above 0 it becomes more probable ([`SequenceOutcome::coefficient`]).
    pub coefficient: f32,
}

/// The signals of this rank's answers, by place in [`TrainBatch::sequences`].
#[derive(Clone, Debug, Default)]
pub(super) struct Signals(BTreeMap<usize, (Option<f32>, f32)>);

impl Signals {
    /// Notes what an update made of the answer at `place`, in place of what an earlier one did.
    pub(super) fn note(&mut self, place: usize, outcome: &SequenceOutcome) {
        self.0.insert(place, (outcome.score.map(narrow), narrow(outcome.coefficient())));
    }

    /// Notes an answer without a gradient, which was skipped.
    pub(super) fn note_inert(&mut self, place: usize, score: Option<f64>) {
        self.0.insert(place, (score.map(narrow), 0.0));
    }

    /// Returns the signals in the order of the index.
    pub(super) fn into_list(self, batch: &TrainBatch) -> Vec<SampleSignal> {
        // Places follow the index.
        let signal = |(place, (score, coefficient)): (usize, _)| SampleSignal {
            position: batch.sequences[place].position,
            score,
            coefficient,
        };
        self.0.into_iter().map(signal).collect()
    }
}

/// Rounds to float32. The objective computes in float64, and an infinity would be refused by the coordinator.
fn narrow(value: f64) -> f32 {
    value.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::update::SequenceTokens;

    #[test]
    fn the_last_update_counts_and_places_become_positions() {
        let sequence = |position| SequenceTokens {
            position,
            tokens: vec![1],
            rollout_logprobs: vec![-1.0],
            sampled_logprobs: Vec::new(),
            version: 0,
            routes: Vec::new(),
        };
        let sequences = vec![sequence(1), sequence(4), sequence(6)];
        let (prompts, prompt_routes) = (HashMap::new(), HashMap::new());
        let batch = TrainBatch { step: 1, index: Vec::new(), prompts, prompt_routes, sequences };
        let mut signals = Signals::default();
        let outcome = |score, slope| SequenceOutcome { score, dloss_dlogprob: vec![slope; 3], ..Default::default() };
        signals.note(2, &outcome(None, 1e300));
        signals.note(0, &outcome(Some(9.0), 9.0));
        signals.note_inert(1, Some(-1.5));
        signals.note(0, &outcome(Some(0.5), -0.25));
        let signal = |position, score, coefficient| SampleSignal { position, score, coefficient };
        let expected = [signal(1, Some(0.5), 0.25), signal(4, Some(-1.5), 0.0), signal(6, None, f32::MIN)];
        assert_eq!(signals.into_list(&batch), expected);
    }
}
