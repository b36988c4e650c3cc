//! `\boxed{…}` and `\fbox{…}`.

use crate::limits::MAX_ANSWER_BYTES;

/// The last box, with preceding boxes that form one enumeration with it.
pub(super) struct Boxes {
    pub(super) content: String,
    /// Byte offset of the end of the last box.
    pub(super) end: usize,
}

struct Found<'a> {
    start: usize,
    end: usize,
    content: &'a str,
}

pub(super) fn last_boxes(text: &str) -> Option<Boxes> {
    let boxes = all(text);
    let last = boxes.last()?;
    let mut first = boxes.len() - 1;
    while first > 0 && only_joins(text.get(boxes[first - 1].end..boxes[first].start)?) {
        first -= 1;
    }
    let contents: Vec<&str> = boxes[first..].iter().map(|found| found.content.trim()).collect();
    Some(Boxes { content: contents.join(", "), end: last.end })
}

/// Returns the content of a box that is never closed, for references that lost their end.
pub(super) fn open_box(text: &str) -> Option<&str> {
    let (start, command) = starts(text).last()?;
    text[start + command.len()..].trim_start().strip_prefix('{')
}

/// Returns the text before a box that the end of the response cut off, else the whole text.
pub(super) fn before_truncated_box(text: &str) -> &str {
    match starts(text).last() {
        Some((start, command)) if read(text, start, command).is_none() => &text[..start],
        _ => text,
    }
}

fn all(text: &str) -> Vec<Found<'_>> {
    /// Unclosed boxes that are examined; each is scanned to the end of the text.
    const MAX_OPEN: usize = 16;
    let mut found: Vec<Found<'_>> = Vec::new();
    let mut open = 0;
    for (start, command) in starts(text) {
        // A box within a box is part of the outer one.
        if found.last().is_some_and(|last| start < last.end) {
            continue;
        }
        match read(text, start, command) {
            Some(one) => found.push(one),
            None => open += 1,
        }
        if open > MAX_OPEN {
            break;
        }
    }
    found
}

fn starts(text: &str) -> impl DoubleEndedIterator<Item = (usize, &'static str)> {
    let mut starts: Vec<_> = ["\\boxed", "\\fbox"]
        .into_iter()
        .flat_map(|command| text.match_indices(command).map(move |(at, _)| (at, command)))
        .collect();
    starts.sort_unstable();
    starts.into_iter()
}

fn read<'a>(text: &'a str, start: usize, command: &str) -> Option<Found<'a>> {
    let after = &text[start + command.len()..];
    let argument = after.trim_start();
    let at = text.len() - argument.len();
    if !argument.starts_with('{') {
        // `\boxed 5`, `\boxed5`
        let ends = [argument.find(|c: char| c.is_whitespace() || c == '$'), argument.find("\\)"), argument.find("\\]")];
        let length = ends.into_iter().flatten().min().unwrap_or(argument.len());
        let is_separate = after.len() > argument.len() || !after.starts_with(|c: char| c.is_alphabetic());
        let is_bare = is_separate && length > 0;
        return is_bare.then(|| Found { start, end: at + length, content: &argument[..length] });
    }
    // A closing brace escaped by a stray backslash still closes, if no other one does.
    if let Some(close) = closing(argument, true).or_else(|| closing(argument, false)) {
        return Some(Found { start, end: at + close + 1, content: &argument[1..close] });
    }
    // A box without a closing brace ends with the formula; if the text ends first, it was cut off.
    let ends = ["$", "\\)", "\\]"];
    let line = argument.lines().next().unwrap_or_default();
    let close =
        ends.iter().filter_map(|end| line.find(end)).min().or((line.len() < argument.len()).then_some(line.len()))?;
    Some(Found { start, end: at + close, content: &argument[1..close] })
}

/// Finds the brace that closes the group at the start of a text.
fn closing(argument: &str, has_escapes: bool) -> Option<usize> {
    let mut depth = 0i32;
    let mut escaped = false;
    argument.bytes().take(4 * MAX_ANSWER_BYTES).position(|byte| {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = has_escapes,
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        depth == 0
    })
}

/// Whether the text between two boxes only joins them.
fn only_joins(between: &str) -> bool {
    let mut rest = between.to_owned();
    // `\boxed{…}, y_2 = \boxed{…}`: the name of the next answer does not separate them.
    if let Some(name) = rest.trim_end().strip_suffix('=') {
        let name = name.trim_end();
        let is_name = |c: char| c.is_ascii_alphanumeric() || "_{}'".contains(c);
        rest.truncate(name.trim_end_matches(is_name).len());
    }
    if rest.len() > 64 || !rest.contains([',', ';', '+']) && !rest.contains("and") && !rest.contains("or") {
        return false;
    }
    for word in ["\\text", "\\quad", "\\qquad", "and", "or"] {
        rest = rest.replace(word, "");
    }
    rest.chars().all(|c| c.is_whitespace() || "$,;+{}\\()".contains(c))
}
