//! Where rows come from: one file per source, in any of several formats, or a generator.

mod fields;
mod files;
mod generate;
pub(crate) mod jsonl;
mod parquet;
mod table;
pub(crate) mod text;
pub(crate) mod value;

use std::path::Path;

use pacs_spec::{FileFormat, SourceSpec};
use pacs_text::Message;

use self::fields::Fields;
use crate::DataError;

/// A generated question with its reference answer, neither of them empty.
pub(crate) struct Row {
    pub(crate) question: String,
    pub(crate) answer: String,
    /// A response that is right, where that is not the reference answer itself; generated problems only.
    pub(crate) response: Option<String>,
    /// Where it stands, for messages: file and line.
    pub(crate) place: String,
}

/// What is asked with its reference answer, neither of them empty.
pub(crate) struct Record {
    pub(crate) asked: Asked,
    pub(crate) answer: String,
    /// A response that is right, where that is not the reference answer itself; generated problems only.
    pub(crate) response: Option<String>,
    /// The verifier that the row names.
    pub(crate) verifier: Option<String>,
    /// Where it stands, for messages: file and line.
    pub(crate) place: String,
}

/// What a row asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// One question, to be written as a message of the user.
    Question(String),
    /// Messages of which the last is the user's.
    Conversation(Vec<Message>),
}

impl Asked {
    /// The question itself, without what precedes it.
    pub(crate) fn question(&self) -> &str {
        match self {
            Self::Question(text) => text,
            Self::Conversation(messages) => messages.last().map_or("", |message| &message.content),
        }
    }
}

impl Asked {
    /// What is asked as messages: `suffix` follows the question, and `system` precedes it where the row brings none.
    pub(crate) fn messages(&self, system: Option<&str>, suffix: &str) -> Vec<Message> {
        let mut messages = match self {
            Self::Question(question) => vec![Message::user(question.clone())],
            Self::Conversation(messages) => messages.clone(),
        };
        if let Some(last) = messages.last_mut() {
            last.content.push_str(suffix);
        }
        let has_system = messages.iter().any(|message| message.role == "system");
        if let Some(system) = system.filter(|_| !has_system) {
            messages.insert(0, Message::system(system));
        }
        messages
    }
}

impl From<Row> for Record {
    fn from(Row { question, answer, response, place }: Row) -> Self {
        Self { asked: Asked::Question(question), answer, response, verifier: None, place }
    }
}

/// What is done with each row, or with what is wrong with it; an error ends the reading.
pub(crate) type Take<'a, R = Row> = dyn FnMut(Result<R, DataError>) -> Result<(), DataError> + 'a;

/// Hands the rows of `source` to `take`, in order, without those that `skip` and `limit` leave out. Returns which fields were
/// read, where the source does not say it.
pub(crate) fn rows(source: &SourceSpec, take: &mut Take<'_, Record>) -> Result<Option<String>, DataError> {
    let fields = match (&source.path, &source.generator) {
        (Some(path), _) => rows_of_files(path, source, take)?,
        (None, Some(generator)) => {
            generate::rows(generator, window(source), &mut |row| take(row.map(Record::from)))?;
            None
        }
        (None, None) => unreachable!("a valid spec has a path or a generator"),
    };
    Ok(fields.and_then(|fields| fields.chosen(source)))
}

/// Rows of one file, or of several one after the other, whose window is over all of them.
fn rows_of_files(path: &Path, source: &SourceSpec, take: &mut Take<'_, Record>) -> Result<Option<Fields>, DataError> {
    let files = files::of(path)?;
    if let [only] = files.as_slice() {
        return rows_of(only, source, take);
    }
    let window = window(source);
    let is_bounded = window != (0..usize::MAX);
    let mut first = 0;
    let mut fields = None;
    for file in &files {
        let mut part = source.clone();
        if is_bounded {
            let rows = count(file)?;
            let start = window.start.max(first);
            let end = window.end.min(first + rows);
            if start < end {
                (part.skip, part.limit) = (Some(start - first), Some(end - start));
            } else {
                part.limit = Some(0);
            }
            first += rows;
        }
        if part.limit == Some(0) {
            continue;
        }
        let Some(chosen) = rows_of(file, &part, take)? else { continue };
        match &fields {
            Some(known) if *known != chosen => {
                let message = format!("its fields are not those of `{}`, the first of these files", files[0].display());
                return Err(DataError::Format { path: file.clone(), message });
            }
            Some(_) => {}
            None => fields = Some(chosen),
        }
    }
    Ok(fields)
}

fn rows_of(path: &Path, source: &SourceSpec, take: &mut Take<'_, Record>) -> Result<Option<Fields>, DataError> {
    match format(path) {
        FileFormat::Parquet => parquet::rows(path, source, take),
        FileFormat::Json => jsonl::rows(path, source, take),
        FileFormat::Table(delimiter) => table::rows(path, delimiter, source, take),
    }
}

/// How many rows the file at `path` has, or all files of a pattern; blank lines do not count.
///
/// # Errors
/// When a file cannot be read.
pub fn count_rows(path: &Path) -> Result<usize, DataError> {
    files::of(path)?.iter().map(|file| count(file)).sum()
}

/// Whether the file at `path` is there, or one that the pattern means.
#[must_use]
pub fn is_there(path: &Path) -> bool {
    files::of(path).is_ok_and(|files| files.iter().all(|file| file.exists()))
}

fn count(path: &Path) -> Result<usize, DataError> {
    match format(path) {
        FileFormat::Parquet => parquet::count(path),
        FileFormat::Json => jsonl::count(path),
        FileFormat::Table(delimiter) => table::count(path, delimiter),
    }
}

/// The format of a file by its name; those that a spec would refuse are read as JSON.
fn format(path: &Path) -> FileFormat {
    FileFormat::of(path).unwrap_or(FileFormat::Json)
}

/// Positions of the rows that a source takes.
fn window(source: &SourceSpec) -> std::ops::Range<usize> {
    let start = source.skip.unwrap_or(0);
    start..start.saturating_add(source.limit.unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests;
