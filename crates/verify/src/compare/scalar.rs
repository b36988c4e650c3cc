//! Equality of expressions, by the first of these methods that decides:
//!
//! 1. exact rational values;
//! 2. for a decimal literal, agreement with the other value to six decimals;
//! 3. residues of rational functions modulo a prime;
//! 4. integers for the variables, if factorials or signs `(-1)^n` call for them;
//! 5. complex values with error bounds.

use num_rational::BigRational;
use num_traits::Signed;

use super::naming::Naming;
use super::numeric::{Agreement, Probe, Value, value};
use super::{Judgement, Rule, residue};
use crate::answer::{Answer, Constant, Expr, Function, Number};
use crate::exact::{exact, exact_at};
use crate::limits::Budget;

pub(super) fn compare(gold: &Expr, found: &Expr, budget: &mut Budget) -> Judgement {
    match (gold, found) {
        // A percentage may be written without its sign, or as a fraction.
        (Expr::Percent(gold), Expr::Percent(found)) => compare(gold, found, budget).with(Rule::Percent),
        (Expr::Percent(inner), plain) | (plain, Expr::Percent(inner)) => {
            let as_written = plain_compare(inner, plain, budget);
            let judgement = if as_written.equal { as_written } else { plain_compare(gold, found, budget) };
            judgement.with(Rule::Percent)
        }
        _ => in_degrees(gold, found, budget),
    }
}

/// A degree sign on one side only: 45° equal π/4, and 45 if the other side has no π that would make it radians.
fn in_degrees(gold: &Expr, found: &Expr, budget: &mut Budget) -> Judgement {
    let judgement = plain_compare(gold, found, budget);
    let in_gold = has(gold, Constant::Degree);
    let in_found = has(found, Constant::Degree);
    if judgement.equal || in_gold == in_found {
        return judgement;
    }
    let (with, without) = if in_gold { (gold, found) } else { (found, gold) };
    if has(without, Constant::Pi) {
        return judgement;
    }
    let plain = without_degrees(with);
    if in_gold { plain_compare(&plain, found, budget) } else { plain_compare(gold, &plain, budget) }
}

fn has(expr: &Expr, constant: Constant) -> bool {
    expr.any(|node| *node == Expr::Constant(constant))
}

/// Removes degree signs, except from angles that a function is applied to.
fn without_degrees(expr: &Expr) -> Expr {
    match expr {
        Expr::Call(function, _) if function.takes_angle() => expr.clone(),
        Expr::Product(factors) => {
            let rest: Vec<Expr> = factors
                .iter()
                .filter(|factor| **factor != Expr::Constant(Constant::Degree))
                .map(without_degrees)
                .collect();
            if rest.is_empty() { Expr::integer(1) } else { Expr::product(rest) }
        }
        _ => expr.map(&mut without_degrees),
    }
}

fn plain_compare(gold: &Expr, found: &Expr, budget: &mut Budget) -> Judgement {
    let judgement = decide(gold, found, budget);
    if judgement.equal {
        return judgement;
    }
    // A logarithm without a base is decimal in some books and natural in others; both sides are read alike.
    let is_bare_log = |node: &Expr| matches!(node, Expr::Call(Function::Log, arguments) if arguments.len() == 1);
    // Next to a natural logarithm, one without a base is not natural too.
    let is_mixed = |side: &Expr| side.any(is_bare_log) && side.any(|node| matches!(node, Expr::Call(Function::Ln, _)));
    if (gold.any(is_bare_log) || found.any(is_bare_log)) && !is_mixed(gold) && !is_mixed(found) {
        let second = decide(&natural_logs(gold), &natural_logs(found), budget);
        if second.equal {
            return second;
        }
    }
    // `1/(N+1)` and `1/(n+1)` are the same, unless one side uses both letters.
    if differ_in_case_only(gold, found) {
        let second = decide(&gold.lower_case(), &found.lower_case(), budget);
        if second.equal {
            return second;
        }
    }
    judgement
}

fn natural_logs(expr: &Expr) -> Expr {
    match expr.map(&mut natural_logs) {
        Expr::Call(Function::Log, arguments) if arguments.len() == 1 => Expr::Call(Function::Ln, arguments),
        other => other,
    }
}

fn differ_in_case_only(gold: &Expr, found: &Expr) -> bool {
    let names = |expr: &Expr| {
        let mut names: Vec<String> = expr.symbols().into_iter().map(str::to_owned).collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    let lower = |names: &[String]| {
        let mut names: Vec<String> = names.iter().map(|name| name.to_lowercase()).collect();
        names.sort_unstable();
        names.dedup();
        names
    };
    let gold = names(gold);
    let found = names(found);
    let gold_lower = lower(&gold);
    let found_lower = lower(&found);
    gold != found && gold_lower == found_lower && gold_lower.len() == gold.len() && found_lower.len() == found.len()
}

fn decide(gold: &Expr, found: &Expr, budget: &mut Budget) -> Judgement {
    let values = (exact(gold, budget), exact(found, budget));
    if let (Some(a), Some(b)) = &values {
        let rule = if a.is_integer() && b.is_integer() { Rule::Integer } else { Rule::Rational };
        if a != b && rounds_to((gold, a), (found, b)) {
            return Judgement::new(true, Rule::Rounded);
        }
        return Judgement::new(a == b, rule);
    }
    if is_infinite(gold) || is_infinite(found) {
        return Judgement::new(gold == found, Rule::Identical);
    }
    if let Some(equal) = same_digits(gold, found) {
        return Judgement::new(equal, Rule::Base);
    }
    if gold == found {
        return Judgement::new(true, Rule::Identical);
    }
    // Such powers of e are never rational, however close: e^{π√163} and its nearest integer.
    if matches!(&values, (Some(_), None)) && is_transcendental(found)
        || matches!(&values, (None, Some(_))) && is_transcendental(gold) && decimal(found).is_none()
    {
        let literal = decimal(gold).is_some() || decimal(found).is_some();
        if !literal {
            return Judgement::new(false, Rule::Numeric);
        }
    }
    match (&values, decimal(gold), decimal(found)) {
        ((Some(literal), None), Some(_), _) if !found.has_symbols() => return rounded(found, literal, budget),
        ((None, Some(literal)), _, Some(_)) if !gold.has_symbols() => return rounded(gold, literal, budget),
        _ => {}
    }
    // From here on variables get values, which must not depend on the letters.
    let naming = Naming::of(&[gold, found]);
    let (gold, found) = &(naming.apply(gold), naming.apply(found));
    if let Some(equal) = residue::equal(gold, found, budget) {
        return Judgement::new(equal, Rule::Residues);
    }
    if means_whole_numbers(gold) || means_whole_numbers(found) {
        return at_whole_numbers(gold, found, budget);
    }
    // Floors agree between their steps, so every integer has to be tried.
    let has_steps = |expr: &Expr| {
        expr.any(|node| matches!(node, Expr::Call(Function::Floor | Function::Ceil, arguments) if arguments[0].has_symbols()))
    };
    if has_steps(gold) || has_steps(found) {
        let judgement = at_points(gold, found, Probe::grid(), budget);
        if !judgement.equal {
            return judgement;
        }
    }
    at_points(gold, found, Probe::all(false), budget)
}

/// Whether an expression is a power `e^a` or `e^{aπ}` with a real algebraic number `a` other than zero, which is
/// transcendental (Lindemann; Gelfond and Schneider).
fn is_transcendental(expr: &Expr) -> bool {
    let is_algebraic = |exponent: &Expr| {
        !exponent.any(|node| match node {
            Expr::Constant(constant) => *constant != Constant::Pi,
            Expr::Symbol(_) | Expr::PlusMinus(_) | Expr::MinusPlus(_) | Expr::Matrix(_) => true,
            Expr::Call(function, _) => *function != Function::Root,
            Expr::Power(_, power) => !matches!(&**power, Expr::Number(_)),
            _ => false,
        })
    };
    let is_multiple = |exponent: &Expr| match exponent {
        Expr::Product(factors) => {
            let pis = factors.iter().filter(|factor| **factor == Expr::Constant(Constant::Pi)).count();
            let others =
                factors.iter().all(|factor| *factor == Expr::Constant(Constant::Pi) || !has(factor, Constant::Pi));
            pis <= 1 && others
        }
        one => *one == Expr::Constant(Constant::Pi) || !has(one, Constant::Pi),
    };
    let exponent = match expr {
        Expr::Power(base, exponent) if **base == Expr::Constant(Constant::Euler) => exponent,
        Expr::Call(Function::Exp, arguments) => &arguments[0],
        Expr::Negative(inner) | Expr::Inverse(inner) => return is_transcendental(inner),
        _ => return false,
    };
    is_algebraic(exponent)
        && is_multiple(exponent)
        && value(exponent, Probe::NONE, &mut Budget::new()).is_some_and(|value| value.is_real() && value.is_nonzero())
}

fn is_infinite(expr: &Expr) -> bool {
    match expr {
        Expr::Constant(Constant::Infinity) => true,
        Expr::Negative(inner) => is_infinite(inner),
        _ => false,
    }
}

/// Compares digits with a base: digits and base must be the same; a side without a base takes the other's.
fn same_digits(gold: &Expr, found: &Expr) -> Option<bool> {
    let digits = |expr: &Expr| match expr {
        Expr::Symbol(name) => {
            let (digits, base) = name.split_once('_')?;
            let are_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            (are_digits(digits) && are_digits(base)).then(|| (digits.to_owned(), Some(base.to_owned())))
        }
        Expr::Number(number) if number.value.is_integer() => Some((number.value.to_string(), None)),
        _ => None,
    };
    let gold = digits(gold)?;
    let found = digits(found)?;
    let same_base = gold.1.is_none() || found.1.is_none() || gold.1 == found.1;
    Some(gold.0 == found.0 && same_base)
}

/// Returns the decimal literal of an expression, ignoring sign and percent sign.
fn decimal(expr: &Expr) -> Option<&Number> {
    match expr {
        Expr::Number(number) => Some(number).filter(|number| number.is_decimal),
        Expr::Negative(inner) | Expr::Percent(inner) => decimal(inner),
        _ => None,
    }
}

/// Decimals to which a literal must agree with another value.
const DECIMALS: u32 = 6;

fn unit() -> BigRational {
    BigRational::new(1.into(), num_bigint::BigInt::from(10).pow(DECIMALS))
}

/// Whether one of two values is a decimal literal, and they agree to six decimals.
fn rounds_to((gold, a): (&Expr, &BigRational), (found, b): (&Expr, &BigRational)) -> bool {
    if decimal(gold).is_none() && decimal(found).is_none() {
        return false;
    }
    let half: BigRational = BigRational::new(1.into(), 2.into());
    let at_decimals = |value: &BigRational| (value / unit() + &half).floor();
    let size = a.abs().max(b.abs());
    // Small numbers must also agree relative to their size.
    (a - b).abs() <= size / BigRational::from_integer(1000.into()) && at_decimals(a) == at_decimals(b)
}

/// Whether an irrational value rounds to a decimal literal.
fn rounded(expr: &Expr, literal: &BigRational, budget: &mut Budget) -> Judgement {
    let Some(value) = value(expr, Probe::NONE, budget) else { return Judgement::undecided() };
    let half_unit = 0.5e-6_f64;
    let near_enough = half_unit.min(value.magnitude() / 1000.0);
    // The literal may have more digits than are compared.
    let half: BigRational = BigRational::new(1.into(), 2.into());
    let literal = (literal / unit() + half).floor() * unit();
    Judgement::new(value.is_within(near_enough, &literal), Rule::Rounded)
}

/// Whether an expression makes sense for integers only.
fn means_whole_numbers(expr: &Expr) -> bool {
    expr.any(|node| match node {
        Expr::Call(Function::Factorial | Function::Binomial | Function::Gcd | Function::Lcm, arguments) => {
            arguments.iter().any(Expr::has_symbols)
        }
        Expr::Power(base, exponent) => {
            exponent.has_symbols() && matches!(&**base, Expr::Negative(base) if !base.has_symbols())
        }
        _ => false,
    })
}

fn at_whole_numbers(gold: &Expr, found: &Expr, budget: &mut Budget) -> Judgement {
    let mut agreeing = 0;
    for probe in Probe::all(true) {
        let variables = |name: &str| probe.whole_value(name);
        match (exact_at(gold, &variables, budget), exact_at(found, &variables, budget)) {
            (Some(a), Some(b)) if a == b => agreeing += 1,
            (Some(_), Some(_)) => return Judgement::new(false, Rule::WholeNumbers),
            // If one side has no value (a factorial of a negative number), the point shows nothing.
            _ => {}
        }
    }
    if agreeing > 1 {
        Judgement::new(true, Rule::WholeNumbers)
    } else {
        at_points(gold, found, Probe::all(true), budget)
    }
}

/// Number of agreeing points after which no more are tried.
const ENOUGH: u32 = 5;

fn at_points(gold: &Expr, found: &Expr, probes: impl Iterator<Item = Probe>, budget: &mut Budget) -> Judgement {
    let has_variables = gold.has_symbols() || found.has_symbols();
    let is_complex = has(gold, Constant::Imaginary) || has(found, Constant::Imaginary);
    let mut agreeing = 0;
    for probe in probes {
        let probe = probe.over(has_variables, is_complex);
        if let (Some(a), Some(b)) = (value(gold, probe, budget), value(found, probe, budget)) {
            match a.agreement(b) {
                Agreement::Same => agreeing += 1,
                Agreement::Different => return Judgement::new(false, Rule::Numeric),
                Agreement::Unknown => {}
            }
        }
        if !has_variables || (agreeing >= ENOUGH && !probe.is_of_grid()) {
            break;
        }
    }
    let enough = if has_variables { 2 } else { 1 };
    if agreeing >= enough { Judgement::new(true, Rule::Numeric) } else { Judgement::undecided() }
}

/// Returns the constant ratio of two differences of sides over all probes; `None` if there is none.
pub(super) fn constant_ratio(gold: (&Expr, &Expr), found: (&Expr, &Expr), budget: &mut Budget) -> Option<Value> {
    let mut ratio: Option<Value> = None;
    let mut agreeing = 0;
    for probe in Probe::all(false) {
        let probe = probe.over(true, false);
        let mut difference =
            |(left, right): (&Expr, &Expr)| value(left, probe, budget)?.minus(value(right, probe, budget)?);
        let (Some(a), Some(b)) = (difference(gold), difference(found)) else { continue };
        if !a.is_nonzero() || !b.is_nonzero() {
            continue;
        }
        let here = b.times(a.inverted()?)?;
        match ratio {
            Some(before) if before.agreement(here) != Agreement::Same => return None,
            _ => ratio = Some(here),
        }
        agreeing += 1;
    }
    ratio.filter(|_| agreeing >= 3)
}

/// Whether `left = right` holds with `by` in place of a variable, and for no other value of it: in an equation that is
/// linear in the variable, one solution is the only one.
pub(super) fn is_solved_by(variable: &Expr, by: &Expr, (left, right): (&Expr, &Expr), budget: &mut Budget) -> bool {
    if by.any(|node| node == variable) || !left.any(|node| node == variable) && !right.any(|node| node == variable) {
        return false;
    }
    let at = |replacement: &Expr| (left.replaced(variable, replacement), right.replaced(variable, replacement));
    let (solved_left, solved_right) = at(by);
    if !decide(&solved_left, &solved_right, budget).equal {
        return false;
    }
    // Linear: the difference of the sides at three equally spaced values has no second difference, but a first one.
    let sides: Vec<Expr> = [2, 5, 8]
        .map(|value| at(&Expr::integer(value)))
        .into_iter()
        .map(|(left, right)| Expr::Sum(vec![left, right.negative()]))
        .collect();
    let [a, b, c] = &sides[..] else { return false };
    let doubled = Expr::Product(vec![Expr::integer(2), b.clone()]);
    let outer = Expr::Sum(vec![a.clone(), c.clone()]);
    decide(&outer, &doubled, budget).equal
        && decide(a, b, budget).rule != Rule::Undecided
        && !decide(a, b, budget).equal
}

/// Whether a value is what an equation gives for the one variable that the value lacks, while it has all others: `y =
/// 2x` and `2x`, but neither `xy = 6` and `6` nor `7 = 11a + c` and `11a + c`.
pub(super) fn is_solved_for_one(sides: (&Expr, &Expr), value: &Expr, budget: &mut Budget) -> bool {
    let of_equation = names(&[sides.0, sides.1]);
    let of_value = names(&[value]);
    let mut missing = of_equation.iter().filter(|name| !of_value.contains(name));
    let (Some(variable), None) = (missing.next(), missing.next()) else { return false };
    let variable = Expr::Symbol((*variable).to_owned());
    !of_value.is_empty()
        && of_value.iter().all(|name| of_equation.contains(name))
        && is_solved_by(&variable, value, sides, budget)
}

fn names<'a>(exprs: &[&'a Expr]) -> Vec<&'a str> {
    let mut names: Vec<&str> = exprs.iter().flat_map(|expr| expr.symbols()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Whether two sides are different numbers; a decimal stands for any number that rounds to it.
pub(crate) fn numbers_differ(a: &Answer, b: &Answer, budget: &mut Budget) -> bool {
    let number = |answer: &Answer| match answer {
        Answer::Scalar(expr) if !expr.has_symbols() && !is_infinite(expr) => Some(expr.clone()),
        _ => None,
    };
    let (Some(a), Some(b)) = (number(a), number(b)) else { return false };
    let judgement = compare(&a, &b, budget);
    if judgement.equal || judgement.rule == Rule::Undecided {
        return false;
    }
    if decimal(&a).is_none() && decimal(&b).is_none() {
        return true;
    }
    /// Allowed relative error of a rounded value.
    const ROUGHLY: f64 = 0.01;
    match (value(&a, Probe::NONE, budget), value(&b, Probe::NONE, budget)) {
        (Some(a), Some(b)) => a.minus(b).is_none_or(|off| off.magnitude() > ROUGHLY * a.magnitude()),
        _ => false,
    }
}

/// Returns coefficient and constant of an expression that is linear in a variable; `None` if it is not linear.
pub(super) fn linear(expr: &Expr, variable: &Expr, budget: &mut Budget) -> Option<(Expr, Expr)> {
    let at = |value: Expr| expr.replaced(variable, &value);
    let fraction = |above: i64, below: i64| Expr::Product(vec![Expr::integer(above), Expr::integer(below).inverse()]);
    let summand = at(Expr::integer(0));
    let factor = Expr::Sum(vec![at(Expr::integer(1)), summand.clone().negative()]);
    for place in [fraction(5, 2), fraction(-7, 3)] {
        let line = Expr::Sum(vec![Expr::Product(vec![factor.clone(), place.clone()]), summand.clone()]);
        if !decide(&at(place), &line, budget).equal {
            return None;
        }
    }
    Some((factor, summand))
}
