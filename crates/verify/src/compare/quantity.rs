//! Comparison of values with units, ratios and times.

use num_rational::BigRational;
use num_traits::ToPrimitive;

use super::{Judgement, Rule, compare as compare_answers, scalar};
use crate::answer::{Answer, Clock, Expr, Number, Unit};
use crate::limits::Budget;

/// Compares answers of which at least one has a unit. A known unit on one side only is ignored; two units must have the
/// same dimensions, and are converted by their scales.
pub(super) fn compare(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    match (gold, found) {
        (Answer::Quantity(gold, unit), Answer::Quantity(found, other)) => {
            if !unit.measures_the_same(other) {
                let rule = if other.is_known { Rule::Unit } else { Rule::Unread };
                return Judgement::new(false, rule);
            }
            if unit.scale == other.scale || unit.is_generic() || other.is_generic() {
                return compare_answers(gold, found, budget);
            }
            match (&**gold, &**found) {
                (Answer::Scalar(gold), Answer::Scalar(found)) => {
                    let judgement = scalar::compare(&scaled(gold, unit), &scaled(found, other), budget);
                    judgement.with(Rule::Unit)
                }
                _ => Judgement::new(false, Rule::Unit),
            }
        }
        (Answer::Quantity(gold, _), found) => compare_answers(gold, found, budget),
        (gold, Answer::Quantity(found, unit)) if unit.is_known => compare_answers(gold, found, budget),
        _ => Judgement::new(false, Rule::Unread),
    }
}

fn scaled(value: &Expr, unit: &Unit) -> Expr {
    Expr::Product(vec![value.clone(), Expr::Number(Number::exact(unit.scale.clone()))])
}

/// Compares answers of which at least one is a ratio, by proportion; a ratio of two parts also equals their quotient.
pub(super) fn ratios(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    let equal = match (gold, found) {
        (Answer::Ratio(gold), Answer::Ratio(found)) => gold.len() == found.len() && in_proportion(gold, found, budget),
        (Answer::Ratio(parts), Answer::Scalar(value)) => {
            quotient(parts).is_some_and(|quotient| scalar::compare(&quotient, value, budget).equal)
        }
        (Answer::Scalar(value), Answer::Ratio(parts)) => {
            quotient(parts).is_some_and(|quotient| scalar::compare(value, &quotient, budget).equal)
        }
        _ => false,
    };
    Judgement::new(equal, Rule::Ratio)
}

fn quotient(parts: &[Expr]) -> Option<Expr> {
    match parts {
        [above, below] => Some(Expr::Product(vec![above.clone(), below.clone().inverse()])),
        _ => None,
    }
}

fn in_proportion(gold: &[Expr], found: &[Expr], budget: &mut Budget) -> bool {
    let is_zero =
        |part: &Expr| matches!(part, Expr::Number(number) if number.value == BigRational::from_integer(0.into()));
    // `12:00` is a time, and in no proportion to `1:00`.
    if gold.iter().chain(found).any(is_zero) {
        return gold.iter().zip(found).all(|(gold, found)| scalar::compare(gold, found, budget).equal);
    }
    let mut crosswise = |gold: &[Expr], found: &[Expr]| {
        let product = |a: &Expr, b: &Expr| Expr::Product(vec![a.clone(), b.clone()]);
        scalar::compare(&product(&gold[0], &found[1]), &product(&gold[1], &found[0]), budget).equal
    };
    gold.windows(2).zip(found.windows(2)).all(|(gold, found)| crosswise(gold, found))
}

/// Whether the parts of a ratio are the hours and minutes of a time.
pub(super) fn is_time(parts: &[Expr], clock: Clock) -> bool {
    let number = |part: Option<&Expr>| match part {
        Some(Expr::Number(number)) if number.value.is_integer() => number.value.numer().to_u32(),
        Some(_) => None,
        None => Some(0),
    };
    let time = (number(parts.first()), number(parts.get(1)), number(parts.get(2)));
    match time {
        (Some(hour), Some(minute), Some(second)) if parts.len() <= 3 => {
            clock.same(Clock { hour, minute, second, after_noon: None })
        }
        _ => false,
    }
}
