//! Sets of real numbers as sorted intervals, so that `(-∞, 3) ∪ (3, ∞)`, `x ≠ 3` and `ℝ \ {3}` are one set.

use std::cmp::Ordering;

use super::numeric::{Probe, value};
use super::scalar;
use crate::answer::{Answer, Bracket, Constant, Expr, Function, Joint, Order};
use crate::limits::{Budget, MAX_ITEMS};

/// An end of an interval: its position, and its expression (`None` at infinity).
#[derive(Clone, Debug)]
struct End {
    at: f64,
    written: Option<Expr>,
    is_closed: bool,
}

#[derive(Clone, Debug)]
struct Interval {
    low: End,
    high: End,
}

/// Disjoint intervals in order; a point is a closed interval of length 0.
#[derive(Clone, Debug)]
pub(super) struct Region(Vec<Interval>);

/// Ends closer than this coincide; whether they are equal values is left to the comparison.
const TOUCHING: f64 = 1e-9;

fn order(a: f64, b: f64) -> Ordering {
    let is_close = a.is_finite() && b.is_finite() && (a - b).abs() <= TOUCHING * a.abs().max(b.abs()).max(1.0);
    if is_close { Ordering::Equal } else { a.total_cmp(&b) }
}

impl End {
    fn infinite(at: f64) -> Self {
        Self { at, written: None, is_closed: false }
    }

    /// Returns `None` if the expression has no position on the number line.
    fn new(expr: &Expr, is_closed: bool, budget: &mut Budget) -> Option<Self> {
        match expr {
            Expr::Constant(Constant::Infinity) => return Some(Self::infinite(f64::INFINITY)),
            Expr::Negative(inner) if matches!(**inner, Expr::Constant(Constant::Infinity)) => {
                return Some(Self::infinite(f64::NEG_INFINITY));
            }
            _ if expr.has_symbols() => return None,
            _ => {}
        }
        let at = value(expr, Probe::NONE, budget)?.position()?;
        Some(Self { at, written: Some(expr.clone()), is_closed })
    }

    fn flipped(&self) -> Self {
        Self { is_closed: !self.is_closed, ..self.clone() }
    }

    fn same(&self, other: &Self, budget: &mut Budget) -> bool {
        match (&self.written, &other.written) {
            (None, None) => self.at == other.at,
            (Some(a), Some(b)) => self.is_closed == other.is_closed && scalar::compare(a, b, budget).equal,
            _ => false,
        }
    }
}

impl Interval {
    fn is_empty(&self) -> bool {
        match order(self.low.at, self.high.at) {
            Ordering::Less => false,
            Ordering::Equal => !(self.low.is_closed && self.high.is_closed),
            Ordering::Greater => true,
        }
    }
}

impl Region {
    /// Returns the set of real numbers that an answer stands for; `None` if it stands for none.
    pub(super) fn new(answer: &Answer, budget: &mut Budget) -> Option<Self> {
        budget.step()?;
        match answer {
            Answer::Reals => Some(Self::reals()),
            Answer::Sequence { open, close, items } => match &items[..] {
                [Answer::Scalar(low), Answer::Scalar(high)] => {
                    let low = End::new(low, *open == Bracket::Square, budget)?;
                    let high = End::new(high, *close == Bracket::Square, budget)?;
                    let interval = Interval { low, high };
                    // `(3, 1)` is a point of the plane and not an interval.
                    (order(interval.low.at, interval.high.at) == Ordering::Less).then(|| Self(vec![interval]))
                }
                _ => None,
            },
            Answer::Set(items) => {
                let mut points = Vec::with_capacity(items.len());
                for item in items {
                    let Answer::Scalar(point) = item else { return None };
                    points.extend(Self::point(point, budget)?.0);
                }
                Self::joined(points, budget)
            }
            Answer::Union(pieces) => {
                let mut intervals = Vec::new();
                for piece in pieces {
                    intervals.extend(Self::new(piece, budget)?.0);
                }
                Self::joined(intervals, budget)
            }
            Answer::Intersection(pieces) => {
                let mut common = Self::reals();
                for piece in pieces {
                    common = common.intersection(&Self::new(piece, budget)?, budget)?;
                }
                Some(common)
            }
            Answer::Difference(set, without) => {
                let without = Self::new(without, budget)?.complement();
                Self::new(set, budget)?.intersection(&without, budget)
            }
            Answer::Inequality(order, left, right) => Self::of_inequality(*order, left, right, budget),
            Answer::Chain(sides, orders) => Self::of_chain(sides, orders, budget),
            Answer::List(pieces, joint) => Self::of_list(pieces, *joint, budget),
            // `x = 1`
            Answer::Equation { left, right, names: true } => match (&**left, &**right) {
                (Answer::Scalar(Expr::Symbol(_)), Answer::Scalar(point)) => Self::point(point, budget),
                _ => None,
            },
            _ => None,
        }
    }

    fn reals() -> Self {
        Self(vec![Interval { low: End::infinite(f64::NEG_INFINITY), high: End::infinite(f64::INFINITY) }])
    }

    fn point(expr: &Expr, budget: &mut Budget) -> Option<Self> {
        let end = End::new(expr, true, budget).filter(|end| end.at.is_finite())?;
        Some(Self(vec![Interval { low: end.clone(), high: end }]))
    }

    /// Solves `x < 3`, for sides that are linear in one variable or the absolute value of a linear expression.
    fn of_inequality(order: Order, left: &Expr, right: &Expr, budget: &mut Budget) -> Option<Self> {
        let is_closed = order == Order::LessOrEqual;
        let below = End::infinite(f64::NEG_INFINITY);
        let above = End::infinite(f64::INFINITY);
        match (order, left.has_symbols(), right.has_symbols()) {
            (Order::NotEqual, true, false) => preimage(left, Self::point(right, budget)?.complement(), budget),
            (Order::NotEqual, false, true) => preimage(right, Self::point(left, budget)?.complement(), budget),
            (_, true, false) => {
                let high = End::new(right, is_closed, budget)?;
                preimage(left, Self(vec![Interval { low: below, high }]), budget)
            }
            (_, false, true) => {
                let low = End::new(left, is_closed, budget)?;
                preimage(right, Self(vec![Interval { low, high: above }]), budget)
            }
            _ => None,
        }
    }

    /// Solves a chain, `1 < 2x + 1 < 5`.
    fn of_chain(sides: &[Expr], orders: &[Order], budget: &mut Budget) -> Option<Self> {
        let ([low, between, high], [at_low, at_high]) = (sides, orders) else { return None };
        let low = End::new(low, *at_low == Order::LessOrEqual, budget)?;
        let high = End::new(high, *at_high == Order::LessOrEqual, budget)?;
        let interval = Interval { low, high };
        if interval.is_empty() {
            return None;
        }
        preimage(between, Self(vec![interval]), budget)
    }

    /// Combines several conditions: `or` makes a union, `and` an intersection. Without a word, disjoint conditions can
    /// only be alternatives, and overlapping ones can only hold together.
    fn of_list(pieces: &[Answer], joint: Joint, budget: &mut Budget) -> Option<Self> {
        let is_condition = |piece: &Answer| matches!(piece, Answer::Inequality(..) | Answer::Chain(..));
        let is_set = |piece: &Answer| {
            is_condition(piece)
                || matches!(piece, Answer::Sequence { .. } | Answer::Equation { .. })
                || (joint == Joint::Or && matches!(piece, Answer::Union(_) | Answer::Set(_)))
        };
        if !pieces.iter().all(is_set) || pieces.iter().all(|piece| matches!(piece, Answer::Equation { .. })) {
            return None;
        }
        let regions: Vec<Self> = pieces.iter().map(|piece| Self::new(piece, budget)).collect::<Option<_>>()?;
        let mut common = Self::reals();
        for region in &regions {
            common = common.intersection(region, budget)?;
        }
        let are_conditions = pieces.iter().all(is_condition);
        match joint {
            Joint::And if are_conditions => return Some(common),
            Joint::Comma if !common.0.is_empty() => return are_conditions.then_some(common),
            _ => {}
        }
        Self::joined(regions.into_iter().flat_map(|region| region.0).collect(), budget)
    }

    /// Sorts intervals and merges those that touch.
    fn joined(mut intervals: Vec<Interval>, budget: &mut Budget) -> Option<Self> {
        if intervals.len() > MAX_ITEMS {
            return None;
        }
        budget.spend(intervals.len())?;
        intervals.retain(|interval| !interval.is_empty());
        intervals.sort_by(|a, b| a.low.at.total_cmp(&b.low.at).then(b.low.is_closed.cmp(&a.low.is_closed)));
        let mut joined: Vec<Interval> = Vec::with_capacity(intervals.len());
        for interval in intervals {
            let Some(last) = joined.last_mut() else {
                joined.push(interval);
                continue;
            };
            let gap = order(last.high.at, interval.low.at);
            let touches = gap == Ordering::Equal && (last.high.is_closed || interval.low.is_closed);
            if gap == Ordering::Less || (gap == Ordering::Equal && !touches) {
                joined.push(interval);
                continue;
            }
            match order(last.high.at, interval.high.at) {
                Ordering::Less => last.high = interval.high,
                Ordering::Equal => last.high.is_closed |= interval.high.is_closed,
                Ordering::Greater => {}
            }
        }
        Some(Self(joined))
    }

    fn complement(&self) -> Self {
        let mut low = End::infinite(f64::NEG_INFINITY);
        let mut gaps = Vec::with_capacity(self.0.len() + 1);
        for interval in &self.0 {
            gaps.push(Interval { low, high: interval.low.flipped() });
            low = interval.high.flipped();
        }
        gaps.push(Interval { low, high: End::infinite(f64::INFINITY) });
        gaps.retain(|gap| !gap.is_empty() && gap.low.at != f64::INFINITY && gap.high.at != f64::NEG_INFINITY);
        Self(gaps)
    }

    fn intersection(&self, other: &Self, budget: &mut Budget) -> Option<Self> {
        budget.spend(self.0.len() * other.0.len())?;
        let mut common = Vec::new();
        for a in &self.0 {
            for b in &other.0 {
                let low = match order(a.low.at, b.low.at) {
                    Ordering::Less => &b.low,
                    Ordering::Greater => &a.low,
                    Ordering::Equal if a.low.is_closed => &b.low,
                    Ordering::Equal => &a.low,
                };
                let high = match order(a.high.at, b.high.at) {
                    Ordering::Less => &a.high,
                    Ordering::Greater => &b.high,
                    Ordering::Equal if a.high.is_closed => &b.high,
                    Ordering::Equal => &a.high,
                };
                common.push(Interval { low: low.clone(), high: high.clone() });
            }
        }
        if common.len() > MAX_ITEMS {
            return None;
        }
        Self::joined(common, budget)
    }

    /// Maps the set by `factor · x + shift`.
    fn mapped(&self, factor: &Expr, shift: &Expr, budget: &mut Budget) -> Option<Self> {
        let (by, to) =
            (value(factor, Probe::NONE, budget)?.position()?, value(shift, Probe::NONE, budget)?.position()?);
        if by == 0.0 {
            return None;
        }
        let end = |end: &End| End {
            at: if end.at.is_infinite() { end.at * by.signum() } else { end.at * by + to },
            written: end
                .written
                .as_ref()
                .map(|written| Expr::Sum(vec![Expr::Product(vec![written.clone(), factor.clone()]), shift.clone()])),
            is_closed: end.is_closed,
        };
        let interval = |interval: &Interval| {
            let low = end(&interval.low);
            let high = end(&interval.high);
            if by > 0.0 { Interval { low, high } } else { Interval { low: high, high: low } }
        };
        Self::joined(self.0.iter().map(interval).collect(), budget)
    }

    /// Whether two sets are equal.
    pub(super) fn same(&self, other: &Self, budget: &mut Budget) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(a, b)| a.low.same(&b.low, budget) && a.high.same(&b.high, budget))
    }
}

/// Solves `expr ∈ set` for the only variable of the expression.
fn preimage(expr: &Expr, set: Region, budget: &mut Budget) -> Option<Region> {
    budget.step()?;
    match expr {
        Expr::Symbol(name) => return (!name.contains('(')).then_some(set),
        Expr::Call(Function::Abs, arguments) => {
            let zero = End { at: 0.0, written: Some(Expr::integer(0)), is_closed: true };
            let positive = Region(vec![Interval { low: zero, high: End::infinite(f64::INFINITY) }]);
            let right = set.intersection(&positive, budget)?;
            let left = right.mapped(&Expr::integer(-1), &Expr::integer(0), budget)?;
            let both = right.0.into_iter().chain(left.0).collect();
            return preimage(&arguments[0], Region::joined(both, budget)?, budget);
        }
        _ => {}
    }
    let names = expr.symbols();
    let first = names.first()?;
    if names.iter().any(|name| name != first) {
        return None;
    }
    let (factor, summand) = scalar::linear(expr, &Expr::Symbol((*first).to_owned()), budget)?;
    // x = (y − b) / a
    let shift = Expr::Product(vec![summand.negative(), factor.clone().inverse()]);
    set.mapped(&factor.inverse(), &shift, budget)
}

/// Whether `and` in one list and `or` in the other give the same conditions a different meaning.
pub(super) fn are_at_odds(gold: &[Answer], joint: Joint, other: Joint) -> bool {
    let has_condition = gold.iter().any(|item| matches!(item, Answer::Inequality(..) | Answer::Chain(..)));
    has_condition && matches!((joint, other), (Joint::And, Joint::Or) | (Joint::Or, Joint::And))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::{Commas, Notation, parse};

    fn same(a: &str, b: &str) -> bool {
        let read = |text: &str| {
            let notation = Notation { commas: Commas::Lists, ..Notation::PLAIN };
            let answer = parse(text, notation, &mut Budget::new()).unwrap_or_else(|error| panic!("{text} {error}"));
            Region::new(&answer, &mut Budget::new()).unwrap_or_else(|| panic!("{text} is no set of numbers"))
        };
        read(a).same(&read(b), &mut Budget::new())
    }

    #[test]
    fn a_set_has_many_names() {
        for (a, b) in [
            (r"[1,2] \cup [2,3]", "[1,3]"),
            (r"(1,2) \cup \{2\} \cup (2,3)", "(1,3)"),
            (r"(1,3) \cap [2,5]", "[2,3)"),
            (r"\mathbb{R} \setminus \{3\}", r"(-\infty,3) \cup (3,\infty)"),
            (r"x \ne 3", r"(-\infty,3) \cup (3,\infty)"),
            (r"x < -1 \text{ or } x > 1", r"(1,\infty) \cup (-\infty,-1)"),
            (r"x > 1 \text{ and } x \le 2", "(1,2]"),
            (r"\mathbb{R}", r"(-\infty,\infty)"),
            (r"((1,2) \cup (3,4)) \cup (5,6)", r"(5,6) \cup (3,4) \cup (1,2)"),
            (r"\{x \mid x > 3\}", r"(3,\infty)"),
            (r"[0,10] \setminus (2,3]", r"[0,2] \cup (3,10]"),
        ] {
            assert!(same(a, b), "{a} and {b}");
        }
        for (a, b) in [
            (r"(1,2) \cup (2,3)", "(1,3)"),
            (r"[1,2)", "[1,2]"),
            (r"x \ne 3", r"\mathbb{R}"),
            (r"(-\infty,3] \cup (3,\infty)", r"x \ne 3"),
        ] {
            assert!(!same(a, b), "{a} and {b}");
        }
    }
}
