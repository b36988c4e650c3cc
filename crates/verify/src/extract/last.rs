//! The last expression of a text: its last math segment or number, whichever ends later.

use crate::limits::MAX_ANSWER_BYTES;

/// How many expressions are tried, from the last one backwards.
const MAX_CANDIDATES: usize = 4;

/// The last expressions, last first.
pub(crate) fn last_expressions(text: &str) -> Vec<String> {
    let math = math_segments(text);
    let mut found: Vec<(usize, &str)> = math.iter().map(|segment| (segment.end, segment.content)).collect();
    // What is within math is not also a number of the text.
    found.extend(
        numbers(text)
            .into_iter()
            .filter(|(start, end, _)| !math.iter().any(|segment| segment.start <= *start && *end <= segment.end))
            .map(|(_, end, content)| (end, content)),
    );
    found.sort_by_key(|(end, _)| *end);
    found.into_iter().rev().take(MAX_CANDIDATES).map(|(_, content)| content.trim().to_owned()).collect()
}

/// The math segment that `text` starts with.
pub(super) fn leading_math(text: &str) -> Option<String> {
    math_segments(text).first().filter(|segment| segment.start == 0).map(|segment| segment.content.trim().to_owned())
}

struct Segment<'a> {
    start: usize,
    end: usize,
    content: &'a str,
}

/// `$…$`, `$$…$$`, `\(…\)` and `\[…\]`, in order.
fn math_segments(text: &str) -> Vec<Segment<'_>> {
    let mut segments = Vec::new();
    let mut at = 0;
    while let Some(offset) = text[at..].find(['$', '\\']) {
        let start = at + offset;
        let rest = &text[start..];
        let opening = ["$$", "$", "\\(", "\\["].into_iter().find(|mark| rest.starts_with(mark));
        let Some(open) = opening else {
            // A command, or an escaped character such as `\$`.
            at = start + 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
            continue;
        };
        let close = match open {
            "\\(" => "\\)",
            "\\[" => "\\]",
            same => same,
        };
        let inside = start + open.len();
        match closing(&text[inside..], close) {
            Some(length) => {
                let end = inside + length + close.len();
                if !text[inside..inside + length].trim().is_empty() {
                    segments.push(Segment { start, end, content: &text[inside..inside + length] });
                }
                at = end;
            }
            None => at = inside,
        }
    }
    segments
}

/// Where `close` stands, escaped characters skipped; math does not go on over an empty line, nor without end.
fn closing(text: &str, close: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len().min(MAX_ANSWER_BYTES) {
        if text.is_char_boundary(at) && text[at..].starts_with(close) {
            return Some(at);
        }
        if bytes[at..].starts_with(b"\n\n") {
            return None;
        }
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    None
}

/// Numbers in plain text with the arithmetic around them (`63 + 11 = 74`): start, end, text.
fn numbers(text: &str) -> Vec<(usize, usize, &str)> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        if !starts_number(text, at) {
            at += 1;
            continue;
        }
        let end = arithmetic_end(text, at);
        if let Some(end) = end {
            found.push((at, end, &text[at..end]));
        }
        at = end.unwrap_or_else(|| word_end(bytes, at)).max(at + 1);
    }
    found
}

fn starts_number(text: &str, at: usize) -> bool {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    if at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_') {
        return false;
    }
    match bytes[at] {
        b'0'..=b'9' => true,
        b'-' | b'.' => digit(at + 1) || (bytes.get(at + 1) == Some(&b'.') && digit(at + 2)),
        _ => false,
    }
}

/// The end of the arithmetic that starts with the number at `start`; `None` when the number is part of a word.
fn arithmetic_end(text: &str, start: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut end = start;
    let mut solid = start;
    // Whether an operator stands between the last digit and here; two numbers without one are two answers.
    let mut joined = true;
    while end < bytes.len() {
        match bytes[end] {
            b'0'..=b'9' if joined || solid == end => {
                end += 1;
                solid = end;
                joined = false;
            }
            b'%' => {
                end += 1;
                solid = end;
            }
            b'.' | b',' if solid == end && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) => {
                end += 1;
                joined = true;
            }
            b'.' if joined && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) => end += 1,
            b'+' | b'-' | b'*' | b'/' | b'=' | b'^' | b'(' | b')' => {
                joined = true;
                end += 1;
            }
            b' ' => end += 1,
            _ => break,
        }
    }
    let mut last = &text[start..solid];
    if text[solid..].starts_with([')']) && last.matches('(').count() > last.matches(')').count() {
        last = &text[start..=solid];
    }
    let behind = &text[start + last.len()..];
    // `2nd` is no number and `2A` a name, but `5m²` has a unit, and `28 pct` is a percentage.
    let word: String = behind.trim_start_matches(' ').chars().take_while(|c| c.is_alphabetic() || *c == '²').collect();
    if ["pct", "percent", "percentage"].contains(&word.as_str()) {
        let spaces = behind.len() - behind.trim_start_matches(' ').len();
        return Some(start + last.len() + spaces + word.len());
    }
    let is_unit = ["m", "m²", "cm", "cm²", "km", "mm", "kg", "g", "s", "h", "min"].contains(&word.as_str());
    let attached = behind.starts_with(|c: char| c.is_alphabetic());
    (!attached || is_unit).then_some(start + last.len())
}

fn word_end(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_').count()
}
