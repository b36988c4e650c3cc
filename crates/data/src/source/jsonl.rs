use std::io::BufRead;
use std::path::Path;

use pacs_spec::SourceSpec;
use serde_json::value::RawValue;
use serde_json::{Map, Value as Json};

use super::fields::Fields;
use super::value::{RawFields, Value};
use super::{Record, Take, text, window};
use crate::DataError;

/// Rows of a file of JSON: an object a line, or one array of objects, whatever its name says.
pub(super) fn rows(path: &Path, source: &SourceSpec, take: &mut Take<'_, Record>) -> Result<Option<Fields>, DataError> {
    let window = window(source);
    let mut position = 0;
    let mut fields = None;
    objects(path, &mut |number, object| {
        let here = position;
        position += 1;
        if here >= window.end {
            return Ok(false);
        }
        // The first row decides for all, also for a source that begins later: both halves of a file are read alike.
        if here < window.start && fields.is_some() {
            return Ok(true);
        }
        let row = object.and_then(|object| {
            let chosen = match &fields {
                Some(chosen) => chosen,
                None => fields.insert(choose(source, &object)?),
            };
            record(chosen, &object, format!("{}:{number}", path.display()))
        });
        if here >= window.start {
            take(row.map_err(|message| DataError::Row { path: path.to_owned(), row: number, message }))?;
        }
        Ok(true)
    })?;
    Ok(fields)
}

pub(super) fn count(path: &Path) -> Result<usize, DataError> {
    let mut count = 0;
    objects(path, &mut |_, _| {
        count += 1;
        Ok(true)
    })?;
    Ok(count)
}

fn choose(source: &SourceSpec, object: &RawFields<'_>) -> Result<Fields, String> {
    let there = |path: &str| matches!(at(object, path), Ok(Some(value)) if value != Value::Null);
    // A row whose own field is null is wrong, and the fields of the others are not to be changed by it.
    match Fields::choose(source, there, || names(object)) {
        Err(_) => Fields::choose(source, |path| matches!(at(object, path), Ok(Some(_))), || names(object)),
        chosen => chosen,
    }
}

fn record(fields: &Fields, object: &RawFields<'_>, place: String) -> Result<Record, String> {
    fields.record(|path| at(object, path), || names(object), place)
}

fn names(object: &RawFields<'_>) -> Vec<String> {
    object.0.iter().map(|(name, _)| name.clone()).collect()
}

/// What lies at a path of a row. Values that are not asked for are not read.
fn at(object: &RawFields<'_>, path: &str) -> Result<Option<Value>, String> {
    let field = |name: &str| object.0.iter().rev().find(|(known, _)| known == name).map(|(_, raw)| *raw);
    if let Some(raw) = field(path) {
        return Value::of_json(raw).map(Some);
    }
    let Some((name, rest)) = path.split_once('.') else { return Ok(None) };
    let Some(raw) = field(name) else { return Ok(None) };
    Ok(Value::of_json(raw)?.at(rest).cloned())
}

/// What is done with the rows of a file, given by number: false ends it.
type Visit<'a> = dyn FnMut(usize, Result<RawFields<'_>, String>) -> Result<bool, DataError> + 'a;

fn objects(path: &Path, visit: &mut Visit<'_>) -> Result<(), DataError> {
    let mut reader = text::open(path)?;
    let (is_array, lines) = begins_array(&mut reader).map_err(|error| text::read_error(path, error))?;
    if !is_array {
        return lines_of(&mut reader, path, &mut |number, line| visit(lines + number, object(line)));
    }
    let mut content = Vec::new();
    reader.read_to_end(&mut content).map_err(|error| text::read_error(path, error))?;
    let array: Vec<&RawValue> = serde_json::from_slice(&content).map_err(|error| {
        let message = format!("it begins as an array of JSON and does not end as one: {error}");
        DataError::Format { path: path.to_owned(), message }
    })?;
    for (number, row) in (1..).zip(array) {
        if !visit(number, object(row.get().as_bytes()))? {
            break;
        }
    }
    Ok(())
}

/// Whether the text is an array, after white space, and how many line breaks that has.
fn begins_array(reader: &mut dyn BufRead) -> std::io::Result<(bool, usize)> {
    let mut lines = 0;
    loop {
        let available = reader.fill_buf()?;
        let spaces = available.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        lines += available[..spaces].iter().filter(|byte| **byte == b'\n').count();
        let first = available.get(spaces).copied();
        let is_end = available.is_empty();
        reader.consume(spaces);
        if first.is_some() || is_end {
            return Ok((first == Some(b'['), lines));
        }
    }
}

/// What is done with the lines of a file, given by number: false ends it.
pub(crate) type VisitLine<'a> = dyn FnMut(usize, &[u8]) -> Result<bool, DataError> + 'a;

/// Visits the lines of `reader` that are not blank; errors name `path`.
pub(crate) fn lines_of(reader: &mut dyn BufRead, path: &Path, visit: &mut VisitLine<'_>) -> Result<(), DataError> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(|error| text::read_error(path, error))? == 0 {
            break;
        }
        let text = line.trim_ascii();
        if !text.is_empty() && !visit(number, text)? {
            break;
        }
    }
    Ok(())
}

/// The fields that a line holds.
fn object(line: &[u8]) -> Result<RawFields<'_>, String> {
    serde_json::from_slice(line).map_err(|error| not_an_object(&error))
}

/// The object that a line holds, for rows whose numbers are not compared.
pub(crate) fn plain_object(line: &[u8]) -> Result<Map<String, Json>, String> {
    serde_json::from_slice(line).map_err(|error| not_an_object(&error))
}

fn not_an_object(error: &serde_json::Error) -> String {
    let text = error.to_string();
    // The parser counts lines within the line that it was given.
    let what = text.split(" at line ").next().unwrap_or(&text);
    format!("not a JSON object: {what} (column {})", error.column())
}
