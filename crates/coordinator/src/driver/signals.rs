use std::collections::BTreeMap;

use pacs_protocol::v1;
use pacs_types::{GroupId, SampleId};

use super::batch::BatchContent;

/// What the last update of its step made of a sample; see [`v1::TrainingSignal`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Signal {
    /// `None` under objectives that name no score.
    pub(crate) score: Option<f32>,
    pub(crate) coefficient: f32,
}

/// The signals of the step in training, from the report of a rank until the samples are archived.
///
/// They are a part of the ranks' results, which the journal holds, so a coordinator that was killed has them again. An
/// undone step drops them.
#[derive(Debug, Default)]
pub(crate) struct Signals(BTreeMap<SampleId, Signal>);

impl Signals {
    /// Adds what a rank has reported.
    pub(crate) fn put(&mut self, reported: Vec<v1::TrainingSignal>) {
        let signal = |signal: v1::TrainingSignal| {
            let v1::TrainingSignal { group_id, sample_index, score, coefficient } = signal;
            (SampleId { group: GroupId(group_id), index: sample_index }, Signal { score, coefficient })
        };
        self.0.extend(reported.into_iter().map(signal));
    }

    /// The signal of a sample; `None` before its rank has reported, and for samples that no rank trains on.
    pub(crate) fn get(&self, sample: SampleId) -> Option<Signal> {
        self.0.get(&sample).copied()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// All signals as one report; `None` if there are none.
    pub(crate) fn report(&self) -> Option<v1::TrainResult> {
        let signal = |(sample, signal): (&SampleId, &Signal)| v1::TrainingSignal {
            group_id: sample.group.0,
            sample_index: sample.index,
            score: signal.score,
            coefficient: signal.coefficient,
        };
        let signals = self.0.iter().map(signal).collect();
        (!self.0.is_empty()).then(|| v1::TrainResult { signals, ..v1::TrainResult::default() })
    }
}

impl BatchContent {
    /// Checks that a rank's report names sequences of its own, each at most once and in the order of the index, which
    /// bounds their number.
    ///
    /// # Errors
    /// Says which sample is named and should not be.
    pub(crate) fn check_report(&self, rank: u32, reported: &[v1::TrainingSignal]) -> Result<(), String> {
        let is_of = |entry: &v1::SequenceIndex, signal: &v1::TrainingSignal| {
            (entry.group_id, entry.sample_index) == (signal.group_id, signal.sample_index)
        };
        // One pass over the index: this runs under the driver's lock.
        let mut rest = self.index.iter().filter(|entry| entry.rank == rank);
        let Some(wrong) = reported.iter().find(|signal| !rest.any(|entry| is_of(entry, signal))) else { return Ok(()) };
        let problem = match self.index.iter().find(|entry| is_of(entry, wrong)) {
            None => "which is not in the batch".to_owned(),
            Some(entry) if entry.rank != rank => format!("which rank {} trains", entry.rank),
            Some(_) => "which comes twice, or out of the order of the index".to_owned(),
        };
        let sample = SampleId { group: GroupId(wrong.group_id), index: wrong.sample_index };
        Err(format!("of rank {rank} names {sample}, {problem}"))
    }
}

#[cfg(test)]
mod tests {
    use pacs_protocol::{ANSWER_BYTES, MOST_SIGNALS};
    use prost::Message;

    use super::*;

    fn signal(group_id: u64, sample_index: u32) -> v1::TrainingSignal {
        v1::TrainingSignal { group_id, sample_index, score: Some(-0.5), coefficient: 0.25 }
    }

    /// Two groups of three samples; the middle ones are rank 1's.
    fn batch() -> BatchContent {
        let entry = |(group_id, sample_index): (u64, u32)| v1::SequenceIndex {
            group_id,
            sample_index,
            rank: u32::from(sample_index == 1),
            ..v1::SequenceIndex::default()
        };
        let samples = [(7, 0), (7, 1), (7, 2), (9, 0), (9, 1), (9, 2)];
        BatchContent { index: samples.map(entry).to_vec(), samples: Vec::new() }
    }

    #[test]
    fn reports_name_sequences_of_their_rank_once_and_in_order() {
        let check = |rank, samples: &[(u64, u32)]| {
            let reported: Vec<_> = samples.iter().map(|(group, index)| signal(*group, *index)).collect();
            batch().check_report(rank, &reported)
        };
        for (rank, samples) in [
            (0, &[(7, 0), (7, 2), (9, 0), (9, 2)][..]),
            (0, &[]),
            (0, &[(7, 2), (9, 2)]),
            (1, &[(7, 1), (9, 1)]),
            (2, &[]),
        ] {
            assert_eq!(check(rank, samples), Ok(()), "{samples:?} of rank {rank}");
        }
        for (rank, samples, named) in [
            (0, &[(7, 0), (8, 0)][..], "of rank 0 names g8.0, which is not in the batch"),
            (0, &[(7, 3)], "of rank 0 names g7.3, which is not in the batch"),
            (0, &[(7, 0), (7, 1)], "of rank 0 names g7.1, which rank 1 trains"),
            (2, &[(9, 2)], "of rank 2 names g9.2, which rank 0 trains"),
            (1, &[(7, 1), (7, 1)], "of rank 1 names g7.1, which comes twice, or out of the order of the index"),
            (0, &[(9, 0), (7, 0)], "of rank 0 names g7.0, which comes twice, or out of the order of the index"),
        ] {
            assert_eq!(check(rank, samples), Err(named.to_owned()));
        }
    }

    #[test]
    fn what_ranks_have_reported_is_restored_from_a_snapshot() {
        let mut signals = Signals::default();
        assert_eq!(signals.report(), None);
        signals.put(vec![signal(7, 0), v1::TrainingSignal { score: None, coefficient: 0.0, ..signal(9, 2) }]);
        signals.put(vec![signal(7, 1)]);
        let mut restored = Signals::default();
        let bytes = signals.report().unwrap().encode_to_vec();
        restored.put(v1::TrainResult::decode(bytes.as_slice()).unwrap().signals);
        let id = |group, index| SampleId { group: GroupId(group), index };
        for sample in [id(7, 0), id(7, 1)] {
            assert_eq!(restored.get(sample), Some(Signal { score: Some(-0.5), coefficient: 0.25 }));
        }
        assert_eq!(restored.get(id(9, 2)), Some(Signal { score: None, coefficient: 0.0 }));
        assert_eq!(restored.get(id(9, 0)), None);
        restored.clear();
        assert_eq!(restored.report(), None);
    }

    #[test]
    fn a_report_of_sixteen_thousand_samples_takes_a_third_of_a_megabyte() {
        let report = |samples: u32, first: u64| v1::TrainResult {
            signals: (0..samples).map(|sample| signal(first + u64::from(sample / 16), sample % 16)).collect(),
            ..v1::TrainResult::default()
        };
        let bytes = report(16_384, 1_000_000).encoded_len();
        assert!((280_000..330_000).contains(&bytes), "{bytes}");
        let largest = report(MOST_SIGNALS as u32, u64::MAX - MOST_SIGNALS as u64).encoded_len();
        assert!(largest <= ANSWER_BYTES / 2, "{largest}");
    }
}
