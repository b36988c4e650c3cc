//! Units after a value, and currency signs before it.

use super::ParseError;
use super::lexer::{Group, Token};
use super::units;
use crate::answer::{Answer, Clock, Constant, DIMENSIONS, Expr, Number, Unit};

/// Most quantities in a sum such as `5 feet 6 inches`.
const MAX_PARTS: usize = 4;

const NO_UNIT: ParseError = ParseError::Syntax("words after a value that are no unit");

/// Reads a value with `read`, and the unit around it.
pub(super) fn measured(
    tokens: &[Token],
    read: &mut dyn FnMut(&[Token]) -> Result<Answer, ParseError>,
) -> Result<Answer, ParseError> {
    if let Some((value, sign)) = after_currency(tokens) {
        let inner = measured(&value, read)?;
        let unit = units::phrase(&sign.to_string()).ok_or(NO_UNIT)?;
        return match inner {
            // `\$5 million`, `\$5 dollars`
            Answer::Quantity(inner, other) if other == unit || other.is_bare() => Ok(Answer::Quantity(inner, other)),
            Answer::Quantity(inner, other) => Ok(Answer::Quantity(inner, unit.product(other).ok_or(NO_UNIT)?)),
            inner => Ok(Answer::Quantity(Box::new(inner), unit)),
        };
    }
    if let Some(temperature) = temperature(tokens) {
        return temperature_of(temperature, read);
    }
    let start = units_start(tokens);
    if start == 0 || start == tokens.len() {
        return read(tokens);
    }
    let (value, after) = tokens.split_at(start);
    match unit(after) {
        Some(unit) => with_unit(read(value)?, unit),
        None => sum(tokens, read),
    }
}

/// Returns the tokens after a currency sign at the start, with the sign.
fn after_currency(tokens: &[Token]) -> Option<(Vec<Token>, char)> {
    match tokens {
        [Token::Currency(sign), rest @ ..] if !rest.is_empty() => Some((rest.to_vec(), *sign)),
        [minus @ (Token::Minus | Token::Plus), Token::Currency(sign), rest @ ..] if !rest.is_empty() => {
            Some(([std::slice::from_ref(minus), rest].concat(), *sign))
        }
        _ => None,
    }
}

/// Finds the start of the words at the end.
fn units_start(tokens: &[Token]) -> usize {
    let mut start = tokens.len();
    for (at, token) in tokens.iter().enumerate().rev() {
        match token {
            Token::Text(_) | Token::Currency(_) => start = at,
            Token::Over | Token::Times | Token::Caret | Token::Minus | Token::Number(_) => {}
            Token::Open(Group::Brace | Group::Round) | Token::Close(Group::Brace | Group::Round) => {}
            _ => break,
        }
    }
    // `12^{\text{th}}`
    let depth =
        |token: &Token| i32::from(matches!(token, Token::Open(_))) - i32::from(matches!(token, Token::Close(_)));
    if tokens[start..].iter().map(depth).sum::<i32>() != 0 {
        return tokens.len();
    }
    // `12 / \text{s}`
    match tokens.get(..start) {
        Some([.., Token::Over]) => start - 1,
        _ => start,
    }
}

/// Reads a unit such as `cm^2`, `miles / hour`, `kg \cdot m^{-2}`.
fn unit(tokens: &[Token]) -> Option<Unit> {
    let mut parts: Vec<(String, i8)> = Vec::new();
    let mut sign = 1;
    let mut rest = tokens;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match first {
            Token::Text(words) => parts.push((words.clone(), sign)),
            Token::Currency(currency) => parts.push((currency.to_string(), sign)),
            Token::Over => sign = -1,
            Token::Times => {}
            Token::Open(Group::Round) | Token::Close(Group::Round) => {}
            Token::Caret => {
                let (exponent, used) = exponent(rest)?;
                let power = &mut parts.last_mut()?.1;
                *power = power.checked_mul(exponent)?;
                rest = &rest[used..];
            }
            _ => return None,
        }
    }
    units::joined(&parts)
}

fn exponent(tokens: &[Token]) -> Option<(i8, usize)> {
    let (digits, sign, used) = match tokens {
        [Token::Number(digits), ..] => (digits, 1, 1),
        [Token::Minus, Token::Number(digits), ..] => (digits, -1, 2),
        [Token::Open(Group::Brace), Token::Number(digits), Token::Close(Group::Brace), ..] => (digits, 1, 3),
        [Token::Open(Group::Brace), Token::Minus, Token::Number(digits), Token::Close(Group::Brace), ..] => {
            (digits, -1, 4)
        }
        _ => return None,
    };
    let exponent: i8 = digits.plain_digits()?.parse().ok().filter(|exponent| (1..=6).contains(exponent))?;
    Some((sign * exponent, used))
}

fn with_unit(inner: Answer, mut unit: Unit) -> Result<Answer, ParseError> {
    let is_one = unit.factor == num_bigint::BigInt::from(1);
    if is_one && !unit.degrees {
        return Ok(if unit.is_bare() { inner } else { Answer::Quantity(Box::new(inner), unit) });
    }
    // `12 thousand`, `30 degrees`: the word is part of the value.
    let Answer::Scalar(expr) = inner else { return Err(NO_UNIT) };
    let mut factors = vec![expr];
    if !is_one {
        factors.push(Expr::Number(Number::exact(std::mem::replace(&mut unit.factor, 1.into()).into())));
    }
    if std::mem::take(&mut unit.degrees) {
        factors.push(Expr::Constant(Constant::Degree));
    }
    let value = Answer::Scalar(Expr::product(factors));
    Ok(if unit.is_bare() { value } else { Answer::Quantity(Box::new(value), unit) })
}

/// Returns the value before `^\circ C`, and the temperature scale.
fn temperature(tokens: &[Token]) -> Option<(&[Token], &'static str)> {
    let (last, before) = tokens.split_last()?;
    let scale = match last {
        Token::Text(name) | Token::Symbol(name) => match name.to_lowercase().as_str() {
            "c" | "celsius" => "°C",
            "f" | "fahrenheit" => "°F",
            _ => return None,
        },
        _ => return None,
    };
    let value = match before {
        [value @ .., Token::Caret, Token::Open(Group::Brace), Token::Degree, Token::Close(Group::Brace)]
        | [value @ .., Token::Caret, Token::Degree]
        | [value @ .., Token::Degree] => value,
        // `degrees Celsius` is one run of words.
        _ => return None,
    };
    Some((value, scale))
}

fn temperature_of(
    (value, scale): (&[Token], &'static str),
    read: &mut dyn FnMut(&[Token]) -> Result<Answer, ParseError>,
) -> Result<Answer, ParseError> {
    let mut dimensions = [0; DIMENSIONS];
    dimensions[3] = 1;
    let unit = Unit { dimensions, currency: scale, written: scale.to_owned(), ..Unit::none() };
    Ok(Answer::Quantity(Box::new(read(value)?), unit))
}

/// Reads `5 feet 6 inches`: quantities of one kind, summed in the first unit.
fn sum(tokens: &[Token], read: &mut dyn FnMut(&[Token]) -> Result<Answer, ParseError>) -> Result<Answer, ParseError> {
    let mut terms = Vec::new();
    let mut first: Option<Unit> = None;
    let mut rest = tokens;
    while !rest.is_empty() {
        let words = rest.iter().position(|token| matches!(token, Token::Text(_))).ok_or(NO_UNIT)?;
        let (value, after) = rest.split_at(words);
        let length = after.iter().position(|token| !matches!(token, Token::Text(_))).unwrap_or(after.len());
        let unit = unit(&after[..length]).filter(|unit| unit.is_known && !unit.degrees).ok_or(NO_UNIT)?;
        rest = &after[length..];
        let Answer::Scalar(value) = read(value)? else { return Err(NO_UNIT) };
        let in_first = first.get_or_insert_with(|| unit.clone());
        let fits =
            in_first.dimensions == unit.dimensions && in_first.currency == unit.currency && unit.counted.is_empty();
        if !fits || in_first.dimensions == [0; DIMENSIONS] || terms.len() >= MAX_PARTS {
            return Err(NO_UNIT);
        }
        let scale = Expr::Number(Number::exact(&unit.scale / &in_first.scale));
        terms.push(Expr::product(vec![value, scale]));
    }
    match first {
        Some(unit) if terms.len() > 1 => Ok(Answer::Quantity(Box::new(Answer::Scalar(Expr::sum(terms))), unit)),
        _ => Err(NO_UNIT),
    }
}

/// Reads `12:41 \text{ p.m.}`, a time with its half of the day; without one it is a ratio that may be read as a time.
pub(super) fn clock(tokens: &[Token]) -> Option<Clock> {
    let (last, time) = tokens.split_last()?;
    let Token::Text(words) = last else { return None };
    let after_noon = Some(units::half_day(words)?);
    let number = |token: &Token| match token {
        Token::Number(literal) => literal.plain_digits().filter(|digits| digits.len() <= 2)?.parse::<u32>().ok(),
        _ => None,
    };
    let (hour, minute, second) = match time {
        [hour] => (number(hour)?, 0, 0),
        [hour, Token::Ratio, minute] => (number(hour)?, number(minute)?, 0),
        [hour, Token::Ratio, minute, Token::Ratio, second] => (number(hour)?, number(minute)?, number(second)?),
        _ => return None,
    };
    (hour <= 24 && minute < 60 && second < 60).then_some(Clock { hour, minute, second, after_noon })
}
