//! Renames variables by order of first occurrence, so that verdicts do not depend on the letters used.

use crate::answer::{Answer, Expr};

/// Variables of several expressions in the order of their first occurrence.
#[derive(Debug, Default)]
pub(crate) struct Naming<'a>(Vec<&'a str>);

/// First character of the names that variables get in comparisons.
const MARK: char = '\u{1}';

impl<'a> Naming<'a> {
    pub(crate) fn of(exprs: &[&'a Expr]) -> Self {
        let mut names = Vec::new();
        for expr in exprs {
            expr.walk(&mut |node| {
                if let Expr::Symbol(name) = node
                    && !names.contains(&name.as_str())
                {
                    names.push(name.as_str());
                }
            });
        }
        Self(names)
    }

    /// Renames every variable of the expression by its place.
    pub(crate) fn apply(&self, expr: &Expr) -> Expr {
        match expr {
            Expr::Symbol(name) => match self.0.iter().position(|known| known == name) {
                Some(at) => Expr::Symbol(format!("{MARK}{at}")),
                None => expr.clone(),
            },
            _ => expr.map(&mut |child| self.apply(child)),
        }
    }
}

/// Returns the place of a renamed variable.
pub(super) fn place(name: &str) -> Option<u64> {
    name.strip_prefix(MARK)?.parse().ok()
}

/// Calls `visit` with every expression of an answer.
pub(crate) fn expressions<'a>(answer: &'a Answer, visit: &mut dyn FnMut(&'a Expr)) {
    match answer {
        Answer::Scalar(expr) => visit(expr),
        Answer::Sequence { items, .. }
        | Answer::Set(items)
        | Answer::List(items, _)
        | Answer::Union(items)
        | Answer::Intersection(items)
        | Answer::Equalities { sides: items, .. } => items.iter().for_each(|item| expressions(item, visit)),
        Answer::Difference(a, b) | Answer::Equation { left: a, right: b, .. } => {
            expressions(a, visit);
            expressions(b, visit);
        }
        Answer::Inequality(_, left, right) => {
            visit(left);
            visit(right);
        }
        Answer::Matrix(rows) => rows.iter().flatten().for_each(visit),
        Answer::Chain(exprs, _) | Answer::Ratio(exprs) => exprs.iter().for_each(visit),
        Answer::Quantity(inner, _) | Answer::Choice(_, inner) | Answer::For(inner, _) | Answer::Member(inner, _) => {
            expressions(inner, visit);
        }
        Answer::Cases(cases) => {
            for (value, condition) in cases {
                expressions(value, visit);
                expressions(condition, visit);
            }
        }
        Answer::Text(_) | Answer::Reals | Answer::Domain(_) | Answer::Clock(_) | Answer::Opaque(_) => {}
    }
}

/// Rebuilds the answer with every expression changed.
pub(crate) fn mapped(answer: &Answer, change: &mut dyn FnMut(&Expr) -> Expr) -> Answer {
    let mut all = |items: &[Answer]| items.iter().map(|item| mapped(item, change)).collect::<Vec<_>>();
    match answer {
        Answer::Scalar(expr) => Answer::Scalar(change(expr)),
        Answer::Sequence { open, close, items } => Answer::Sequence { open: *open, close: *close, items: all(items) },
        Answer::Set(items) => Answer::Set(all(items)),
        Answer::List(items, joint) => Answer::List(all(items), *joint),
        Answer::Union(items) => Answer::Union(all(items)),
        Answer::Intersection(items) => Answer::Intersection(all(items)),
        Answer::Equalities { sides, names } => Answer::Equalities { sides: all(sides), names: *names },
        Answer::Difference(a, b) => Answer::Difference(Box::new(mapped(a, change)), Box::new(mapped(b, change))),
        Answer::Equation { left, right, names } => {
            let left = Box::new(mapped(left, change));
            let right = Box::new(mapped(right, change));
            Answer::Equation { left, right, names: *names }
        }
        Answer::Inequality(order, left, right) => Answer::Inequality(*order, change(left), change(right)),
        Answer::Matrix(rows) => Answer::Matrix(rows.iter().map(|row| row.iter().map(&mut *change).collect()).collect()),
        Answer::Chain(exprs, orders) => Answer::Chain(exprs.iter().map(change).collect(), orders.clone()),
        Answer::Ratio(exprs) => Answer::Ratio(exprs.iter().map(change).collect()),
        Answer::Quantity(inner, unit) => Answer::Quantity(Box::new(mapped(inner, change)), unit.clone()),
        Answer::Choice(letter, inner) => Answer::Choice(letter.clone(), Box::new(mapped(inner, change))),
        Answer::For(inner, names) => Answer::For(Box::new(mapped(inner, change)), names.clone()),
        Answer::Member(inner, domain) => Answer::Member(Box::new(mapped(inner, change)), domain),
        Answer::Cases(cases) => {
            let lines = cases.iter().map(|(value, condition)| (mapped(value, change), mapped(condition, change)));
            Answer::Cases(lines.collect())
        }
        Answer::Text(_) | Answer::Reals | Answer::Domain(_) | Answer::Clock(_) | Answer::Opaque(_) => answer.clone(),
    }
}
