//! Where rows come from: one file per source, in any of several formats, or a generator.

mod fields;
mod generate;
pub(crate) mod jsonl;
mod parquet;
mod table;
pub(crate) mod text;
pub(crate) mod value;

use std::path::Path;

use pacs_spec::{FileFormat, SourceSpec};
use pacs_text::Message;

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
        (Some(path), _) => match format(path) {
            FileFormat::Parquet => parquet::rows(path, source, take)?,
            FileFormat::Json => jsonl::rows(path, source, take)?,
            FileFormat::Table(delimiter) => table::rows(path, delimiter, source, take)?,
        },
        (None, Some(generator)) => {
            generate::rows(generator, window(source), &mut |row| take(row.map(Record::from)))?;
            None
        }
        (None, None) => unreachable!("a valid spec has a path or a generator"),
    };
    Ok(fields.and_then(|fields| fields.chosen(source)))
}

/// How many rows the file at `path` has; blank lines do not count.
///
/// # Errors
/// When the file cannot be read.
pub fn count_rows(path: &Path) -> Result<usize, DataError> {
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
