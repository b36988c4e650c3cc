use std::collections::HashMap;

use pacs_types::{GroupId, Sample, SampleId, Verdict};

/// Samples and verdicts, by group.
#[derive(Debug, Default)]
pub(crate) struct Store {
    groups: HashMap<GroupId, HashMap<u32, Judged>>,
}

#[derive(Debug)]
struct Judged {
    sample: Sample,
    verdict: Option<Verdict>,
}

impl Store {
    pub(crate) fn put_sample(&mut self, id: SampleId, sample: Sample) {
        self.groups.entry(id.group).or_default().insert(id.index, Judged { sample, verdict: None });
    }

    pub(crate) fn put_verdict(&mut self, id: SampleId, verdict: Verdict) {
        if let Some(judged) = self.groups.get_mut(&id.group).and_then(|group| group.get_mut(&id.index)) {
            judged.verdict = Some(verdict);
        }
    }

    pub(crate) fn sample(&self, id: SampleId) -> Option<&Sample> {
        self.groups.get(&id.group)?.get(&id.index).map(|judged| &judged.sample)
    }

    /// The judged samples of a group, by index.
    pub(crate) fn group(&self, group: GroupId) -> Vec<(u32, &Sample, &Verdict)> {
        let samples = self.groups.get(&group).into_iter().flatten();
        let judged = samples.filter_map(|(index, judged)| Some((*index, &judged.sample, judged.verdict.as_ref()?)));
        let mut judged: Vec<_> = judged.collect();
        judged.sort_unstable_by_key(|(index, ..)| *index);
        judged
    }

    /// Takes the judged samples of a group out, by index.
    pub(crate) fn take(&mut self, group: GroupId) -> Vec<(u32, Sample, Verdict)> {
        let samples = self.groups.remove(&group).into_iter().flatten();
        let mut judged: Vec<_> =
            samples.filter_map(|(index, judged)| Some((index, judged.sample, judged.verdict?))).collect();
        judged.sort_unstable_by_key(|(index, ..)| *index);
        judged
    }

    pub(crate) fn drop_sample(&mut self, id: SampleId) {
        if let Some(group) = self.groups.get_mut(&id.group) {
            group.remove(&id.index);
        }
    }

    pub(crate) fn drop_group(&mut self, group: GroupId) {
        self.groups.remove(&group);
    }

    /// Whether a sample is there, and its verdict if it should have one.
    pub(crate) fn has(&self, id: SampleId, judged: bool) -> bool {
        let found = self.groups.get(&id.group).and_then(|group| group.get(&id.index));
        found.is_some_and(|found| !judged || found.verdict.is_some())
    }
}
