//! Equality of expressions.

use num_rational::BigRational;
use num_traits::{Signed, ToPrimitive};

use super::exact::exact;
use super::numeric::{Probe, Value, value};
use super::{Judgement, Rule};
use crate::answer::{Expr, Number};
use crate::limits::Budget;

/// Decimals from which on a literal counts as a rounded value: `0.666667` stands for 2/3, `0.67` does not.
const ROUNDED_DECIMALS: u32 = 6;

pub(super) fn compare(gold: &Expr, found: &Expr, budget: &mut Budget) -> Judgement {
    match (gold, found) {
        // A percentage may be written without its sign, or as a fraction of one.
        (Expr::Percent(gold), Expr::Percent(found)) => compare(gold, found, budget).with(Rule::Percent),
        (Expr::Percent(inner), plain) | (plain, Expr::Percent(inner)) => {
            let as_written = compare(inner, plain, budget);
            let judgement = if as_written.equal { as_written } else { plain_compare(gold, found, budget) };
            judgement.with(Rule::Percent)
        }
        _ => plain_compare(gold, found, budget),
    }
}

fn plain_compare(gold: &Expr, found: &Expr, budget: &mut Budget) -> Judgement {
    match (exact(gold, budget), exact(found, budget)) {
        (Some(a), Some(b)) => {
            let rule = if a.is_integer() && b.is_integer() { Rule::Integer } else { Rule::Rational };
            Judgement { equal: a == b || is_rounded(gold, found, &a, &b), rule }
        }
        (a, b) => {
            let has_variables = !gold.symbols().is_empty() || !found.symbols().is_empty();
            let rule = if has_variables { Rule::Symbolic } else { Rule::Numeric };
            let equal = gold == found || numerically(gold, found, has_variables, budget);
            let rounded = !equal && !has_variables && rounds_to((gold, &a), (found, &b), budget);
            Judgement { equal: equal || rounded, rule }
        }
    }
}

fn numerically(gold: &Expr, found: &Expr, has_variables: bool, budget: &mut Budget) -> bool {
    let probes = if has_variables { &Probe::ALL[..] } else { &Probe::ALL[..1] };
    let mut agreeing = 0;
    for probe in probes {
        match (value(gold, *probe, budget), value(found, *probe, budget)) {
            (Some(a), Some(b)) => match a.agrees(b) {
                Some(true) => agreeing += 1,
                Some(false) => return false,
                None => {}
            },
            (None, None) => {}
            // A point at which only one of them has a value says that they differ.
            _ => return false,
        }
    }
    agreeing * 2 > probes.len() || (has_variables && agreeing >= 2)
}

/// The decimal literal that an expression is, sign apart.
fn literal(expr: &Expr) -> Option<&Number> {
    match expr {
        Expr::Number(number) => Some(number),
        Expr::Negative(inner) => literal(inner),
        _ => None,
    }
}

/// Half a unit in the last place of a literal with many decimals.
fn half_unit(expr: &Expr) -> Option<BigRational> {
    let decimals = literal(expr)?.decimals.filter(|decimals| *decimals >= ROUNDED_DECIMALS)?;
    Some(BigRational::new(1.into(), num_bigint::BigInt::from(10).pow(decimals) * 2))
}

/// Whether one of two rationals is a decimal with many places to which the other, not a decimal itself, rounds.
fn is_rounded(gold: &Expr, found: &Expr, a: &BigRational, b: &BigRational) -> bool {
    let is_decimal = |expr: &Expr| literal(expr).is_some_and(|number| number.decimals.is_some());
    if is_decimal(gold) && is_decimal(found) {
        return false;
    }
    [gold, found].into_iter().filter_map(half_unit).any(|half| (a - b).abs() <= half)
}

fn rounds_to(
    (gold, a): (&Expr, &Option<BigRational>),
    (found, b): (&Expr, &Option<BigRational>),
    budget: &mut Budget,
) -> bool {
    let half = match (a, b) {
        (Some(_), None) => half_unit(gold),
        (None, Some(_)) => half_unit(found),
        _ => None,
    };
    let Some(half) = half.and_then(|half| half.to_f64()) else { return false };
    let probe = Probe::ALL[0];
    match (value(gold, probe, budget), value(found, probe, budget)) {
        (Some(a), Some(b)) => (a.re - b.re).abs() <= half && a.is_real() && b.is_real(),
        _ => false,
    }
}

/// The factor by which `found` is `gold` at every probe: 1 for equal, −1 for opposite, `None` when there is none.
pub(super) fn constant_ratio(gold: (&Expr, &Expr), found: (&Expr, &Expr), budget: &mut Budget) -> Option<Value> {
    let mut ratio: Option<Value> = None;
    let mut agreeing = 0;
    for probe in Probe::ALL {
        let mut difference = |(left, right): (&Expr, &Expr)| {
            let difference = value(left, probe, budget)?.minus(value(right, probe, budget)?)?;
            (difference.magnitude() > 1e3 * difference.error).then_some(difference)
        };
        let (Some(a), Some(b)) = (difference(gold), difference(found)) else { continue };
        let here = b.times(a.inverted()?)?;
        match ratio {
            Some(before) if before.agrees(here) != Some(true) => return None,
            _ => ratio = Some(here),
        }
        agreeing += 1;
    }
    ratio.filter(|_| agreeing >= 2)
}
