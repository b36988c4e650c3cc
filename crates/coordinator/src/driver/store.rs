use std::collections::HashMap;

use pacs_types::{GroupId, Sample, SampleId, Verdict};

/// Samples and verdicts, by group.
///
/// A run holds them by the hundred thousand, most of them a few kilobytes, so what is kept beside their content counts: a
/// group is a list of pointers by index, and nothing has room for more than is in it.
#[derive(Debug, Default)]
pub(crate) struct Store {
    groups: HashMap<GroupId, Vec<Option<Box<Judged>>>>,
}

#[derive(Debug)]
struct Judged {
    sample: Sample,
    verdict: Option<Box<Verdict>>,
}

impl Store {
    pub(crate) fn put_sample(&mut self, id: SampleId, mut sample: Sample) {
        // Lists that were read off the wire have grown by doubling.
        sample.tokens.shrink_to_fit();
        sample.logprobs.shrink_to_fit();
        sample.sampled_logprobs.shrink_to_fit();
        sample.text.shrink_to_fit();
        sample.spans.shrink_to_fit();
        let (group, index) = (self.groups.entry(id.group).or_default(), id.index as usize);
        if group.len() <= index {
            group.resize_with(index + 1, || None);
        }
        group[index] = Some(Box::new(Judged { sample, verdict: None }));
    }

    pub(crate) fn put_verdict(&mut self, id: SampleId, verdict: Verdict) {
        let group = self.groups.get_mut(&id.group);
        if let Some(Some(judged)) = group.and_then(|group| group.get_mut(id.index as usize)) {
            judged.verdict = Some(Box::new(verdict));
        }
    }

    pub(crate) fn sample(&self, id: SampleId) -> Option<&Sample> {
        self.judged(id).map(|judged| &judged.sample)
    }

    /// The judged samples of a group, by index.
    pub(crate) fn group(&self, group: GroupId) -> Vec<(u32, &Sample, &Verdict)> {
        let slots = (0u32..).zip(self.groups.get(&group).into_iter().flatten());
        let there = slots.filter_map(|(index, slot)| Some((index, slot.as_deref()?)));
        there.filter_map(|(index, judged)| Some((index, &judged.sample, judged.verdict.as_deref()?))).collect()
    }

    /// Takes the judged samples of a group out, by index.
    pub(crate) fn take(&mut self, group: GroupId) -> Vec<(u32, Sample, Verdict)> {
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

    /// Whether a sample is there, and its verdict if it should have one.
    pub(crate) fn has(&self, id: SampleId, judged: bool) -> bool {
        self.judged(id).is_some_and(|found| !judged || found.verdict.is_some())
    }

    fn judged(&self, id: SampleId) -> Option<&Judged> {
        self.groups.get(&id.group)?.get(id.index as usize)?.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use pacs_types::{FinishReason, Outcome, WeightVersion};

    use super::*;

    fn id(group: u64, index: u32) -> SampleId {
        SampleId { group: GroupId(group), index }
    }

    /// A sample as the wire gives it: with room for more than is in it.
    fn sample(token: u32) -> Sample {
        let mut tokens = Vec::with_capacity(100);
        tokens.push(token);
        let mut logprobs = Vec::with_capacity(100);
        logprobs.push(-1.0);
        let mut text = String::with_capacity(100);
        text.push('x');
        let (finish, version) = (FinishReason::Stop, WeightVersion(0));
        let (sampled_logprobs, spans) = (Vec::with_capacity(100), Vec::with_capacity(100));
        Sample { tokens, logprobs, sampled_logprobs, entropy_sum: 0.0, text, finish, version, spans }
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
        assert_eq!(store.sample(id(7, 2)).map(|sample| sample.tokens[0]), Some(2));
        store.drop_sample(id(7, 0));
        assert_eq!(labels(&store), [(3, 0.5)]);
        // Another one in its place has no verdict yet.
        store.put_sample(id(7, 3), sample(5));
        assert_eq!(labels(&store), []);
        store.put_verdict(id(7, 3), verdict(0.25));
        let taken = store.take(GroupId(7));
        assert_eq!(taken.iter().map(|(index, sample, _)| (*index, sample.tokens[0])).collect::<Vec<_>>(), [(3, 5)]);
        assert!(!store.has(id(7, 2), false), "the group is gone");
    }

    #[test]
    fn what_is_kept_has_no_room_to_spare() {
        let mut store = Store::default();
        store.put_sample(id(0, 0), sample(1));
        let kept = store.sample(id(0, 0)).unwrap();
        let room = (kept.tokens.capacity(), kept.logprobs.capacity(), kept.text.capacity());
        assert_eq!((room, kept.sampled_logprobs.capacity(), kept.spans.capacity()), ((1, 1, 1), 0, 0));
    }
}
