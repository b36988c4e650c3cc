use std::path::Path;

use pacs_spec::SourceSpec;

use super::fields::Fields;
use super::value::Value;
use super::{Record, Take, text, window};
use crate::DataError;

/// Rows of a text table, whose first row names the fields. Every value is a text.
pub(super) fn rows(
    path: &Path,
    delimiter: u8,
    source: &SourceSpec,
    take: &mut Take<'_, Record>,
) -> Result<Option<Fields>, DataError> {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(text::open(path)?);
    let headers: Vec<String> =
        reader.headers().map_err(|error| failed(path, error))?.iter().map(str::to_owned).collect();
    let place_of = |name: &str| headers.iter().position(|known| known == name);
    let fields = Fields::choose(source, |name| place_of(name).is_some(), || headers.clone());
    let fields = fields.map_err(|message| DataError::Format { path: path.to_owned(), message })?;
    let window = window(source);
    for (position, row) in reader.records().enumerate() {
        if position >= window.end {
            break;
        }
        if position < window.start {
            continue;
        }
        let row = row.map_err(|error| failed(path, error))?;
        let line = row.position().map_or(position + 2, |position| position.line() as usize);
        let value =
            |name: &str| Ok(place_of(name).and_then(|place| row.get(place)).map(|text| Value::Text(text.to_owned())));
        let record = fields.record(value, || headers.clone(), format!("{}:{line}", path.display()));
        take(record.map_err(|message| DataError::Row { path: path.to_owned(), row: line, message }))?;
    }
    Ok(Some(fields))
}

pub(super) fn count(path: &Path, delimiter: u8) -> Result<usize, DataError> {
    let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(text::open(path)?);
    let mut count = 0;
    for row in reader.records() {
        row.map_err(|error| failed(path, error))?;
        count += 1;
    }
    Ok(count)
}

fn failed(path: &Path, error: csv::Error) -> DataError {
    let line = error.position().map(|position| position.line() as usize);
    match (line, error.into_kind()) {
        (_, csv::ErrorKind::Io(error)) => text::read_error(path, error),
        (Some(row), csv::ErrorKind::UnequalLengths { expected_len, len, .. }) => {
            let message = format!("it has {len} fields, the first row names {expected_len}");
            DataError::Row { path: path.to_owned(), row, message }
        }
        (_, kind) => DataError::Format { path: path.to_owned(), message: format!("no table: {kind:?}") },
    }
}
