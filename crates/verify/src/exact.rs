//! Exact evaluation of expressions in rationals.

use num_bigint::BigInt;
use num_integer::Integer;
use num_rational::BigRational;
use num_traits::{One, Signed, ToPrimitive, Zero};

use crate::answer::{Expr, Function};
use crate::limits::{Budget, MAX_BITS};

/// Returns the exact value; `None` if it is irrational, has variables, or is too large.
pub(crate) fn exact(expr: &Expr, budget: &mut Budget) -> Option<BigRational> {
    exact_at(expr, &|_| None, budget)
}

/// Returns the exact value with integers for the variables.
pub(crate) fn exact_at(
    expr: &Expr,
    variables: &dyn Fn(&str) -> Option<i64>,
    budget: &mut Budget,
) -> Option<BigRational> {
    budget.step()?;
    match expr {
        Expr::Number(number) => bounded(number.value.clone(), budget),
        Expr::Symbol(name) => variables(name).map(|value| BigRational::from_integer(value.into())),
        Expr::Constant(_) | Expr::PlusMinus(_) | Expr::MinusPlus(_) | Expr::Matrix(_) => None,
        Expr::Sum(terms) => {
            let mut sum = BigRational::zero();
            for term in terms {
                let term = exact_at(term, variables, budget)?;
                pay(&sum, &term, budget)?;
                sum = bounded(sum + term, budget)?;
            }
            Some(sum)
        }
        Expr::Product(factors) => {
            let mut product = BigRational::one();
            for factor in factors {
                let factor = exact_at(factor, variables, budget)?;
                pay(&product, &factor, budget)?;
                product = bounded(product * factor, budget)?;
            }
            Some(product)
        }
        Expr::Inverse(x) => Some(exact_at(x, variables, budget)?).filter(|x| !x.is_zero()).map(|x| x.recip()),
        Expr::Negative(x) => Some(-exact_at(x, variables, budget)?),
        Expr::Percent(x) => Some(exact_at(x, variables, budget)? / BigInt::from(100)),
        Expr::Power(base, exponent) => {
            power(&exact_at(base, variables, budget)?, &exact_at(exponent, variables, budget)?, budget)
        }
        Expr::Call(function, arguments) => {
            let mut values = Vec::with_capacity(arguments.len());
            for argument in arguments {
                values.push(exact_at(argument, variables, budget)?);
            }
            bounded(call(*function, &values, budget)?, budget)
        }
    }
}

fn words(value: &BigRational) -> usize {
    usize::try_from((value.numer().bits() + value.denom().bits()) / 64).unwrap_or(usize::MAX)
}

/// Pays for an operation on two rationals: a greatest common divisor takes as many steps as there are pairs of words,
/// each much dearer than one machine instruction.
/// and much more than one machine instruction each.
fn pay(a: &BigRational, b: &BigRational, budget: &mut Budget) -> Option<()> {
    let words = words(a) + words(b);
    budget.spend(words * words / 2)
}

fn bounded(value: BigRational, budget: &mut Budget) -> Option<BigRational> {
    budget.spend(words(&value))?;
    (value.numer().bits() <= MAX_BITS && value.denom().bits() <= MAX_BITS).then_some(value)
}

fn power(base: &BigRational, exponent: &BigRational, budget: &mut Budget) -> Option<BigRational> {
    let times = exponent.numer().to_i32()?;
    let degree = exponent.denom().to_u32()?;
    let base = root(base, degree, budget)?;
    if base.is_zero() && times <= 0 {
        return None;
    }
    let bits = base.numer().bits().max(base.denom().bits());
    if base.abs().is_one() {
        return Some(if times % 2 == 0 { BigRational::one() } else { base });
    }
    let bits = bits.checked_mul(u64::from(times.unsigned_abs())).filter(|bits| *bits <= MAX_BITS)?;
    budget.spend(usize::try_from(bits / 64).ok()?.pow(2) / 2)?;
    Some(base.pow(times))
}

/// Returns the real root if it is rational.
fn root(base: &BigRational, degree: u32, budget: &mut Budget) -> Option<BigRational> {
    if degree == 1 {
        return Some(base.clone());
    }
    if degree == 0 || base.is_negative() {
        return None;
    }
    // Newton's method takes some dozen divisions.
    budget.spend(16 * (words(base) + 1).pow(2))?;
    let of = |x: &BigInt| {
        let root = x.nth_root(degree);
        let fits = root.bits().saturating_mul(u64::from(degree)) <= 2 * MAX_BITS;
        (fits && root.pow(degree) == *x).then_some(root)
    };
    Some(BigRational::new(of(base.numer())?, of(base.denom())?))
}

fn call(function: Function, arguments: &[BigRational], budget: &mut Budget) -> Option<BigRational> {
    match (function, arguments) {
        (Function::Root, [x, n]) if n.is_integer() => {
            let degree = n.numer().to_u32().filter(|degree| (1..=64).contains(degree))?;
            if x.is_negative() && degree % 2 == 1 {
                return Some(-root(&-x, degree, budget)?);
            }
            root(x, degree, budget)
        }
        (Function::Abs, [x]) => Some(x.abs()),
        (Function::Floor, [x]) => Some(x.floor()),
        (Function::Ceil, [x]) => Some(x.ceil()),
        (Function::Factorial, [n]) if n.is_integer() => {
            let n = n.numer().to_u32().filter(|n| *n <= 1000)?;
            // n! has about n·log2(n) bits, and each of n products touches all words so far.
            budget.spend(n as usize * (n as usize / 12 + 1))?;
            let factorial = (1..=n).fold(BigInt::one(), |product, k| product * k);
            Some(BigRational::from_integer(factorial))
        }
        (Function::Binomial, [n, k]) if n.is_integer() && k.is_integer() => {
            let n = n.numer().to_u64()?;
            let k = k.numer().to_u64()?;
            if k > n {
                return Some(BigRational::zero());
            }
            // Each factor adds at most its own bits, and each turn touches whole words.
            let k = usize::try_from(k.min(n - k)).ok().filter(|k| *k <= 2000)?;
            budget.spend(2 * k * (k * (64 - n.leading_zeros() as usize) / 128 + 1))?;
            let binomial = (0..k as u64).fold(BigInt::one(), |product, i| product * (n - i) / (i + 1));
            Some(BigRational::from_integer(binomial))
        }
        (Function::Max, [first, rest @ ..]) => Some(rest.iter().fold(first, Ord::max).clone()),
        (Function::Min, [first, rest @ ..]) => Some(rest.iter().fold(first, Ord::min).clone()),
        (Function::Gcd | Function::Lcm, values) if !values.is_empty() && values.iter().all(BigRational::is_integer) => {
            let mut all = values[0].numer().clone();
            for value in &values[1..] {
                budget.spend((words(value) + 1).pow(2))?;
                let value = value.numer();
                all = if function == Function::Gcd { all.gcd(value) } else { all.lcm(value) };
                budget.spend(usize::try_from(all.bits() / 64).ok()?)?;
            }
            Some(BigRational::from_integer(all))
        }
        // Without an explicit base it is ten; see `scalar` for the other reading.
        (Function::Log, [x]) => logarithm(x, &BigRational::from_integer(10.into()), budget),
        (Function::Log, [x, base]) => logarithm(x, base, budget),
        _ => None,
    }
}

/// Returns the logarithm if it is an integer.
fn logarithm(x: &BigRational, base: &BigRational, budget: &mut Budget) -> Option<BigRational> {
    if !x.is_positive() || *base <= BigRational::one() || !base.is_integer() {
        return None;
    }
    let (argument, sign) = if x.is_integer() { (x.numer(), 1) } else { (x.denom(), -1) };
    if sign < 0 && !x.numer().is_one() {
        return None;
    }
    let times = (argument.bits() as f64 - 1.0) / (base.numer().bits() as f64 - 1.0).max(1.0);
    let mut power = BigInt::one();
    let mut exponent = 0i64;
    // Each turn multiplies by the base, so there are no more turns than bits.
    budget.spend((times as usize + 2) * (words(x) + 1))?;
    while power < *argument {
        power *= base.numer();
        exponent += 1;
    }
    (power == *argument).then(|| BigRational::from_integer((sign * exponent).into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Answer;
    use crate::parse::{Notation, parse};

    fn value(text: &str) -> Option<String> {
        let Ok(Answer::Scalar(expr)) = parse(text, Notation::PLAIN, &mut Budget::new()) else {
            panic!("{text} is no scalar")
        };
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
            (r"28\%", "7/25"),
            (r"{3 \over 4}", "3/4"),
            (r"{5 \choose 2}", "10"),
            (r"\log_2 8", "3"),
            (r"\log_5625", "4"),
            (r"\log 0.001", "-3"),
            (r"\gcd(12, 18)", "6"),
            (r"\sum_{k=1}^{10} k^2", "385"),
            (r"\prod_{i=1}^5 i", "120"),
            ("12'345", "12345"),
            (r"12{,}\!345", "12345"),
            ("0{,}5", "1/2"),
            ("2²", "4"),
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
