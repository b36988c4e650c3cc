//! Phrases that announce the answer, such as "The answer is …".

use super::last::{announced, first_value, last_expressions, leading_formulas};

/// An announcement of the answer.
pub(super) struct Phrase {
    /// Byte offset of the phrase.
    pub(super) at: usize,
    /// Whether it says "final".
    pub(super) is_final: bool,
    /// Whether a value follows directly, rather than a remark about one.
    pub(super) states_value: bool,
    /// Whether the phrase is retracted, or leaves open which of several values is meant.
    pub(super) is_hedged: bool,
    pub(super) candidates: Vec<String>,
}

/// Words between announcement and value that make it no answer: a denial, a guess, a choice, a bound.
const HEDGES: &[&str] = &[
    "not",
    "never",
    "neither",
    "nor",
    "either",
    "no",
    "none",
    "maybe",
    "perhaps",
    "possibly",
    "probably",
    "likely",
    "unknown",
    "unclear",
    "unsure",
    "uncertain",
    "undetermined",
    "cannot",
    "cant",
    "between",
    "somewhere",
    "one",
    "some",
    "any",
    "among",
    "might",
    "may",
    "could",
    "would",
    "least",
    "most",
    "less",
    "fewer",
    "more",
    "greater",
    "larger",
    "smaller",
    "bigger",
    "under",
    "below",
    "above",
    "wrong",
    "guess",
    "other",
];

/// Words between announcement and value that carry no meaning.
const FILLERS: &[&str] = &[
    "the",
    "a",
    "an",
    "is",
    "are",
    "be",
    "to",
    "equal",
    "equals",
    "therefore",
    "thus",
    "hence",
    "then",
    "so",
    "now",
    "indeed",
    "simply",
    "exactly",
    "number",
    "value",
    "of",
    "option",
    "choice",
    "approximately",
    "about",
    "by",
];

/// Announcements in lower case, and whether they are final.
const MARKS: &[(&str, bool)] = &[
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

/// Announcements of a guess, or of what the answer is not.
const GUESSES: &[&str] = &[
    "answer could be",
    "answer might be",
    "answer may be",
    "answer can be",
    "answer isn't",
    "answer cannot be",
    "answer can't be",
];

/// Returns the last announcement with text after it.
pub(super) fn last_phrase(text: &str) -> Option<Phrase> {
    // ASCII only, so that byte offsets stay those of `text`.
    let lower = text.to_ascii_lowercase();
    let mut found: Vec<(usize, usize, bool)> = MARKS
        .iter()
        .filter_map(|(mark, is_final)| lower.rfind(mark).map(|at| (at, at + mark.len(), *is_final)))
        .collect();
    found.extend(GUESSES.iter().filter_map(|mark| lower.rfind(mark).map(|at| (at, at + mark.len(), false))));
    // Ordered by the end of the mark: "final answer: the answer is 5" is one announcement.
    found.sort_unstable_by_key(|(at, end, is_final)| (*end, *at, *is_final));
    let &(at, end, _) = found.last()?;
    let is_final = found.iter().any(|(start, _, is_final)| *is_final && at.saturating_sub(*start) <= 64);
    let sentence = sentence(&text[end..]);
    let is_hedged = GUESSES.iter().any(|mark| lower[at..].starts_with(mark)) || is_hedged(sentence);
    let states_value = states_value(sentence);
    let value = first_value(sentence).filter(|_| states_value).map_or(sentence, |(start, _)| &sentence[start..]);
    let candidates = if is_hedged { Vec::new() } else { read(value) };
    Some(Phrase { at, is_final, states_value, is_hedged, candidates })
}

/// Returns the words up to the first value of a sentence.
fn words_before_value(sentence: &str) -> Option<Vec<String>> {
    let (start, _) = first_value(sentence)?;
    let word =
        |word: &str| word.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect::<String>();
    Some(sentence[..start].split_whitespace().map(word).filter(|word| !word.is_empty()).collect())
}

/// Removes words that only introduce the answer: `option B`.
fn without_fillers(answer: &str) -> &str {
    let is_filler = |word: &str| word.len() > 1 && FILLERS.contains(&word.to_lowercase().as_str());
    match answer.rsplit_once(' ') {
        Some((words, last)) if words.split_whitespace().all(is_filler) => last,
        _ => answer,
    }
}

fn states_value(sentence: &str) -> bool {
    words_before_value(sentence).is_some_and(|words| words.iter().all(|word| FILLERS.contains(&word.as_str())))
}

fn is_hedged(sentence: &str) -> bool {
    let Some(words) = words_before_value(sentence) else { return false };
    // `isn't`
    let denies = |word: &str| {
        word.len() > 3
            && word.ends_with("nt")
            && matches!(&word[..word.len() - 2], "is" | "does" | "was" | "would" | "could" | "can")
    };
    // Only words since the verb count: `the most that anybody can have is 5`.
    let verb = words.iter().rposition(|word| matches!(word.as_str(), "is" | "are" | "equals" | "be" | "has" | "have"));
    let since = &words[verb.map_or(0, |at| at + 1)..];
    if since.iter().any(|word| HEDGES.contains(&word.as_str())) || words.iter().any(|word| denies(word)) {
        return true;
    }
    let Some((_, end)) = first_value(sentence) else { return false };
    let rest = sentence[end..].trim_start_matches([',', ' ']);
    let names_others = |rest: &str| first_value(rest).is_some();
    // A clause that names another value makes it ambiguous; a plain list (`3 or 5`) is read as a list.
    let is_list =
        sentence.split_whitespace().filter(|word| word.chars().all(char::is_alphabetic) && word.len() > 1).count() <= 2;
    !is_list && rest.strip_prefix("or ").is_some_and(|rest| names_others(rest) && !rest.starts_with(['$', '\\']))
}

fn read(sentence: &str) -> Vec<String> {
    let start = sentence.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, ':' | '*' | '='));
    let start = start.trim_end().trim_end_matches(['.', '*']).trim_end();
    let start = without_fillers(start);
    if start.is_empty() {
        return Vec::new();
    }
    let mut candidates = Vec::new();
    candidates.extend(leading_formulas(start));
    // A few words may be the answer; a whole clause only contains it.
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

/// Returns the text up to the end of its first sentence or paragraph, without cutting math.
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
