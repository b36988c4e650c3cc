//! Samples that no step has consumed yet: their statistics come from the driver, their content from the journal.

use std::sync::Arc;

use pacs_data::Problems;
use pacs_machine::evaluation_problem;
use pacs_protocol::v1;
use pacs_types::{GroupId, Purpose, SampleId, Verdict};

use super::ObserveError;
use super::query::{Found, Page, Query, shorten};
use super::recorded::{MOST_TEXT, MOST_TOKENS, Window};
use crate::driver::{Driver, KeptSample, Signal, problem_of};

/// Samples that one call examines under the driver's lock, which takes some microseconds.
const MOST_CANDIDATES: usize = 2048;

/// A sample whose content has not been read yet.
#[derive(Debug)]
pub(super) struct InFlight {
    id: SampleId,
    sample: KeptSample,
    verdict: Option<Verdict>,
    /// While its step is in training, once its rank has reported.
    signal: Option<Signal>,
}

/// Samples that match a query as far as the driver knows, and whether there may be more after them.
#[derive(Debug)]
pub(super) struct Candidates {
    samples: Vec<InFlight>,
    problems: Arc<Problems>,
    more_after: Option<Page>,
}

fn purpose_of(group: GroupId) -> Purpose {
    if evaluation_problem(group).is_some() { Purpose::Evaluate } else { Purpose::Train }
}

impl Candidates {
    /// Collects candidates. Runs under the driver's lock, so it reads no files.
    pub(super) fn of(driver: &Driver, query: &Query) -> Self {
        let mut groups: Vec<GroupId> = driver.store.groups().collect();
        groups.sort_unstable_by_key(|group| std::cmp::Reverse(*group));
        let (mut samples, mut looked_at, mut more_after) = (Vec::new(), 0, None);
        let after = match query.page {
            Page::InFlight(group, index) => Some((group, index)),
            Page::Newest | Page::Archive(..) => None,
        };
        'all: for group in groups {
            for (index, sample, verdict) in driver.store.samples(group) {
                if after.is_some_and(|(last, at)| group > last || (group == last && index <= at)) {
                    continue;
                }
                if looked_at == MOST_CANDIDATES {
                    break 'all;
                }
                looked_at += 1;
                if looked_at == MOST_CANDIDATES {
                    more_after = Some(Page::InFlight(group, index));
                }
                if query.wants(purpose_of(group), group, verdict.map(|verdict| verdict.outcome), false) {
                    let id = SampleId { group, index };
                    let (sample, verdict, signal) = (sample.clone(), verdict.cloned(), driver.signals.get(id));
                    samples.push(InFlight { id, sample, verdict, signal });
                }
            }
        }
        Self { samples, problems: Arc::clone(&driver.problems), more_after }
    }

    /// Adds the matching candidates to an answer. Reads the journal.
    pub(super) fn search(self, found: &mut Found) {
        let mut before = found.query().page;
        for candidate in self.samples {
            if !found.has_room(before) {
                return;
            }
            match candidate.sample.text() {
                Ok(text) => found.offer(candidate.observed(&self.problems, text), before),
                // Its step may be over by now, which moved it to the archive.
                Err(error) => found.note(format!("{} is left out: {error}", candidate.id)),
            }
            if found.is_full() {
                return;
            }
            before = Page::InFlight(candidate.id.group, candidate.id.index);
        }
        if let Some(page) = self.more_after {
            found.stop_at(page);
        }
    }
}

impl InFlight {
    pub(super) fn of(driver: &Driver, id: SampleId) -> Option<(Self, Arc<Problems>)> {
        let (_, sample, verdict) = driver.store.samples(id.group).find(|(index, ..)| *index == id.index)?;
        let (sample, verdict, signal) = (sample.clone(), verdict.cloned(), driver.signals.get(id));
        let this = Self { id, sample, verdict, signal };
        Some((this, Arc::clone(&driver.problems)))
    }

    fn observed(&self, problems: &Problems, response: String) -> v1::ObservedSample {
        let problem = problem_of(problems, self.id.group);
        let state = if self.verdict.is_some() { v1::SampleState::Judged } else { v1::SampleState::Unjudged };
        v1::ObservedSample {
            purpose: v1::Purpose::from(purpose_of(self.id.group)).into(),
            state: state.into(),
            step: None,
            group_id: self.id.group.0,
            index: self.id.index,
            question: problem.question.clone(),
            gold: problem.answer.clone(),
            response,
            shortened: false,
            verdict: self.verdict.clone().map(v1::Verdict::from),
            tokens: self.sample.tokens,
            finish: v1::FinishReason::from(self.sample.finish).into(),
            version: None,
            logprob_sum: None,
            entropy_sum: self.sample.entropy_sum,
            score: self.signal.and_then(|signal| signal.score),
            coefficient: self.signal.map(|signal| signal.coefficient),
        }
    }

    /// The sample with its tokens, read from the journal.
    pub(super) fn whole(self, problems: &Problems, window: Window) -> Result<v1::GetSampleResponse, ObserveError> {
        let content = self.sample.content();
        let content =
            content.map_err(|error| ObserveError::NotFound(format!("{} cannot be read: {error}", self.id)))?;
        let span = |span: &pacs_types::VersionSpan| v1::VersionSpan { version: span.version.0, tokens: span.tokens };
        let spans = content.spans.iter().map(span).collect();
        let mut sample = self.observed(problems, content.text);
        sample.version = Some(content.version.0);
        sample.logprob_sum = Some(content.logprobs.iter().map(|logprob| f64::from(*logprob)).sum());
        shorten(&mut sample, MOST_TEXT);
        let prompt = &problem_of(problems, self.id.group).prompt_tokens;
        Ok(v1::GetSampleResponse {
            sample: Some(sample),
            prompt_tokens: prompt.iter().take(MOST_TOKENS).copied().collect(),
            first_token: window.first(),
            tokens: window.of(&content.tokens),
            logprobs: window.of(&content.logprobs),
            sampled_logprobs: window.of(&content.sampled_logprobs),
            spans,
        })
    }
}
