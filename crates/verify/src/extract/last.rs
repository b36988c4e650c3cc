//! The last expression of a text: its last formula or number, whichever ends later.

use crate::limits::MAX_ANSWER_BYTES;

/// Expressions that are tried, from the last one backwards.
const MAX_CANDIDATES: usize = 4;

/// A part of the text that may be the answer.
#[derive(Clone, Debug)]
pub(super) struct Expression {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) content: String,
}

/// Returns the last expressions, last first.
pub(crate) fn last_expressions(text: &str) -> Vec<String> {
    let text = tail(text);
    let segments = segments(text);
    let mut found = numbers_between(text, &segments);
    found.extend(formulas(text, segments));
    // For a row of formulas (`$1$, $2$ and $3$`), the last formula alone is tried second.
    found.sort_by_key(|expression| (expression.end, expression.content.len()));
    found.into_iter().rev().take(MAX_CANDIDATES).map(|expression| expression.content).collect()
}

/// Returns the formulas at the start of `text`.
pub(super) fn leading_formulas(text: &str) -> Option<String> {
    formulas(text, segments(text)).into_iter().rfind(|formula| formula.start == 0).map(|formula| formula.content)
}

/// Returns what a sentence that announces an answer states: its first formula or number, whichever ends later, or the
/// last number after an equals sign.
pub(super) fn announced(sentence: &str) -> Option<String> {
    let sentence = tail(sentence);
    let segments = segments(sentence);
    let numbers = numbers_between(sentence, &segments);
    let formulas = formulas(sentence, segments);
    let first_formula = formulas.iter().rev().min_by_key(|formula| formula.start);
    let behind_equals = sentence.rfind('=').and_then(|at| numbers.iter().find(|number| number.end > at));
    let number = behind_equals.or(numbers.first());
    let latest = first_formula.into_iter().chain(number).max_by_key(|expression| expression.end);
    latest.map(|expression| expression.content.clone())
}

/// Finds the first formula or number of a text.
pub(super) fn first_value(text: &str) -> Option<(usize, usize)> {
    let segments = segments(text);
    let numbers = numbers_between(text, &segments);
    let first = segments.iter().chain(&numbers).min_by_key(|expression| expression.start);
    first.map(|expression| (expression.start, expression.end))
}

/// Returns the end of a text, in which its last expression is searched.
fn tail(text: &str) -> &str {
    const BYTES: usize = 8 << 10;
    let mut start = text.len().saturating_sub(BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// Returns every formula, and every row of formulas (`$1$, $2$ and $3$`) as one list.
fn formulas(text: &str, segments: Vec<Expression>) -> Vec<Expression> {
    let mut found: Vec<Expression> = Vec::with_capacity(segments.len());
    let mut row: Option<Expression> = None;
    for segment in segments {
        match &mut row {
            Some(row) if is_row(&text[row.end..segment.start]) && row.content.len() < MAX_ANSWER_BYTES => {
                row.content.push_str(", ");
                row.content.push_str(&segment.content);
                row.end = segment.end;
            }
            _ => found.extend(row.replace(segment.clone())),
        }
        found.push(segment);
    }
    found.extend(row);
    found
}

/// Whether two formulas with this text between them are members of one list.
fn is_row(between: &str) -> bool {
    let words = between.trim();
    let words = words.strip_prefix(',').unwrap_or(words).trim_start();
    between.len() <= 16 && (matches!(words, "and" | "or") || (words.is_empty() && between.contains(',')))
}

/// Finds `$…$`, `$$…$$`, `\(…\)` and `\[…\]`, in order.
fn segments(text: &str) -> Vec<Expression> {
    const MARKS: [(&str, &str); 4] = [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")];
    let mut segments = Vec::new();
    // How far the closing mark of each kind is known to be missing, so that no part is searched twice.
    let mut barren = [0; MARKS.len()];
    let mut at = 0;
    while let Some(offset) = text[at..].find(['$', '\\']) {
        let start = at + offset;
        let rest = &text[start..];
        let Some(kind) = MARKS.iter().position(|(open, _)| rest.starts_with(open)) else {
            // A command, or an escaped character such as `\$`.
            at = start + 1 + rest[1..].chars().next().map_or(0, char::len_utf8);
            continue;
        };
        let (open, close) = MARKS[kind];
        let inside = start + open.len();
        at = inside;
        if inside < barren[kind] {
            continue;
        }
        match closing(&text[inside..], close) {
            Ok(length) => {
                at = inside + length + close.len();
                let content = text[inside..inside + length].trim();
                if !content.is_empty() {
                    segments.push(Expression { start, end: at, content: content.to_owned() });
                }
            }
            Err(searched) => barren[kind] = inside + searched,
        }
    }
    segments
}

/// Finds `close`, skipping escaped characters. Math does not extend over an empty line or without end. The error is how
/// far was searched.
fn closing(text: &str, close: &str) -> Result<usize, usize> {
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len().min(MAX_ANSWER_BYTES) {
        if bytes[at..].starts_with(close.as_bytes()) {
            return Ok(at);
        }
        if bytes[at..].starts_with(b"\n\n") {
            break;
        }
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    Err(at)
}

/// Returns the numbers outside of formulas.
fn numbers_between(text: &str, segments: &[Expression]) -> Vec<Expression> {
    let ends = std::iter::once(0).chain(segments.iter().map(|segment| segment.end));
    let starts = segments.iter().map(|segment| segment.start).chain(std::iter::once(text.len()));
    ends.zip(starts).flat_map(|(from, to)| numbers(text, from, to)).collect()
}

/// Returns numbers in plain text with the arithmetic around them (`63 + 11 = 74`, `2\sqrt{3}`).
fn numbers(text: &str, from: usize, to: usize) -> Vec<Expression> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = from;
    while at < to {
        if !starts_number(text, at) {
            at += 1;
            continue;
        }
        let end = arithmetic_end(text, at);
        if let Some(end) = end {
            found.push(Expression { start: at, end, content: text[at..end].to_owned() });
        }
        at = end.unwrap_or_else(|| word_end(bytes, at)).max(at + 1);
    }
    found
}

/// Commands that formulas without delimiters start or continue with.
const OPERANDS: [&str; 7] = ["frac", "dfrac", "tfrac", "cfrac", "sqrt", "pi", "infty"];
const OPERATORS: [&str; 8] = ["cdot", "times", "div", "pm", "left", "right", "circ", "%"];

/// Returns the LaTeX command at the start of a text, without its backslash.
fn command(text: &str) -> Option<&str> {
    let name = text.strip_prefix('\\')?;
    let length = name.bytes().take_while(u8::is_ascii_alphabetic).count();
    Some(if length == 0 { name.get(..1)? } else { &name[..length] })
}

fn starts_number(text: &str, at: usize) -> bool {
    let bytes = text.as_bytes();
    let digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let operand = |at: usize| text.get(at..).and_then(command).is_some_and(|name| OPERANDS.contains(&name));
    // `(-\frac12)`
    let bracket = |at: usize| {
        bytes.get(at) == Some(&b'(') && (operand(at + 1) || bytes.get(at + 1) == Some(&b'-') && operand(at + 2))
    };
    if operand(at) || bracket(at) || bytes[at] == b'-' && bracket(at + 1) {
        return true;
    }
    // `XDY2K` contains no number, and `(0,1)` and `7:3` have no last one.
    if at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || b"_(,:[{^.-".contains(&bytes[at - 1])) {
        return false;
    }
    match bytes[at] {
        b'0'..=b'9' => true,
        b'-' => digit(at + 1) || operand(at + 1) || (bytes.get(at + 1) == Some(&b'.') && digit(at + 2)),
        b'.' => digit(at + 1),
        _ => false,
    }
}

/// Finds the end of the arithmetic that starts with the number at `start`; `None` if the number is part of a word.
fn arithmetic_end(text: &str, start: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let next_is_digit = |at: usize| bytes.get(at + 1).is_some_and(u8::is_ascii_digit);
    let next_is_negative = |at: usize| bytes.get(at + 1) == Some(&b'-') && next_is_digit(at + 1);
    let mut end = start;
    let mut solid = start;
    // Whether an operator follows the last digit; two numbers without one are two answers.
    let mut joined = true;
    while end < bytes.len() && end - start < MAX_ANSWER_BYTES {
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
            b'.' | b',' | b':' if solid == end && next_is_digit(end) => {
                end += 1;
                joined = true;
            }
            b'.' if joined && next_is_digit(end) => end += 1,
            b',' if solid == end && next_is_negative(end) => {
                end += 2;
                joined = true;
            }
            b'+' | b'-' | b'*' | b'/' | b'=' | b'^' | b'(' | b')' => {
                joined = true;
                end += 1;
            }
            b'{' => {
                end += braced(&text[end..])?;
                solid = end;
                joined = false;
            }
            b'\\' => match command(&text[end..]) {
                Some(name) if OPERANDS.contains(&name) => {
                    end += 1 + name.len();
                    solid = end;
                }
                Some("\\") | None => break,
                Some(name) if OPERATORS.contains(&name) => {
                    end += 1 + name.len();
                    joined = true;
                    solid = if matches!(name, "%" | "circ") { end } else { solid };
                }
                _ => break,
            },
            b' ' => end += 1,
            _ => break,
        }
    }
    let mut last = &text[start..solid];
    if text[solid..].starts_with([')']) && last.matches('(').count() > last.matches(')').count() {
        last = &text[start..=solid];
    }
    let following = &text[start + last.len()..];
    // `2nd` is not a number and `2A` is a name, but `5m²` has a unit, and `28 pct` is a percentage.
    let word: String =
        following.trim_start_matches(' ').chars().take_while(|c| c.is_alphabetic() || *c == '²').collect();
    if ["pct", "percent", "percentage"].contains(&word.as_str()) {
        let spaces = following.len() - following.trim_start_matches(' ').len();
        return Some(start + last.len() + spaces + word.len());
    }
    let is_unit = ["m", "m²", "cm", "cm²", "km", "mm", "kg", "g", "s", "h", "min"].contains(&word.as_str());
    let attached = following.starts_with(|c: char| c.is_alphabetic());
    (!attached || is_unit).then_some(start + last.len())
}

/// Length of the brace group at the start of a text, if it is short enough to occur outside of formulas.
fn braced(text: &str) -> Option<usize> {
    const BYTES: usize = 256;
    let mut depth = 0i32;
    let close = text.bytes().take(BYTES).position(|byte| {
        depth += i32::from(byte == b'{') - i32::from(byte == b'}');
        depth == 0
    });
    close.map(|close| close + 1)
}

fn word_end(bytes: &[u8], at: usize) -> usize {
    at + bytes[at..].iter().take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_').count()
}
