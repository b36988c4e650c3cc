//! Standard output and error. Failed writes are ignored, because a reader that has gone away (`pacs status | head`, a closed
//! terminal) must not end a run.
//!
//! All human-readable output is written here, with terminal escape sequences of any source escaped.

use std::fmt::Display;
use std::io::{Write, stderr, stdout};

use pacs_runtime::{harmless, harmless_json, harmless_lines};

/// Writes one line that may contain text of models, workers or verifiers.
pub(crate) fn line(text: impl Display) {
    let _ = writeln!(stdout().lock(), "{}", harmless(&text.to_string()));
}

/// Writes one line like [`line()`] and returns whether the reader is still there, so that a command that follows a run ends with
/// its reader.
pub(crate) fn line_is_read(text: impl Display) -> bool {
    writeln!(stdout().lock(), "{}", harmless(&text.to_string())).is_ok()
}

/// Writes lines composed by this program.
pub(crate) fn text(text: impl Display) {
    let mut out = stdout().lock();
    let _ = write!(out, "{}", harmless_lines(&text.to_string())).and_then(|()| out.flush());
}

/// Writes JSON and a line end; control characters in strings are escaped.
pub(crate) fn json(json: impl Display) {
    let _ = writeln!(stdout().lock(), "{}", harmless_json(&json.to_string()));
}

/// Writes text for another program to read, unchanged.
pub(crate) fn raw(text: impl Display) {
    let mut out = stdout().lock();
    let _ = write!(out, "{text}").and_then(|()| out.flush());
}

/// Writes lines composed by this program to standard error.
pub(crate) fn error(text: impl Display) {
    let _ = writeln!(stderr().lock(), "{}", harmless_lines(&text.to_string()));
}
