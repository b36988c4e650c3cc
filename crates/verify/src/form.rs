//! How far an answer has been worked out: the calculation that is left between explicit numbers.
//!
//! A policy that copies `37 + 58` from the question has the value of the answer without having calculated it. An answer
//! counts as evaluated if it leaves no more to do than the reference: no sum or product of explicit numbers, and no
//! function of explicit numbers from a family that the reference does not use. Fractions, radicals, powers and
//! multiples of π are forms of numbers and leave nothing to do. With variables, sums of products that the reference has
//! collected are work, and so are the factors of a reference that is a product of sums.

use num_rational::BigRational;
use num_traits::{One, ToPrimitive};

use crate::answer::{Answer, Constant, Expr, Function};
use crate::compare::expressions;
use crate::exact::exact;
use crate::limits::Budget;

/// The calculation left in an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Number of sums and products of explicit numbers.
    operations: usize,
    /// Explicit powers that are multiplied with each other.
    powers: usize,
    /// Whether there is an explicit power.
    has_power: bool,
    /// Roots of whole numbers from which a factor could be taken out, roots of roots, and products of roots.
    roots: usize,
    /// Whether there is a root of explicit numbers.
    has_root: bool,
    /// Whether it is a quotient of explicit numbers, and whether it is a plain integer.
    is_quotient: bool,
    is_whole: bool,
    /// Whether it is a plain number or fraction.
    is_rational: bool,
    /// Whether it contains variables.
    has_variables: bool,
    /// Families of functions of explicit numbers, one bit per family.
    families: u16,
    /// Number of functions of explicit numbers, and of functions of variables.
    functions: usize,
    calls: usize,
    /// Sums of products of sums, which could be multiplied out and collected.
    collections: usize,
    /// Number of matrices that are calculated with.
    matrices: usize,
    /// Whether it is a product of sums, or of a sum and a factor taken out of it.
    is_factored: bool,
    /// Whether it is a product of several sums, which could be expanded.
    is_product: bool,
    /// Whether it is a sum without products of sums.
    is_expanded: bool,
    /// Whether it is an equation between variables, rather than a value.
    is_statement: bool,
    /// Whether it is a single expression, under any name.
    is_value: bool,
    /// Whether it is an equation of any kind.
    is_equation: bool,
}

impl Work {
    /// Measures the calculation left in an answer, for an equation that only names a value in that value.
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
        work.is_equation = matches!(answer, Answer::Equation { .. } | Answer::Equalities { .. });
        let is_equation =
            matches!(answer, Answer::Equation { names: false, .. } | Answer::Equalities { names: false, .. });
        if let (Answer::Scalar(expr), false) = (value, is_equation) {
            work.is_value = true;
            work.shape(expr, budget);
        }
        expressions(value, &mut |expr| work.add(expr, budget));
        work
    }

    /// Whether an answer leaves no more to do than the reference.
    pub(crate) fn is_within(self, reference: Self) -> bool {
        /// Functions that an answer may have beyond the reference: a tangent is a sine over a cosine.
        const MORE_CALLS: usize = 1;
        let has_form = !self.is_value || !reference.is_value || self.has_form_of(reference);
        // Compared with the reference and not with a fixed form: what counts as worked out depends on the question, and the reference is
        // the only sign of it.
        self.operations <= reference.operations
            && (self.powers <= reference.powers || reference.has_power)
            && self.roots <= reference.roots
            && self.families & !reference.families == 0
            && self.functions <= 2 * reference.functions + MORE_CALLS
            && self.calls <= reference.calls + MORE_CALLS
            && self.collections <= reference.collections
            && self.matrices <= reference.matrices
            && (!self.is_statement || reference.is_equation)
            && has_form
    }

    /// Whether the answer is a number if the reference is one, and a polynomial is factored or expanded
    /// like the reference.
    fn has_form_of(self, reference: Self) -> bool {
        // The reference's form is demanded only where it is stricter: a factored reference asks for factors, a number for a number.
        let is_number = !(self.has_root && reference.is_rational || self.is_quotient && reference.is_whole);
        let is_closed = !self.has_variables || reference.has_variables;
        let has_factors = !reference.is_factored || self.is_factored;
        let is_expanded = !reference.is_expanded || !self.is_product;
        is_number && is_closed && has_factors && is_expanded
    }

    /// Determines the overall form of an answer.
    fn shape(&mut self, expr: &Expr, budget: &mut Budget) {
        let sums = factors_of_sums(expr);
        let mut above = Vec::new();
        let mut below = Vec::new();
        flat_factors(expr, &mut above, &mut below);
        let has_more = above.iter().any(|factor| factor.has_symbols() && factors_of_sums(factor) == 0);
        let is_product = !matches!(expr, Expr::Sum(_));
        self.is_product = is_product && sums > 1;
        self.is_factored = is_product && (sums > 1 || (sums > 0 && has_more));
        let mut terms = Vec::new();
        flat_terms(expr, &mut terms);
        self.is_expanded = terms.len() > 1 && terms.iter().all(|term| factors_of_sums(term) == 0);
        self.is_whole = matches!(strip(expr), Expr::Number(number) if number.value.is_integer());
        let is_fraction = above.iter().chain(&below).all(|factor| matches!(factor, Expr::Number(_)));
        self.is_rational = is_product && is_fraction && is_explicit(expr, budget);
        self.is_quotient = is_product && !below.is_empty() && is_explicit(expr, budget);
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
                let bracket = |term: &&Expr| matches!(term, Expr::Negative(inner) if matches!(**inner, Expr::Sum(_)));
                if let Expr::Sum(written) = expr {
                    self.collections += written.iter().filter(bracket).count();
                    self.matrices += usize::from(written.iter().any(|term| matches!(term, Expr::Matrix(_))));
                }
                terms.into_iter().for_each(|term| self.add(term, budget));
                return;
            }
            Expr::Product(_) | Expr::Inverse(_) => {
                let mut above = Vec::new();
                let mut below = Vec::new();
                flat_factors(expr, &mut above, &mut below);
                for side in [&above, &below] {
                    let literals = side.iter().filter(|factor| is_literal(factor)).count();
                    let powers = side.iter().filter(|factor| is_power(factor)).count();
                    let roots = side.iter().filter(|factor| is_root(factor)).count();
                    // `3 \cdot 10^8` is the usual notation of large numbers.
                    let scaled = side.iter().filter(|factor| is_power(factor) && !is_power_of_ten(factor)).count();
                    self.operations += literals.saturating_sub(1);
                    self.powers += powers.saturating_sub(1) + usize::from(literals > 0 && scaled > 0);
                    self.roots += roots.saturating_sub(1);
                }
                let in_both = |is: fn(&Expr) -> bool| above.iter().any(|x| is(x)) && below.iter().any(|x| is(x));
                self.powers += usize::from(in_both(is_power));
                let is_decimal = |factor: &&&Expr| matches!(strip(factor), Expr::Number(number) if number.is_decimal);
                let is_fraction = !below.is_empty() && below.iter().all(|factor| is_literal(factor));
                self.operations +=
                    usize::from(is_fraction && above.iter().chain(&below).any(|factor| is_decimal(&factor)));
                // `(1 + 2i)·6`, `1/(1 + 2i)`
                let complex = above.iter().filter(|factor| is_complex(factor)).count();
                let others = above.iter().filter(|factor| is_literal(factor)).count();
                self.operations += usize::from(complex > 0 && complex + others > 1);
                self.operations += below.iter().filter(|factor| is_complex(factor)).count();
                self.matrices += usize::from(above.iter().any(|factor| matches!(factor, Expr::Matrix(_))));
                above.into_iter().chain(below).for_each(|factor| self.add(factor, budget));
                return;
            }
            Expr::Symbol(_) => self.has_variables = true,
            Expr::Call(Function::Root, arguments) => {
                self.has_root |= !arguments[0].has_symbols();
                self.roots += usize::from(could_be_simpler(&arguments[0], arguments.get(1)));
            }
            Expr::Call(function, arguments) => {
                let is_explicit = arguments.iter().all(|argument| !argument.has_symbols());
                self.families |= if is_explicit { family(*function) } else { 0 };
                self.functions += usize::from(is_explicit);
                self.calls += usize::from(!is_explicit);
                self.matrices += usize::from(arguments.iter().any(|argument| matches!(argument, Expr::Matrix(_))));
            }
            Expr::Power(base, exponent) => {
                self.has_power |= is_power(expr);
                self.matrices += usize::from(matches!(**base, Expr::Matrix(_)));
                let has_i = |side: &Expr| side.any(|node| *node == Expr::Constant(Constant::Imaginary));
                self.operations += usize::from(has_i(base) && !base.has_symbols());
                self.families |= if has_i(exponent) && !exponent.has_symbols() { family(Function::Exp) } else { 0 };
                // `(2x)^3`, `(2^3)^4`, `8^{1/3}`
                let is_product = |side: &Expr| matches!(side, Expr::Product(factors) if factors.iter().any(is_literal));
                self.operations += usize::from(is_product(base) && base.has_symbols() && is_literal(exponent));
                self.operations += usize::from(is_power(base) && is_literal(exponent));
                let is_whole = |side: &Expr| matches!(strip(side), Expr::Number(number) if number.value.is_integer());
                self.has_root |= is_power(expr) && !is_whole(exponent);
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

/// Collects the factors of numerator and denominator, without ones.
fn flat_factors<'a>(expr: &'a Expr, above: &mut Vec<&'a Expr>, below: &mut Vec<&'a Expr>) {
    match expr {
        Expr::Product(all) => all.iter().for_each(|factor| flat_factors(factor, above, below)),
        Expr::Inverse(inner) => flat_factors(inner, below, above),
        Expr::Negative(inner) => flat_factors(inner, above, below),
        Expr::Number(number) if number.value.is_one() => {}
        other => above.push(other),
    }
}

/// Counts the factors of a product that are sums with variables, with multiplicity.
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

/// Whether it is an explicit rational number, in any notation.
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

fn is_root(expr: &Expr) -> bool {
    matches!(expr, Expr::Call(Function::Root, arguments) if !arguments[0].has_symbols())
}

fn is_power_of_ten(expr: &Expr) -> bool {
    matches!(expr, Expr::Power(base, _) if **base == Expr::integer(10))
}

/// Removes the sign.
fn strip(expr: &Expr) -> &Expr {
    match expr {
        Expr::Negative(inner) => strip(inner),
        other => other,
    }
}

/// Whether it is a power of explicit numbers.
fn is_power(expr: &Expr) -> bool {
    let is_number =
        |node: &Expr| !node.any(|part| matches!(part, Expr::Symbol(_) | Expr::Constant(_) | Expr::Call(..)));
    matches!(expr, Expr::Power(base, exponent) if is_number(base) && is_number(exponent))
}

/// Whether it is a sum of explicit numbers, one of which is a multiple of `i`.
fn is_complex(expr: &Expr) -> bool {
    matches!(expr, Expr::Sum(terms) if terms.iter().any(|term| term.any(|node| *node == Expr::Constant(Constant::Imaginary))))
        && !expr.has_symbols()
}

/// Whether a root is of an integer with a factor to be taken out, or of another root.
fn could_be_simpler(radicand: &Expr, degree: Option<&Expr>) -> bool {
    /// Largest factor that is searched; simplifying by a larger one is not demanded.
    const LARGEST: u64 = 100;
    let whole = |expr: &Expr| match expr {
        Expr::Number(number) if number.value.is_integer() => number.value.numer().to_u64(),
        _ => None,
    };
    if radicand.any(|node| matches!(node, Expr::Call(Function::Root, arguments) if !arguments[0].has_symbols())) {
        return true;
    }
    let (Some(radicand), Some(degree)) = (whole(radicand), degree.and_then(whole)) else { return false };
    let degree = u32::try_from(degree).unwrap_or(u32::MAX).clamp(2, 64);
    let divides = |power: u64| radicand > 0 && radicand.is_multiple_of(power);
    (2..=LARGEST).map_while(|factor| factor.checked_pow(degree)).any(divides)
}

/// Groups functions that are evaluated alike: a logarithm may have another base, a sine be a cosine.
fn family(function: Function) -> u16 {
    use Function::{
        Abs, Arccos, Arcsin, Arctan, Binomial, Ceil, Cis, Cos, Cosh, Cot, Csc, Determinant, Exp, Factorial, Floor, Gcd,
        Lcm, Lg, Ln, Log, Max, Min, Root, Sec, Sin, Sinh, Tan, Tanh,
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
