//! From two strings to a verdict.

use pacs_types::{Outcome, Verdict};

use crate::answer::{Answer, Constant, Expr};
use crate::compare::{Judgement, Rule, compare, text_key};
use crate::extract;
use crate::limits::{Budget, MAX_ANSWER_BYTES, MAX_GOLD_BYTES, MAX_RESPONSE_BYTES, MAX_STEPS};
use crate::parse::{Commas, ParseError, parse};

/// Where the final answer of a response may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A box, a final-answer phrase, or else the last expression of the text.
    Lenient,
    /// A box or a final-answer phrase.
    Strict,
    /// A box, or else the last number of the text; either way a plain number, without arithmetic left to do. `56 + 40`
    /// is no answer to `What is 56 + 40?`, which the other two cannot tell.
    Number,
}

/// Most steps of one grading: reading either side and comparing them have a budget each.
pub const MAX_GRADE_STEPS: u32 = 3 * MAX_STEPS;

/// Why a reference answer cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GoldError {
    /// There is nothing in it.
    #[error("reference answer is empty")]
    Empty,
    /// It is longer than any answer that is compared.
    #[error("reference answer has {bytes} bytes, more than {MAX_ANSWER_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It is neither an expression nor words.
    #[error("reference answer `{answer}` cannot be read: it {problem}")]
    Unreadable {
        /// The part that was taken for the answer.
        answer: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Says whether a reference answer can be read, so that responses can be compared with it.
///
/// # Errors
/// See [`GoldError`].
pub fn check_gold(gold: &str) -> Result<(), GoldError> {
    Reading::gold(gold, &mut Budget::new()).map(|_| ())
}

/// Grades a response against the reference answer.
///
/// Never panics; the work is bounded by the lengths and counts of `limits`. A response that is too long or too deep to
/// be judged is [`Outcome::Unparsable`] and not [`Outcome::Failed`]: a failed verification is not trained on, and no
/// policy should find that way out.
#[must_use]
pub fn grade(response: &str, gold: &str, mode: Mode) -> Verdict {
    grade_counted(response, gold, mode).0
}

/// Grades as [`grade`] does, and says how many steps it took: at most [`MAX_GRADE_STEPS`], whatever the strings are.
#[must_use]
pub fn grade_counted(response: &str, gold: &str, mode: Mode) -> (Verdict, u32) {
    // A budget each, so that no response can use up what the reference needs to be read.
    let mut budgets = [Budget::new(), Budget::new(), Budget::new()];
    let verdict = grade_within(response, gold, mode, &mut budgets);
    (verdict, budgets.iter().map(Budget::taken).sum())
}

fn grade_within(response: &str, gold: &str, mode: Mode, budgets: &mut [Budget; 3]) -> Verdict {
    let [for_gold, for_response, for_comparison] = budgets;
    let gold = match Reading::gold(gold, for_gold) {
        Ok(gold) => gold,
        Err(error) => return verdict(Outcome::Failed, None, &error.to_string()),
    };
    // Extraction looks at every byte a few times.
    let _ = for_response.spend(response.len().min(MAX_RESPONSE_BYTES) / 64);
    let candidates = extract::candidates(response, mode);
    let Some(first) = candidates.iter().find(|candidate| !candidate.trim().is_empty()) else {
        return verdict(Outcome::Unparsable, None, "no_answer");
    };
    if first.len() > MAX_ANSWER_BYTES {
        return verdict(Outcome::Unparsable, None, "too_long");
    }
    if mode == Mode::Number && !extract::is_number(first) {
        return verdict(Outcome::Unparsable, Some(first.clone()), "not_a_number");
    }
    let Some(found) = candidates.iter().find_map(|candidate| Reading::new(candidate, for_response).ok()) else {
        // Unreadable, but letter for letter the reference.
        let same = source_key(first) == gold.key;
        let outcome = if same { Outcome::Correct } else { Outcome::Unparsable };
        return verdict(outcome, Some(first.clone()), if same { "text" } else { "unreadable" });
    };
    let judgement = gold.judge(&found, for_comparison);
    if !judgement.equal && for_comparison.is_spent() {
        return verdict(Outcome::Unparsable, Some(found.source), "too_complex");
    }
    if judgement.rule == Rule::Undecided {
        return verdict(Outcome::Unparsable, Some(found.source), judgement.rule.name());
    }
    let outcome = if judgement.equal { Outcome::Correct } else { Outcome::Wrong };
    verdict(outcome, Some(found.source), judgement.rule.name())
}

fn verdict(outcome: Outcome, extracted: Option<String>, rule: &str) -> Verdict {
    let label = if outcome == Outcome::Correct { 1.0 } else { 0.0 };
    Verdict { outcome, label, reward: label, extracted, rule: rule.to_owned() }
}

/// An answer that was read, in the ways that its commas can be understood.
struct Reading {
    source: String,
    key: String,
    answer: Answer,
    /// With every comma as a separator; `None` when that makes no difference.
    as_list: Option<Answer>,
    /// With the comma as a decimal point, where that makes the answer a decimal number.
    as_decimal: Option<Answer>,
}

impl Reading {
    fn new(source: &str, budget: &mut Budget) -> Result<Self, ParseError> {
        let answer = parse(source, Commas::Thousands, budget)?;
        let has_commas = source.contains(',');
        let other = |commas, budget: &mut Budget| {
            let read = || parse(source, commas, budget).ok();
            has_commas.then(read).flatten().filter(|other| *other != answer)
        };
        let as_list = other(Commas::Lists, budget);
        let as_decimal = other(Commas::Decimal, budget).filter(Answer::is_decimal);
        Ok(Self { source: source.to_owned(), key: source_key(source), answer, as_list, as_decimal })
    }

    fn gold(gold: &str, budget: &mut Budget) -> Result<Self, GoldError> {
        if gold.trim().is_empty() {
            return Err(GoldError::Empty);
        }
        if gold.len() > MAX_GOLD_BYTES {
            return Err(GoldError::TooLong { bytes: gold.len() });
        }
        let answer = extract::gold(gold);
        match Self::new(&answer, budget) {
            Ok(reading) => Ok(reading),
            Err(ParseError::TooLong) => Err(GoldError::TooLong { bytes: answer.len() }),
            Err(problem) => Err(GoldError::Unreadable { answer, problem: problem.to_string() }),
        }
    }

    fn judge(&self, found: &Self, budget: &mut Budget) -> Judgement {
        let judgement = compare(&self.answer, &found.answer, budget);
        if judgement.equal {
            return judgement;
        }
        if !self.key.is_empty() && self.key == found.key {
            return Judgement { equal: true, rule: Rule::Text };
        }
        if matches!(self.answer, Answer::Text(_)) || matches!(found.answer, Answer::Text(_)) {
            let equal = self.word_key().is_some_and(|gold| found.word_key() == Some(gold));
            return Judgement { equal, rule: Rule::Text };
        }
        if self.as_list.is_some() || found.as_list.is_some() {
            let gold_list = self.as_list.as_ref().unwrap_or(&self.answer);
            let found_list = found.as_list.as_ref().unwrap_or(&found.answer);
            let as_lists = compare(gold_list, found_list, budget);
            if as_lists.equal {
                return as_lists;
            }
        }
        // `2,74` is a decimal number when the other side is one.
        let as_decimal = match (&self.as_decimal, &found.as_decimal) {
            (None, Some(found)) if self.answer.is_decimal() => compare(&self.answer, found, budget),
            (Some(gold), None) if found.answer.is_decimal() => compare(gold, &found.answer, budget),
            _ => judgement,
        };
        if as_decimal.equal { as_decimal } else { judgement }
    }

    /// The answer as a word: `\text{(B)}` and `B` are the same choice, `odd` and `\text{odd}` the same word.
    fn word_key(&self) -> Option<String> {
        match &self.answer {
            Answer::Text(text) => Some(text_key(text)),
            Answer::Scalar(expr) if letters(expr).is_some() => letters(expr).map(|word| text_key(&word)),
            _ => {
                let plain = self.source.trim_matches(|c: char| !c.is_alphanumeric());
                let is_word = !plain.is_empty() && plain.chars().all(|c| c.is_alphabetic() || c.is_whitespace());
                is_word.then(|| text_key(plain))
            }
        }
    }
}

/// The letters of a product of variables, which is what a short word is read as.
fn letters(expr: &Expr) -> Option<String> {
    match expr {
        Expr::Symbol(name) if name.chars().all(char::is_alphabetic) => Some(name.clone()),
        Expr::Constant(Constant::Euler) => Some("e".to_owned()),
        Expr::Constant(Constant::Imaginary) => Some("i".to_owned()),
        Expr::Product(factors) => factors.iter().map(letters).collect(),
        _ => None,
    }
}

/// The source without spaces, delimiters and layout, to see whether two sources are written alike.
fn source_key(source: &str) -> String {
    let mut key = source.to_owned();
    for layout in ["\\left", "\\right", "\\displaystyle", "\\,", "\\;", "\\!", "\\ ", "$", "\\(", "\\)", "\\[", "\\]"] {
        key = key.replace(layout, "");
    }
    let mut joined = String::with_capacity(key.len());
    for word in key.split_whitespace() {
        // `1 2` is not `12`.
        let both_digits =
            joined.ends_with(|c: char| c.is_ascii_digit()) && word.starts_with(|c: char| c.is_ascii_digit());
        joined.push_str(if both_digits { " " } else { "" });
        joined.push_str(word);
    }
    joined.trim_end_matches(['.', '\\']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeating_the_question_is_no_number() {
        let outcome = |response, mode| grade(response, "96", mode).outcome;
        assert_eq!(outcome("We add 56 + 40, first", Mode::Lenient), Outcome::Correct);
        assert_eq!(outcome("We add 56 + 40, first", Mode::Number), Outcome::Wrong);
        assert_eq!(outcome(r"\boxed{56 + 40}", Mode::Number), Outcome::Unparsable);
        assert_eq!(outcome(r"56 + 40 = \boxed{96}, not 97", Mode::Number), Outcome::Correct);
        assert_eq!(outcome("56 + 40 = 96.0", Mode::Number), Outcome::Correct);
        assert_eq!(outcome("no idea", Mode::Number), Outcome::Unparsable);
    }
}
