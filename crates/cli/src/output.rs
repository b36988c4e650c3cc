//! Standard output and error. A reader that has gone away (`pacs status | head`, a closed terminal) must not end a run, so
//! failed writes are let go.
//!
//! All that `pacs` says to people goes through here, and nothing that a terminal acts on gets through, whoever wrote it.

use std::fmt::Display;
use std::io::{Write, stderr, stdout};

use pacs_runtime::{harmless, harmless_json, harmless_lines};

/// Writes one line, in which others may have had a say.
pub(crate) fn line(text: impl Display) {
    let _ = writeln!(stdout().lock(), "{}", harmless(&text.to_string()));
}

/// Writes one line like [`line()`], and says whether somebody still reads: a command that follows a run ends with its reader.
pub(crate) fn line_is_read(text: impl Display) -> bool {
    writeln!(stdout().lock(), "{}", harmless(&text.to_string())).is_ok()
}

/// Writes lines of this program's own.
pub(crate) fn text(text: impl Display) {
    let mut out = stdout().lock();
    let _ = write!(out, "{}", harmless_lines(&text.to_string())).and_then(|()| out.flush());
}

/// Writes JSON, and ends its line.
pub(crate) fn json(json: impl Display) {
    let _ = writeln!(stdout().lock(), "{}", harmless_json(&json.to_string()));
}

/// Writes text for a program to read, as it is.
pub(crate) fn raw(text: impl Display) {
    let mut out = stdout().lock();
    let _ = write!(out, "{text}").and_then(|()| out.flush());
}

/// Writes lines of this program's own to standard error.
pub(crate) fn error(text: impl Display) {
    let _ = writeln!(stderr().lock(), "{}", harmless_lines(&text.to_string()));
}
