//! From text to [`Answer`]. `lexer` makes tokens (with `literal` for numbers and `words` for word lists). `structure`
//! splits lists, relations, sets and brackets. `measure` separates units (`units`). `expression` and `operand` parse
//! expressions. [`settle`] completes an answer before it is compared; `matrix` calculates with matrices.

mod characters;
mod expression;
mod lexer;
mod literal;
mod matrix;
mod measure;
mod operand;
mod prose;
mod settle;
mod structure;
mod units;
mod words;

use std::borrow::Cow;

use crate::answer::Answer;
use crate::limits::{Budget, MAX_ANSWER_BYTES};

pub(crate) use literal::Commas;
pub(crate) use settle::{Settled, settle};

/// Why a text could not be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParseError {
    #[error("is empty")]
    Empty,
    #[error("is longer than {MAX_ANSWER_BYTES} bytes")]
    TooLong,
    #[error("is nested too deeply")]
    TooDeep,
    #[error("takes too many steps to read")]
    TooComplex,
    #[error("has {0}")]
    Syntax(&'static str),
}

/// Meaning of adjacent letters without a font, if it is ambiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Letters {
    /// A few are adjacent variables, many are a word.
    Plain,
    /// An abbreviation after a value is a unit: `5 km`.
    Units,
    /// Always adjacent variables.
    Products,
}

/// Choices between readings of ambiguous notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Notation {
    pub(crate) commas: Commas,
    pub(crate) letters: Letters,
}

impl Notation {
    pub(crate) const PLAIN: Self = Self { commas: Commas::Thousands, letters: Letters::Plain };
}

/// Parses one answer.
pub(crate) fn parse(text: &str, notation: Notation, budget: &mut Budget) -> Result<Answer, ParseError> {
    if text.len() > MAX_ANSWER_BYTES {
        return Err(ParseError::TooLong);
    }
    budget.spend(text.len()).ok_or(ParseError::TooComplex)?;
    let tokens = lexer::tokens(&single_escapes(&plain_characters(text)), notation)?;
    structure::whole(&tokens, budget)
}

/// Removes invisible characters, and replaces spaces and full-width forms by their ASCII variants.
fn plain_characters(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Borrowed(text);
    }
    let plain = |c: char| match c {
        '\u{200b}'..='\u{200f}' | '\u{2060}'..='\u{2064}' | '\u{feff}' | '\u{ad}' | '\u{fe0e}' | '\u{fe0f}' => None,
        '\u{a0}' | '\u{2000}'..='\u{200a}' | '\u{202f}' | '\u{205f}' | '\u{3000}' => Some(' '),
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0),
        '\u{2212}' | '\u{2010}'..='\u{2013}' | '\u{fe63}' => Some('-'),
        _ => Some(c),
    };
    Cow::Owned(text.chars().filter_map(plain).collect())
}

/// Undoes doubled backslashes (`\\frac`), which occur throughout data sets that were escaped twice.
fn single_escapes(text: &str) -> String {
    let bytes = text.as_bytes();
    let is_command = |at: usize| bytes.get(at + 1).is_some_and(u8::is_ascii_alphabetic);
    let commands = || (0..bytes.len()).filter(|&at| bytes[at] == b'\\' && is_command(at));
    let doubled = |at: usize| at > 0 && bytes[at - 1] == b'\\';
    if !text.contains("\\begin") {
        // Outside of matrices, a row break before a letter has no meaning.
        let mut single = text.to_owned();
        for at in commands().filter(|&at| doubled(at)).collect::<Vec<_>>().into_iter().rev() {
            single.remove(at);
        }
        return single;
    }
    if commands().next().is_some() && commands().all(doubled) { text.replace("\\\\", "\\") } else { text.to_owned() }
}
