//! Finds the text of the final answer in a response.

mod boxed;
mod last;
mod number;
mod phrase;

use crate::grade::Mode;
use crate::limits::MAX_RESPONSE_BYTES;

pub(crate) use last::last_expressions;
pub(crate) use number::is_number;

/// Returns texts that may be the final answer, best first; later ones count only if those before cannot be read.
pub(crate) fn candidates(response: &str, mode: Mode) -> Vec<String> {
    let text = spoken(response);
    let found_box = boxed::last_boxes(text);
    if mode == Mode::Number {
        let last = found_box.map(|found| found.content).or_else(|| number::last_number(text));
        return last.into_iter().collect();
    }
    let found_phrase = phrase::last_phrase(text);
    match (found_box, found_phrase) {
        // "The final answer is 4" after the last box replaces the boxed answer; "… is correct" does not.
        (Some(found), Some(phrase)) if phrase.is_final && phrase.at > found.end && phrase.states_value => {
            phrase.candidates
        }
        (Some(found), _) => vec![found.content],
        (None, Some(phrase)) if phrase.is_hedged => Vec::new(),
        (None, Some(phrase)) if !phrase.candidates.is_empty() => phrase.candidates,
        _ if mode == Mode::Lenient => last_expressions(boxed::before_truncated_box(text)),
        _ => Vec::new(),
    }
}

/// Returns the content of the last box, or else the last line that is not blank; for answers that are not mathematics.
pub(crate) fn final_text(response: &str) -> Option<String> {
    let text = spoken(response);
    let line = || text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned);
    boxed::last_boxes(text).map(|found| found.content).or_else(line)
}

/// Returns the part of a reference that is the answer; some data sets give a sentence or a whole solution.
pub(crate) fn gold(text: &str) -> String {
    if let Some(found) = boxed::last_boxes(text) {
        return found.content;
    }
    if let Some(content) = boxed::open_box(text) {
        return content.to_owned();
    }
    match phrase::last_phrase(text).and_then(|phrase| phrase.candidates.into_iter().next()) {
        Some(answer) => answer,
        None => text.trim().to_owned(),
    }
}

/// Returns the part of a response that is read: without hidden reasoning and chat markup, and within the limit.
fn spoken(response: &str) -> &str {
    const TURN_ENDS: [&str; 5] = ["<|im_start|>user", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>"];
    let mut text = response;
    if text.len() > MAX_RESPONSE_BYTES {
        // The end is kept: that is where final answers are.
        let mut start = text.len() - MAX_RESPONSE_BYTES;
        while !text.is_char_boundary(start) {
            start += 1;
        }
        text = &text[start..];
    }
    for end in TURN_ENDS {
        if let Some(at) = text.find(end).filter(|at| !text[..*at].trim().is_empty()) {
            text = &text[..at];
        }
    }
    // A response that ends with its reasoning is read as a whole: the answer can only be in there.
    match text.rfind("</think>").map(|at| &text[at + "</think>".len()..]) {
        Some(following) if !following.trim().is_empty() => following,
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(response: &str) -> Option<String> {
        candidates(response, Mode::Lenient).into_iter().next()
    }

    #[test]
    fn the_last_box_wins_and_braces_nest() {
        assert_eq!(first(r"\boxed{1} then \boxed{\frac{1}{\sqrt{2}}}.").as_deref(), Some(r"\frac{1}{\sqrt{2}}"));
        assert_eq!(first(r"\fbox{7}").as_deref(), Some("7"));
        assert_eq!(first(r"so \boxed{3} and then \boxed{\frac{1}{").as_deref(), Some("3"));
        assert_eq!(first(r"we get $5$, hence \boxed{\frac{1}{").as_deref(), Some("5"));
        assert_eq!(first(r"\boxed 5").as_deref(), Some("5"));
        assert_eq!(first(r"Write \boxed{ before it: \boxed{5}").as_deref(), Some("5"));
    }

    #[test]
    fn boxes_in_a_row_are_one_answer() {
        assert_eq!(first(r"\boxed{1}, \boxed{2} and $\boxed{3}$").as_deref(), Some("1, 2, 3"));
        assert_eq!(first(r"first \boxed{1}. Then \boxed{2}").as_deref(), Some("2"));
    }

    #[test]
    fn phrases_are_read_to_the_end_of_the_sentence() {
        assert_eq!(first("The answer is 3.14. I hope it is correct.").as_deref(), Some("3.14"));
        assert_eq!(first("Final Answer: The largest $n$ is 34.").as_deref(), Some("34"));
        assert_eq!(first("so x\n#### 1,234\n").as_deref(), Some("1,234"));
        assert_eq!(first(r"\boxed{3}. Wait. The final answer is $4$.").as_deref(), Some("4"));
        assert_eq!(first(r"The answer is 4. Better: \boxed{3}").as_deref(), Some("3"));
    }

    #[test]
    fn reasoning_and_markup_are_left_out() {
        assert_eq!(first(r"<think>\boxed{1}</think> It is 2.").as_deref(), Some("2"));
        assert_eq!(first(r"<think>\boxed{1}</think>").as_deref(), Some("1"));
        assert_eq!(first(r"It is \boxed{1}<|im_end|> \boxed{2}").as_deref(), Some("1"));
    }

    #[test]
    fn without_marks_the_last_expression_is_taken_in_lenient_mode_only() {
        assert_eq!(first("63 + 11 = 74").as_deref(), Some("63 + 11 = 74"));
        assert_eq!(first("first 12, then 1,000.99m²").as_deref(), Some("1,000.99"));
        assert_eq!(first("there are $x = 5$ of them").as_deref(), Some("x = 5"));
        assert_eq!(candidates("it is 74", Mode::Strict), Vec::<String>::new());
        assert_eq!(first("I do not know."), None);
    }
}
