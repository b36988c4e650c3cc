//! Evaluation of rational functions modulo a prime: exact arithmetic on single machine words.
//!
//! Two expressions of numbers, variables, `π`, `e` and `i`, combined by the four operations and integer
//! powers, are equal exactly when their difference is the zero of the field of rational functions (`π` and `e`
//! count as independent, as far as is known). A difference modulo the prime therefore proves
//! that they differ. Agreement at three points leaves a probability of about (degree / 2^61)^3 that they
//! differ after all (Schwartz-Zippel).

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{Signed, ToPrimitive, Zero};

use crate::answer::{Constant, Expr, Function};
use crate::exact::exact;
use crate::limits::Budget;

/// The largest prime below 2^61 that leaves 1 modulo 4, so that it has a square root of −1.
const PRIME: u64 = (1 << 61) - 31;

/// A square root of −1 modulo [`PRIME`].
const IMAGINARY: u64 = 583_529_827_753_931_384;

/// Number of points at which expressions are compared.
const POINTS: u64 = 3;

/// Whether two rational functions are equal; `None` if one is not a rational function, or has a pole at every point.
pub(super) fn equal(gold: &Expr, found: &Expr, budget: &mut Budget) -> Option<bool> {
    let mut agreeing = 0;
    for point in 0..POINTS {
        match (residue(gold, point, budget), residue(found, point, budget)) {
            (Some(a), Some(b)) if a == b => agreeing += 1,
            (Some(_), Some(_)) => return Some(false),
            _ => return None,
        }
    }
    (agreeing == POINTS).then_some(true)
}

fn residue(expr: &Expr, point: u64, budget: &mut Budget) -> Option<u64> {
    budget.step()?;
    match expr {
        Expr::Number(number) => of_rational(&number.value, budget),
        Expr::Constant(Constant::Imaginary) => Some(IMAGINARY),
        Expr::Constant(Constant::Pi) => Some(value_of("pi", point)),
        Expr::Constant(Constant::Degree) => Some(times(value_of("pi", point), inverse(180, budget)?)),
        Expr::Constant(Constant::Euler) => Some(value_of("e", point)),
        Expr::Symbol(name) => Some(value_of(name, point)),
        Expr::Sum(terms) => terms.iter().try_fold(0, |sum, term| Some((sum + residue(term, point, budget)?) % PRIME)),
        Expr::Product(factors) => {
            factors.iter().try_fold(1, |product, factor| Some(times(product, residue(factor, point, budget)?)))
        }
        Expr::Inverse(x) => inverse(residue(x, point, budget)?, budget),
        Expr::Negative(x) => Some((PRIME - residue(x, point, budget)?) % PRIME),
        Expr::Percent(x) => Some(times(residue(x, point, budget)?, inverse(100, budget)?)),
        Expr::Power(base, exponent) => {
            let exponent = exact(exponent, budget).filter(BigRational::is_integer)?;
            let base = residue(base, point, budget)?;
            if base == 0 && !exponent.is_positive() {
                return None;
            }
            budget.spend(16)?;
            Some(power(base, modulo(exponent.numer(), PRIME - 1)?))
        }
        Expr::Call(Function::Factorial, arguments) => factorial(&exact(&arguments[0], budget)?, budget),
        Expr::Call(..) => of_rational(&exact(expr, budget)?, budget),
        Expr::Constant(Constant::Infinity) | Expr::PlusMinus(_) | Expr::MinusPlus(_) | Expr::Matrix(_) => None,
    }
}

/// Value of a variable or constant at a point, the same in every process.
fn value_of(name: &str, point: u64) -> u64 {
    name.bytes().fold(pacs_types::mix(point ^ 0x5eed), |hash, byte| pacs_types::mix(hash ^ u64::from(byte))) % PRIME
}

/// Factorial modulo the prime: the number itself may be too large to write, but not too long to multiply out.
fn factorial(n: &BigRational, budget: &mut Budget) -> Option<u64> {
    let n = n.is_integer().then(|| n.numer().to_u64()).flatten().filter(|n| *n <= 10_000)?;
    budget.spend(usize::try_from(n).ok()?)?;
    Some((1..=n).fold(1, times))
}

fn of_rational(value: &BigRational, budget: &mut Budget) -> Option<u64> {
    budget.spend(usize::try_from(value.numer().bits() / 64).ok()?)?;
    let numerator = modulo(value.numer(), PRIME)?;
    if value.is_integer() {
        return Some(numerator);
    }
    Some(times(numerator, inverse(modulo(value.denom(), PRIME)?, budget)?))
}

fn modulo(value: &BigInt, modulus: u64) -> Option<u64> {
    let modulus = BigInt::from(modulus);
    let rest = value % &modulus;
    let rest = if rest.is_negative() { rest + modulus } else { rest };
    if rest.is_zero() { Some(0) } else { rest.to_u64() }
}

fn times(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b) % u128::from(PRIME);
    u64::try_from(product).expect("a remainder is below the modulus")
}

fn power(base: u64, mut exponent: u64) -> u64 {
    let mut result = 1;
    let mut square = base;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = times(result, square);
        }
        square = times(square, square);
        exponent >>= 1;
    }
    result
}

/// Modular inverse, by Fermat's little theorem.
fn inverse(value: u64, budget: &mut Budget) -> Option<u64> {
    budget.spend(16)?;
    (value != 0).then(|| power(value, PRIME - 2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Answer;
    use crate::parse::{Notation, parse};

    fn same(a: &str, b: &str) -> Option<bool> {
        let read = |text| match parse(text, Notation::PLAIN, &mut Budget::new()) {
            Ok(Answer::Scalar(expr)) => expr,
            other => panic!("{text} is no scalar: {other:?}"),
        };
        equal(&read(a), &read(b), &mut Budget::new())
    }

    #[test]
    fn constants_of_the_field() {
        assert_eq!(times(IMAGINARY, IMAGINARY), PRIME - 1);
        assert_eq!(times(inverse(12345, &mut Budget::new()).expect("not zero"), 12345), 1);
        assert_eq!(PRIME % 4, 1);
    }

    #[test]
    fn rational_functions_are_compared_exactly() {
        assert_eq!(same("(x+1)^{500}", "(1+x)^{250}(x+1)^{250}"), Some(true));
        assert_eq!(same("(x+1)^{500}", "(x+1)^{500}+1"), Some(false));
        assert_eq!(same(r"\frac{x^2-1}{x-1}", "x+1"), Some(true));
        assert_eq!(same("(1+2i)(1-2i)", "5"), Some(true));
        assert_eq!(same(r"\frac{\pi x}{2}", r"0.5 x \pi"), Some(true));
        assert_eq!(same("10^{10^{10}}", "10^{10^{10}}+1"), Some(false));
        assert_eq!(same("10^{10^{10}}", "100^{5000000000}"), Some(true));
        assert_eq!(same(r"\sqrt{2}", "1"), None);
    }
}
