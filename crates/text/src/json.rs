//! JSON as Python's `json.dumps` spaces it, which is what chat templates expect of their `tojson` filter.

use std::io;

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::{Formatter, PrettyFormatter};

/// Widest indentation: memory is taken for it before anything is written.
const MOST_INDENT: usize = 64;

/// The filter, with the options of transformers: `tojson(indent=2, ensure_ascii=false, separators=(",", ":"), sort_keys=false)`.
/// Nothing is escaped for HTML.
pub(crate) fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let error = |message: String| Error::new(ErrorKind::InvalidOperation, message);
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<usize>>("indent")?,
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")? == Some(true);
    let sorted = options.get::<Option<bool>>("sort_keys")? == Some(true);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    if let Some(wide) = indent.filter(|indent| *indent > MOST_INDENT) {
        return Err(error(format!("tojson(indent={wide}) is not supported; at most {MOST_INDENT}")));
    }
    let mut json = serde_json::to_value(value).map_err(|e| error(e.to_string()))?;
    if sorted {
        json.sort_all_objects();
    }
    let mut out = Vec::new();
    let written = match (indent, &separators) {
        (None, None) => json.serialize(&mut Serializer::with_formatter(&mut out, Spaced { item: ", ", key: ": " })),
        (None, Some(given)) => {
            let [item, key] = given.as_slice() else {
                return Err(error("tojson(separators=…): expected two texts".to_owned()));
            };
            json.serialize(&mut Serializer::with_formatter(&mut out, Spaced { item, key }))
        }
        (Some(indent), None) => {
            let indent = " ".repeat(indent);
            json.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(indent.as_bytes())))
        }
        (Some(_), Some(_)) => {
            return Err(error("tojson with both `indent` and `separators` is not supported".to_owned()));
        }
    };
    written.map_err(|e| error(e.to_string()))?;
    let text = String::from_utf8(out).map_err(|e| error(e.to_string()))?;
    Ok(Value::from_safe_string(if ascii { in_ascii(&text) } else { text }))
}

/// JSON without letters beyond ASCII, which stand in its texts only.
fn in_ascii(text: &str) -> String {
    let mut ascii = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_ascii() {
            ascii.push(letter);
        } else {
            for unit in letter.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

/// One line, with these texts after every item and every key.
struct Spaced<'a> {
    item: &'a str,
    key: &'a str,
}

impl Formatter for Spaced<'_> {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
}
