//! Number literals: digits, separators, a decimal point, a power of ten.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

use super::ParseError;
use crate::answer::Number;
use crate::limits::MAX_BITS;

/// Meaning of a comma between digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commas {
    /// A thousands separator if exactly three digits follow and no bracket is open, otherwise a separator of members.
    Thousands,
    /// A separator of list members.
    Lists,
    /// A decimal point.
    Decimal,
}

/// A number as written.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Literal {
    pub(super) whole: String,
    /// Digits after the decimal point; `None` without a point.
    pub(super) decimals: Option<String>,
    /// Repeating digits, under an overline or between dots.
    pub(super) repeating: String,
    pub(super) exponent: i32,
}

/// Takes a literal from the front of `rest`, which starts with a digit, or with a point and a digit.
pub(super) fn literal(rest: &mut &str, commas: Commas) -> Literal {
    let mut literal = Literal { whole: digits(rest).to_owned(), ..Literal::default() };
    // The first group has one to three digits and no leading zero.
    if (1..=3).contains(&literal.whole.len()) && !literal.whole.starts_with('0') {
        while let Some((group, bytes)) = thousands(rest, commas) {
            literal.whole.push_str(group);
            *rest = &rest[bytes..];
        }
    }
    let is_point = |following: &str| {
        following.starts_with(|c: char| c.is_ascii_digit()) || !repeating(&mut { following }).is_empty()
    };
    let points: &[&str] = if commas == Commas::Decimal { &[".", "{,}", ","] } else { &[".", "{,}"] };
    if let Some(following) =
        points.iter().find_map(|point| rest.strip_prefix(point)).filter(|following| is_point(following))
    {
        *rest = following;
        literal.decimals = Some(digits(rest).to_owned());
        literal.repeating = repeating(rest);
        if let Some(period) = period(literal.decimals.as_deref().unwrap_or_default(), rest) {
            literal.repeating = period;
        }
    }
    literal.exponent = exponent(rest);
    literal
}

fn digits<'a>(rest: &mut &'a str) -> &'a str {
    let count = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (digits, following) = rest.split_at(count);
    *rest = following;
    digits
}

/// Returns the three digits of a thousands group, and the bytes of the group with its separator.
fn thousands(rest: &str, commas: Commas) -> Option<(&str, usize)> {
    let separators = ["{,}\\!", "{,}", ",\\!", "\\,", "\\ ", "'", "~", " ", ","];
    let separator = separators.into_iter().find(|separator| rest.starts_with(separator))?;
    if separator == "," && commas != Commas::Thousands {
        return None;
    }
    let following = &rest[separator.len()..];
    let group = if separator.ends_with("\\!") { following.trim_start_matches(' ') } else { following };
    let count = group.bytes().take_while(u8::is_ascii_digit).count();
    // `2 100/300` is a mixed number.
    let is_mixed = separator == " " && group[count..].trim_start().starts_with('/');
    (count == 3 && !is_mixed).then(|| (&group[..3], rest.len() - group.len() + 3))
}

/// Takes repeating digits: under a line (`\overline{12}`, `\bar3`), or from one dot to the other (`\dot{1}2\dot{3}`).
fn repeating(rest: &mut &str) -> String {
    let mut following = *rest;
    if let Some(digits) = marked(&mut following, &["\\overline", "\\bar"]) {
        *rest = following;
        return digits.to_owned();
    }
    let Some(first) = marked(&mut following, &["\\dot"]) else { return String::new() };
    let mut after = following;
    let between = digits(&mut after);
    match marked(&mut after, &["\\dot"]) {
        Some(last) => {
            *rest = after;
            format!("{first}{between}{last}")
        }
        None => {
            *rest = following;
            first.to_owned()
        }
    }
}

/// Returns the digits of a group, or the digit, after one of the commands.
fn marked<'a>(rest: &mut &'a str, commands: &[&str]) -> Option<&'a str> {
    let argument = commands.iter().find_map(|command| rest.strip_prefix(command))?.trim_start();
    let (inside, following) = match argument.strip_prefix('{') {
        Some(inside) => inside.split_once('}')?,
        None => argument.split_at_checked(1)?,
    };
    if inside.is_empty() || !inside.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    *rest = following;
    Some(inside)
}

/// Returns the period that dots continue: in `0.333\ldots`, a digit that ends the decimals three times, or
/// a group twice.
fn period(decimals: &str, rest: &mut &str) -> Option<String> {
    let following = ["\\ldots", "\\dots", "\\cdots", "…", "..."].iter().find_map(|dots| rest.strip_prefix(dots))?;
    let period = (1..=6).find_map(|length| {
        let times = if length == 1 { 3 } else { 2 };
        let tail = decimals.get(decimals.len().checked_sub(length)?..)?;
        decimals.ends_with(&tail.repeat(times)).then_some(tail)
    })?;
    *rest = following;
    Some(period.to_owned())
}

/// Takes the power of ten of `1.5e-3`; 0 without one.
fn exponent(rest: &mut &str) -> i32 {
    let Some(following) = rest.strip_prefix(['e', 'E']) else { return 0 };
    let digits = following.strip_prefix(['-', '+']).unwrap_or(following);
    let count = digits.bytes().take_while(u8::is_ascii_digit).count();
    let ends = !digits[count..].starts_with(|c: char| c.is_ascii_alphanumeric() || c == '.');
    if !(1..=4).contains(&count) || !ends {
        return 0;
    }
    let length = following.len() - digits.len() + count;
    let value = following[..length].parse().unwrap_or(0);
    *rest = &following[length..];
    value
}

impl Literal {
    pub(super) fn of_digits(digits: &str) -> Self {
        Self { whole: digits.to_owned(), ..Self::default() }
    }

    /// Returns the digits of a plain integer.
    pub(super) fn plain_digits(&self) -> Option<&str> {
        (self.decimals.is_none() && self.exponent == 0 && !self.whole.is_empty()).then_some(self.whole.as_str())
    }

    /// Returns the budget steps of converting the digits, which grow with the square of their count.
    pub(super) fn steps(&self) -> usize {
        let digits = self.whole.len()
            + self.decimals.as_ref().map_or(0, String::len)
            + self.repeating.len()
            + self.exponent.unsigned_abs() as usize;
        (digits / 16).pow(2) / 4
    }

    /// Returns the value of the literal.
    pub(super) fn number(&self) -> Result<Number, ParseError> {
        let fraction = self.decimals.as_deref().unwrap_or("");
        let digits: String = [self.whole.as_str(), fraction].concat();
        let whole = if digits.is_empty() { BigInt::zero() } else { integer(&digits)? };
        let mut value = BigRational::from_integer(whole);
        if !fraction.is_empty() {
            value /= ten_to(length(fraction)?);
        }
        if !self.repeating.is_empty() {
            let period = (ten_to(length(&self.repeating)?) - BigInt::one()) * ten_to(length(fraction)?);
            value += BigRational::new(integer(&self.repeating)?, period);
        }
        if u64::from(self.exponent.unsigned_abs()) * 4 > MAX_BITS {
            return Err(ParseError::Syntax("a number that is too large"));
        }
        if self.exponent != 0 {
            let scale = ten_to(self.exponent.unsigned_abs());
            value = if self.exponent < 0 { value / scale } else { value * scale };
        }
        Ok(Number { value, is_decimal: self.decimals.is_some() && self.repeating.is_empty() })
    }
}

fn length(digits: &str) -> Result<u32, ParseError> {
    u32::try_from(digits.len()).map_err(|_| ParseError::TooLong)
}

fn ten_to(power: u32) -> BigInt {
    BigInt::from(10).pow(power)
}

pub(super) fn integer(digits: &str) -> Result<BigInt, ParseError> {
    digits.parse().map_err(|_| ParseError::Syntax("a number of no digits"))
}
