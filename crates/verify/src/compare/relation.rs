//! Equations and inequalities.

use super::region::Region;
use super::{Judgement, Rule, compare, scalar};
use crate::answer::{Answer, Expr, Order};
use crate::limits::Budget;

pub(super) fn equations(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    let equal = match (gold, found) {
        (Answer::Equation(gl, gr), Answer::Equation(fl, fr)) => {
            let same = |a: &Answer, b: &Answer, budget: &mut Budget| compare(a, b, budget).equal;
            (same(gl, fl, budget) && same(gr, fr, budget))
                || (same(gl, fr, budget) && same(gr, fl, budget))
                || (heads_agree(gl, fl) && same(gr, fr, budget))
                || same_curve([gl, gr], [fl, fr], budget)
        }
        // `x = 5` for `5`; but the number 1 is not `2x + z = 1`.
        (Answer::Equation(left, right), found) if left.is_name() => return compare(right, found, budget),
        (Answer::Equation(..), _) => false,
        // What the reference asks for is on the right side of the last `=`, whatever it is called on the left.
        (gold, Answer::Equation(left, right)) => {
            let judgement = compare(gold, right, budget);
            return if !judgement.equal && right.is_name() { compare(gold, left, budget) } else { judgement };
        }
        _ => false,
    };
    Judgement::new(equal, Rule::Equation)
}

/// Whether two left sides are applications of the same function: `f(x)` and `f(n)`.
fn heads_agree(gold: &Answer, found: &Answer) -> bool {
    let head = |side: &Answer| match side {
        Answer::Scalar(Expr::Product(factors)) if factors.len() == 2 => match (&factors[0], &factors[1]) {
            (Expr::Symbol(head), Expr::Symbol(_)) => Some(head.clone()),
            _ => None,
        },
        _ => None,
    };
    head(gold).is_some_and(|gold| head(found) == Some(gold))
}

/// Whether the same points fulfil two equations: one is a multiple of the other, or one is the other solved for a
/// variable.
fn same_curve(gold: [&Answer; 2], found: [&Answer; 2], budget: &mut Budget) -> bool {
    let (Some(gold), Some(found)) = (scalars(gold), scalars(found)) else { return false };
    scalar::constant_ratio(gold, found, budget).is_some()
        || is_solved_form(gold, found, budget)
        || is_solved_form(found, gold, budget)
}

fn scalars([left, right]: [&Answer; 2]) -> Option<(&Expr, &Expr)> {
    match (left, right) {
        (Answer::Scalar(left), Answer::Scalar(right)) => Some((left, right)),
        _ => None,
    }
}

fn is_solved_form((left, right): (&Expr, &Expr), other: (&Expr, &Expr), budget: &mut Budget) -> bool {
    // Equations without a second variable are numbers with a name, and `x = 5` is not `2x = 10` by accident.
    matches!(left, Expr::Symbol(_)) && scalar::is_solved_by(left, right, other, budget)
}

pub(super) fn inequalities(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    if let (Answer::Inequality(order, gl, gr), Answer::Inequality(other, fl, fr)) = (gold, found)
        && let Some(ratio) = scalar::constant_ratio((gl, gr), (fl, fr), budget)
    {
        let equal = order == other && (*order == Order::NotEqual || ratio.is_positive());
        return Judgement::new(equal, Rule::Inequality);
    }
    match (Region::new(gold, budget), Region::new(found, budget)) {
        (Some(gold), Some(found)) => Judgement::new(gold.same(&found, budget), Rule::Region),
        _ => Judgement::new(false, Rule::Inequality),
    }
}
