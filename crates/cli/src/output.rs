//! Standard output and error. A reader that has gone away (`pacs status | head`, a closed terminal) must not end a run, so
//! failed writes are let go.

use std::fmt::Display;
use std::io::{Write, stderr, stdout};

/// Writes a line.
pub(crate) fn line(text: impl Display) {
    let _ = writeln!(stdout().lock(), "{text}");
}

/// Writes text as it is.
pub(crate) fn text(text: impl Display) {
    let mut out = stdout().lock();
    let _ = write!(out, "{text}").and_then(|()| out.flush());
}

/// Writes a line to standard error.
pub(crate) fn error(text: impl Display) {
    let _ = writeln!(stderr().lock(), "{text}");
}
