//! "The answer is …" and its relatives.

use super::last::{announced, last_expressions, leading_formulas};

/// A phrase that announces the answer.
pub(super) struct Phrase {
    /// Where it stands.
    pub(super) at: usize,
    /// Whether it says "final".
    pub(super) is_final: bool,
    pub(super) candidates: Vec<String>,
}

/// What announces an answer, in lower case, and whether it is final.
const MARKS: [(&str, bool); 9] = [
    ("final answer is", true),
    ("final answer:", true),
    ("final answer", true),
    ("answer is", false),
    ("answer:", false),
    ("answer :", false),
    ("####", true),
    ("<answer>", true),
    ("answer is:", false),
];

/// The last phrase with something behind it.
pub(super) fn last_phrase(text: &str) -> Option<Phrase> {
    // ASCII only, so that offsets stay those of `text`.
    let lower = text.to_ascii_lowercase();
    let mut found: Vec<(usize, usize, bool)> = MARKS
        .iter()
        .filter_map(|(mark, is_final)| lower.rfind(mark).map(|at| (at, at + mark.len(), *is_final)))
        .collect();
    // Ordered by where the mark ends: "final answer: the answer is 5" is one announcement.
    found.sort_unstable_by_key(|(at, end, is_final)| (*end, *at, *is_final));
    let &(at, end, _) = found.last()?;
    let is_final = found.iter().any(|(start, _, is_final)| *is_final && at.saturating_sub(*start) <= 64);
    let sentence = sentence(&text[end..]);
    Some(Phrase { at, is_final, candidates: read(sentence) })
}

fn read(sentence: &str) -> Vec<String> {
    let start = sentence.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, ':' | '*' | '='));
    let start = start.trim_end().trim_end_matches(['.', '*']).trim_end();
    if start.is_empty() {
        return Vec::new();
    }
    let mut candidates = Vec::new();
    candidates.extend(leading_formulas(start));
    // A few words may be the answer; a whole clause only holds it.
    let words = start.split_whitespace().filter(|word| word.chars().all(char::is_alphabetic) && word.len() > 1).count();
    if candidates.is_empty() && words <= 2 {
        candidates.push(start.to_owned());
    }
    candidates.extend(announced(start));
    candidates.extend(last_expressions(start));
    if candidates.is_empty() {
        candidates.push(start.to_owned());
    }
    candidates
}

/// Up to the end of the sentence or paragraph that starts with `text`, math included whole.
fn sentence(text: &str) -> &str {
    let text = text.trim_start();
    let text = text.find("</answer>").map_or(text, |end| &text[..end]);
    let mut in_math = false;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let next = chars.peek().map(|(_, next)| *next);
        match c {
            '\\' if matches!(next, Some('(' | '[')) => in_math = true,
            '\\' if matches!(next, Some(')' | ']')) => in_math = false,
            '\\' => {
                chars.next();
            }
            '$' => in_math = !in_math,
            '\n' if !in_math => return &text[..at],
            '.' if !in_math && next.is_none_or(char::is_whitespace) => return &text[..at],
            _ => {}
        }
    }
    // A dollar sign that opened nothing (a price) must not swallow the rest.
    if in_math { text.lines().next().map_or(text, |line| line.split(". ").next().unwrap_or(line)) } else { text }
}
