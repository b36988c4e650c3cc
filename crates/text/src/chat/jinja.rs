//! The template language itself, within one process.

use std::io;

use minijinja::{Environment, Error, ErrorKind, Value};

use crate::Day;
use crate::json::tojson;
use crate::python;

/// The name of the only template in an environment.
const NAME: &str = "chat";

/// Instructions that one rendering may take: loops end, whatever a model folder says. A real template takes some hundred a message,
/// and this many take about a second.
const FUEL: u64 = 10_000_000;

/// Bytes that a rendered conversation may have: more than any model's context.
pub(super) const MOST_RENDERED: usize = 64 << 20;

/// A compiled template. Errors are texts that name the line.
pub(super) struct Jinja(Environment<'static>);

impl Jinja {
    /// Compiles a template. Tags of libraries that only mark parts of a text have no effect on it: `{% generation %}` says which
    /// tokens to train on, which is decided here by who speaks.
    pub(super) fn compile(source: &str, day: Day) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(python::method);
        environment.set_formatter(python::write);
        environment.add_filter("string", |value: &Value| python::string(value));
        environment.add_test("iterable", |value: &Value| python::is_iterable(value));
        environment.add_test("number", |value: &Value| python::is_number(value));
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", move |format: String| day.format(&format));
        environment.add_template_owned(NAME, without_marks(source)).map_err(|e| describe(&e))?;
        Ok(Self(environment))
    }

    /// What the template makes of its variables.
    pub(super) fn render(&self, variables: &serde_json::Value) -> Result<String, String> {
        let template = self.0.get_template(NAME).map_err(|e| describe(&e))?;
        let mut rendered = Bounded::default();
        let done = template.render_captured_to(Value::from_serialize(variables), &mut rendered).map(drop);
        if rendered.is_full {
            return Err(format!("the text has more than {MOST_RENDERED} bytes"));
        }
        done.map_err(|e| describe(&e))?;
        String::from_utf8(rendered.text).map_err(|e| e.to_string())
    }
}

/// Takes a rendered text up to its limit.
#[derive(Default)]
struct Bounded {
    text: Vec<u8>,
    is_full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.is_full |= self.text.len() + bytes.len() > MOST_RENDERED;
        if self.is_full {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Puts blocks that always hold in the place of `{% generation %}` and `{% endgeneration %}`: what blocks do to the white space around
/// them stays as it is.
fn without_marks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        text.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inner = &tag[2..end];
        let word = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']);
        match word.trim() {
            mark @ ("generation" | "endgeneration") => {
                let block = if mark == "generation" { "if true" } else { "endif" };
                text.push_str("{%");
                text.push_str(&inner.replace(mark, block));
                text.push_str("%}");
            }
            _ => text.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    text.push_str(rest);
    text
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The error without the internal name of the template.
fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}
