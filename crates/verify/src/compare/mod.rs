//! Decides whether two answers mean the same.

mod exact;
mod numeric;
mod scalar;

use crate::answer::{Answer, Bracket, Constant, Expr, Order};
use crate::limits::Budget;

/// What was decided, and by which rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) equal: bool,
    pub(crate) rule: Rule,
}

/// The rule that decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    Integer,
    Rational,
    Numeric,
    Symbolic,
    Percent,
    Text,
    Sequence,
    Set,
    Union,
    Matrix,
    Equation,
    Inequality,
    /// The answers are of different kinds.
    Kind,
}

impl Rule {
    /// Snake-case name, as verdicts carry it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Rational => "rational",
            Self::Numeric => "numeric",
            Self::Symbolic => "symbolic",
            Self::Percent => "percent",
            Self::Text => "text",
            Self::Sequence => "sequence",
            Self::Set => "set",
            Self::Union => "union",
            Self::Matrix => "matrix",
            Self::Equation => "equation",
            Self::Inequality => "inequality",
            Self::Kind => "kind",
        }
    }
}

impl Judgement {
    fn new(equal: bool, rule: Rule) -> Self {
        Self { equal, rule }
    }

    fn with(self, rule: Rule) -> Self {
        Self { rule, ..self }
    }
}

/// Compares a reference with what was found. The nesting of answers is bounded by the parser, the work by `budget`.
pub(crate) fn compare(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    use Answer::{Equation, Inequality, List, Matrix, Scalar, Sequence, Set, Text, Union};
    if budget.step().is_none() {
        return Judgement::new(false, Rule::Kind);
    }
    match (gold, found) {
        (Scalar(gold), Scalar(found)) => scalar::compare(gold, found, budget),
        (Text(gold), Text(found)) => Judgement::new(text_key(gold) == text_key(found), Rule::Text),
        (Equation(..), _) | (_, Equation(..)) => equations(gold, found, budget),
        (Inequality(..), _) | (_, Inequality(..)) => inequalities(gold, found, budget),
        (Sequence { open, close, items }, Sequence { open: o, close: c, items: others }) => {
            // `[1, 2]` and `(1, 2)` are different intervals, but with other lengths only two ways to write a tuple.
            let same_kind = (open == o && close == c) || items.len() != 2;
            Judgement::new(same_kind && in_order(items, others, budget), Rule::Sequence)
        }
        (Sequence { open: Bracket::Round, close: Bracket::Round, items }, List(others))
        | (List(others), Sequence { open: Bracket::Round, close: Bracket::Round, items }) => {
            let is_gold = matches!(gold, Sequence { .. });
            let equal = if is_gold { in_order(items, others, budget) } else { in_order(others, items, budget) };
            Judgement::new(equal, Rule::Sequence)
        }
        (Set(gold) | List(gold), Set(found) | List(found)) => {
            Judgement::new(in_any_order(gold, found, budget), Rule::Set)
        }
        (Set(items) | List(items), single) if items.len() == 1 => compare(&items[0], single, budget),
        (single, Set(items) | List(items)) if items.len() == 1 => compare(single, &items[0], budget),
        (Union(gold), Union(found)) => Judgement::new(in_any_order(gold, found, budget), Rule::Union),
        (Matrix(gold), Matrix(found)) => Judgement::new(matrices(gold, found, budget), Rule::Matrix),
        _ => Judgement::new(false, Rule::Kind),
    }
}

/// What is left of words when case, spaces and marks do not count.
pub(crate) fn text_key(text: &str) -> String {
    text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

fn in_order(gold: &[Answer], found: &[Answer], budget: &mut Budget) -> bool {
    gold.len() == found.len() && gold.iter().zip(found).all(|(gold, found)| compare(gold, found, budget).equal)
}

/// Whether every member has an equal one on the other side; a member that is repeated counts once.
fn in_any_order(gold: &[Answer], found: &[Answer], budget: &mut Budget) -> bool {
    let mut has_equal = |one: &Answer, others: &[Answer], is_gold: bool| {
        others.iter().any(|other| {
            let (gold, found) = if is_gold { (one, other) } else { (other, one) };
            compare(gold, found, budget).equal
        })
    };
    gold.iter().all(|one| has_equal(one, found, true)) && found.iter().all(|one| has_equal(one, gold, false))
}

fn matrices(gold: &[Vec<Expr>], found: &[Vec<Expr>], budget: &mut Budget) -> bool {
    gold.len() == found.len()
        && gold.iter().zip(found).all(|(gold, found)| {
            gold.len() == found.len()
                && gold.iter().zip(found).all(|(gold, found)| scalar::compare(gold, found, budget).equal)
        })
}

fn equations(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    let equal = match (gold, found) {
        (Answer::Equation(gl, gr), Answer::Equation(fl, fr)) => {
            let same = |a: &Answer, b: &Answer, budget: &mut Budget| compare(a, b, budget).equal;
            (same(gl, fl, budget) && same(gr, fr, budget))
                || (heads_agree(gl, fl) && same(gr, fr, budget))
                || proportional([gl, gr], [fl, fr], budget)
        }
        // `x = 5` for `5`, and the other way round; but `2x + z = 1` is not the number 1.
        (Answer::Equation(left, right), found) if left.is_name() => return compare(right, found, budget),
        (gold, Answer::Equation(left, right)) => {
            if left.is_name() || is_closed(left) {
                return compare(gold, right, budget);
            }
            if right.is_name() {
                return compare(gold, left, budget);
            }
            false
        }
        _ => false,
    };
    Judgement::new(equal, Rule::Equation)
}

/// Whether the left side is a calculation, of which the right side is the result (or something nobody can read).
fn is_closed(left: &Answer) -> bool {
    match left {
        Answer::Opaque => true,
        Answer::Scalar(expr) => expr.symbols().is_empty(),
        Answer::Matrix(_) => true,
        _ => false,
    }
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

fn proportional(gold: [&Answer; 2], found: [&Answer; 2], budget: &mut Budget) -> bool {
    let scalars = |[left, right]: [&Answer; 2]| match (left, right) {
        (Answer::Scalar(left), Answer::Scalar(right)) => Some((left.clone(), right.clone())),
        _ => None,
    };
    let (Some(gold), Some(found)) = (scalars(gold), scalars(found)) else { return false };
    scalar::constant_ratio((&gold.0, &gold.1), (&found.0, &found.1), budget).is_some()
}

fn inequalities(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    let equal = match (gold, found) {
        (Answer::Inequality(op, gl, gr), Answer::Inequality(other, fl, fr)) => {
            let ratio = scalar::constant_ratio((gl, gr), (fl, fr), budget);
            let points_the_same_way = |ratio: numeric::Value| ratio.is_real() && ratio.re > 0.0;
            op == other && ratio.is_some_and(|ratio| *op == Order::NotEqual || points_the_same_way(ratio))
        }
        _ => match (as_interval(gold), as_interval(found)) {
            (Some(gold), Some(found)) => return compare(&gold, &found, budget),
            _ => false,
        },
    };
    Judgement::new(equal, Rule::Inequality)
}

/// `x < 3` as `(-∞, 3)`; an interval stays what it is.
fn as_interval(answer: &Answer) -> Option<Answer> {
    let Answer::Inequality(order, left, right) = answer else {
        return matches!(answer, Answer::Sequence { .. }).then(|| answer.clone());
    };
    let bracket = match order {
        Order::Less => Bracket::Round,
        Order::LessOrEqual => Bracket::Square,
        Order::NotEqual => return None,
    };
    let infinity = Expr::Constant(Constant::Infinity);
    let (low, high, open, close) = match (left, right) {
        (Expr::Symbol(_), bound) => (Expr::Negative(Box::new(infinity)), bound.clone(), Bracket::Round, bracket),
        (bound, Expr::Symbol(_)) => (bound.clone(), infinity, bracket, Bracket::Round),
        _ => return None,
    };
    Some(Answer::Sequence { open, close, items: vec![Answer::Scalar(low), Answer::Scalar(high)] })
}
