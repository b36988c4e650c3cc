use std::collections::HashMap;

use pacs_protocol::{WireError, v1};
use pacs_types::{FinishReason, GroupId, Sample, SampleId, Verdict};
use prost::Message;

use crate::journal::{ReadError, StoredFrame};

/// Statistics of each sample in flight by group: its numbers, its verdict, and the place of its content on disk.
///
/// A run holds hundreds of thousands of samples of up to megabytes each, and needs the content of each only three
/// times: to judge, to train, and to archive. So memory holds a few numbers for each, and tokens, log-probs and text
/// stay in the journal, which has them anyway.
#[derive(Debug, Default)]
pub(crate) struct Store {
    groups: HashMap<GroupId, Vec<Option<Box<Judged>>>>,
    largest_text: usize,
}

#[derive(Debug)]
struct Judged {
    sample: KeptSample,
    verdict: Option<Box<Verdict>>,
}

/// A sample without its content, which is in the journal.
#[derive(Clone, Debug)]
pub(crate) struct KeptSample {
    /// Number of tokens of the answer.
    pub(crate) tokens: u32,
    /// Bytes of the answer's text.
    pub(crate) text_bytes: u32,
    /// Sum of token entropies; see [`Sample::entropy_sum`].
    pub(crate) entropy_sum: f64,
    pub(crate) finish: FinishReason,
    frame: StoredFrame,
}

/// Why the content of a sample cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContentError {
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The checksum of the frame holds, but its content does not decode as a sample.
    #[error("it is no sample: {0}")]
    Malformed(String),
}

impl ContentError {
    /// Whether the content is lost, rather than unreadable for now.
    pub(crate) fn is_damage(&self) -> bool {
        !matches!(self, Self::Read(ReadError::File { .. } | ReadError::Unwritten))
    }
}

impl KeptSample {
    /// Summarizes a sample whose frame is in the journal or about to be.
    pub(crate) fn new(sample: &Sample, frame: StoredFrame) -> Self {
        let narrow = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        Self {
            tokens: narrow(sample.tokens.len()),
            text_bytes: narrow(sample.text.len()),
            entropy_sum: sample.entropy_sum,
            finish: sample.finish,
            frame,
        }
    }

    /// Restores it from a frame that an earlier coordinator has written, if `check` accepts the sample.
    pub(crate) fn load(
        frame: StoredFrame,
        check: impl FnOnce(&Sample) -> Result<(), WireError>,
    ) -> Result<Self, ContentError> {
        let sample = read(&frame)?;
        check(&sample).map_err(|error| ContentError::Malformed(error.to_string()))?;
        Ok(Self::new(&sample, frame))
    }

    /// Reads the whole sample. Blocks on the disk, so it must not be called under the driver's lock.
    pub(crate) fn content(&self) -> Result<Sample, ContentError> {
        read(&self.frame)
    }

    /// Reads only the text. Blocks on the disk, so it must not be called under the driver's lock.
    pub(crate) fn text(&self) -> Result<String, ContentError> {
        let read = TextOfSample::decode(self.frame.read()?.as_slice());
        read.map(|sample| sample.text).map_err(|error| ContentError::Malformed(error.to_string()))
    }
}

fn read(frame: &StoredFrame) -> Result<Sample, ContentError> {
    let malformed = |error: String| ContentError::Malformed(error);
    let wire = v1::Sample::decode(frame.read()?.as_slice()).map_err(|error| malformed(error.to_string()))?;
    wire.try_into().map_err(|error: WireError| malformed(error.to_string()))
}

/// A [`v1::Sample`] of which only the text is decoded.
#[derive(Clone, PartialEq, prost::Message)]
struct TextOfSample {
    #[prost(string, tag = "4")]
    text: String,
}

impl Store {
    pub(crate) fn put_sample(&mut self, id: SampleId, sample: KeptSample) {
        let (group, index) = (self.groups.entry(id.group).or_default(), id.index as usize);
        if group.len() <= index {
            group.resize_with(index + 1, || None);
        }
        self.largest_text = self.largest_text.max(sample.text_bytes as usize);
        group[index] = Some(Box::new(Judged { sample, verdict: None }));
    }

    /// Size of the longest text seen so far, in bytes.
    pub(crate) fn largest_text(&self) -> usize {
        self.largest_text
    }

    pub(crate) fn put_verdict(&mut self, id: SampleId, verdict: Verdict) {
        let group = self.groups.get_mut(&id.group);
        if let Some(Some(judged)) = group.and_then(|group| group.get_mut(id.index as usize)) {
            judged.verdict = Some(Box::new(verdict));
        }
    }

    pub(crate) fn sample(&self, id: SampleId) -> Option<&KeptSample> {
        self.judged(id).map(|judged| &judged.sample)
    }

    /// All groups with samples, in no particular order.
    pub(crate) fn groups(&self) -> impl Iterator<Item = GroupId> {
        self.groups.keys().copied()
    }

    /// The samples of a group by index, with the verdicts of judged ones.
    pub(crate) fn samples(&self, group: GroupId) -> impl Iterator<Item = (u32, &KeptSample, Option<&Verdict>)> {
        let slots = (0u32..).zip(self.groups.get(&group).into_iter().flatten());
        slots.filter_map(|(index, slot)| {
            let judged = slot.as_deref()?;
            Some((index, &judged.sample, judged.verdict.as_deref()))
        })
    }

    /// The judged samples of a group by index.
    pub(crate) fn group(&self, group: GroupId) -> Vec<(u32, &KeptSample, &Verdict)> {
        let slots = (0u32..).zip(self.groups.get(&group).into_iter().flatten());
        let there = slots.filter_map(|(index, slot)| Some((index, slot.as_deref()?)));
        there.filter_map(|(index, judged)| Some((index, &judged.sample, judged.verdict.as_deref()?))).collect()
    }

    /// Removes a group and returns its judged samples by index.
    pub(crate) fn take(&mut self, group: GroupId) -> Vec<(u32, KeptSample, Verdict)> {
        let slots = (0u32..).zip(self.groups.remove(&group).into_iter().flatten());
        let there = slots.filter_map(|(index, slot)| Some((index, *slot?)));
        there.filter_map(|(index, Judged { sample, verdict })| Some((index, sample, *verdict?))).collect()
    }

    pub(crate) fn drop_sample(&mut self, id: SampleId) {
        if let Some(slot) = self.groups.get_mut(&id.group).and_then(|group| group.get_mut(id.index as usize)) {
            *slot = None;
        }
    }

    pub(crate) fn drop_group(&mut self, group: GroupId) {
        self.groups.remove(&group);
    }

    /// Whether the store has a sample, and its verdict if it should be judged.
    pub(crate) fn has(&self, id: SampleId, judged: bool) -> bool {
        self.judged(id).is_some_and(|found| !judged || found.verdict.is_some())
    }

    fn judged(&self, id: SampleId) -> Option<&Judged> {
        self.groups.get(&id.group)?.get(id.index as usize)?.as_deref()
    }
}

/// A sample with a given number of tokens and no content, for tests that only count.
#[cfg(test)]
pub(crate) fn counted(tokens: u32, finish: FinishReason) -> KeptSample {
    KeptSample { tokens, text_bytes: 0, entropy_sum: 1.0, finish, frame: StoredFrame::default() }
}

#[cfg(test)]
mod tests {
    use pacs_types::Outcome;

    use super::*;

    fn id(group: u64, index: u32) -> SampleId {
        SampleId { group: GroupId(group), index }
    }

    fn sample(tokens: u32) -> KeptSample {
        counted(tokens, FinishReason::Stop)
    }

    fn verdict(label: f64) -> Verdict {
        Verdict { outcome: Outcome::Correct, label, reward: label, extracted: None, rule: String::new() }
    }

    #[test]
    fn samples_lie_by_index_however_they_come() {
        let mut store = Store::default();
        for index in [2, 0, 3] {
            store.put_sample(id(7, index), sample(index));
        }
        store.put_verdict(id(7, 3), verdict(0.5));
        store.put_verdict(id(7, 0), verdict(1.0));
        store.put_verdict(id(7, 1), verdict(1.0));
        store.put_verdict(id(8, 0), verdict(1.0));
        let labels = |store: &Store| -> Vec<(u32, f64)> {
            store.group(GroupId(7)).into_iter().map(|(index, _, verdict)| (index, verdict.label)).collect()
        };
        assert_eq!(labels(&store), [(0, 1.0), (3, 0.5)]);
        assert!(store.has(id(7, 2), false) && !store.has(id(7, 2), true) && store.has(id(7, 3), true));
        assert!(!store.has(id(7, 1), false) && !store.has(id(7, 9), false) && !store.has(id(8, 0), false));
        assert_eq!(store.sample(id(7, 2)).map(|sample| sample.tokens), Some(2));
        store.drop_sample(id(7, 0));
        assert_eq!(labels(&store), [(3, 0.5)]);
        // A replacement at this index has no verdict yet.
        store.put_sample(id(7, 3), sample(5));
        assert_eq!(labels(&store), []);
        store.put_verdict(id(7, 3), verdict(0.25));
        let taken = store.take(GroupId(7));
        assert_eq!(taken.iter().map(|(index, sample, _)| (*index, sample.tokens)).collect::<Vec<_>>(), [(3, 5)]);
        assert!(!store.has(id(7, 2), false), "the group is gone");
    }

    #[test]
    fn what_is_kept_of_a_sample_does_not_grow_with_it() {
        // The list entry, the place on disk and the verdict add up to some 300 bytes per sample.
        assert!(size_of::<Judged>() <= 48, "{}", size_of::<Judged>());
    }

    #[test]
    fn the_text_of_a_sample_is_read_alone() {
        let wire =
            v1::Sample { tokens: vec![7; 1000], logprobs: vec![-0.5; 1000], text: "ä 2".into(), ..Default::default() };
        let read = TextOfSample::decode(wire.encode_to_vec().as_slice()).unwrap();
        assert_eq!(read.text, "ä 2");
    }
}
