//! A rank's report of what the updates of a step made of its answers.

use pacs_protocol::{MOST_SIGNALS, v1};

use crate::update::{SampleSignal, TrainBatch};

/// Converts the signals of a step to a list that fits into the report. Those beyond its bound are left out: they are
/// shown to people, and not worth a step.
pub(super) fn report(batch: &TrainBatch, signals: &[SampleSignal]) -> Vec<v1::TrainingSignal> {
    if signals.len() > MOST_SIGNALS {
        tracing::warn!(
            step = batch.step,
            "the scores of {} of this rank's {} answers are not reported",
            signals.len() - MOST_SIGNALS,
            signals.len()
        );
    }
    let signal = |signal: &SampleSignal| {
        let entry = &batch.index[signal.position];
        let SampleSignal { score, coefficient, .. } = *signal;
        v1::TrainingSignal { group_id: entry.group, sample_index: entry.sample, score, coefficient }
    };
    signals.iter().take(MOST_SIGNALS).map(signal).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::update::IndexEntry;

    #[test]
    fn a_report_names_samples_and_is_bounded() {
        let entry = |group: u64, sample| IndexEntry {
            group: 1_000_000 + group,
            sample,
            mini_batch: 0,
            rank: 0,
            label: 0.0,
            reward: 0.0,
            answer_tokens: 1,
            truncated: false,
            unit: None,
        };
        let index: Vec<IndexEntry> =
            (0..64).flat_map(|group| (0..1025).map(move |sample| entry(group, sample))).collect();
        let signal = |position| SampleSignal { position, score: Some(0.25), coefficient: position as f32 };
        let signals: Vec<SampleSignal> = (0..index.len()).map(signal).collect();
        let batch = TrainBatch {
            step: 1,
            index,
            prompts: HashMap::new(),
            prompt_routes: HashMap::new(),
            sequences: Vec::new(),
        };
        let reported = report(&batch, &signals);
        assert_eq!(reported.len(), MOST_SIGNALS);
        let named = &reported[2 * 1025 + 7];
        assert_eq!((named.group_id, named.sample_index, named.score), (1_000_002, 7, Some(0.25)));
        assert_eq!(named.coefficient, (2 * 1025 + 7) as f32);
    }
}
