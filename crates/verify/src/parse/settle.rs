//! Steps between parsing and comparing, separate so that the form of an answer can be examined before them.

use super::{ParseError, matrix};
use crate::answer::{Answer, Expr, Function};
use crate::compare::numbers_differ;
use crate::limits::Budget;

/// An answer that is ready to be compared.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Settled {
    pub(crate) answer: Answer,
    /// Variables for all (or some) values of which the answer holds.
    pub(crate) declared: Vec<String>,
}

/// Evaluates matrices, checks that sides which are said to be equal are not different numbers, and separates the
/// variables that an answer holds for.
///
/// # Errors
/// When the answer contradicts itself (`3 = 4`), is trivial (`0 = 0`), or is an undefined matrix calculation.
pub(crate) fn settle(answer: Answer, budget: &mut Budget) -> Result<Settled, ParseError> {
    let mut declared = Vec::new();
    let answer = settled(answer, &mut declared, budget)?;
    Ok(Settled { answer, declared })
}

fn settled(answer: Answer, declared: &mut Vec<String>, budget: &mut Budget) -> Result<Answer, ParseError> {
    budget.step().ok_or(ParseError::TooComplex)?;
    let mut all = |items: Vec<Answer>, budget: &mut Budget| -> Result<Vec<Answer>, ParseError> {
        items.into_iter().map(|item| settled(item, declared, budget)).collect()
    };
    Ok(match answer {
        Answer::Scalar(expr) => return scalar(expr, budget),
        Answer::Sequence { open, close, items } => Answer::Sequence { open, close, items: all(items, budget)? },
        Answer::Set(items) => Answer::Set(all(items, budget)?),
        Answer::List(items, joint) => Answer::List(all(items, budget)?, joint),
        Answer::Union(items) => Answer::Union(all(items, budget)?),
        Answer::Intersection(items) => Answer::Intersection(all(items, budget)?),
        Answer::Difference(set, without) => {
            let set = settled(*set, declared, budget)?;
            Answer::Difference(Box::new(set), Box::new(settled(*without, declared, budget)?))
        }
        Answer::Equation { left, right, names } => {
            return equation(vec![*left, *right], names, declared, budget);
        }
        Answer::Equalities { sides, names } => return equation(sides, names, declared, budget),
        Answer::Quantity(inner, unit) => Answer::Quantity(Box::new(settled(*inner, declared, budget)?), unit),
        Answer::Choice(letter, inner) => Answer::Choice(letter, Box::new(settled(*inner, declared, budget)?)),
        Answer::Cases(cases) => {
            let mut lines = Vec::with_capacity(cases.len());
            for (value, condition) in cases {
                lines.push((settled(value, declared, budget)?, settled(condition, declared, budget)?));
            }
            Answer::Cases(lines)
        }
        Answer::For(inner, names) => {
            declared.extend(names);
            return settled(*inner, declared, budget);
        }
        other => other,
    })
}

fn scalar(expr: Expr, budget: &mut Budget) -> Result<Answer, ParseError> {
    if matrix::has_matrix(&expr) {
        return matrix::reduce(expr, budget);
    }
    if expr.any(|node| matches!(node, Expr::Call(Function::Determinant, _))) {
        return Err(ParseError::Syntax("a determinant of no matrix"));
    }
    Ok(Answer::Scalar(expr))
}

fn equation(
    sides: Vec<Answer>,
    names: bool,
    declared: &mut Vec<String>,
    budget: &mut Budget,
) -> Result<Answer, ParseError> {
    // Identical sides carry no information; a calculation on one side (`1 + 2 = 3`) does.
    if sides.iter().all(|side| *side == sides[0]) && !matches!(sides[0], Answer::Opaque(_)) {
        return Err(ParseError::Syntax("an equation without information"));
    }
    let mut read = Vec::with_capacity(sides.len());
    for side in sides {
        read.push(settled(side, declared, budget)?);
    }
    // For a named value the last side counts, whatever came before; without a name the sides state a fact.
    for pair in read.windows(2).filter(|_| !names) {
        if numbers_differ(&pair[0], &pair[1], budget) {
            return Err(ParseError::Syntax("sides that are different numbers"));
        }
    }
    let right = Box::new(read.pop().ok_or(ParseError::Empty)?);
    let left = Box::new(read.swap_remove(0));
    Ok(Answer::Equation { left, right, names })
}
