//! Where rows come from: one file per source.

mod generate;
pub(crate) mod jsonl;
mod parquet;

use std::path::Path;

use pacs_spec::SourceSpec;

use crate::DataError;

/// A question with its reference answer, neither of them empty.
pub(crate) struct Row {
    pub(crate) question: String,
    pub(crate) answer: String,
    /// A response that is right, where that is not the reference answer itself; generated problems only.
    pub(crate) response: Option<String>,
    /// Where it stands, for messages: file and line.
    pub(crate) place: String,
}

/// What is done with each row, or with what is wrong with it; an error ends the reading.
pub(crate) type Take<'a> = dyn FnMut(Result<Row, DataError>) -> Result<(), DataError> + 'a;

/// Hands the rows of `source` to `take`, in order, without those that `skip` and `limit` leave out.
pub(crate) fn rows(source: &SourceSpec, take: &mut Take<'_>) -> Result<(), DataError> {
    match (&source.path, &source.generator) {
        (Some(path), _) if is_parquet(path) => parquet::rows(path, source, take),
        (Some(path), _) => jsonl::rows(path, source, take),
        (None, Some(generator)) => generate::rows(generator, window(source), take),
        (None, None) => unreachable!("a valid spec has a path or a generator"),
    }
}

/// How many rows the file at `path` has; blank lines of JSONL do not count.
///
/// # Errors
/// When the file cannot be read.
pub fn count_rows(path: &Path) -> Result<usize, DataError> {
    if is_parquet(path) { parquet::count(path) } else { jsonl::count(path) }
}

fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "parquet")
}

/// Positions of the rows that a source takes.
fn window(source: &SourceSpec) -> std::ops::Range<usize> {
    let start = source.skip.unwrap_or(0);
    start..start.saturating_add(source.limit.unwrap_or(usize::MAX))
}

/// A value of a row that is text, or says what it is instead.
struct Cell {
    text: Result<String, &'static str>,
    is_number: bool,
}

/// Makes a row of its two values; the message says what is wrong with them.
fn row(source: &SourceSpec, question: Cell, answer: Cell, place: String) -> Result<Row, String> {
    let not_text = |field: &str, what: &str, wanted| format!("field `{field}` is {what}, expected {wanted}");
    let number = "a number";
    let question_text = match question {
        Cell { text: Ok(_), is_number: true } => Err(number),
        Cell { text, .. } => text,
    };
    let question = question_text.map_err(|what| not_text(&source.question_field, what, "a text"))?;
    let answer = answer.text.map_err(|what| not_text(&source.answer_field, what, "a text or a number"))?;
    for (field, text) in [(&source.question_field, &question), (&source.answer_field, &answer)] {
        if text.trim().is_empty() {
            return Err(format!("field `{field}` is empty"));
        }
    }
    Ok(Row { question, answer, response: None, place })
}

/// The message for a field that is not there.
fn no_field<'a>(field: &str, present: impl Iterator<Item = &'a str>) -> String {
    let present: Vec<String> = present.map(|name| format!("`{name}`")).collect();
    let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
    format!("there is no field `{field}` (fields: {present}); `question_field` and `answer_field` choose the fields")
}
