//! Reads a run from its folder, whether its coordinator is running or not.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pacs_protocol::v1;
use pacs_types::{FinishReason, GroupId, Outcome, Purpose};
use parquet::record::Field;

use super::ObserveError;
use super::history::{History, MOST_POINTS, UNNAMED_SET};
use super::query::{Found, Page, Query, bounded, purpose, shorten};
use crate::FileError;
use crate::records::{ArchiveFile, ArchiveReader, Columns, archive_files, is_gone};

const USUAL_POINTS: u32 = 500;
/// Bound on the metric names in one request.
const MOST_NAMES: usize = 256;
/// Tokens of one sample in an answer; `MOST_TEXT` bounds the bytes of its text.
pub(super) const MOST_TOKENS: usize = 65_536;
pub(super) const MOST_TEXT: usize = 512 << 10;
/// Bound on the version spans of a sample in an answer.
const MOST_SPANS: usize = 4096;
/// Time limit for finding a sample whose step is not known.
const SEARCH_TIME: Duration = Duration::from_secs(5);
/// Tries to open a file: a merge may replace it between listing and opening, but hardly twice.
const TRIES: usize = 3;

/// Columns read for a list of samples; `WHOLE` adds those for a single sample.
const SUMMARY: [&str; 16] = [
    "group",
    "sample",
    "question",
    "gold",
    "response",
    "extracted",
    "outcome",
    "rule",
    "label",
    "reward",
    "tokens",
    "finish",
    "logprob_sum",
    "entropy_sum",
    "score",
    "coefficient",
];
const WHOLE: [&str; 5] = ["token_ids", "logprobs", "sampled_logprobs", "span_versions", "span_tokens"];
const VERSION: &str = "version";

/// Reads the metrics and the sample archive of a run. Blocks on the disk, and writes nothing.
#[derive(Debug)]
pub struct Recorded {
    run_dir: PathBuf,
    /// Metrics of steps and of each evaluation set that was asked for, by its name, as far as they were read.
    histories: Mutex<(History, BTreeMap<String, History>)>,
}

impl Recorded {
    /// A reader of the run in `run_dir`; opens no file yet.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        let steps = History::new(run_dir.join(lines_of(Purpose::Train)), 0..=u64::MAX);
        Self { run_dir: run_dir.to_owned(), histories: Mutex::new((steps, BTreeMap::new())) }
    }

    /// Returns metrics over the steps; implements `ObserveService.GetMetrics`.
    ///
    /// # Errors
    /// When the request is out of bounds, or the file cannot be read.
    pub fn metrics(&self, request: &v1::GetMetricsRequest) -> Result<v1::GetMetricsResponse, ObserveError> {
        let most_points = bounded("most_points", request.most_points, USUAL_POINTS, MOST_POINTS as u32)?;
        if request.names.len() > MOST_NAMES {
            let problem = format!("has {} entries, expected at most {MOST_NAMES}", request.names.len());
            return Err(ObserveError::invalid("names", problem));
        }
        let purpose = purpose(request.purpose)?.unwrap_or(Purpose::Train);
        let range = request.first_step.unwrap_or(0)..=request.last_step.unwrap_or(u64::MAX);
        let failed = |path: &Path, error: io::Error| ObserveError::File(FileError::file("read", path)(error));
        let path = self.run_dir.join(lines_of(purpose));
        let is_part = range != (0..=u64::MAX);
        let mut histories = self.histories.lock().unwrap_or_else(PoisonError::into_inner);
        let (steps, evaluations) = &mut *histories;
        if purpose == Purpose::Train {
            if !is_part {
                steps.update().map_err(|error| failed(&path, error))?;
                return Ok(steps.answer(&request.names, most_points));
            }
            drop(histories);
            // Read again at full resolution, because the kept points of a long run are too coarse for a part of it.
            let mut part = History::new(path.clone(), range);
            part.update().map_err(|error| failed(&path, error))?;
            return Ok(part.answer(&request.names, most_points));
        }
        let of_set = |range, set: &str| History::new(path.clone(), range).of_set(set);
        let unnamed = evaluations.entry(UNNAMED_SET.to_owned()).or_insert_with(|| of_set(0..=u64::MAX, UNNAMED_SET));
        unnamed.update().map_err(|error| failed(&path, error))?;
        let sets: Vec<String> = unnamed.sets().iter().cloned().collect();
        let set = match request.set.as_str() {
            "" if sets.iter().any(|set| set == UNNAMED_SET) => UNNAMED_SET,
            "" => sets.first().map_or(UNNAMED_SET, String::as_str),
            // Only known sets are read, so that requests cannot fill the memory.
            set if sets.iter().any(|known| known == set) => set,
            _ => return Ok(v1::GetMetricsResponse { steps_per_point: 1, sets, ..Default::default() }),
        };
        let mut answer = if is_part {
            let mut part = of_set(range, set);
            part.update().map_err(|error| failed(&path, error))?;
            part.answer(&request.names, most_points)
        } else {
            let history = evaluations.entry(set.to_owned()).or_insert_with(|| of_set(0..=u64::MAX, set));
            history.update().map_err(|error| failed(&path, error))?;
            history.answer(&request.names, most_points)
        };
        answer.sets = sets;
        Ok(answer)
    }

    /// Implements `ObserveService.ListSamples`; without a coordinator no sample is in flight.
    ///
    /// # Errors
    /// When the request is out of bounds, or the folder cannot be read.
    pub fn samples(&self, request: v1::ListSamplesRequest) -> Result<v1::ListSamplesResponse, ObserveError> {
        let mut found = Found::new(Query::new(request)?);
        self.search(&mut found)?;
        Ok(found.into_response())
    }

    /// Returns one sample with its tokens; implements `ObserveService.GetSample`.
    ///
    /// # Errors
    /// When there is no such sample, the request is out of bounds, or the archive cannot be read.
    pub fn sample(&self, request: &v1::GetSampleRequest) -> Result<v1::GetSampleResponse, ObserveError> {
        let window = Window::new(request)?;
        let began = Instant::now();
        let mut unread = Vec::new();
        let mut tries = 0;
        'again: loop {
            unread.clear();
            for file in self.files()? {
                if request.step.is_some_and(|step| !(file.first..=file.last).contains(&step)) {
                    continue;
                }
                if began.elapsed() > SEARCH_TIME {
                    return Err(ObserveError::invalid(
                        "step",
                        "is needed: the archive is too large to be searched for it".into(),
                    ));
                }
                match find(&file, request, &window) {
                    Ok(Some(found)) => return Ok(found),
                    Ok(None) => {}
                    Err(error) if is_gone(&error) && tries < TRIES => {
                        tries += 1;
                        continue 'again;
                    }
                    Err(error) => unread.push(format!("{}: {error}", named(&file))),
                }
            }
            break;
        }
        let of_step = request.step.map(|step| format!(" of step {step}")).unwrap_or_default();
        let unread = if unread.is_empty() { String::new() } else { format!("; not searched: {}", unread.join(", ")) };
        Err(ObserveError::NotFound(format!(
            "no sample g{}.{}{of_step} is there{unread}",
            request.group_id, request.index
        )))
    }

    /// Adds matching samples of the archive to an answer.
    pub(super) fn search(&self, found: &mut Found) -> Result<(), ObserveError> {
        let mut tries = 0;
        // Position within the current step, to continue there if a file vanishes.
        let mut page = found.query().page;
        'again: while found.query().wants_archived() {
            for file in self.files()? {
                match search_file(&file, found, &mut page) {
                    Ok(()) if found.is_full() => return Ok(()),
                    Ok(()) => {}
                    Err(error) if is_gone(&error) && tries < TRIES => {
                        tries += 1;
                        continue 'again;
                    }
                    Err(error) => found.note(format!("{} is left out: {error}", named(&file))),
                }
            }
            break;
        }
        Ok(())
    }

    fn files(&self) -> Result<Vec<ArchiveFile>, ObserveError> {
        let folder = self.run_dir.join("samples");
        archive_files(&folder).map_err(|error| ObserveError::File(FileError::file("list", &folder)(error)))
    }
}

fn lines_of(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Train => "metrics.jsonl",
        Purpose::Evaluate => "evaluations.jsonl",
    }
}

fn named(file: &ArchiveFile) -> String {
    let what = if file.purpose == Purpose::Train { "steps" } else { "evaluations" };
    format!("the archive of {what} {} to {}", file.first, file.last)
}

/// Whether a position in the archive precedes another: training first, then evaluations, each newest first. Ordering by
/// step alone would give no order of files, because one may hold 64 steps.
fn is_before(place: (Purpose, u64), other: (Purpose, u64)) -> bool {
    let key = |(purpose, step): (Purpose, u64)| (purpose == Purpose::Evaluate, std::cmp::Reverse(step));
    key(place) < key(other)
}

fn search_file(file: &ArchiveFile, found: &mut Found, page: &mut Page) -> parquet::errors::Result<()> {
    let query = found.query();
    let is_wanted = query.purpose.is_none_or(|purpose| purpose == file.purpose)
        && query.step.is_none_or(|step| (file.first..=file.last).contains(&step));
    if !is_wanted
        || matches!(*page, Page::Archive(purpose, step, _) if is_before((file.purpose, file.first), (purpose, step)))
    {
        return Ok(());
    }
    let reader = ArchiveReader::open(file)?;
    let columns: Vec<&str> = SUMMARY.into_iter().chain([VERSION]).collect();
    for step in reader.steps() {
        if found.query().step.is_some_and(|wanted| wanted != step) {
            continue;
        }
        let skipped = match *page {
            Page::Archive(purpose, at, rows) if (purpose, at) == (file.purpose, step) => rows,
            Page::Archive(purpose, at, _) if is_before((file.purpose, step), (purpose, at)) => continue,
            _ => 0,
        };
        let mut row = 0;
        let ended = reader.visit(step, &columns, |mut columns| {
            row += 1;
            if row <= skipped {
                return ControlFlow::Continue(());
            }
            let before = Page::Archive(file.purpose, step, row - 1);
            if !found.has_room(before) {
                return ControlFlow::Break(());
            }
            let sample = summary(file.purpose, step, &mut columns);
            let outcome = sample.verdict.as_ref().and_then(|verdict| Outcome::try_from(verdict.outcome()).ok());
            if found.query().wants(file.purpose, GroupId(sample.group_id), outcome, true) {
                found.offer(sample, before);
            }
            match found.is_full() {
                true => ControlFlow::Break(()),
                false => {
                    *page = Page::Archive(file.purpose, step, row);
                    ControlFlow::Continue(())
                }
            }
        })?;
        if ended.is_break() {
            return Ok(());
        }
    }
    Ok(())
}

/// The requested sample, if the file contains it.
fn find(
    file: &ArchiveFile,
    request: &v1::GetSampleRequest,
    window: &Window,
) -> parquet::errors::Result<Option<v1::GetSampleResponse>> {
    let reader = ArchiveReader::open(file)?;
    for step in reader.steps() {
        if request.step.is_some_and(|wanted| wanted != step) {
            continue;
        }
        // The row is found by small columns alone, so that tokens are decoded for one row only.
        let (mut row, mut place, mut prompt_tokens) = (0, None, Vec::new());
        let _ = reader.visit(step, &["group", "sample", "prompt_ids"], |mut columns| {
            if whole(&mut columns, "group") == request.group_id {
                let prompt = numbers(&mut columns, "prompt_ids", 0, MOST_TOKENS);
                if !prompt.is_empty() {
                    prompt_tokens = prompt;
                }
                if whole(&mut columns, "sample") == u64::from(request.index) {
                    place = Some(row);
                    return ControlFlow::Break(());
                }
            }
            row += 1;
            ControlFlow::Continue(())
        })?;
        let Some(place) = place else { continue };
        let (mut row, mut found) = (0, None);
        let columns: Vec<&str> = SUMMARY.into_iter().chain([VERSION]).chain(WHOLE).collect();
        let _ = reader.visit(step, &columns, |mut columns| {
            row += 1;
            if row <= place {
                return ControlFlow::Continue(());
            }
            let mut sample = summary(file.purpose, step, &mut columns);
            shorten(&mut sample, MOST_TEXT);
            let Window { first, most } = *window;
            let versions = numbers(&mut columns, "span_versions", 0, MOST_SPANS);
            let tokens = numbers(&mut columns, "span_tokens", 0, MOST_SPANS);
            let span = |(version, tokens)| v1::VersionSpan { version: u64::from(version), tokens };
            found = Some(v1::GetSampleResponse {
                sample: Some(sample),
                prompt_tokens: std::mem::take(&mut prompt_tokens),
                first_token: u32::try_from(first).unwrap_or(u32::MAX),
                tokens: numbers(&mut columns, "token_ids", first, most),
                logprobs: floats(&mut columns, "logprobs", first, most),
                sampled_logprobs: floats(&mut columns, "sampled_logprobs", first, most),
                spans: versions.into_iter().zip(tokens).map(span).collect(),
            });
            ControlFlow::Break(())
        })?;
        return Ok(found);
    }
    Ok(None)
}

/// The range of tokens that a request asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    first: usize,
    most: usize,
}

impl Window {
    pub(super) fn new(request: &v1::GetSampleRequest) -> Result<Self, ObserveError> {
        let most = bounded("most_tokens", request.most_tokens, MOST_TOKENS as u32, MOST_TOKENS as u32)?;
        Ok(Self { first: request.first_token as usize, most })
    }

    pub(super) fn of<T: Clone>(self, values: &[T]) -> Vec<T> {
        values.iter().skip(self.first).take(self.most).cloned().collect()
    }

    pub(super) fn first(self) -> u32 {
        u32::try_from(self.first).unwrap_or(u32::MAX)
    }
}

/// A row without its tokens.
fn summary(purpose: Purpose, step: u64, columns: &mut Columns) -> v1::ObservedSample {
    let outcome = match text(columns, "outcome").as_str() {
        "correct" => v1::Outcome::Correct,
        "wrong" => v1::Outcome::Wrong,
        "unparsable" => v1::Outcome::Unparsable,
        "failed" => v1::Outcome::Failed,
        "timed_out" => v1::Outcome::TimedOut,
        _ => v1::Outcome::Unspecified,
    };
    let finish = match text(columns, "finish").as_str() {
        "stop" => v1::FinishReason::from(FinishReason::Stop),
        "length" => v1::FinishReason::from(FinishReason::Length),
        _ => v1::FinishReason::Unspecified,
    };
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let verdict = v1::Verdict {
        outcome: outcome.into(),
        label: double(columns, "label"),
        reward: double(columns, "reward"),
        extracted: match columns.remove("extracted") {
            Some(Field::Str(text)) => Some(text),
            _ => None,
        },
        rule: text(columns, "rule"),
    };
    v1::ObservedSample {
        purpose: v1::Purpose::from(purpose).into(),
        state: v1::SampleState::Archived.into(),
        step: Some(step),
        group_id: whole(columns, "group"),
        index: narrow(whole(columns, "sample")),
        question: text(columns, "question"),
        gold: text(columns, "gold"),
        response: text(columns, "response"),
        shortened: false,
        verdict: Some(verdict),
        tokens: narrow(whole(columns, "tokens")),
        finish: finish.into(),
        version: Some(whole(columns, VERSION)),
        logprob_sum: Some(double(columns, "logprob_sum")),
        entropy_sum: double(columns, "entropy_sum"),
        score: optional_float(columns, "score"),
        coefficient: optional_float(columns, "coefficient"),
    }
}

fn text(columns: &mut HashMap<String, Field>, name: &str) -> String {
    match columns.remove(name) {
        Some(Field::Str(text)) => text,
        _ => String::new(),
    }
}

fn whole(columns: &mut HashMap<String, Field>, name: &str) -> u64 {
    match columns.remove(name) {
        Some(Field::Long(value)) => u64::try_from(value).unwrap_or(0),
        Some(Field::Int(value)) => u64::try_from(value).unwrap_or(0),
        _ => 0,
    }
}

fn double(columns: &mut HashMap<String, Field>, name: &str) -> f64 {
    match columns.remove(name) {
        Some(Field::Double(value)) => value,
        _ => 0.0,
    }
}

/// A number that not every row has, and no row of files of earlier versions.
fn optional_float(columns: &mut HashMap<String, Field>, name: &str) -> Option<f32> {
    match columns.remove(name) {
        Some(Field::Float(value)) => Some(value),
        _ => None,
    }
}

fn elements(columns: &mut HashMap<String, Field>, name: &str) -> Vec<Field> {
    match columns.remove(name) {
        Some(Field::ListInternal(list)) => list.elements().to_vec(),
        _ => Vec::new(),
    }
}

fn numbers(columns: &mut HashMap<String, Field>, name: &str, first: usize, most: usize) -> Vec<u32> {
    let value = |field: Field| match field {
        Field::Int(value) => u32::try_from(value).unwrap_or(0),
        _ => 0,
    };
    elements(columns, name).into_iter().skip(first).take(most).map(value).collect()
}

fn floats(columns: &mut HashMap<String, Field>, name: &str, first: usize, most: usize) -> Vec<f32> {
    let value = |field: Field| match field {
        Field::Float(value) => value,
        _ => f32::NAN,
    };
    elements(columns, name).into_iter().skip(first).take(most).map(value).collect()
}
