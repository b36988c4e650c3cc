//! Decides whether two answers mean the same.

mod double;
mod numeric;
mod region;
mod relation;
mod residue;
mod scalar;

use crate::answer::{Answer, Bracket, Expr};
use crate::limits::Budget;

use region::Region;

/// What was decided, and by which rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) equal: bool,
    pub(crate) rule: Rule,
}

/// The rule that decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Exact whole numbers.
    Integer,
    /// Exact fractions.
    Rational,
    /// A decimal literal and another value at six decimals.
    Rounded,
    /// Digits with a base.
    Base,
    /// Trees that are the same.
    Identical,
    /// Rational functions modulo a prime.
    Residues,
    /// Exact values at whole numbers for the variables.
    WholeNumbers,
    /// Complex values with error bounds.
    Numeric,
    Percent,
    Text,
    Sequence,
    Set,
    /// Sets of real numbers.
    Region,
    Union,
    Matrix,
    Equation,
    Inequality,
    /// The answers are of different kinds.
    Kind,
    /// Neither equality nor difference could be shown.
    Undecided,
}

impl Rule {
    /// Snake-case name, as verdicts carry it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Rational => "rational",
            Self::Rounded => "rounded",
            Self::Base => "base",
            Self::Identical => "identical",
            Self::Residues => "residues",
            Self::WholeNumbers => "whole_numbers",
            Self::Numeric => "numeric",
            Self::Percent => "percent",
            Self::Text => "text",
            Self::Sequence => "sequence",
            Self::Set => "set",
            Self::Region => "region",
            Self::Union => "union",
            Self::Matrix => "matrix",
            Self::Equation => "equation",
            Self::Inequality => "inequality",
            Self::Kind => "kind",
            Self::Undecided => "undecided",
        }
    }
}

impl Judgement {
    fn new(equal: bool, rule: Rule) -> Self {
        Self { equal, rule }
    }

    fn undecided() -> Self {
        Self::new(false, Rule::Undecided)
    }

    fn with(self, rule: Rule) -> Self {
        if self.rule == Rule::Undecided { self } else { Self { rule, ..self } }
    }
}

/// Compares a reference with what was found. The nesting of answers is bounded by the parser, the work by `budget`.
pub(crate) fn compare(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    use Answer::{Equation, Inequality, List, Matrix, Opaque, Scalar, Sequence, Set, Text};
    if budget.step().is_none() {
        return Judgement::undecided();
    }
    match (gold, found) {
        (Scalar(gold), Scalar(found)) => scalar::compare(gold, found, budget),
        (Text(gold), Text(found)) => Judgement::new(text_key(gold) == text_key(found), Rule::Text),
        (Opaque(gold), Opaque(found)) => Judgement::new(gold == found, Rule::Identical),
        (Equation(..), _) | (_, Equation(..)) => relation::equations(gold, found, budget),
        (Inequality(..), _) | (_, Inequality(..)) => relation::inequalities(gold, found, budget),
        (Sequence { .. }, Sequence { .. }) => sequences(gold, found, budget),
        // A pair in set braces or none keeps its order as long as the reference has one …
        (Sequence { open: Bracket::Round, close: Bracket::Round, items }, List(others) | Set(others)) => {
            Judgement::new(in_order(items, others, budget), Rule::Sequence)
        }
        // … and has none when the reference has none.
        (List(items) | Set(items), Sequence { open: Bracket::Round, close: Bracket::Round, items: others }) => {
            Judgement::new(in_any_order(items, others, budget), Rule::Set)
        }
        (Set(gold) | List(gold), Set(found) | List(found)) => {
            Judgement::new(in_any_order(gold, found, budget), Rule::Set)
        }
        (Set(items) | List(items), Scalar(_)) if items.iter().all(|item| matches!(item, Scalar(_))) => {
            Judgement::new(in_any_order(items, std::slice::from_ref(found), budget), Rule::Set)
        }
        (Scalar(_), Set(items) | List(items)) if items.iter().all(|item| matches!(item, Scalar(_))) => {
            Judgement::new(in_any_order(std::slice::from_ref(gold), items, budget), Rule::Set)
        }
        (Set(items) | List(items), single) if items.len() == 1 => compare(&items[0], single, budget),
        (single, Set(items) | List(items)) if items.len() == 1 => compare(single, &items[0], budget),
        (Matrix(gold), Matrix(found)) => Judgement::new(matrices(gold, found, budget), Rule::Matrix),
        (Matrix(rows), Sequence { items, .. }) => Judgement::new(is_vector(rows, items, true, budget), Rule::Matrix),
        (Sequence { items, .. }, Matrix(rows)) => Judgement::new(is_vector(rows, items, false, budget), Rule::Matrix),
        _ => regions(gold, found, budget),
    }
}

/// What is left of words when case, spaces and marks do not count.
pub(crate) fn text_key(text: &str) -> String {
    let key: String = text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    if key == "dne" { "doesnotexist".to_owned() } else { key }
}

/// Tuples, points and intervals.
fn sequences(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    let (Answer::Sequence { open, close, items }, Answer::Sequence { open: o, close: c, items: others }) =
        (gold, found)
    else {
        return Judgement::new(false, Rule::Kind);
    };
    if open == o && close == c {
        return Judgement::new(in_order(items, others, budget), Rule::Sequence);
    }
    // With other brackets it is another interval, unless it cannot be one or the bracket is at infinity.
    match (Region::new(gold, budget), Region::new(found, budget)) {
        (Some(gold), Some(found)) => Judgement::new(gold.same(&found, budget), Rule::Region),
        _ => {
            let may_be_interval = items.len() == 2 && !items.iter().all(is_number);
            Judgement::new(!may_be_interval && in_order(items, others, budget), Rule::Sequence)
        }
    }
}

fn is_number(answer: &Answer) -> bool {
    matches!(answer, Answer::Scalar(expr) if !expr.has_symbols())
}

/// Sets of real numbers, or pieces that are none and must match one by one.
fn regions(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    if let (Some(gold), Some(found)) = (Region::new(gold, budget), Region::new(found, budget)) {
        return Judgement::new(gold.same(&found, budget), Rule::Region);
    }
    match (gold, found) {
        (Answer::Union(gold), Answer::Union(found)) | (Answer::Intersection(gold), Answer::Intersection(found)) => {
            Judgement::new(in_any_order(gold, found, budget), Rule::Union)
        }
        (Answer::Difference(gold, without), Answer::Difference(found, other)) => {
            Judgement::new(compare(gold, found, budget).equal && compare(without, other, budget).equal, Rule::Union)
        }
        _ => Judgement::new(false, Rule::Kind),
    }
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

/// Whether a matrix of one column or row holds the coordinates of a tuple.
fn is_vector(rows: &[Vec<Expr>], items: &[Answer], matrix_is_gold: bool, budget: &mut Budget) -> bool {
    let cells: Vec<&Expr> = rows.iter().flatten().collect();
    (rows.len() == 1 || rows.iter().all(|row| row.len() == 1))
        && cells.len() == items.len()
        && cells.into_iter().zip(items).all(|(cell, item)| match item {
            Answer::Scalar(item) if matrix_is_gold => scalar::compare(cell, item, budget).equal,
            Answer::Scalar(item) => scalar::compare(item, cell, budget).equal,
            _ => false,
        })
}
