//! A parsed answer in all the ways in which it can be understood.

use crate::answer::{Answer, Constant, Expr};
use crate::compare::{Judgement, Rule, compare, expressions, mapped, text_key};
use crate::limits::Budget;
use crate::parse::{Commas, Letters, Notation, ParseError, Settled, parse, settle};

pub(crate) struct Reading {
    pub(crate) source: String,
    pub(crate) key: String,
    /// The answer as written, before it was settled.
    pub(crate) raw: Answer,
    pub(crate) settled: Settled,
}

/// A judgement, with the readings of both sides that it is based on.
pub(crate) struct Decision {
    pub(crate) judgement: Judgement,
    /// The readings, if they are not the first ones.
    pub(crate) readings: Option<Box<[Answer; 2]>>,
}

impl From<Judgement> for Decision {
    fn from(judgement: Judgement) -> Self {
        Self { judgement, readings: None }
    }
}

impl Reading {
    pub(crate) fn new(source: &str, budget: &mut Budget) -> Result<Self, ParseError> {
        let raw = parse(source, Notation::PLAIN, budget)?;
        let settled = settle(raw.clone(), budget)?;
        Ok(Self { source: source.to_owned(), key: source_key(source), raw, settled })
    }

    /// Returns the answer in another notation, if that makes a difference.
    pub(crate) fn in_notation(&self, notation: Notation, budget: &mut Budget) -> Option<Answer> {
        let read = parse(&self.source, notation, budget).ok()?;
        let answer = settle(read, budget).ok()?.answer;
        (answer != self.settled.answer).then_some(answer)
    }

    /// Decides whether another answer equals this one.
    pub(crate) fn judge(&self, found: &Self, budget: &mut Budget) -> Decision {
        let gold = &self.settled.answer;
        let answer = &found.settled.answer;
        let judgement = compare(gold, answer, budget);
        if judgement.equal {
            return judgement.into();
        }
        if !self.key.is_empty() && self.key == found.key {
            return Judgement { equal: true, rule: Rule::Text }.into();
        }
        let others = [Self::as_words, Self::with_units, Self::as_lists, Self::with_decimal_comma, Self::with_parameter];
        for other in others {
            if let Some(decision) = other(self, found, budget) {
                return decision;
            }
        }
        judgement.into()
    }

    /// Compares as words: `\text{(B)}` and `B` are the same choice. A single word without a font may be a product of
    /// variables, if the other side is one.
    fn as_words(&self, found: &Self, budget: &mut Budget) -> Option<Decision> {
        let products = Notation { letters: Letters::Products, ..Notation::PLAIN };
        match (&self.settled.answer, &found.settled.answer) {
            (Answer::Text(_), Answer::Text(_)) => None,
            (Answer::Text(_), other) | (other, Answer::Text(_)) => {
                let same = |gold: &String, found: &String| {
                    // A single letter without a font is a variable, and case distinguishes variables.
                    text_key(gold) == text_key(found)
                        && (text_key(gold).chars().count() > 1 || letters_of(gold) == letters_of(found))
                };
                let words = self.word().zip(found.word());
                if words.is_some_and(|(gold, found)| same(&gold, &found)) {
                    return Some(Judgement { equal: true, rule: Rule::Text }.into());
                }
                let Answer::Scalar(expr) = other else { return None };
                if !expr.has_symbols() {
                    return None;
                }
                let gold = self.in_notation(products, budget);
                let answer = found.in_notation(products, budget);
                equal(
                    gold.as_ref().unwrap_or(&self.settled.answer),
                    answer.as_ref().unwrap_or(&found.settled.answer),
                    budget,
                )
            }
            _ => None,
        }
    }

    /// Reads letters after a number as a unit abbreviation. Since they may be variables, this applies only if the other
    /// side is a number without letters or has a unit in words.
    fn with_units(&self, found: &Self, budget: &mut Budget) -> Option<Decision> {
        let units = Notation { letters: Letters::Units, ..Notation::PLAIN };
        let may_have_unit = |reading: &Self| reading.source.contains(|c: char| c.is_ascii_alphabetic());
        let gold = may_have_unit(self).then(|| self.in_notation(units, budget)).flatten();
        let answer = may_have_unit(found).then(|| found.in_notation(units, budget)).flatten();
        match (&gold, &answer) {
            (None, Some(answer)) if !has_symbols(&self.settled.answer) => equal(&self.settled.answer, answer, budget),
            (Some(gold), None) if has_unit(&found.settled.answer) => equal(gold, &found.settled.answer, budget),
            (Some(gold), Some(answer)) => equal(gold, answer, budget),
            _ => None,
        }
    }

    /// Reads commas between groups of three digits as separators of members.
    fn as_lists(&self, found: &Self, budget: &mut Budget) -> Option<Decision> {
        let lists = Notation { commas: Commas::Lists, ..Notation::PLAIN };
        let has_commas = |reading: &Self| reading.source.contains(',');
        let gold = has_commas(self).then(|| self.in_notation(lists, budget)).flatten();
        let answer = has_commas(found).then(|| found.in_notation(lists, budget)).flatten();
        if gold.is_none() && answer.is_none() {
            return None;
        }
        equal(gold.as_ref().unwrap_or(&self.settled.answer), answer.as_ref().unwrap_or(&found.settled.answer), budget)
    }

    /// Reads `2,74` as a decimal number if the reference is one. The reference itself is never read so: `1,2` are two
    /// numbers, and `1,500` is one and a half thousand.
    fn with_decimal_comma(&self, found: &Self, budget: &mut Budget) -> Option<Decision> {
        let decimal = Notation { commas: Commas::Decimal, ..Notation::PLAIN };
        let is_number = matches!(&found.settled.answer, Answer::Scalar(_));
        if is_number || !found.source.contains(',') || !self.settled.answer.is_decimal() {
            return None;
        }
        let answer = found.in_notation(decimal, budget).filter(Answer::is_decimal)?;
        equal(&self.settled.answer, &answer, budget)
    }

    /// Allows another name of an integer parameter: `k\pi` and `n\pi`.
    fn with_parameter(&self, found: &Self, budget: &mut Budget) -> Option<Decision> {
        let gold = &self.settled.answer;
        let answer = &found.settled.answer;
        let own = variables(gold);
        let other = variables(answer);
        let mut only_own = own.iter().filter(|name| !other.contains(name));
        let mut only_other = other.iter().filter(|name| !own.contains(name));
        let (Some(name), None) = (only_own.next(), only_own.next()) else { return None };
        let (Some(renamed), None) = (only_other.next(), only_other.next()) else { return None };
        let are_declared = self.settled.declared.contains(name) || found.settled.declared.contains(renamed);
        let are_periods = || counts_periods(gold, name) && counts_periods(answer, renamed);
        if !are_declared && !are_periods() {
            return None;
        }
        let target = Expr::Symbol(renamed.clone());
        let by = Expr::Symbol(name.clone());
        let answer = mapped(answer, &mut |expr| expr.replaced(&target, &by));
        equal(gold, &answer, budget)
    }

    /// Returns the answer as a word: `\text{(B)}` and `B` are the same choice, `odd` and `\text{odd}` the same word.
    fn word(&self) -> Option<String> {
        match &self.settled.answer {
            Answer::Text(text) => Some(text.clone()),
            Answer::Scalar(expr) if letters(expr).is_some() => letters(expr),
            _ => {
                let plain = self.source.trim_matches(|c: char| !c.is_alphanumeric());
                let is_word = !plain.is_empty() && plain.chars().all(|c| c.is_alphabetic() || c.is_whitespace());
                is_word.then(|| plain.to_owned())
            }
        }
    }
}

fn letters_of(word: &str) -> String {
    word.chars().filter(|c| c.is_alphanumeric()).collect()
}

fn equal(gold: &Answer, found: &Answer, budget: &mut Budget) -> Option<Decision> {
    let judgement = compare(gold, found, budget);
    judgement.equal.then(|| Decision { judgement, readings: Some(Box::new([gold.clone(), found.clone()])) })
}

fn has_symbols(answer: &Answer) -> bool {
    !variables(answer).is_empty()
}

fn has_unit(answer: &Answer) -> bool {
    match answer {
        Answer::Quantity(..) => true,
        Answer::Sequence { items, .. } | Answer::List(items, _) | Answer::Set(items) => items.iter().all(has_unit),
        Answer::Equation { right, .. } => has_unit(right),
        _ => false,
    }
}

/// Returns the variables of an answer, unless they only name its value.
fn variables(answer: &Answer) -> Vec<String> {
    let mut names = Vec::new();
    let mut add = |answer: &Answer| {
        expressions(answer, &mut |expr| {
            for name in expr.symbols() {
                if !names.iter().any(|known| known == name) {
                    names.push(name.to_owned());
                }
            }
        });
    };
    match answer {
        Answer::Equation { right, names: true, .. } => add(right),
        Answer::List(items, _) => {
            for item in items {
                match item {
                    Answer::Equation { right, names: true, .. } => add(right),
                    other => add(other),
                }
            }
        }
        other => add(other),
    }
    names
}

/// Whether a variable only occurs as a whole number of periods of an angle: `\frac{\pi}{6} + k\pi`. Next to other
/// variables, in powers and in functions it is a quantity of its own.
fn counts_periods(answer: &Answer, name: &str) -> bool {
    let is_it = |expr: &Expr| matches!(expr, Expr::Symbol(other) if other == name);
    let is_period = |expr: &Expr| matches!(expr, Expr::Constant(Constant::Pi | Constant::Degree));
    let is_plain = |term: &Expr| {
        !term.any(|node| match node {
            Expr::Symbol(_) => !is_it(node),
            Expr::Power(..) | Expr::Call(..) => true,
            _ => false,
        })
    };
    let mut found = false;
    let mut only = true;
    expressions(answer, &mut |expr| {
        let terms = match expr {
            Expr::Sum(terms) => terms.as_slice(),
            one => std::slice::from_ref(one),
        };
        for term in terms.iter().filter(|term| term.any(is_it)) {
            found = true;
            only &= term.any(is_period) && is_plain(term);
        }
    });
    found && only
}

/// Returns the letters of a product of variables, the form in which short words are parsed.
fn letters(expr: &Expr) -> Option<String> {
    match expr {
        Expr::Symbol(name) if name.chars().all(char::is_alphabetic) => Some(name.clone()),
        Expr::Constant(Constant::Euler) => Some("e".to_owned()),
        Expr::Constant(Constant::Imaginary) => Some("i".to_owned()),
        Expr::Product(factors) => factors.iter().map(letters).collect(),
        _ => None,
    }
}

/// Normalises a source: removes spaces, delimiters and layout, to compare sources literally.
pub(crate) fn source_key(source: &str) -> String {
    let mut key = source.to_owned();
    for layout in ["\\left", "\\right", "\\displaystyle", "\\,", "\\;", "\\!", "\\ ", "$", "\\(", "\\)", "\\[", "\\]"] {
        key = key.replace(layout, "");
    }
    let mut joined = String::with_capacity(key.len());
    for word in key.split_whitespace() {
        // `1 2` is not `12`.
        let both_digits =
            joined.ends_with(|c: char| c.is_ascii_digit()) && word.starts_with(|c: char| c.is_ascii_digit());
        joined.push_str(if both_digits { " " } else { "" });
        joined.push_str(word);
    }
    joined.trim_end_matches(['.', '\\']).to_owned()
}
