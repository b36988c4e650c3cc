//! Tokens to expressions: recursive descent with a bounded depth.
//!
//! ```text
//! ratio  := sum (':' sum)*
//! sum    := ['+' '-' '±'] term (('+' | '-' | '±') term)*
//! term   := factor (('*' | '/' | nothing) factor)*
//! factor := sign* atom postfix*
//! ```

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

use super::ParseError;
use super::lexer::{Group, Literal, Token};
use crate::answer::{Constant, Expr, Function, Number};
use crate::limits::{MAX_BITS, MAX_DEPTH};

/// Reads an expression that takes up all tokens.
pub(super) fn expression(tokens: &[Token]) -> Result<Expr, ParseError> {
    if tokens.is_empty() {
        return Err(ParseError::Empty);
    }
    let mut parser = Parser { tokens: tokens.to_vec(), at: 0, depth: 0, bars: 0, angles: 0 };
    let expr = parser.ratio()?;
    match parser.peek() {
        None => Ok(expr),
        Some(_) => Err(ParseError::Syntax("something left over behind an expression")),
    }
}

struct Parser {
    /// Owned, because `\frac12` takes a number token apart.
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// Open absolute-value bars.
    bars: usize,
    /// Enclosing trigonometric functions, in which a degree sign is an angle.
    angles: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn eat(&mut self, token: &Token) -> bool {
        let found = self.peek() == Some(token);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, token: &Token, problem: &'static str) -> Result<(), ParseError> {
        if self.eat(token) { Ok(()) } else { Err(ParseError::Syntax(problem)) }
    }

    fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, ParseError>) -> Result<T, ParseError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(ParseError::TooDeep);
        }
        let result = read(self);
        self.depth -= 1;
        result
    }

    fn ratio(&mut self) -> Result<Expr, ParseError> {
        let mut parts = vec![self.nested(Self::sum)?];
        while self.eat(&Token::Ratio) {
            parts.push(inverse(self.nested(Self::sum)?));
        }
        Ok(product(parts))
    }

    fn sum(&mut self) -> Result<Expr, ParseError> {
        let mut terms = Vec::new();
        loop {
            let sign = self.peek().cloned();
            let term = match sign {
                Some(Token::PlusMinus) => {
                    self.at += 1;
                    Expr::PlusMinus(Box::new(self.term()?))
                }
                Some(Token::MinusPlus) => {
                    self.at += 1;
                    Expr::MinusPlus(Box::new(self.term()?))
                }
                _ if terms.is_empty() => self.term()?,
                Some(Token::Plus | Token::Minus) => self.term()?,
                _ => break,
            };
            terms.push(term);
            if self.peek().is_none() {
                break;
            }
        }
        Ok(if terms.len() == 1 { terms.remove(0) } else { Expr::Sum(terms) })
    }

    fn term(&mut self) -> Result<Expr, ParseError> {
        let negative = self.sign();
        let mut factors = Vec::new();
        let mut divide = false;
        loop {
            let (factor, literal) = self.factor()?;
            let factor = match factor {
                Expr::Number(whole) if literal && !divide && factors.is_empty() => Expr::Number(self.mixed(whole)?),
                other => other,
            };
            factors.push(if divide { inverse(factor) } else { factor });
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
                Some(next) if self.starts_atom(next) => false,
                _ => break,
            };
        }
        let product = product(factors);
        Ok(if negative { Expr::Negative(Box::new(product)) } else { product })
    }

    /// Whether an odd number of minus signs stands here.
    fn sign(&mut self) -> bool {
        let mut negative = false;
        loop {
            if self.eat(&Token::Minus) {
                negative = !negative;
            } else if !self.eat(&Token::Plus) {
                return negative;
            }
        }
    }

    fn starts_atom(&self, token: &Token) -> bool {
        match token {
            Token::Bar => self.bars == 0,
            Token::Open(group) => *group != Group::Set,
            Token::Number(_) | Token::Symbol(_) | Token::Constant(_) | Token::Function(_) => true,
            Token::Fraction | Token::Sqrt => true,
            _ => false,
        }
    }

    /// `2\frac{5}{8}` and `1 1/2`: a whole number and a proper fraction of whole numbers behind it.
    ///
    /// Looks at the tokens and takes them only when they fit: reading them to find out would double the work at every
    /// level of a nested fraction.
    fn mixed(&mut self, whole: Number) -> Result<Number, ParseError> {
        let rest = &self.tokens[self.at..];
        let parts = match rest {
            [Token::Number(top), Token::Over, Token::Number(bottom), ..] => Some((digits(top), digits(bottom), 3)),
            // `\frac58`
            [Token::Fraction, Token::Number(both), ..] if both.whole.len() == 2 => {
                digits(both).map(|both| (Some(&both[..1]), Some(&both[1..]), 2))
            }
            [Token::Fraction, rest @ ..] => braced_digits(rest).and_then(|(top, used)| {
                braced_digits(&rest[used..]).map(|(bottom, more)| (Some(top), Some(bottom), 1 + used + more))
            }),
            _ => None,
        };
        let Some((Some(top), Some(bottom), used)) = parts.filter(|_| whole.decimals.is_none()) else {
            return Ok(whole);
        };
        let (top, bottom) = (integer(top)?, integer(bottom)?);
        if top.is_zero() || top >= bottom {
            return Ok(whole);
        }
        self.at += used;
        Ok(Number { value: whole.value + BigRational::new(top, bottom), decimals: None })
    }

    /// An atom with its powers, factorials, per cents and units; true for a plain number.
    fn factor(&mut self) -> Result<(Expr, bool), ParseError> {
        if self.sign() {
            let (inner, _) = self.nested(Self::factor)?;
            return Ok((Expr::Negative(Box::new(inner)), false));
        }
        let atom = self.nested(Self::atom)?;
        let literal = matches!(atom, Expr::Number(_));
        self.postfix(atom, literal)
    }

    fn postfix(&mut self, mut expr: Expr, mut literal: bool) -> Result<(Expr, bool), ParseError> {
        /// More marks than anybody writes; nested nodes, so they are bounded like depth.
        const MAX_MARKS: usize = 8;
        for _ in 0..MAX_MARKS {
            let Some(next) = self.peek() else { return Ok((expr, literal)) };
            match next {
                Token::Bang => expr = Expr::Call(Function::Factorial, vec![expr]),
                Token::Percent => expr = Expr::Percent(Box::new(expr)),
                Token::Degree => expr = self.degrees(expr),
                Token::Text(_) => {
                    self.units();
                    continue;
                }
                Token::Over if matches!(self.tokens.get(self.at + 1), Some(Token::Text(_))) => {}
                Token::Caret => {
                    self.at += 1;
                    expr = self.power(expr)?;
                    literal = false;
                    continue;
                }
                Token::Underscore if literal => {
                    self.at += 1;
                    let base = self.subscript()?;
                    let Expr::Number(number) = &expr else { return Err(ParseError::Syntax("a base of no number")) };
                    expr = Expr::Symbol(format!("{}_{base}", number.value));
                    continue;
                }
                _ => return Ok((expr, literal)),
            }
            self.at += 1;
            literal = literal && matches!(expr, Expr::Number(_));
        }
        Err(ParseError::TooDeep)
    }

    /// Skips units with their exponents: `cm^2`, `miles / hour`.
    fn units(&mut self) {
        while matches!(self.peek(), Some(Token::Text(_))) {
            self.at += 1;
            match self.tokens[self.at..] {
                [Token::Caret, Token::Number(_), ..] => self.at += 2,
                [Token::Caret, Token::Open(Group::Brace), Token::Number(_), Token::Close(Group::Brace), ..] => {
                    self.at += 4;
                }
                _ => {}
            }
            if matches!(self.tokens[self.at..], [Token::Over, Token::Text(_), ..]) {
                self.at += 1;
            }
        }
    }

    fn degrees(&self, expr: Expr) -> Expr {
        if self.angles == 0 {
            return expr;
        }
        product(vec![expr, Expr::Constant(Constant::Pi), inverse(Expr::integer(180))])
    }

    fn power(&mut self, base: Expr) -> Result<Expr, ParseError> {
        let degree = match self.tokens[self.at..] {
            [Token::Degree, ..] => 1,
            [Token::Open(Group::Brace), Token::Degree, Token::Close(Group::Brace), ..] => 3,
            _ => 0,
        };
        if degree > 0 {
            self.at += degree;
            return Ok(self.degrees(base));
        }
        if self.eat(&Token::Prime) {
            return primed(base);
        }
        let exponent = self.exponent()?;
        Ok(Expr::Power(Box::new(base), Box::new(exponent)))
    }

    /// A brace group, or a signed atom that may have an exponent of its own.
    fn exponent(&mut self) -> Result<Expr, ParseError> {
        let negative = self.sign();
        let atom = self.nested(Self::atom)?;
        let exponent = if self.eat(&Token::Caret) { self.nested(|parser| parser.power(atom))? } else { atom };
        Ok(if negative { Expr::Negative(Box::new(exponent)) } else { exponent })
    }

    fn atom(&mut self) -> Result<Expr, ParseError> {
        let Some(token) = self.peek().cloned() else { return Err(ParseError::Syntax("a missing operand")) };
        self.at += 1;
        match token {
            Token::Number(literal) => number(&literal).map(Expr::Number),
            Token::Constant(Constant::Euler) if self.peek() == Some(&Token::Underscore) => self.symbol("e".to_owned()),
            Token::Constant(Constant::Imaginary) if self.peek() == Some(&Token::Underscore) => {
                self.symbol("i".to_owned())
            }
            Token::Constant(constant) => Ok(Expr::Constant(constant)),
            Token::Symbol(name) => self.symbol(name),
            Token::Function(Function::Binomial) => {
                let arguments = vec![self.fraction_part()?, self.fraction_part()?];
                Ok(Expr::Call(Function::Binomial, arguments))
            }
            Token::Function(function) => self.call(function),
            Token::Fraction => Ok(product(vec![self.fraction_part()?, inverse(self.fraction_part()?)])),
            Token::Sqrt => self.root(),
            Token::Bar => {
                let bars = std::mem::replace(&mut self.bars, 1);
                let inside = self.ratio()?;
                self.bars = bars;
                self.expect(&Token::Bar, "an absolute value without an end")?;
                Ok(Expr::Call(Function::Abs, vec![inside]))
            }
            Token::Open(group) => self.group(group),
            _ => Err(ParseError::Syntax("an operator without an operand")),
        }
    }

    /// The rest of a bracketed expression.
    fn group(&mut self, group: Group) -> Result<Expr, ParseError> {
        if group == Group::Set {
            return Err(ParseError::Syntax("a set within an expression"));
        }
        let bars = std::mem::take(&mut self.bars);
        let inside = self.ratio()?;
        self.bars = bars;
        self.expect(&Token::Close(group), "a bracket that is not closed")?;
        Ok(match group {
            Group::Floor => Expr::Call(Function::Floor, vec![inside]),
            Group::Ceil => Expr::Call(Function::Ceil, vec![inside]),
            _ => inside,
        })
    }

    /// A symbol with subscripts and primes, and with the number that it is applied to.
    fn symbol(&mut self, mut name: String) -> Result<Expr, ParseError> {
        loop {
            if self.eat(&Token::Underscore) {
                name = format!("{name}_{}", self.subscript()?);
            } else if self.eat(&Token::Prime) {
                name.push('\'');
            } else {
                break;
            }
        }
        // `I(0)` is the value of a function; read as a product it would be zero.
        if let [Token::Open(Group::Round), Token::Number(argument), Token::Close(Group::Round), ..] =
            &self.tokens[self.at..]
        {
            name = format!("{name}({})", number(argument)?.value);
            self.at += 3;
        }
        Ok(Expr::Symbol(name))
    }

    /// A subscript as a name; its tokens need not form an expression (`\sum_{k=0}`).
    fn subscript(&mut self) -> Result<String, ParseError> {
        let mut depth = 0;
        let mut name = String::new();
        loop {
            let Some(token) = self.peek() else { return Err(ParseError::Syntax("a missing subscript")) };
            match token {
                Token::Open(Group::Brace) => depth += 1,
                Token::Close(Group::Brace) => depth -= 1,
                Token::Number(literal) => name.push_str(&literal.whole),
                Token::Symbol(symbol) | Token::Text(symbol) => name.push_str(symbol),
                other => name.push_str(&format!("{other:?}")),
            }
            self.at += 1;
            if depth <= 0 {
                return Ok(name);
            }
        }
    }

    /// An argument of `\frac`: a group, one digit, or one atom.
    fn fraction_part(&mut self) -> Result<Expr, ParseError> {
        let negative = self.sign();
        let part = match self.peek() {
            Some(Token::Number(literal)) if literal.whole.len() > 1 && literal.decimals.is_none() => {
                let (digit, rest) = literal.whole.split_at(1);
                let (digit, rest) = (digit.to_owned(), rest.to_owned());
                let exponent = literal.exponent;
                self.tokens[self.at] = Token::Number(Literal { whole: rest, exponent, ..Literal::default() });
                number(&Literal { whole: digit, ..Literal::default() }).map(Expr::Number)?
            }
            _ => self.nested(Self::atom)?,
        };
        Ok(if negative { Expr::Negative(Box::new(part)) } else { part })
    }

    fn root(&mut self) -> Result<Expr, ParseError> {
        let mut index = Expr::integer(2);
        if self.eat(&Token::Open(Group::Square)) {
            index = self.nested(Self::ratio)?;
            self.expect(&Token::Close(Group::Square), "a root index without an end")?;
        }
        let radicand = self.nested(Self::atom)?;
        Ok(Expr::Call(Function::Root, vec![radicand, index]))
    }

    /// A function with its optional base or power and its argument.
    fn call(&mut self, function: Function) -> Result<Expr, ParseError> {
        let mut base = None;
        let mut exponent = None;
        for _ in 0..2 {
            if function == Function::Log && self.eat(&Token::Underscore) {
                base = Some(self.nested(Self::atom)?);
            } else if self.eat(&Token::Caret) {
                exponent = Some(self.exponent()?);
            }
        }
        self.angles += usize::from(function.takes_angle());
        let argument = self.nested(Self::argument);
        self.angles -= usize::from(function.takes_angle());
        let argument = argument?;
        let is_inverse = exponent == Some(Expr::Negative(Box::new(Expr::integer(1))));
        if let (true, Some(inverse)) = (is_inverse, function.inverse()) {
            return Ok(Expr::Call(inverse, vec![argument]));
        }
        let call = match base {
            Some(base) => Expr::Call(function, vec![argument, base]),
            // Without a base the logarithm is the natural one, as in most mathematical writing.
            None if function == Function::Log => Expr::Call(Function::Ln, vec![argument]),
            None => Expr::Call(function, vec![argument]),
        };
        Ok(match exponent {
            Some(exponent) => Expr::Power(Box::new(call), Box::new(exponent)),
            None => call,
        })
    }

    /// A bracket, or factors side by side up to the next function or operator: `\sin 2x`.
    fn argument(&mut self) -> Result<Expr, ParseError> {
        if matches!(self.peek(), Some(Token::Open(_))) {
            return self.atom();
        }
        let negative = self.sign();
        let mut factors = Vec::new();
        while let Some(next) = self.peek() {
            let stops = matches!(next, Token::Function(_)) && !factors.is_empty();
            if stops || !self.starts_atom(next) || (matches!(next, Token::Open(_)) && !factors.is_empty()) {
                break;
            }
            let (factor, _) = self.factor()?;
            factors.push(factor);
        }
        if factors.is_empty() {
            return Err(ParseError::Syntax("a function without an argument"));
        }
        let argument = product(factors);
        Ok(if negative { Expr::Negative(Box::new(argument)) } else { argument })
    }
}

/// The digits of a plain whole number.
fn digits(literal: &Literal) -> Option<&str> {
    (literal.decimals.is_none() && literal.exponent == 0 && !literal.whole.is_empty()).then_some(literal.whole.as_str())
}

/// A digit, or a whole number in braces, and the number of tokens it takes.
fn braced_digits(tokens: &[Token]) -> Option<(&str, usize)> {
    match tokens {
        [Token::Open(Group::Brace), Token::Number(number), Token::Close(Group::Brace), ..] => {
            digits(number).map(|digits| (digits, 3))
        }
        [Token::Number(number), ..] => digits(number).filter(|digits| digits.len() == 1).map(|digits| (digits, 1)),
        _ => None,
    }
}

fn product(mut factors: Vec<Expr>) -> Expr {
    if factors.len() == 1 { factors.remove(0) } else { Expr::Product(factors) }
}

fn inverse(expr: Expr) -> Expr {
    Expr::Inverse(Box::new(expr))
}

fn primed(base: Expr) -> Result<Expr, ParseError> {
    match base {
        Expr::Symbol(name) => Ok(Expr::Symbol(format!("{name}'"))),
        _ => Err(ParseError::Syntax("a prime behind something that has no name")),
    }
}

/// The value of a literal.
fn number(literal: &Literal) -> Result<Number, ParseError> {
    let fraction = literal.decimals.as_deref().unwrap_or("");
    let digits: String = [literal.whole.as_str(), fraction].concat();
    let whole = if digits.is_empty() { BigInt::zero() } else { integer(&digits)? };
    let places = u32::try_from(fraction.len()).map_err(|_| ParseError::TooLong)?;
    let mut value = BigRational::new(whole, ten_to(places));
    if !literal.repeating.is_empty() {
        let length = u32::try_from(literal.repeating.len()).map_err(|_| ParseError::TooLong)?;
        let period = (ten_to(length) - BigInt::one()) * ten_to(places);
        value += BigRational::new(integer(&literal.repeating)?, period);
    }
    let scale = literal.exponent.unsigned_abs();
    if u64::from(scale) * 4 > MAX_BITS {
        return Err(ParseError::Syntax("a number that is too large"));
    }
    let scale = BigRational::from_integer(ten_to(scale));
    value = if literal.exponent < 0 { value / scale } else { value * scale };
    let decimals = literal.decimals.is_some() && literal.repeating.is_empty() && literal.exponent == 0;
    Ok(Number { value, decimals: decimals.then_some(places) })
}

fn ten_to(power: u32) -> BigInt {
    BigInt::from(10).pow(power)
}

fn integer(digits: &str) -> Result<BigInt, ParseError> {
    digits.parse().map_err(|_| ParseError::Syntax("a number of no digits"))
}
