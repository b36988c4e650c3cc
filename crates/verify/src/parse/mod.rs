//! Text to [`Answer`]: `lexer` makes tokens (numbers are in `literal`, word lists in `words`), `structure` splits lists,
//! relations, sets and brackets, `expression` and `operand` read expressions, `matrix` calculates with matrices.

mod expression;
mod lexer;
mod literal;
mod matrix;
mod operand;
mod structure;
mod words;

use crate::answer::Answer;
use crate::limits::{Budget, MAX_ANSWER_BYTES};

pub(crate) use literal::Commas;

/// Why a text could not be read.
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

/// Reads one answer.
pub(crate) fn parse(text: &str, commas: Commas, budget: &mut Budget) -> Result<Answer, ParseError> {
    if text.len() > MAX_ANSWER_BYTES {
        return Err(ParseError::TooLong);
    }
    budget.spend(text.len()).ok_or(ParseError::TooComplex)?;
    let tokens = lexer::tokens(&single_escapes(text), commas)?;
    structure::answer(&tokens, 0, budget)
}

/// Undoes doubled backslashes (`\\frac`), which data sets that were escaped twice have throughout.
fn single_escapes(text: &str) -> String {
    let bytes = text.as_bytes();
    let is_command = |at: usize| bytes.get(at + 1).is_some_and(u8::is_ascii_alphabetic);
    let commands = || (0..bytes.len()).filter(|&at| bytes[at] == b'\\' && is_command(at));
    let doubled = |at: usize| at > 0 && bytes[at - 1] == b'\\';
    if !text.contains("\\begin") {
        // Outside of matrices a row break before a letter means nothing.
        let mut single = text.to_owned();
        for at in commands().filter(|&at| doubled(at)).collect::<Vec<_>>().into_iter().rev() {
            single.remove(at);
        }
        return single;
    }
    if commands().next().is_some() && commands().all(doubled) { text.replace("\\\\", "\\") } else { text.to_owned() }
}
