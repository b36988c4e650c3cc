//! How far an answer has been worked out: what is left to calculate between explicit numbers.
//!
//! A policy that copies `37 + 58` out of the question has the value of the answer without having found it. An answer is
//! evaluated when it leaves no more to do than the reference: no sum or product of explicit numbers, and no function of
//! explicit numbers of a family that the reference has none of. Fractions, radicals, powers and multiples of π are forms
//! of numbers, and nothing is left to do in them. With variables, sums of products that the reference has collected are
//! work, and so are the factors of a reference that is a product of sums.

use num_rational::BigRational;
use num_traits::{One, ToPrimitive};

use crate::answer::{Answer, Constant, Expr, Function};
use crate::compare::expressions;
use crate::exact::exact;
use crate::limits::Budget;

/// What is left to do in an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Sums and products of explicit numbers.
    operations: usize,
    /// Explicit powers that are multiplied with each other.
    powers: usize,
    /// Whether there is an explicit power at all.
    has_power: bool,
    /// Roots of whole numbers from which a factor could be taken out, and roots of roots.
    roots: usize,
    /// Families of functions of explicit numbers, one bit each.
    families: u16,
    /// Functions of variables.
    calls: usize,
    /// Sums of products of sums, which could be multiplied out and collected.
    collections: usize,
    /// Matrices that are calculated with.
    matrices: usize,
    /// Whether the whole is a product of sums.
    is_factored: bool,
    /// Whether it is an equation about variables and not a value.
    is_statement: bool,
}

impl Work {
    /// What is left to do in an answer; of an equation that only gives its value, in the value.
    pub(crate) fn of(answer: &Answer, budget: &mut Budget) -> Self {
        let mut work = Self::default();
        let value = match answer {
            Answer::Equation { left, right, names } => {
                let is_name = matches!(**right, Answer::Scalar(Expr::Symbol(_)));
                work.is_statement = !names && !is_name && has_symbols(left);
                if is_name { left } else { right }
            }
            Answer::Equalities { sides, names } => {
                work.is_statement = !names && sides.first().is_some_and(has_symbols);
                sides.last().unwrap_or(answer)
            }
            other => other,
        };
        work.is_factored = matches!(value, Answer::Scalar(expr) if factors_of_sums(expr) > 1);
        expressions(value, &mut |expr| work.add(expr, budget));
        work
    }

    /// Whether an answer leaves no more to do than the reference.
    pub(crate) fn is_within(self, reference: Self) -> bool {
        /// Functions of variables that an answer may have more than the reference: an identity or two.
        const MORE_CALLS: usize = 2;
        self.operations <= reference.operations
            && (self.powers <= reference.powers || reference.has_power)
            && self.roots <= reference.roots
            && self.families & !reference.families == 0
            && self.calls <= reference.calls + MORE_CALLS
            && self.collections <= reference.collections
            && self.matrices <= reference.matrices
            && (self.is_factored || !reference.is_factored)
            && (!self.is_statement || reference.is_statement)
    }

    fn add(&mut self, expr: &Expr, budget: &mut Budget) {
        if budget.step().is_none() {
            return;
        }
        match expr {
            Expr::Sum(_) => {
                let mut terms = Vec::new();
                flat_terms(expr, &mut terms);
                let numbers = terms.iter().filter(|term| is_explicit(term, budget)).count();
                self.operations += numbers.saturating_sub(1);
                let products = terms.iter().filter(|term| factors_of_sums(term) > 0).count();
                self.collections += products.saturating_sub(1);
                terms.into_iter().for_each(|term| self.add(term, budget));
                return;
            }
            Expr::Product(_) | Expr::Inverse(_) => {
                let (mut above, mut below) = (Vec::new(), Vec::new());
                flat_factors(expr, &mut above, &mut below);
                for side in [&above, &below] {
                    let literals = side.iter().filter(|factor| is_literal(factor)).count();
                    let powers = side.iter().filter(|factor| is_power(factor)).count();
                    self.operations += literals.saturating_sub(1);
                    self.powers += powers.saturating_sub(1);
                }
                // `(1 + 2i)·6`, `1/(1 + 2i)`
                let complex = above.iter().filter(|factor| is_complex(factor)).count();
                let others = above.iter().filter(|factor| is_literal(factor)).count();
                self.operations += usize::from(complex > 0 && complex + others > 1);
                self.operations += below.iter().filter(|factor| is_complex(factor)).count();
                self.matrices += usize::from(above.iter().any(|factor| matches!(factor, Expr::Matrix(_))));
                above.into_iter().chain(below).for_each(|factor| self.add(factor, budget));
                return;
            }
            Expr::Call(Function::Root, arguments) => {
                self.roots += usize::from(could_be_simpler(&arguments[0], arguments.get(1)));
            }
            Expr::Call(function, arguments) => {
                let is_explicit = arguments.iter().all(|argument| !argument.has_symbols());
                self.families |= if is_explicit { family(*function) } else { 0 };
                self.calls += usize::from(!is_explicit);
                self.matrices += usize::from(arguments.iter().any(|argument| matches!(argument, Expr::Matrix(_))));
            }
            Expr::Power(base, _) => {
                self.has_power |= is_power(expr);
                self.matrices += usize::from(matches!(**base, Expr::Matrix(_)));
                self.operations += usize::from(is_complex(base));
            }
            _ => {}
        }
        for child in expr.children() {
            self.add(child, budget);
        }
    }
}

fn has_symbols(answer: &Answer) -> bool {
    let mut found = false;
    expressions(answer, &mut |expr| found |= expr.has_symbols());
    found
}

fn flat_terms<'a>(expr: &'a Expr, terms: &mut Vec<&'a Expr>) {
    match expr {
        Expr::Sum(all) => all.iter().for_each(|term| flat_terms(term, terms)),
        Expr::Negative(inner) if matches!(**inner, Expr::Sum(_)) => flat_terms(inner, terms),
        other => terms.push(other),
    }
}

/// Factors above and below the line, the number one aside.
fn flat_factors<'a>(expr: &'a Expr, above: &mut Vec<&'a Expr>, below: &mut Vec<&'a Expr>) {
    match expr {
        Expr::Product(all) => all.iter().for_each(|factor| flat_factors(factor, above, below)),
        Expr::Inverse(inner) => flat_factors(inner, below, above),
        Expr::Negative(inner) => flat_factors(inner, above, below),
        Expr::Number(number) if number.value.is_one() => {}
        other => above.push(other),
    }
}

/// How many factors of a product are sums with variables, each as often as it is multiplied.
fn factors_of_sums(expr: &Expr) -> usize {
    match expr {
        Expr::Sum(_) if expr.has_symbols() => 1,
        Expr::Power(base, exponent) => match &**exponent {
            Expr::Number(number) if number.value > BigRational::one() => 2 * factors_of_sums(base),
            _ => factors_of_sums(base),
        },
        Expr::Product(factors) => factors.iter().map(factors_of_sums).sum(),
        Expr::Negative(inner) => factors_of_sums(inner),
        _ => 0,
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

/// A power of explicit numbers.
fn is_power(expr: &Expr) -> bool {
    let is_number = |node: &Expr| !node.any(|part| matches!(part, Expr::Symbol(_) | Expr::Constant(_) | Expr::Call(..)));
    matches!(expr, Expr::Power(base, exponent) if is_number(base) && is_number(exponent))
}

/// A sum of explicit numbers of which one is a multiple of `i`.
fn is_complex(expr: &Expr) -> bool {
    matches!(expr, Expr::Sum(terms) if terms.iter().any(|term| term.any(|node| *node == Expr::Constant(Constant::Imaginary))))
        && !expr.has_symbols()
}

/// Whether a root is of a whole number that has a factor to be taken out, or of a root.
fn could_be_simpler(radicand: &Expr, degree: Option<&Expr>) -> bool {
    /// Factors that are looked for; who simplifies a root by a larger one has done enough.
    const LARGEST: u64 = 100;
    let whole = |expr: &Expr| match expr {
        Expr::Number(number) if number.value.is_integer() => number.value.numer().to_u64(),
        _ => None,
    };
    if matches!(radicand, Expr::Call(Function::Root, _)) {
        return true;
    }
    let (Some(radicand), Some(degree)) = (whole(radicand), degree.and_then(whole)) else { return false };
    let degree = u32::try_from(degree).unwrap_or(u32::MAX).clamp(2, 64);
    let divides = |power: u64| radicand > 0 && radicand.is_multiple_of(power);
    (2..=LARGEST).map_while(|factor| factor.checked_pow(degree)).any(divides)
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
