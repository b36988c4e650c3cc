//! What templates expect of Python: how lists and dictionaries are written as text, and methods of its texts and lists that the template
//! engine's own set lacks.

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, Output, State, escape_formatter};

/// Writes what stands between `{{` and `}}`.
pub(crate) fn write(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    if is_container(value) {
        return out.write_str(&repr(value)).map_err(Error::from);
    }
    escape_formatter(out, state, value)
}

/// The filter `string`.
pub(crate) fn string(value: &Value) -> Value {
    match value.kind() {
        ValueKind::String => value.clone(),
        _ if is_container(value) => repr(value).into(),
        _ => value.to_string().into(),
    }
}

/// The test `iterable`: `none` is not.
pub(crate) fn is_iterable(value: &Value) -> bool {
    is_container(value) || matches!(value.kind(), ValueKind::String | ValueKind::Undefined)
}

/// The test `number`: truth values are numbers.
pub(crate) fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

fn is_container(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

/// A value as `repr` of Python writes it.
fn repr(value: &Value) -> String {
    let items = || value.try_iter().into_iter().flatten();
    match value.kind() {
        ValueKind::String => quoted(value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<String> = items().map(|item| repr(&item)).collect();
            format!("[{}]", items.join(", "))
        }
        ValueKind::Map => {
            let field = |key: Value| format!("{}: {}", repr(&key), repr(&value.get_item(&key).unwrap_or_default()));
            let fields: Vec<String> = items().map(field).collect();
            format!("{{{}}}", fields.join(", "))
        }
        _ => value.to_string(),
    }
}

/// A text in quotes: single ones, unless they stand in it and double ones do not.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut quoted = String::from(quote);
    for letter in text.chars() {
        match letter {
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            letter if letter == quote => {
                quoted.push('\\');
                quoted.push(letter);
            }
            letter if letter.is_control() => quoted.push_str(&format!("\\x{:02x}", u32::from(letter))),
            letter => quoted.push(letter),
        }
    }
    quoted.push(quote);
    quoted
}

/// A list of texts.
fn owned(texts: Vec<&str>) -> Value {
    texts.into_iter().map(Value::from).collect()
}

/// Methods of texts and lists: those of the engine's set, and some that it lacks.
pub(crate) fn method(state: &State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name) {
        (Some(text), "removeprefix" | "removesuffix") => {
            let (part,): (&str,) = from_args(arguments)?;
            let rest = if name == "removeprefix" { text.strip_prefix(part) } else { text.strip_suffix(part) };
            Ok(rest.unwrap_or(text).into())
        }
        (Some(text), "partition" | "rpartition") => {
            let (part,): (&str,) = from_args(arguments)?;
            if part.is_empty() {
                return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
            }
            let is_first = name == "partition";
            let found = if is_first { text.split_once(part) } else { text.rsplit_once(part) };
            let parts = match (found, is_first) {
                (Some((before, after)), _) => vec![before, part, after],
                (None, true) => vec![text, "", ""],
                (None, false) => vec!["", "", text],
            };
            Ok(owned(parts))
        }
        (Some(text), "rsplit") => {
            let (part, most): (Option<&str>, Option<i64>) = from_args(arguments)?;
            let Some(part) = part.filter(|part| !part.is_empty()) else {
                return Err(Error::new(ErrorKind::InvalidOperation, "rsplit without a separator is not supported"));
            };
            let pieces = match most.and_then(|most| usize::try_from(most).ok()) {
                Some(most) => text.rsplitn(most.saturating_add(1), part).collect::<Vec<_>>(),
                None => text.rsplit(part).collect(),
            };
            Ok(owned(pieces.into_iter().rev().collect()))
        }
        (None, "index") if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) => {
            let (wanted,): (&Value,) = from_args(arguments)?;
            let place = value.try_iter()?.position(|item| item == *wanted);
            place
                .map(Value::from)
                .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "index: it is not in the list"))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments),
    }
}
