//! A request for samples, with its bounds checked.

use std::str::FromStr;
use std::time::{Duration, Instant};

use pacs_protocol::v1;
use pacs_types::{GroupId, Outcome, Purpose};
use prost::Message;

use super::ObserveError;

const USUAL_LIMIT: u32 = 50;
const MOST_SAMPLES: u32 = 500;
const USUAL_TEXT: u32 = 500;
const MOST_TEXT: u32 = 64 << 10;
const MOST_PATTERN: usize = 1024;
/// Samples that one call examines, within `SEARCH_TIME`; the answer then says where to continue.
pub(super) const MOST_SEARCHED: usize = 50_000;
const SEARCH_TIME: Duration = Duration::from_secs(3);
/// Bytes of the samples in one answer; notes and page fit into the rest of 4 MiB.
const ANSWER_BYTES: usize = pacs_protocol::ANSWER_BYTES - (256 << 10);
const MOST_NOTES: usize = 20;
const MOST_NOTE: usize = 1024;

/// Filters and limits of a request for samples.
#[derive(Debug)]
pub(super) struct Query {
    pub(super) purpose: Option<Purpose>,
    pub(super) step: Option<u64>,
    pub(super) group: Option<GroupId>,
    state: Option<v1::SampleState>,
    outcomes: Vec<v1::Outcome>,
    /// Text to search for, in lower case.
    text: String,
    limit: usize,
    text_bytes: usize,
    pub(super) page: Page,
}

/// Position from which a search continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Page {
    /// From the newest sample.
    Newest,
    /// After this sample in flight; larger group ids come first, then smaller indices.
    InFlight(GroupId, u32),
    /// After this many rows of the step in the archive.
    Archive(Purpose, u64, usize),
}

impl Query {
    pub(super) fn new(request: v1::ListSamplesRequest) -> Result<Self, ObserveError> {
        let outcome = |wire: &i32| match v1::Outcome::try_from(*wire) {
            Ok(outcome) if outcome != v1::Outcome::Unspecified => Ok(outcome),
            _ => Err(ObserveError::invalid("outcomes", format!("holds {wire}, which is no outcome"))),
        };
        if request.text.len() > MOST_PATTERN {
            let problem = format!("has {} bytes, expected at most {MOST_PATTERN}", request.text.len());
            return Err(ObserveError::invalid("text", problem));
        }
        let state = v1::SampleState::try_from(request.state)
            .map_err(|_| ObserveError::invalid("state", format!("is {}, which is no state", request.state)))?;
        Ok(Self {
            purpose: purpose(request.purpose)?,
            step: request.step,
            group: request.group_id.map(GroupId),
            state: (state != v1::SampleState::Unspecified).then_some(state),
            outcomes: request.outcomes.iter().map(outcome).collect::<Result<_, _>>()?,
            text: request.text.to_lowercase(),
            limit: bounded("limit", request.limit, USUAL_LIMIT, MOST_SAMPLES)?,
            text_bytes: bounded("text_bytes", request.text_bytes, USUAL_TEXT, MOST_TEXT)?,
            page: request.page.parse()?,
        })
    }

    /// Whether samples in flight can match.
    pub(super) fn wants_in_flight(&self) -> bool {
        self.step.is_none() && self.state != Some(v1::SampleState::Archived) && !matches!(self.page, Page::Archive(..))
    }

    /// Whether archived samples can match.
    pub(super) fn wants_archived(&self) -> bool {
        self.state.is_none_or(|state| state == v1::SampleState::Archived)
    }

    /// Whether a sample matches, as far as its statistics tell; its texts are not read yet.
    pub(super) fn wants(&self, purpose: Purpose, group: GroupId, outcome: Option<Outcome>, archived: bool) -> bool {
        let state = match (archived, outcome) {
            (true, _) => v1::SampleState::Archived,
            (false, Some(_)) => v1::SampleState::Judged,
            (false, None) => v1::SampleState::Unjudged,
        };
        self.purpose.is_none_or(|wanted| wanted == purpose)
            && self.group.is_none_or(|wanted| wanted == group)
            && self.state.is_none_or(|wanted| wanted == state)
            && (self.outcomes.is_empty() || outcome.is_some_and(|is| self.outcomes.contains(&is.into())))
    }

    fn has_text(&self, sample: &v1::ObservedSample) -> bool {
        self.text.is_empty()
            || [&sample.question, &sample.response].iter().any(|text| text.to_lowercase().contains(&self.text))
    }
}

/// The purpose that a request names; `None` for any.
pub(super) fn purpose(wire: i32) -> Result<Option<Purpose>, ObserveError> {
    match v1::Purpose::try_from(wire) {
        Ok(v1::Purpose::Unspecified) => Ok(None),
        Ok(v1::Purpose::Train) => Ok(Some(Purpose::Train)),
        Ok(v1::Purpose::Evaluate) => Ok(Some(Purpose::Evaluate)),
        Err(_) => Err(ObserveError::invalid("purpose", format!("is {wire}, which is no purpose"))),
    }
}

/// A number with a default for 0 and an upper bound.
pub(super) fn bounded(field: &'static str, value: u32, usual: u32, most: u32) -> Result<usize, ObserveError> {
    match value {
        0 => Ok(usual as usize),
        value if value <= most => Ok(value as usize),
        value => Err(ObserveError::invalid(field, format!("is {value}, expected at most {most}"))),
    }
}

impl FromStr for Page {
    type Err = ObserveError;

    fn from_str(text: &str) -> Result<Self, ObserveError> {
        let page = || -> Option<Self> {
            match text.split(':').collect::<Vec<_>>()[..] {
                [""] => Some(Self::Newest),
                ["f", group, index] => Some(Self::InFlight(GroupId(group.parse().ok()?), index.parse().ok()?)),
                ["t", step, rows] => Some(Self::Archive(Purpose::Train, step.parse().ok()?, rows.parse().ok()?)),
                ["e", step, rows] => Some(Self::Archive(Purpose::Evaluate, step.parse().ok()?, rows.parse().ok()?)),
                _ => None,
            }
        };
        page().ok_or_else(|| ObserveError::invalid("page", "is none that an answer has named".to_owned()))
    }
}

impl std::fmt::Display for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Newest => Ok(()),
            Self::InFlight(group, index) => write!(f, "f:{}:{index}", group.0),
            Self::Archive(Purpose::Train, step, rows) => write!(f, "t:{step}:{rows}"),
            Self::Archive(Purpose::Evaluate, step, rows) => write!(f, "e:{step}:{rows}"),
        }
    }
}

/// An answer under construction.
#[derive(Debug)]
pub(super) struct Found {
    query: Query,
    response: v1::ListSamplesResponse,
    room: usize,
    searched: usize,
    began: Instant,
    is_full: bool,
}

impl Found {
    pub(super) fn new(query: Query) -> Self {
        let response = v1::ListSamplesResponse::default();
        Self { query, response, room: ANSWER_BYTES, searched: 0, began: Instant::now(), is_full: false }
    }

    pub(super) fn query(&self) -> &Query {
        &self.query
    }

    /// Counts an examined sample. Returns whether the limits of the call allow it; if not, the next
    /// call continues after `before`.
    pub(super) fn has_room(&mut self, before: Page) -> bool {
        self.searched += 1;
        let is_late =
            self.searched > MOST_SEARCHED || (self.searched.is_multiple_of(64) && self.began.elapsed() > SEARCH_TIME);
        if is_late || self.response.samples.len() >= self.query.limit {
            self.stop_at(before);
        }
        !self.is_full
    }

    /// Adds a sample if it contains the text and fits; one that does not fit is the first of the next answer.
    pub(super) fn offer(&mut self, mut sample: v1::ObservedSample, before: Page) {
        if !self.query.has_text(&sample) {
            return;
        }
        shorten(&mut sample, self.query.text_bytes);
        match self.room.checked_sub(sample.encoded_len() + 16) {
            Some(left) => {
                self.room = left;
                self.response.samples.push(sample);
            }
            None => self.stop_at(before),
        }
    }

    /// Ends this answer at a position. An answer without samples has none, and no single
    /// sample is too large for an answer.
    pub(super) fn stop_at(&mut self, page: Page) {
        if !self.is_full {
            (self.is_full, self.response.next_page) = (true, page.to_string());
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.is_full
    }

    pub(super) fn note(&mut self, note: impl std::fmt::Display) {
        if self.response.notes.len() < MOST_NOTES {
            let mut note = note.to_string();
            cut(&mut note, MOST_NOTE);
            self.response.notes.push(note);
        }
    }

    pub(super) fn into_response(self) -> v1::ListSamplesResponse {
        self.response
    }
}

/// Cuts each text of a sample off at a number of bytes.
pub(super) fn shorten(sample: &mut v1::ObservedSample, most: usize) {
    let v1::ObservedSample { question, gold, response, verdict, .. } = sample;
    let mut texts = vec![question, gold, response];
    if let Some(verdict) = verdict {
        texts.push(&mut verdict.rule);
        texts.extend(&mut verdict.extracted);
    }
    let mut shortened = false;
    for text in texts {
        shortened |= cut(text, most);
    }
    sample.shortened |= shortened;
}

fn cut(text: &mut String, most: usize) -> bool {
    let is_long = text.len() > most;
    if is_long {
        text.truncate(text.floor_char_boundary(most));
    }
    is_long
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read_back_and_others_are_refused() {
        for page in [
            Page::Newest,
            Page::InFlight(GroupId(u64::MAX), 7),
            Page::Archive(Purpose::Train, 12, 0),
            Page::Archive(Purpose::Evaluate, 0, usize::MAX),
        ] {
            assert_eq!(page.to_string().parse::<Page>().unwrap(), page);
        }
        for other in ["x", "t:1", "t:-1:2", "e:1:2:3", "f::", "t:99999999999999999999:1"] {
            assert!(other.parse::<Page>().is_err(), "{other}");
        }
    }

    #[test]
    fn requests_beyond_the_bounds_are_refused_by_field() {
        let refused = |request: v1::ListSamplesRequest| match Query::new(request) {
            Err(ObserveError::Invalid { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        let any = v1::ListSamplesRequest::default;
        assert_eq!(refused(v1::ListSamplesRequest { purpose: 9, ..any() }), "purpose");
        assert_eq!(refused(v1::ListSamplesRequest { state: -1, ..any() }), "state");
        assert_eq!(refused(v1::ListSamplesRequest { outcomes: vec![1, 0], ..any() }), "outcomes");
        assert_eq!(refused(v1::ListSamplesRequest { text: "x".repeat(1025), ..any() }), "text");
        assert_eq!(refused(v1::ListSamplesRequest { limit: 501, ..any() }), "limit");
        assert_eq!(refused(v1::ListSamplesRequest { text_bytes: u32::MAX, ..any() }), "text_bytes");
        assert_eq!(refused(v1::ListSamplesRequest { page: "next".into(), ..any() }), "page");
        assert!(Query::new(any()).is_ok());
    }

    #[test]
    fn what_does_not_fit_is_left_for_the_next_page() {
        let query =
            Query::new(v1::ListSamplesRequest { limit: 500, text_bytes: 65_536, ..Default::default() }).unwrap();
        let mut found = Found::new(query);
        let mut taken = 0;
        let page = |row| Page::Archive(Purpose::Train, 1, row);
        for row in 0..500 {
            if !found.has_room(page(row)) {
                break;
            }
            let sample =
                v1::ObservedSample { response: "ä".repeat(50_000), question: "x".repeat(9), ..Default::default() };
            found.offer(sample, page(row));
            taken += usize::from(!found.is_full());
        }
        let response = found.into_response();
        assert!(response.encoded_len() < pacs_protocol::ANSWER_BYTES);
        assert_eq!(response.samples.len(), taken);
        assert_eq!(response.next_page.parse::<Page>().unwrap(), page(taken), "after those that were taken");
        assert!(response.samples.iter().all(|sample| sample.shortened && sample.response.len() == 65_536));
    }
}
