use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use pacs_spec::SourceSpec;
use serde_json::{Map, Value};

use super::{Cell, Row, Take, no_field, row, window};
use crate::DataError;

pub(super) fn rows(path: &Path, source: &SourceSpec, take: &mut Take<'_>) -> Result<(), DataError> {
    let window = window(source);
    let mut position = 0;
    lines(path, &mut |number, line| {
        let here = position;
        position += 1;
        if here >= window.end {
            return Ok(false);
        }
        if here >= window.start {
            let row_error = |message| DataError::Row { path: path.to_owned(), row: number, message };
            take(parse(path, source, number, line).map_err(row_error))?;
        }
        Ok(true)
    })
}

pub(super) fn count(path: &Path) -> Result<usize, DataError> {
    let mut count = 0;
    lines(path, &mut |_, _| {
        count += 1;
        Ok(true)
    })?;
    Ok(count)
}

/// What is done with the lines of a file, given by number: false ends it.
pub(crate) type Visit<'a> = dyn FnMut(usize, &[u8]) -> Result<bool, DataError> + 'a;

/// Visits the lines of a file that are not blank.
fn lines(path: &Path, visit: &mut Visit<'_>) -> Result<(), DataError> {
    let read_error = |error| DataError::Read { path: path.to_owned(), error };
    lines_of(&mut BufReader::new(File::open(path).map_err(read_error)?), path, visit)
}

/// Visits the lines of `reader` that are not blank; errors name `path`.
pub(crate) fn lines_of(reader: &mut dyn BufRead, path: &Path, visit: &mut Visit<'_>) -> Result<(), DataError> {
    let read_error = |error| DataError::Read { path: path.to_owned(), error };
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(read_error)? == 0 {
            break;
        }
        let text = line.trim_ascii();
        if !text.is_empty() && !visit(number, text)? {
            break;
        }
    }
    Ok(())
}

fn parse(path: &Path, source: &SourceSpec, number: usize, line: &[u8]) -> Result<Row, String> {
    let object = object(line)?;
    let cell =
        |field: &str| object.get(field).map(cell).ok_or_else(|| no_field(field, object.keys().map(String::as_str)));
    let place = format!("{}:{number}", path.display());
    row(source, cell(&source.question_field)?, cell(&source.answer_field)?, place)
}

/// The object that a line holds.
pub(crate) fn object(line: &[u8]) -> Result<Map<String, Value>, String> {
    serde_json::from_slice(line).map_err(|error| {
        let text = error.to_string();
        // The parser counts lines within the line that it was given.
        let what = text.split(" at line ").next().unwrap_or(&text);
        format!("not a JSON object: {what} (column {})", error.column())
    })
}

fn cell(value: &Value) -> Cell {
    let text = match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Null => Err("null"),
        Value::Bool(_) => Err("true or false"),
        Value::Array(_) => Err("an array"),
        Value::Object(_) => Err("an object"),
    };
    Cell { text, is_number: value.is_number() }
}
