//! Decides whether two answers mean the same.

mod double;
mod naming;
mod numeric;
mod quantity;
mod region;
mod relation;
mod residue;
mod scalar;

use crate::answer::{Answer, Bracket, Expr, Joint};
use crate::limits::Budget;

use naming::Naming;
pub(crate) use naming::{expressions, mapped};
use region::Region;
pub(crate) use scalar::numbers_differ;

/// Outcome of a comparison, and the rule that decided it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) equal: bool,
    pub(crate) rule: Rule,
}

/// The rule that decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// Exact comparison of integers.
    Integer,
    /// Exact comparison of fractions.
    Rational,
    /// A decimal literal agrees with another value to six decimals.
    Rounded,
    /// Digits with an explicit base.
    Base,
    /// The trees are identical.
    Identical,
    /// Rational functions, compared modulo a prime.
    Residues,
    /// Exact values with integers for the variables.
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
    /// Parts of a ratio.
    Ratio,
    /// Times of day.
    Clock,
    /// Units of different dimensions, or different counted things.
    Unit,
    /// The letter of a choice.
    Choice,
    /// Functions by cases.
    Cases,
    /// The answers are of different kinds.
    Kind,
    /// The answer contains unknown words that the reference does not have.
    Unread,
    /// Neither equality nor difference could be established.
    Undecided,
}

impl Rule {
    /// Returns the snake-case name, as verdicts show it.
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
            Self::Ratio => "ratio",
            Self::Clock => "clock",
            Self::Unit => "unit",
            Self::Choice => "choice",
            Self::Cases => "cases",
            Self::Kind => "kind",
            Self::Unread => "unread",
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
        if matches!(self.rule, Rule::Undecided | Rule::Unread) { self } else { Self { rule, ..self } }
    }
}

/// Compares a reference with an answer. The parser bounds the nesting of answers, `budget` the work.
pub(crate) fn compare(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    use Answer::{
        Cases, Chain, Choice, Clock, Equation, Inequality, List, Matrix, Opaque, Quantity, Ratio, Scalar, Sequence,
        Set, Text,
    };
    // Out of budget is undecided and not different: whether the answer is wrong has not been established.
    if budget.step().is_none() {
        return Judgement::undecided();
    }
    match (gold, found) {
        // The order of the arms is the rule: the first that fits decides, and what is special comes before what is general.
        (Scalar(gold), Scalar(found)) => scalar::compare(gold, found, budget),
        (Quantity(..), _) | (_, Quantity(..)) => quantity::compare(gold, found, budget),
        (Choice(..), _) | (_, Choice(..)) => choices(gold, found, budget),
        (Text(gold), Text(found)) => Judgement::new(text_key(gold) == text_key(found), Rule::Text),
        (Text(word), Scalar(number)) | (Scalar(number), Text(word)) => {
            let counted = counting_word(word).map(Expr::integer);
            Judgement::new(counted.is_some_and(|counted| scalar::compare(&counted, number, budget).equal), Rule::Text)
        }
        (Text(word), Set(items)) | (Set(items), Text(word)) => {
            Judgement::new(items.is_empty() && means_nothing(word), Rule::Set)
        }
        (Opaque(gold), Opaque(found)) => Judgement::new(gold == found, Rule::Identical),
        (Clock(gold), Clock(found)) => Judgement::new(gold.same(*found), Rule::Clock),
        (Clock(clock), Ratio(parts)) | (Ratio(parts), Clock(clock)) => {
            Judgement::new(quantity::is_time(parts, *clock), Rule::Clock)
        }
        (Equation { .. }, _) | (_, Equation { .. }) => relation::equations(gold, found, budget),
        (Ratio(_), _) | (_, Ratio(_)) => quantity::ratios(gold, found, budget),
        (Cases(gold), Cases(found)) => cases(gold, found, budget),
        (Inequality(..) | Chain(..), _) | (_, Inequality(..) | Chain(..)) => {
            relation::inequalities(gold, found, budget)
        }
        (Sequence { .. }, Sequence { .. }) => sequences(gold, found, budget),
        // A pair in set braces or without brackets keeps its order as long as the reference has an order …
        (Sequence { open: Bracket::Round, close: Bracket::Round, items }, List(others, _) | Set(others)) => {
            let others = relation::by_name(others);
            Judgement::new(in_order(items, &others, budget), Rule::Sequence)
        }
        // … and has no order if the reference has none, unless the reference names its members.
        (List(items, _) | Set(items), Sequence { open: Bracket::Round, close: Bracket::Round, items: others }) => {
            if relation::have_names(items) {
                return Judgement::new(in_order(&relation::by_name(items), others, budget), Rule::Sequence);
            }
            Judgement::new(in_any_order(items, others, budget), Rule::Set)
        }
        (List(items, joint), List(others, other)) => lists((items, *joint), (others, *other), budget),
        (Set(gold) | List(gold, _), Set(found) | List(found, _)) => {
            Judgement::new(in_any_order(gold, found, budget), Rule::Set)
        }
        (Set(items) | List(items, _), Scalar(_)) if items.iter().all(|item| matches!(item, Scalar(_))) => {
            Judgement::new(in_any_order(items, std::slice::from_ref(found), budget), Rule::Set)
        }
        (Scalar(_), Set(items) | List(items, _)) if items.iter().all(|item| matches!(item, Scalar(_))) => {
            Judgement::new(in_any_order(std::slice::from_ref(gold), items, budget), Rule::Set)
        }
        (Set(items) | List(items, _), single) if items.len() == 1 => compare(&items[0], single, budget),
        (single, Set(items) | List(items, _)) if items.len() == 1 => compare(single, &items[0], budget),
        (Matrix(gold), Matrix(found)) => Judgement::new(matrices(gold, found, budget), Rule::Matrix),
        (Matrix(rows), Sequence { items, .. }) => Judgement::new(is_vector(rows, items, true, budget), Rule::Matrix),
        (Sequence { items, .. }, Matrix(rows)) => Judgement::new(is_vector(rows, items, false, budget), Rule::Matrix),
        (Answer::Domain(gold), Answer::Domain(found)) => Judgement::new(gold == found, Rule::Set),
        (Answer::Member(gold, domain), Answer::Member(found, other)) => {
            Judgement::new(domain == other && compare(gold, found, budget).equal, Rule::Set)
        }
        _ => regions(gold, found, budget),
    }
}

/// Normalises words: case, spaces and punctuation are ignored. Digits, signs and relations count, and so does a gap
/// between two numbers.
pub(crate) fn text_key(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut key = String::with_capacity(text.len());
    for (at, &c) in chars.iter().enumerate() {
        let digit = |at: Option<usize>| at.and_then(|at| chars.get(at)).is_some_and(char::is_ascii_digit);
        let before = digit(at.checked_sub(1));
        let after = digit(Some(at + 1));
        match c {
            _ if c.is_alphanumeric() => key.extend(c.to_lowercase()),
            '<' | '>' | '≤' | '≥' | '=' | '≠' | '+' | '*' | '/' | '^' | '×' | '÷' | '%' | '√' => key.push(c),
            '.' | ':' if after => key.push(c),
            // A sign before a number, possibly after a space; between letters it is a hyphen.
            '-' if after || chars[at + 1..].iter().all(|c| !c.is_alphanumeric()) && key.is_empty() => key.push(c),
            '-' if chars.get(at + 1) == Some(&' ') && digit(Some(at + 2)) => key.push(c),
            ' ' | ',' if before && after || c == ',' && before && digit(Some(at + 2)) => key.push(' '),
            _ => {}
        }
    }
    // The usual abbreviation for limits, which data sets use on one side and models on the other.
    if key == "dne" { "doesnotexist".to_owned() } else { key }
}

/// Whether words say that there is no solution.
fn means_nothing(words: &str) -> bool {
    const PHRASES: &[&str] = &[
        "nosolution",
        "nosolutions",
        "norealsolution",
        "norealsolutions",
        "emptyset",
        "theemptyset",
        "empty",
        "nosuchvalues",
        "nosolutionexists",
    ];
    PHRASES.contains(&text_key(words).as_str())
}

/// Value of a number word.
fn counting_word(word: &str) -> Option<i64> {
    const WORDS: &[&str] = &[
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
        "thirteen",
        "fourteen",
        "fifteen",
        "sixteen",
        "seventeen",
        "eighteen",
        "nineteen",
        "twenty",
    ];
    let word = word.trim().to_lowercase();
    WORDS.iter().position(|name| *name == word).and_then(|at| i64::try_from(at).ok())
}

/// Compares letters of choices, with or without their contents.
fn choices(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    let is_letter = |answer: &Answer, letter: &str| match answer {
        Answer::Text(text) => text_key(text) == letter.to_lowercase(),
        Answer::Scalar(Expr::Symbol(name)) => name == letter,
        _ => false,
    };
    match (gold, found) {
        (Answer::Choice(gold, _), Answer::Choice(found, _)) => Judgement::new(gold == found, Rule::Choice),
        (Answer::Choice(letter, value), found) => {
            if is_letter(found, letter) {
                Judgement::new(true, Rule::Choice)
            } else {
                compare(value, found, budget)
            }
        }
        (gold, Answer::Choice(letter, value)) => {
            if is_letter(gold, letter) {
                Judgement::new(true, Rule::Choice)
            } else {
                compare(gold, value, budget)
            }
        }
        _ => Judgement::new(false, Rule::Kind),
    }
}

/// Compares functions by cases: same values under same conditions.
fn cases(gold: &[(Answer, Answer)], found: &[(Answer, Answer)], budget: &mut Budget) -> Judgement {
    let has_same = |one: &(Answer, Answer), others: &[(Answer, Answer)], budget: &mut Budget| {
        others.iter().any(|other| compare(&one.0, &other.0, budget).equal && compare(&one.1, &other.1, budget).equal)
    };
    // In both directions: with repeated cases, one direction alone would accept a function that leaves a case out.
    let equal = gold.len() == found.len()
        && gold.iter().all(|one| has_same(one, found, budget))
        && found.iter().all(|one| has_same(one, gold, budget));
    Judgement::new(equal, Rule::Cases)
}

/// Compares lists in any order. With names (`x = 3, y = 4`), values of the same name must agree.
fn lists((gold, joint): (&[Answer], Joint), (found, other): (&[Answer], Joint), budget: &mut Budget) -> Judgement {
    if let Some(equal) = relation::named_lists(gold, found, budget) {
        return Judgement::new(equal, Rule::Set);
    }
    if in_any_order(gold, found, budget) && !region::are_at_odds(gold, joint, other) {
        return Judgement::new(true, Rule::Set);
    }
    let lists = [(gold, joint), (found, other)].map(|(items, joint)| Answer::List(items.to_vec(), joint));
    match (Region::new(&lists[0], budget), Region::new(&lists[1], budget)) {
        (Some(gold), Some(found)) => Judgement::new(gold.same(&found, budget), Rule::Region),
        _ => Judgement::new(false, Rule::Set),
    }
}

/// Compares tuples, points and intervals.
fn sequences(gold: &Answer, found: &Answer, budget: &mut Budget) -> Judgement {
    let (Answer::Sequence { open, close, items }, Answer::Sequence { open: o, close: c, items: others }) =
        (gold, found)
    else {
        return Judgement::new(false, Rule::Kind);
    };
    if open == o && close == c {
        return Judgement::new(in_order(items, others, budget), Rule::Sequence);
    }
    // Other brackets make another interval, unless it cannot be an interval or the bracket is at infinity.
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

/// Compares sets of real numbers; pieces that are not such sets must match one by one.
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

/// Whether each member has an equal one on the other side; repeated members count once.
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
