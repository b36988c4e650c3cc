//! Comparison of equations and inequalities.

use super::region::Region;
use super::{Judgement, Naming, Rule, compare, scalar};
use crate::answer::{Answer, Bracket, Expr, Joint, Order};
use crate::limits::Budget;

pub(super) fn equations(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    use Answer::{Equation, List};
    // `(f(n), g(n)) = (n, 1)` is `f(n) = n, g(n) = 1`.
    if let (List(..), Some(parts)) = (gold, part_by_part(found)) {
        return compare(gold, &parts, budget);
    }
    if let (Some(parts), List(..)) = (part_by_part(gold), found)
        && matches!(found, List(items, _) if have_names(items))
    {
        return compare(&parts, found, budget);
    }
    let equal = match (gold, found) {
        (Equation { left: gl, right: gr, .. }, Equation { left: fl, right: fr, .. }) => {
            let same = |a: &Answer, b: &Answer, budget: &mut Budget| compare(a, b, budget).equal;
            (same(gl, fl, budget) && same(gr, fr, budget))
                || (same(gl, fr, budget) && same(gr, fl, budget))
                || same_function([gl, gr], [fl, fr], budget)
                || same_curve([gl, gr], [fl, fr], budget)
        }
        // `x = 5` for `5`; but the number 1 is not `2x + z = 1`.
        (Equation { right, names: true, .. }, found) => {
            let judgement = compare(right, found, budget);
            return if judgement.equal { judgement } else { points(gold, found, budget).unwrap_or(judgement) };
        }
        (Equation { left, right, .. }, Answer::Scalar(value)) => {
            scalars([left, right]).is_some_and(|sides| scalar::is_solved_for_one(sides, value, budget))
        }
        // The asked value is right of the last `=`, whatever names it on the left.
        (gold, Equation { left, right, .. }) => {
            let judgement = compare(gold, right, budget);
            if !judgement.equal && matches!(**right, Answer::Scalar(Expr::Symbol(_))) {
                return compare(gold, left, budget);
            }
            return if judgement.equal { judgement } else { points(gold, found, budget).unwrap_or(judgement) };
        }
        _ => false,
    };
    Judgement::new(equal, Rule::Equation)
}

/// `x = 1` is a point if the other side is a set of numbers.
fn points(gold: &Answer, found: &Answer, budget: &mut Budget) -> Option<Judgement> {
    if matches!(gold, Answer::Scalar(_)) || matches!(found, Answer::Scalar(_)) {
        return None;
    }
    let gold = Region::new(gold, budget)?;
    let found = Region::new(found, budget)?;
    Some(Judgement::new(gold.same(&found, budget), Rule::Region))
}

/// Splits an equation of tuples into equations of their parts.
fn part_by_part(answer: &Answer) -> Option<Answer> {
    let Answer::Equation { left, right, names: true } = answer else { return None };
    match (&**left, &**right) {
        (Answer::Sequence { items: names, .. } | Answer::List(names, _), Answer::Sequence { items: values, .. })
            if names.len() == values.len() =>
        {
            let part = |(name, value): (&Answer, &Answer)| Answer::Equation {
                left: Box::new(name.clone()),
                right: Box::new(value.clone()),
                names: true,
            };
            Some(Answer::List(names.iter().zip(values).map(part).collect(), Joint::Comma))
        }
        _ => None,
    }
}

/// Splits a named value into name and value.
fn named(item: &Answer) -> Option<(&Answer, &Answer)> {
    match item {
        Answer::Equation { left, right, names: true } => Some((left, right)),
        _ => None,
    }
}

/// Whether every member has a different name.
pub(super) fn have_names(items: &[Answer]) -> bool {
    let names: Option<Vec<_>> = items.iter().map(|item| named(item).map(|(name, _)| name)).collect();
    names.is_some_and(|names| names.iter().enumerate().all(|(at, name)| !names[..at].contains(name)))
}

/// Returns the values in order of their names if all are single letters, otherwise in the given order.
pub(super) fn by_name(items: &[Answer]) -> Vec<Answer> {
    let letter = |item: &Answer| match named(item) {
        Some((Answer::Scalar(Expr::Symbol(name)), _)) if name.chars().count() == 1 => Some(name.clone()),
        _ => None,
    };
    let mut items = items.to_vec();
    if have_names(&items) && items.iter().all(|item| letter(item).is_some()) {
        items.sort_by_key(letter);
    }
    items
}

/// Compares lists of which one has names; `None` if the names do not matter.
pub(super) fn named_lists(gold: &[Answer], found: &[Answer], budget: &mut Budget) -> Option<bool> {
    if !have_names(gold) || gold.len() != found.len() {
        return None;
    }
    if have_names(found) {
        let value_of = |name: &Answer, budget: &mut Budget| {
            let is_it = |item: &&Answer| named(item).is_some_and(|(other, _)| compare(name, other, budget).equal);
            found.iter().find(is_it).and_then(named).map(|(_, value)| value)
        };
        let mut pairs = Vec::with_capacity(gold.len());
        for item in gold {
            let (name, value) = named(item)?;
            // Under other names they are values of something else, or the same in another notation.
            pairs.push((value, value_of(name, budget)?));
        }
        return Some(pairs.into_iter().all(|(gold, found)| compare(gold, found, budget).equal));
    }
    let is_plain = found.iter().all(|item| named(item).is_none());
    if !is_plain || are_indexed(gold) {
        return None;
    }
    Some(gold.iter().zip(found).all(|(gold, found)| compare(gold, found, budget).equal))
}

/// Whether the names are one letter with indices: `x_1, x_2` are roots in any order.
fn are_indexed(items: &[Answer]) -> bool {
    let head = |item: &Answer| match named(item) {
        Some((Answer::Scalar(Expr::Symbol(name)), _)) => name.split_once('_').map(|(head, _)| head.to_owned()),
        _ => None,
    };
    let first = items.first().and_then(head);
    first.is_some() && items.iter().all(|item| head(item) == first)
}

/// Whether two equations define the same function under any name of its variable: `f(x) = x` and `f(t) = t`.
fn same_function(gold: [&Answer; 2], found: [&Answer; 2], budget: &mut Budget) -> bool {
    let head = |side: &Answer| match side {
        Answer::Scalar(Expr::Product(factors)) => match &factors[..] {
            [Expr::Symbol(head), Expr::Symbol(variable)] => Some((head.clone(), variable.clone())),
            _ => None,
        },
        _ => None,
    };
    let is_free = |name: &str, side: &Answer| {
        let mut occurs = false;
        super::naming::expressions(side, &mut |expr| occurs |= expr.symbols().contains(&name));
        !occurs
    };
    // `f(x) = 2x` and `y = 2x`
    let is_value = |side: &Answer, of: &Answer| matches!(side, Answer::Scalar(Expr::Symbol(name)) if is_free(name, of));
    let [own, other] = [head(gold[0]), head(found[0])];
    if own.is_some() && is_value(found[0], found[1]) || other.is_some() && is_value(gold[0], gold[1]) {
        return compare(gold[1], found[1], budget).equal;
    }
    let (Some((gold_head, variable)), Some((found_head, other))) = (own, other) else { return false };
    if gold_head != found_head {
        return false;
    }
    if variable != other && !is_free(&variable, found[1]) {
        return false;
    }
    let by = Expr::Symbol(variable);
    let target = Expr::Symbol(other);
    let renamed = super::naming::mapped(found[1], &mut |expr| expr.replaced(&target, &by));
    compare(gold[1], &renamed, budget).equal
}

/// Whether two equations have the same solutions: one is a multiple of the other, or one is the
/// other solved for a variable.
fn same_curve(gold: [&Answer; 2], found: [&Answer; 2], budget: &mut Budget) -> bool {
    let (Some(gold), Some(found)) = (scalars(gold), scalars(found)) else { return false };
    let naming = Naming::of(&[gold.0, gold.1, found.0, found.1]);
    let [gl, gr, fl, fr] = [gold.0, gold.1, found.0, found.1].map(|side| naming.apply(side));
    scalar::constant_ratio((&gl, &gr), (&fl, &fr), budget).is_some()
        || is_solved_form((&gl, &gr), (&fl, &fr), budget)
        || is_solved_form((&fl, &fr), (&gl, &gr), budget)
}

fn scalars([left, right]: [&Answer; 2]) -> Option<(&Expr, &Expr)> {
    match (left, right) {
        (Answer::Scalar(left), Answer::Scalar(right)) => Some((left, right)),
        _ => None,
    }
}

fn is_solved_form((left, right): (&Expr, &Expr), other: (&Expr, &Expr), budget: &mut Budget) -> bool {
    // Equations without a second variable are named numbers, and `x = 5` must not equal `2x = 10` by accident.
    matches!(left, Expr::Symbol(_)) && scalar::is_solved_by(left, right, other, budget)
}

pub(super) fn inequalities(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    if let (Answer::Inequality(order, gl, gr), Answer::Inequality(other, fl, fr)) = (gold, found) {
        let naming = Naming::of(&[gl, gr, fl, fr]);
        let [gl, gr, fl, fr] = [gl, gr, fl, fr].map(|side| naming.apply(side));
        if let Some(ratio) = scalar::constant_ratio((&gl, &gr), (&fl, &fr), budget) {
            let equal = order == other && (*order == Order::NotEqual || ratio.is_positive());
            return Judgement::new(equal, Rule::Inequality);
        }
    }
    if let (Answer::Chain(sides, orders), Answer::Chain(others, other_orders)) = (gold, found)
        && orders == other_orders
        && sides.iter().zip(others).all(|(gold, found)| scalar::compare(gold, found, budget).equal)
    {
        return Judgement::new(true, Rule::Inequality);
    }
    match (Region::new(gold, budget), Region::new(found, budget)) {
        (Some(gold), Some(found)) => Judgement::new(gold.same(&found, budget), Rule::Region),
        _ => Judgement::new(is_same_interval(gold, found, budget), Rule::Inequality),
    }
}

/// Whether the expression is a variable or a function of one.
fn is_variable(expr: &Expr) -> bool {
    match expr {
        Expr::Symbol(name) => !name.contains('('),
        Expr::Product(factors) => {
            matches!(&factors[..], [Expr::Symbol(head), Expr::Symbol(_)] if matches!(head.as_str(), "f" | "g" | "h"))
        }
        _ => false,
    }
}

/// `-1 < f < 1` and `(-1, 1)`, where the ends or what lies between them have variables.
fn is_same_interval(gold: &Answer, found: &Answer, budget: &mut Budget) -> bool {
    let ends = |answer: &Answer| match answer {
        Answer::Chain(sides, orders) => match (&sides[..], &orders[..]) {
            ([low, between, high], [at_low, at_high]) if is_variable(between) => {
                Some(([*at_low == Order::Less, *at_high == Order::Less], [low.clone(), high.clone()]))
            }
            _ => None,
        },
        Answer::Sequence { open, close, items } => match &items[..] {
            [Answer::Scalar(low), Answer::Scalar(high)] => {
                Some(([*open == Bracket::Round, *close == Bracket::Round], [low.clone(), high.clone()]))
            }
            _ => None,
        },
        _ => None,
    };
    let (Some((open, gold)), Some((others, found))) = (ends(gold), ends(found)) else { return false };
    open == others && gold.iter().zip(&found).all(|(gold, found)| scalar::compare(gold, found, budget).equal)
}
