//! Sets of real numbers as sorted intervals, so that `(-∞, 3) ∪ (3, ∞)`, `x ≠ 3` and `ℝ \ {3}` are one set.

use std::cmp::Ordering;

use super::numeric::{Probe, value};
use super::scalar;
use crate::answer::{Answer, Bracket, Constant, Expr, Order};
use crate::limits::{Budget, MAX_ITEMS};

/// An end of an interval: where it lies, and as it was written (`None` at infinity).
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

/// Intervals in order that do not touch; a point is a closed interval from itself to itself.
#[derive(Clone, Debug)]
pub(super) struct Region(Vec<Interval>);

/// Ends closer than this are one; whether they are written values of one number is for the comparison to say.
const TOUCHING: f64 = 1e-9;

fn order(a: f64, b: f64) -> Ordering {
    let is_close = a.is_finite() && b.is_finite() && (a - b).abs() <= TOUCHING * a.abs().max(b.abs()).max(1.0);
    if is_close { Ordering::Equal } else { a.total_cmp(&b) }
}

impl End {
    fn infinite(at: f64) -> Self {
        Self { at, written: None, is_closed: false }
    }

    /// `None` when the expression has no place on the number line.
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
    /// The set of real numbers that an answer stands for; `None` when it is none.
    pub(super) fn new(answer: &Answer, budget: &mut Budget) -> Option<Self> {
        budget.step()?;
        match answer {
            Answer::Reals => Some(Self::reals()),
            Answer::Sequence { open, close, items } => match &items[..] {
                [Answer::Scalar(low), Answer::Scalar(high)] => {
                    let low = End::new(low, *open == Bracket::Square, budget)?;
                    let high = End::new(high, *close == Bracket::Square, budget)?;
                    let interval = Interval { low, high };
                    // `(3, 1)` is a point of the plane and no interval.
                    (order(interval.low.at, interval.high.at) == Ordering::Less).then(|| Self(vec![interval]))
                }
                _ => None,
            },
            Answer::Set(items) => {
                let points = items.iter().map(|item| match item {
                    Answer::Scalar(point) => {
                        let end = End::new(point, true, budget).filter(|end| end.at.is_finite())?;
                        Some(Interval { low: end.clone(), high: end })
                    }
                    _ => None,
                });
                Self::joined(points.collect::<Option<_>>()?, budget)
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
            Answer::List(pieces) => Self::of_list(pieces, budget),
            _ => None,
        }
    }

    fn reals() -> Self {
        Self(vec![Interval { low: End::infinite(f64::NEG_INFINITY), high: End::infinite(f64::INFINITY) }])
    }

    /// `x < 3`, the variable on either side.
    fn of_inequality(order: Order, left: &Expr, right: &Expr, budget: &mut Budget) -> Option<Self> {
        let mut end = |expr: &Expr, is_closed: bool| End::new(expr, is_closed, budget);
        let is_closed = order == Order::LessOrEqual;
        let (below, above) = (End::infinite(f64::NEG_INFINITY), End::infinite(f64::INFINITY));
        let intervals = match (order, left, right) {
            (Order::NotEqual, Expr::Symbol(_), point) | (Order::NotEqual, point, Expr::Symbol(_)) => {
                let point = end(point, false)?;
                vec![Interval { low: below, high: point.clone() }, Interval { low: point, high: above }]
            }
            (_, Expr::Symbol(_), bound) => vec![Interval { low: below, high: end(bound, is_closed)? }],
            (_, bound, Expr::Symbol(_)) => vec![Interval { low: end(bound, is_closed)?, high: above }],
            _ => return None,
        };
        Some(Self(intervals))
    }

    /// Several inequalities: apart from each other they can only be meant as alternatives, overlapping ones only as
    /// conditions that hold together.
    fn of_list(pieces: &[Answer], budget: &mut Budget) -> Option<Self> {
        if !pieces.iter().all(|piece| matches!(piece, Answer::Inequality(..) | Answer::Sequence { .. })) {
            return None;
        }
        let regions: Vec<Self> = pieces.iter().map(|piece| Self::new(piece, budget)).collect::<Option<_>>()?;
        let mut common = Self::reals();
        for region in &regions {
            common = common.intersection(region, budget)?;
        }
        if !common.0.is_empty() {
            return pieces.iter().all(|piece| matches!(piece, Answer::Inequality(..))).then_some(common);
        }
        Self::joined(regions.into_iter().flat_map(|region| region.0).collect(), budget)
    }

    /// Sorts intervals and joins those that touch.
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

    /// Whether two sets are the same.
    pub(super) fn same(&self, other: &Self, budget: &mut Budget) -> bool {
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(|(a, b)| a.low.same(&b.low, budget) && a.high.same(&b.high, budget))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse::{Commas, parse};

    fn same(a: &str, b: &str) -> bool {
        let read = |text: &str| {
            let answer =
                parse(text, Commas::Lists, &mut Budget::new()).unwrap_or_else(|error| panic!("{text} {error}"));
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
