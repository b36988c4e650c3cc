//! Tokens to expressions: recursive descent with a bounded depth. Operators and marks are here, operands in `operand`.
//!
//! ```text
//! ratio  := sum ((':' | '\over') sum)*
//! sum    := ['+' '-' '±'] term (('+' | '-' | '±') term)*
//! term   := factor (('*' | '/' | nothing) factor)*
//! factor := sign* operand mark*
//! ```

use num_rational::BigRational;
use num_traits::Zero;

use super::ParseError;
use super::lexer::{Group, Token};
use super::literal::{Literal, integer};
use super::words::ELLIPSIS;
use crate::answer::{Constant, Expr, Function, Number};
use crate::limits::{Budget, MAX_DEPTH};

/// Parses an expression from all of the tokens.
pub(super) fn expression(tokens: &[Token], budget: &mut Budget) -> Result<Expr, ParseError> {
    if tokens.is_empty() {
        return Err(ParseError::Empty);
    }
    budget.spend(tokens.len()).ok_or(ParseError::TooComplex)?;
    let mut parser = Parser { tokens: tokens.to_vec(), at: 0, depth: 0, bars: 0, budget };
    let expr = parser.ratio()?;
    match parser.peek() {
        None => Ok(expr),
        Some(_) => Err(ParseError::Syntax("something left over after an expression")),
    }
}

pub(super) struct Parser<'a> {
    /// Owned, because `\frac12` splits a number token.
    pub(super) tokens: Vec<Token>,
    pub(super) at: usize,
    depth: usize,
    /// Number of open absolute-value bars.
    pub(super) bars: usize,
    pub(super) budget: &'a mut Budget,
}

impl Parser<'_> {
    pub(super) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    /// Returns the tokens that are left.
    pub(super) fn rest(&self) -> &[Token] {
        &self.tokens[self.at..]
    }

    pub(super) fn eat(&mut self, token: &Token) -> bool {
        let found = self.peek() == Some(token);
        self.at += usize::from(found);
        found
    }

    pub(super) fn expect(&mut self, token: &Token, problem: &'static str) -> Result<(), ParseError> {
        if self.eat(token) { Ok(()) } else { Err(ParseError::Syntax(problem)) }
    }

    pub(super) fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, ParseError>) -> Result<T, ParseError> {
        self.budget.step().ok_or(ParseError::TooComplex)?;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(ParseError::TooDeep);
        }
        let result = read(self);
        self.depth -= 1;
        result
    }

    pub(super) fn ratio(&mut self) -> Result<Expr, ParseError> {
        let mut parts = vec![self.nested(Self::sum)?];
        loop {
            if self.eat(&Token::Ratio) || self.eat(&Token::FractionBar) {
                parts.push(self.nested(Self::sum)?.inverse());
            } else if self.eat(&Token::Choose) {
                let chosen = self.nested(Self::sum)?;
                parts = vec![Expr::Call(Function::Binomial, vec![Expr::product(parts), chosen])];
            } else {
                return Ok(Expr::product(parts));
            }
        }
    }

    fn sum(&mut self) -> Result<Expr, ParseError> {
        let mut terms = Vec::new();
        loop {
            let term = match self.peek() {
                Some(Token::PlusMinus) => {
                    self.at += 1;
                    Expr::PlusMinus(Box::new(self.term()?))
                }
                Some(Token::MinusPlus) => {
                    self.at += 1;
                    Expr::MinusPlus(Box::new(self.term()?))
                }
                Some(Token::Plus | Token::Minus) => self.term()?,
                _ if terms.is_empty() => self.term()?,
                _ => return Ok(Expr::sum(continued(terms))),
            };
            terms.push(term);
        }
    }

    pub(super) fn term(&mut self) -> Result<Expr, ParseError> {
        let negative = self.sign();
        let mut factors = Vec::new();
        let mut divide = false;
        loop {
            let (factor, literal) = self.factor()?;
            let factor = match factor {
                Expr::Number(whole) if literal && !divide && factors.is_empty() => Expr::Number(self.mixed(whole)?),
                other => other,
            };
            factors.push(if divide { factor.inverse() } else { factor });
            divide = match self.peek() {
                Some(Token::Times) => {
                    self.at += 1;
                    false
                }
                Some(Token::Over) => {
                    self.at += 1;
                    true
                }
                Some(Token::Number(_)) if literal => return Err(ParseError::Syntax("two numbers side by side")),
                Some(next) if self.starts_operand(next) => false,
                _ => break,
            };
        }
        let product = Expr::product(factors);
        Ok(if negative { product.negative() } else { product })
    }

    /// Takes signs; returns whether an odd number of them is minus.
    pub(super) fn sign(&mut self) -> bool {
        let mut negative = false;
        loop {
            if self.eat(&Token::Minus) {
                negative = !negative;
            } else if !self.eat(&Token::Plus) {
                return negative;
            }
        }
    }

    pub(super) fn starts_operand(&self, token: &Token) -> bool {
        match token {
            Token::Bar => self.bars == 0,
            Token::Open(group) => *group != Group::Set,
            Token::Number(_) | Token::Symbol(_) | Token::Constant(_) | Token::Function(_) => true,
            Token::Fraction | Token::Sqrt | Token::Series(_) | Token::BeginMatrix | Token::BeginDeterminant => true,
            _ => false,
        }
    }

    /// Parses `2\frac{5}{8}` and `1 1/2`: an integer followed by a proper fraction of integers.
    ///
    /// Looks ahead at the tokens and takes them only if they fit: parsing them to find out would double the work at
    /// every level of a nested fraction.
    fn mixed(&mut self, whole: Number) -> Result<Number, ParseError> {
        let rest = self.rest();
        let parts = match rest {
            [Token::Number(top), Token::Over, Token::Number(bottom), ..] => {
                Some((top.plain_digits(), bottom.plain_digits(), 3))
            }
            // `\frac58`
            [Token::Fraction, Token::Number(both), ..] if both.whole.len() == 2 => {
                both.plain_digits().map(|both| (Some(&both[..1]), Some(&both[1..]), 2))
            }
            [Token::Fraction, rest @ ..] => braced_digits(rest).and_then(|(top, used)| {
                braced_digits(&rest[used..]).map(|(bottom, more)| (Some(top), Some(bottom), 1 + used + more))
            }),
            _ => None,
        };
        let Some((Some(top), Some(bottom), used)) = parts.filter(|_| !whole.is_decimal) else {
            return Ok(whole);
        };
        let top = integer(top)?;
        let bottom = integer(bottom)?;
        if top.is_zero() || top >= bottom {
            return Ok(whole);
        }
        self.at += used;
        Ok(Number::exact(whole.value + BigRational::new(top, bottom)))
    }

    /// Parses an operand with its powers, factorials, percent signs and degrees; true for a plain number.
    pub(super) fn factor(&mut self) -> Result<(Expr, bool), ParseError> {
        if self.sign() {
            let (inner, _) = self.nested(Self::factor)?;
            return Ok((inner.negative(), false));
        }
        let operand = self.nested(Self::operand)?;
        let literal = matches!(operand, Expr::Number(_));
        self.marks(operand, literal)
    }

    fn marks(&mut self, mut expr: Expr, mut literal: bool) -> Result<(Expr, bool), ParseError> {
        /// More marks than occur in practice. They nest, so they are bounded like depth.
        const MAX_MARKS: usize = 8;
        for _ in 0..MAX_MARKS {
            let Some(next) = self.peek() else { return Ok((expr, literal)) };
            match next {
                Token::Bang => expr = Expr::Call(Function::Factorial, vec![expr]),
                Token::Percent => expr = Expr::Percent(Box::new(expr)),
                Token::Degree => {
                    self.at += 1;
                    expr = self.degrees(expr)?;
                    literal = false;
                    continue;
                }
                Token::Caret => {
                    self.at += 1;
                    expr = self.power(expr)?;
                    literal = false;
                    continue;
                }
                Token::Underscore if literal => {
                    self.at += 1;
                    expr = self.based(&expr)?;
                    continue;
                }
                _ => return Ok((expr, literal)),
            }
            self.at += 1;
            literal = literal && matches!(expr, Expr::Number(_));
        }
        Err(ParseError::TooDeep)
    }

    /// Parses digits with a base: `1011_2`.
    fn based(&mut self, digits: &Expr) -> Result<Expr, ParseError> {
        let base = self.subscript()?;
        let base = base.trim_start_matches('0');
        let Expr::Number(number) = digits else { return Err(ParseError::Syntax("a base of no number")) };
        let base = if base == "ten" { "10" } else { base };
        Ok(Expr::Symbol(format!("{}_{base}", number.value)))
    }

    /// Parses degrees with the minutes of arc that follow: `30^\circ 15'`.
    fn degrees(&mut self, expr: Expr) -> Result<Expr, ParseError> {
        let minutes = match self.rest() {
            [Token::Number(minutes), Token::Prime, ..] => Some((minutes, 2)),
            [Token::Number(minutes), Token::Caret, Token::Prime, ..] => Some((minutes, 3)),
            _ => None,
        };
        let mut angle = expr;
        if let Some((minutes, used)) = minutes {
            let minutes = Expr::Number(minutes.number()?);
            self.at += used;
            angle = Expr::Sum(vec![angle, Expr::Product(vec![minutes, Expr::integer(60).inverse()])]);
        }
        Ok(Expr::Product(vec![angle, Expr::Constant(Constant::Degree)]))
    }

    fn power(&mut self, base: Expr) -> Result<Expr, ParseError> {
        let inside = match self.rest() {
            [Token::Open(Group::Brace), inside, Token::Close(Group::Brace), ..] => Some((inside, 3)),
            [inside, ..] => Some((inside, 1)),
            [] => None,
        };
        match inside {
            Some((Token::Degree, used)) => {
                self.at += used;
                return self.degrees(base);
            }
            Some((Token::Prime, used)) => {
                self.at += used;
                return primed(base);
            }
            // `400^{\text{th}}`
            Some((Token::Text(word), used)) if ["th", "st", "nd", "rd"].contains(&word.as_str()) => {
                self.at += used;
                return Ok(base);
            }
            _ => {}
        }
        let exponent = self.exponent()?;
        Ok(Expr::Power(Box::new(base), Box::new(exponent)))
    }

    /// Parses a brace group, or a signed operand, which may have an exponent of its own.
    pub(super) fn exponent(&mut self) -> Result<Expr, ParseError> {
        let negative = self.sign();
        let operand = self.nested(Self::operand)?;
        let exponent = if self.eat(&Token::Caret) { self.nested(|parser| parser.power(operand))? } else { operand };
        Ok(if negative { exponent.negative() } else { exponent })
    }
}

/// Returns a digit, or an integer in braces, with the number of tokens it takes.
fn braced_digits(tokens: &[Token]) -> Option<(&str, usize)> {
    match tokens {
        [Token::Open(Group::Brace), Token::Number(number), Token::Close(Group::Brace), ..] => {
            number.plain_digits().map(|digits| (digits, 3))
        }
        [Token::Number(number), ..] => digit(number).map(|digits| (digits, 1)),
        _ => None,
    }
}

fn digit(literal: &Literal) -> Option<&str> {
    literal.plain_digits().filter(|digits| digits.len() == 1)
}

fn primed(base: Expr) -> Result<Expr, ParseError> {
    match base {
        Expr::Symbol(name) => Ok(Expr::Symbol(format!("{name}'"))),
        _ => Err(ParseError::Syntax("a prime after something that has no name")),
    }
}

/// Reads `a_0 + a_1 + … + a_k` and `a_k + a_{k-1} + … + a_0` as one name for the sum from first to last, if the written
/// terms before and after the dots rise by one each.
fn continued(terms: Vec<Expr>) -> Vec<Expr> {
    let Some(dots) = terms.iter().position(|term| matches!(term, Expr::Symbol(name) if name == ELLIPSIS)) else {
        return terms;
    };
    let indexed = |term: &Expr| match term {
        Expr::Symbol(name) => name.split_once('_').map(|(head, index)| (head.to_owned(), index.to_owned())),
        _ => None,
    };
    let all = |terms: &[Expr]| terms.iter().map(indexed).collect::<Option<Vec<_>>>();
    let (Some(mut before), Some(mut after)) = (all(&terms[..dots]), all(&terms[dots + 1..])) else { return terms };
    let number = |index: &str| index.parse::<u64>().ok();
    if before.first().is_some_and(|(_, index)| number(index).is_none()) {
        // Reversed, so that it starts at a number.
        before.reverse();
        after.reverse();
        std::mem::swap(&mut before, &mut after);
    }
    let (Some((head, low)), Some((_, high))) = (before.first(), after.last()) else { return terms };
    let is_one_name = before.iter().chain(&after).all(|(other, _)| other == head);
    let rises = |(at, (_, index)): (u64, &(String, String))| number(low).map(|low| low + at) == number(index);
    // Backwards: `k`, `k-1`, …
    let falls = |(back, (_, index)): (usize, &(String, String))| match back {
        0 => index == high,
        _ => *index == format!("{high}Minus{back}"),
    };
    let is_plain = number(low).is_some()
        && is_one_name
        && (0..).zip(&before).all(rises)
        && after.iter().rev().enumerate().all(falls);
    if is_plain { vec![Expr::Symbol(format!("{head}_{low}{ELLIPSIS}{high}"))] } else { terms }
}
