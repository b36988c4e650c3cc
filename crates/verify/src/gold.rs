//! Reference answers: whether they can be read, and whether they have a single meaning.

use std::fmt;

use crate::answer::Answer;
use crate::extract;
use crate::limits::{Budget, MAX_ANSWER_BYTES, MAX_GOLD_BYTES};
use crate::parse::{Commas, Letters, Notation, ParseError};
use crate::reading::Reading;
use crate::render::reading;

/// Why a reference answer cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GoldError {
    /// The reference answer is empty.
    #[error("reference answer is empty")]
    Empty,
    /// The reference answer is longer than any answer that is compared.
    #[error("reference answer has {bytes} bytes, more than {MAX_ANSWER_BYTES}")]
    TooLong {
        /// Length of the reference answer (bytes).
        bytes: usize,
    },
    /// It is neither an expression nor words.
    #[error("reference answer `{answer}` cannot be read: it {problem}")]
    Unreadable {
        /// The part of the reference that was taken for the answer.
        answer: String,
        /// What is wrong with it, as part of a sentence.
        problem: String,
    },
}

/// How a reference answer was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GoldCheck {
    /// Kind and content, as shown in the reasons of verdicts.
    pub reading: String,
    /// Rule that its reading depends on, if it has more than one possible meaning.
    pub leniency: Option<Leniency>,
}

/// Why a readable reference answer may not be read as it was meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Leniency {
    /// `\textbf{(D)}\ 42`: both the letter and its content are accepted.
    Choice,
    /// A sentence, which only the same words match.
    Prose,
    /// The answer was extracted from a solution or sentence.
    Embedded,
    /// `5 km` without a text font: the letters count as variables, so 5 is not accepted.
    Letters,
    /// Words after a value that are in no table of units and counted things.
    Words,
    /// `1,234`: a thousands separator, or two members.
    Commas,
}

impl Leniency {
    /// Returns advice on how to fix the reference.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::Choice => "keep either the letter or the value in `answer_field`, whichever the prompt asks for",
            Self::Prose => "leave such rows out, or grade them by a verifier of your own (`verifier.kind = \"exec\"`)",
            Self::Embedded => "keep the answer alone in `answer_field`",
            Self::Letters => "write the unit as `\\text{…}`, or leave it out",
            Self::Words => "leave the words out, or write a unit of docs/VERIFIERS.md",
            Self::Commas => "write a number without separators, or a list with spaces after its commas",
        }
    }
}

impl fmt::Display for Leniency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Choice => "the letter of a choice with its value",
            Self::Prose => "prose that only the same words equal",
            Self::Embedded => "an answer within other text",
            Self::Letters => "letters that are a unit or variables",
            Self::Words => "words that are no known unit",
            Self::Commas => "a comma that separates thousands or members",
        })
    }
}

/// Checks whether a reference answer can be read, so that responses can be compared with it.
///
/// # Errors
/// When it is empty, too long, or neither an expression nor words.
pub fn check_gold(gold: &str) -> Result<(), GoldError> {
    read(gold, &mut Budget::new()).map(|_| ())
}

/// Reads a reference answer and reports how.
///
/// # Errors
/// As [`check_gold`].
pub fn inspect_gold(gold: &str) -> Result<GoldCheck, GoldError> {
    let mut budget = Budget::new();
    let read = read(gold, &mut budget)?;
    let leniency = leniency(gold, &read, &mut budget);
    Ok(GoldCheck { reading: reading(&read.settled.answer), leniency })
}

/// Reads the part of a reference that is the answer.
pub(crate) fn read(gold: &str, budget: &mut Budget) -> Result<Reading, GoldError> {
    if gold.trim().is_empty() {
        return Err(GoldError::Empty);
    }
    if gold.len() > MAX_GOLD_BYTES {
        return Err(GoldError::TooLong { bytes: gold.len() });
    }
    let answer = extract::gold(gold);
    match Reading::new(&answer, budget) {
        Ok(reading) => Ok(reading),
        Err(ParseError::TooLong) => Err(GoldError::TooLong { bytes: answer.len() }),
        Err(problem) => Err(GoldError::Unreadable { answer, problem: problem.to_string() }),
    }
}

fn leniency(gold: &str, read: &Reading, budget: &mut Budget) -> Option<Leniency> {
    /// Number of words from which on an answer is a sentence.
    const SENTENCE: usize = 4;
    let is_sentence =
        |answer: &Answer| matches!(answer, Answer::Text(text) if text.split_whitespace().count() >= SENTENCE);
    let with_units = Notation { letters: Letters::Units, ..Notation::PLAIN };
    let as_list = Notation { commas: Commas::Lists, ..Notation::PLAIN };
    let answer = &read.settled.answer;
    let has_sentence = match answer {
        Answer::List(items, _) => items.iter().any(is_sentence),
        Answer::Equation { left, right, .. } => is_sentence(left) || is_sentence(right),
        one => is_sentence(one),
    };
    if has_sentence {
        return Some(Leniency::Prose);
    }
    match answer {
        Answer::Choice(..) => return Some(Leniency::Choice),
        Answer::Quantity(_, unit) if !unit.is_known => return Some(Leniency::Words),
        _ => {}
    }
    if read.source.len() + 8 < gold.trim().len() {
        return Some(Leniency::Embedded);
    }
    let ends_in_unit =
        |answer: &Answer| matches!(answer, Answer::Quantity(inner, _) if matches!(**inner, Answer::Scalar(_)));
    if read.source.contains(|c: char| c.is_ascii_alphabetic())
        && read.in_notation(with_units, budget).is_some_and(|answer| ends_in_unit(&answer))
    {
        return Some(Leniency::Letters);
    }
    (read.source.contains(',') && read.in_notation(as_list, budget).is_some()).then_some(Leniency::Commas)
}
