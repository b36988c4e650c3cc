//! Operands: numbers, symbols, brackets, fractions, roots, functions, sums over an index, matrices.

use super::ParseError;
use super::expression::{Parser, expression};
use super::lexer::{Group, Series, Token};
use super::literal::Literal;
use crate::answer::{Constant, Expr, Function};
use crate::limits::{MAX_ITEMS, MAX_TERMS};

impl Parser<'_> {
    pub(super) fn operand(&mut self) -> Result<Expr, ParseError> {
        let Some(token) = self.peek().cloned() else { return Err(ParseError::Syntax("a missing operand")) };
        self.at += 1;
        match token {
            Token::Number(literal) => {
                self.budget.spend(literal.steps()).ok_or(ParseError::TooComplex)?;
                literal.number().map(Expr::Number)
            }
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
            Token::Function(function) if function.takes_list() => self.list_call(function),
            Token::Function(function) => self.call(function),
            Token::Fraction => Ok(Expr::product(vec![self.fraction_part()?, self.fraction_part()?.inverse()])),
            Token::Series(series) => self.series(series),
            Token::Sqrt => self.root(),
            Token::BeginMatrix => self.matrix().map(Expr::Matrix),
            Token::BeginDeterminant => {
                let matrix = self.matrix().map(Expr::Matrix)?;
                Ok(Expr::Call(Function::Determinant, vec![matrix]))
            }
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

    /// Parses the rest of a bracketed expression.
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

    /// Parses a symbol with subscripts and primes, and with the number that it is applied to.
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
        // `I(0)` is the value of a function; as a product it would be zero.
        if let [Token::Open(Group::Round), Token::Number(argument), Token::Close(Group::Round), ..] = self.rest() {
            name = format!("{name}({})", argument.number()?.value);
            self.at += 3;
        }
        Ok(Expr::Symbol(name))
    }

    /// Reads a subscript as part of a name; its tokens need not form an expression (`\sum_{k=0}`).
    pub(super) fn subscript(&mut self) -> Result<String, ParseError> {
        let mut depth = 0;
        let mut name = String::new();
        loop {
            let Some(token) = self.peek() else { return Err(ParseError::Syntax("a missing subscript")) };
            match token {
                Token::Open(Group::Brace) => depth += 1,
                Token::Close(Group::Brace) => depth -= 1,
                Token::Number(literal) => name.push_str(&literal.whole),
                Token::Symbol(symbol) | Token::Text(symbol) => name.push_str(symbol),
                Token::Constant(Constant::Euler) => name.push('e'),
                Token::Constant(Constant::Imaginary) => name.push('i'),
                other => name.push_str(&format!("{other:?}")),
            }
            self.at += 1;
            if depth <= 0 {
                return Ok(name);
            }
        }
    }

    /// Splits the first digit from a longer number: `\frac12`, `\log_5 625` written as `\log_5625`.
    fn first_digit(&mut self) -> Option<Expr> {
        let Some(Token::Number(literal)) = self.peek() else { return None };
        if literal.whole.len() < 2 {
            return None;
        }
        let (digit, rest) = literal.whole.split_at(1);
        let rest = Literal { whole: rest.to_owned(), ..literal.clone() };
        let digit = Expr::integer(digit.parse().ok()?);
        self.tokens[self.at] = Token::Number(rest);
        Some(digit)
    }

    /// Parses an argument of `\frac`: a group, one digit, or one operand.
    fn fraction_part(&mut self) -> Result<Expr, ParseError> {
        let negative = self.sign();
        let part = match self.first_digit() {
            Some(digit) => digit,
            None => self.nested(Self::operand)?,
        };
        Ok(if negative { part.negative() } else { part })
    }

    fn root(&mut self) -> Result<Expr, ParseError> {
        let mut index = Expr::integer(2);
        if self.eat(&Token::Open(Group::Square)) {
            index = self.nested(Self::ratio)?;
            self.expect(&Token::Close(Group::Square), "a root index without an end")?;
        }
        let radicand = self.nested(Self::operand)?;
        Ok(Expr::Call(Function::Root, vec![radicand, index]))
    }

    /// Parses a function with its optional base or power and its argument.
    fn call(&mut self, function: Function) -> Result<Expr, ParseError> {
        let mut base = None;
        let mut exponent = None;
        for _ in 0..2 {
            if function == Function::Log && self.eat(&Token::Underscore) {
                // `\log_5625`, but not `\log_10 5`.
                let has_argument = self.tokens.get(self.at + 1).is_some_and(|next| self.starts_operand(next));
                let digit = if has_argument { None } else { self.first_digit() };
                base = Some(digit.map_or_else(|| self.nested(Self::operand), Ok)?);
            } else if self.eat(&Token::Caret) {
                exponent = Some(self.exponent()?);
            }
        }
        let argument = self.nested(Self::argument)?;
        match function {
            Function::Lg => base = Some(Expr::integer(10)),
            Function::Cis => {
                let sine = Expr::Call(Function::Sin, vec![argument.clone()]);
                let cosine = Expr::Call(Function::Cos, vec![argument]);
                return Ok(Expr::Sum(vec![cosine, Expr::Product(vec![Expr::Constant(Constant::Imaginary), sine])]));
            }
            _ => {}
        }
        let function = if function == Function::Lg { Function::Log } else { function };
        let is_inverse = exponent == Some(Expr::integer(1).negative());
        if let (true, Some(inverse)) = (is_inverse, function.inverse()) {
            return Ok(Expr::Call(inverse, vec![argument]));
        }
        let arguments = std::iter::once(argument).chain(base).collect();
        let call = Expr::Call(function, arguments);
        Ok(match exponent {
            Some(exponent) => Expr::Power(Box::new(call), Box::new(exponent)),
            None => call,
        })
    }

    /// Parses `\gcd(12, 18)`: arguments with separators.
    fn list_call(&mut self, function: Function) -> Result<Expr, ParseError> {
        let open = self.peek().cloned();
        let Some(Token::Open(group @ (Group::Round | Group::Set | Group::Brace))) = open else {
            return Err(ParseError::Syntax("a function without an argument"));
        };
        self.at += 1;
        let mut arguments = Vec::new();
        loop {
            arguments.push(self.nested(Self::ratio)?);
            if !matches!(self.peek(), Some(Token::Separator(_))) {
                break;
            }
            self.at += 1;
        }
        self.expect(&Token::Close(group), "a bracket that is not closed")?;
        if arguments.len() > MAX_ITEMS {
            return Err(ParseError::Syntax("too many arguments"));
        }
        Ok(Expr::Call(function, arguments))
    }

    /// Parses a bracket, or adjacent factors up to the next function or operator: `\sin 2x`.
    fn argument(&mut self) -> Result<Expr, ParseError> {
        if matches!(self.peek(), Some(Token::Open(_))) {
            return self.operand();
        }
        let negative = self.sign();
        let mut factors = Vec::new();
        while let Some(next) = self.peek() {
            let stops = matches!(next, Token::Function(_)) && !factors.is_empty();
            if stops || !self.starts_operand(next) || (matches!(next, Token::Open(_)) && !factors.is_empty()) {
                break;
            }
            let (factor, _) = self.factor()?;
            factors.push(factor);
        }
        if factors.is_empty() {
            return Err(ParseError::Syntax("a function without an argument"));
        }
        let argument = Expr::product(factors);
        Ok(if negative { argument.negative() } else { argument })
    }

    /// Parses `\sum` and `\prod`: expanded if the bounds are numbers, otherwise a symbol before its term.
    fn series(&mut self, series: Series) -> Result<Expr, ParseError> {
        let bounds = bounds(self.rest());
        let Some((index, from, to, used)) = bounds else {
            return self.symbol(format!("{series:?}"));
        };
        self.at += used;
        let term = self.nested(Self::term)?;
        let name = match &index {
            Expr::Symbol(name) => name.clone(),
            _ => "i".to_owned(),
        };
        // `a_k` is one name, in which the index cannot be replaced by a number.
        let is_hidden = term.symbols().iter().any(|symbol| symbol.contains('_') && symbol.contains(&name));
        if is_hidden || to.checked_sub(from).is_none_or(|terms| !(0..MAX_TERMS).contains(&terms)) {
            return Ok(Expr::product(vec![Expr::Symbol(format!("{series:?}_{name}={from}^{to}")), term]));
        }
        let mut terms = Vec::new();
        for value in from..=to {
            self.budget.spend(2 * term.size()).ok_or(ParseError::TooComplex)?;
            terms.push(term.replaced(&index, &Expr::integer(value)));
        }
        Ok(if series == Series::Sum { Expr::sum(terms) } else { Expr::product(terms) })
    }

    /// Parses rows up to the end of the current matrix.
    fn matrix(&mut self) -> Result<Vec<Vec<Expr>>, ParseError> {
        let mut depth = 0i32;
        let end = self.rest().iter().position(|token| {
            match token {
                Token::BeginMatrix | Token::BeginDeterminant => depth += 1,
                Token::EndMatrix => depth -= 1,
                _ => {}
            }
            depth < 0
        });
        let end = end.ok_or(ParseError::Syntax("a matrix without an end"))?;
        let inside = self.tokens[self.at..self.at + end].to_vec();
        self.at += end + 1;
        self.nested(|parser| rows(&inside, parser))
    }
}

fn rows(inside: &[Token], parser: &mut Parser<'_>) -> Result<Vec<Vec<Expr>>, ParseError> {
    if inside.iter().any(|token| matches!(token, Token::BeginMatrix | Token::BeginDeterminant)) {
        return Err(ParseError::Syntax("a matrix within a matrix"));
    }
    let mut rows = Vec::new();
    for row in inside.split(|token| *token == Token::NextRow).filter(|row| !row.is_empty()) {
        let cells: Vec<_> = row.split(|token| *token == Token::NextCell).collect();
        if cells.len() > MAX_ITEMS || rows.len() >= MAX_ITEMS {
            return Err(ParseError::Syntax("too many cells"));
        }
        let cells = cells.into_iter().map(|cell| expression(cell, parser.budget));
        rows.push(cells.collect::<Result<Vec<Expr>, _>>()?);
    }
    if rows.is_empty() { Err(ParseError::Empty) } else { Ok(rows) }
}

/// Returns index, bounds and number of tokens of `_{k=1}^{10}`.
fn bounds(tokens: &[Token]) -> Option<(Expr, i64, i64, usize)> {
    let [Token::Underscore, Token::Open(Group::Brace), index, rest @ ..] = tokens else { return None };
    let index = match index {
        Token::Symbol(name) => Expr::Symbol(name.clone()),
        Token::Constant(Constant::Imaginary) => Expr::Constant(Constant::Imaginary),
        _ => return None,
    };
    let [Token::Relation(super::lexer::Relation::Equal), Token::Number(from), Token::Close(Group::Brace), rest @ ..] =
        rest
    else {
        return None;
    };
    let (to, used) = match rest {
        [Token::Caret, Token::Open(Group::Brace), Token::Number(to), Token::Close(Group::Brace), ..] => (to, 4),
        [Token::Caret, Token::Number(to), ..] => (to, 2),
        _ => return None,
    };
    let value = |literal: &Literal| literal.plain_digits().and_then(|digits| digits.parse().ok());
    Some((index, value(from)?, value(to)?, 6 + used))
}
