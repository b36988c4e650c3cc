//! Exact value of an expression of rationals.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

use crate::answer::{Expr, Function};
use crate::limits::{Budget, MAX_BITS};

/// The exact value; `None` when it is no rational, has variables, or is too large.
pub(super) fn exact(expr: &Expr, budget: &mut Budget) -> Option<BigRational> {
    budget.step()?;
    let value = match expr {
        Expr::Number(number) => number.value.clone(),
        Expr::Constant(_) | Expr::Symbol(_) | Expr::PlusMinus(_) | Expr::MinusPlus(_) => return None,
        Expr::Sum(terms) => {
            let mut sum = BigRational::zero();
            for term in terms {
                sum = bounded(sum + exact(term, budget)?, budget)?;
            }
            sum
        }
        Expr::Product(factors) => {
            let mut product = BigRational::one();
            for factor in factors {
                product = bounded(product * exact(factor, budget)?, budget)?;
            }
            product
        }
        Expr::Inverse(x) => {
            let x = exact(x, budget)?;
            if x.is_zero() {
                return None;
            }
            x.recip()
        }
        Expr::Negative(x) => -exact(x, budget)?,
        Expr::Percent(x) => exact(x, budget)? / BigInt::from(100),
        Expr::Power(base, exponent) => power(&exact(base, budget)?, &exact(exponent, budget)?)?,
        Expr::Call(function, arguments) => {
            let arguments: Vec<_> = arguments.iter().map(|x| exact(x, budget)).collect::<Option<_>>()?;
            call(*function, &arguments)?
        }
    };
    bounded(value, budget)
}

fn bounded(value: BigRational, budget: &mut Budget) -> Option<BigRational> {
    budget.bits(value.numer().bits() + value.denom().bits())?;
    (value.numer().bits() <= MAX_BITS && value.denom().bits() <= MAX_BITS).then_some(value)
}

fn power(base: &BigRational, exponent: &BigRational) -> Option<BigRational> {
    let times = exponent.numer().to_i32()?;
    let degree = exponent.denom().to_u32()?;
    let base = root(base, degree)?;
    if base.is_zero() && times <= 0 {
        return None;
    }
    let bits = base.numer().bits().max(base.denom().bits());
    if base.abs().is_one() {
        return Some(if times % 2 == 0 { BigRational::one() } else { base });
    }
    if bits.checked_mul(u64::from(times.unsigned_abs()))? > MAX_BITS {
        return None;
    }
    Some(base.pow(times))
}

/// The real root, where it is rational.
fn root(base: &BigRational, degree: u32) -> Option<BigRational> {
    if degree == 1 {
        return Some(base.clone());
    }
    if degree == 0 || base.is_negative() {
        return None;
    }
    let of = |x: &BigInt| {
        let root = x.nth_root(degree);
        let fits = root.bits().saturating_mul(u64::from(degree)) <= 2 * MAX_BITS;
        (fits && root.pow(degree) == *x).then_some(root)
    };
    Some(BigRational::new(of(base.numer())?, of(base.denom())?))
}

fn call(function: Function, arguments: &[BigRational]) -> Option<BigRational> {
    match (function, arguments) {
        (Function::Root, [x, n]) if n.is_integer() => {
            let degree = n.numer().to_u32().filter(|degree| (1..=64).contains(degree))?;
            if x.is_negative() && degree % 2 == 1 {
                return Some(-root(&-x, degree)?);
            }
            root(x, degree)
        }
        (Function::Abs, [x]) => Some(x.abs()),
        (Function::Floor, [x]) => Some(x.floor()),
        (Function::Ceil, [x]) => Some(x.ceil()),
        (Function::Factorial, [n]) if n.is_integer() => {
            let n = n.numer().to_u32().filter(|n| *n <= 1000)?;
            let factorial = (1..=n).fold(BigInt::one(), |product, k| product * k);
            Some(BigRational::from_integer(factorial))
        }
        (Function::Binomial, [n, k]) if n.is_integer() && k.is_integer() => {
            let (n, k) = (n.numer().to_u32().filter(|n| *n <= 2000)?, k.numer().to_u32()?);
            if k > n {
                return Some(BigRational::zero());
            }
            let binomial = (0..k.min(n - k)).fold(BigInt::one(), |product, i| product * (n - i) / (i + 1));
            Some(BigRational::from_integer(binomial))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Answer;
    use crate::parse::{Commas, parse};

    fn value(text: &str) -> Option<String> {
        let Ok(Answer::Scalar(expr)) = parse(text, Commas::Thousands) else { panic!("{text} is no scalar") };
        exact(&expr, &mut Budget::new()).map(|value| value.to_string())
    }

    #[test]
    fn rationals_are_exact() {
        for (text, expected) in [
            (r"\frac{1}{3} + 0.5", "5/6"),
            (r"2\frac58", "21/8"),
            ("1 1/2", "3/2"),
            (r"16.\overline{6}", "50/3"),
            ("2^{-3}", "1/8"),
            ("1,234.50", "2469/2"),
            (r"34,\!560", "34560"),
            ("10{,}000", "10000"),
            (r"\sqrt{529}", "23"),
            (r"\sqrt[3]{-\frac{8}{27}}", "-2/3"),
            ("4^{3/2}", "8"),
            ("5!", "120"),
            (r"\binom{5}{2}", "10"),
            (r"\lfloor -1.5 \rfloor", "-2"),
            ("|-3|", "3"),
            (r"3.46 \times 10^{3}", "3460"),
            ("1.07e16", "10700000000000000"),
            ("-2^2", "-4"),
            ("--3", "3"),
            ("7:32", "7/32"),
            (r"28\%", "7/25"),
        ] {
            assert_eq!(value(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn what_is_irrational_or_too_large_has_no_exact_value() {
        for text in [r"\sqrt{2}", r"\pi", "x", "10^{10^{10}}", "1/0", "2000!", "9^{9^{9}}"] {
            assert_eq!(value(text), None, "{text}");
        }
    }
}
