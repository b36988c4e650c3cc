//! `\boxed{…}` and `\fbox{…}`.

/// The last box, together with boxes right before it that form one enumeration.
pub(super) struct Boxes {
    pub(super) content: String,
    /// Where the last one ends.
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

/// The text before a box that the end of the response cut off, else all of it.
pub(super) fn before_truncated_box(text: &str) -> &str {
    match starts(text).last() {
        Some((start, command)) if read(text, start, command).is_none() => &text[..start],
        _ => text,
    }
}

fn all(text: &str) -> Vec<Found<'_>> {
    /// Boxes without an end that are looked at; each is scanned to the end of the text.
    const MAX_OPEN: usize = 16;
    let mut found: Vec<Found<'_>> = Vec::new();
    let mut open = 0;
    for (start, command) in starts(text) {
        // A box within a box belongs to the outer one.
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
    let behind = &text[start + command.len()..];
    let argument = behind.trim_start();
    let at = text.len() - argument.len();
    if !argument.starts_with('{') {
        // `\boxed 5`
        let length = argument.find(|c: char| c.is_whitespace() || c == '$').unwrap_or(argument.len());
        let is_bare = behind.len() > argument.len() && length > 0;
        return is_bare.then(|| Found { start, end: at + length, content: &argument[..length] });
    }
    let mut depth = 0i32;
    let mut escaped = false;
    for (offset, byte) in argument.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(Found { start, end: at + offset + 1, content: &argument[1..offset] });
        }
    }
    None
}

/// Whether the text between two boxes does no more than join them.
fn only_joins(between: &str) -> bool {
    let mut rest = between.to_owned();
    if rest.len() > 64 || !rest.contains([',', ';', '+']) && !rest.contains("and") && !rest.contains("or") {
        return false;
    }
    for word in ["\\text", "\\quad", "\\qquad", "and", "or"] {
        rest = rest.replace(word, "");
    }
    rest.chars().all(|c| c.is_whitespace() || "$,;+{}\\()".contains(c))
}
