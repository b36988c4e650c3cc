//! How far an answer has been worked out: what is left to calculate between explicit numbers.
//!
//! A policy that copies `37 + 58` out of the question has the value of the answer without having found it. An answer is
//! evaluated when it leaves no more to do than the reference: no sum or product of explicit numbers, and no function of
//! explicit numbers of a family that the reference has none of. Fractions, radicals, powers and multiples of π are forms
//! of numbers, and nothing is left to do in them.

use crate::answer::{Answer, Expr, Function};
use crate::compare::expressions;
use crate::exact::exact;
use crate::limits::Budget;

/// What is left to do in an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Sums and products of explicit numbers.
    operations: usize,
    /// Families of functions of explicit numbers, one bit each.
    families: u16,
    /// Matrices that are calculated with.
    matrices: usize,
    /// Products of sums that could be multiplied out.
    products: usize,
    /// Sums, each a chance to have something in common taken out.
    sums: usize,
}

impl Work {
    /// What is left to do in an answer; of an equation that only names its value, in the value.
    pub(crate) fn of(answer: &Answer, is_named: bool, budget: &mut Budget) -> Self {
        let mut work = Self::default();
        let value = match answer {
            Answer::Equation { left, right, .. } if !is_named => {
                let is_name = matches!(**right, Answer::Scalar(Expr::Symbol(_)));
                if is_name { left } else { right }
            }
            Answer::Equalities { sides, .. } if !is_named => sides.last().unwrap_or(answer),
            other => other,
        };
        expressions(value, &mut |expr| work.add(expr, budget));
        work
    }

    /// Whether an answer leaves no more to do than the reference.
    pub(crate) fn is_within(self, reference: Self) -> bool {
        self.operations <= reference.operations
            && self.families & !reference.families == 0
            && self.matrices <= reference.matrices
    }

    fn add(&mut self, expr: &Expr, budget: &mut Budget) {
        if budget.step().is_none() {
            return;
        }
        match expr {
            Expr::Sum(terms) => {
                let numbers = terms.iter().filter(|term| is_explicit(term, budget)).count();
                self.operations += numbers.saturating_sub(1);
                self.sums += 1;
            }
            Expr::Product(factors) => {
                // Numbers above or below the line; one above another is a fraction.
                let above = factors.iter().filter(|factor| is_literal(factor)).count();
                let below = factors.iter().filter(|factor| matches!(factor, Expr::Inverse(x) if is_literal(x))).count();
                self.operations += above.saturating_sub(1) + below.saturating_sub(1);
                self.products += usize::from(factors.iter().filter(|factor| is_sum(factor)).count() > 0);
                if factors.iter().filter(|factor| matches!(factor, Expr::Matrix(_))).count() > 0 {
                    self.matrices += 1;
                }
            }
            Expr::Call(function, arguments) => {
                if arguments.iter().all(|argument| !argument.has_symbols()) {
                    self.families |= family(*function);
                }
                if arguments.iter().any(|argument| matches!(argument, Expr::Matrix(_))) {
                    self.matrices += 1;
                }
            }
            Expr::Power(base, _) if matches!(**base, Expr::Matrix(_)) => self.matrices += 1,
            _ => {}
        }
        for child in expr.children() {
            self.add(child, budget);
        }
    }
}

fn is_sum(expr: &Expr) -> bool {
    match expr {
        Expr::Sum(_) => true,
        Expr::Power(base, _) => is_sum(base),
        _ => false,
    }
}

/// A rational number that is written out, in whatever form.
fn is_explicit(expr: &Expr, budget: &mut Budget) -> bool {
    let is_closed = !expr.any(|node| matches!(node, Expr::Symbol(_) | Expr::Matrix(_)));
    is_closed && exact(expr, budget).is_some()
}

fn is_literal(expr: &Expr) -> bool {
    match expr {
        Expr::Number(_) => true,
        Expr::Negative(inner) | Expr::Percent(inner) => is_literal(inner),
        _ => false,
    }
}

/// Functions that are worked out alike: a logarithm may be written with another base, a sine as a cosine.
fn family(function: Function) -> u16 {
    use Function::{
        Abs, Arccos, Arcsin, Arctan, Binomial, Ceil, Cis, Cos, Cosh, Cot, Csc, Determinant, Exp, Factorial, Floor, Gcd, Lcm, Lg, Ln,
        Log, Max, Min, Root, Sec, Sin, Sinh, Tan, Tanh,
    };
    match function {
        Root => 0,
        Log | Ln | Lg => 1,
        Exp | Sinh | Cosh | Tanh => 1 << 1,
        Sin | Cos | Tan | Cot | Sec | Csc | Cis => 1 << 2,
        Arcsin | Arccos | Arctan => 1 << 3,
        Abs => 1 << 4,
        Floor | Ceil => 1 << 5,
        Factorial | Binomial => 1 << 6,
        Gcd | Lcm => 1 << 7,
        Max | Min => 1 << 8,
        Determinant => 1 << 9,
    }
}
