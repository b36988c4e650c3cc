//! Tokens to answers: lists, relations, sets and brackets. What is left is for `expression`.

use super::ParseError;
use super::expression::expression;
use super::lexer::{Group, Relation, Token};
use super::matrix;
use crate::answer::{Answer, Bracket, Constant, Expr, Order};
use crate::limits::{Budget, MAX_DEPTH, MAX_ITEMS};

/// Reads a whole answer.
pub(super) fn answer(tokens: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    if depth > MAX_DEPTH {
        return Err(ParseError::TooDeep);
    }
    budget.spend(tokens.len()).ok_or(ParseError::TooComplex)?;
    if let Some(words) = only_words(tokens) {
        return Ok(Answer::Text(words));
    }
    let members: Vec<_> = split(tokens, |token| *token == Token::Separator).filter(|part| !part.is_empty()).collect();
    match members[..] {
        [] => Err(ParseError::Empty),
        [one] => relation(one, depth, budget),
        _ => Ok(Answer::List(items(&members, depth, budget)?)),
    }
}

/// Reads the members of a list; a member that is itself several answers (`±2`) is spread out.
fn items(members: &[&[Token]], depth: usize, budget: &mut Budget) -> Result<Vec<Answer>, ParseError> {
    if members.len() > MAX_ITEMS {
        return Err(ParseError::Syntax("too many members"));
    }
    let mut items = Vec::with_capacity(members.len());
    for member in members {
        match answer(member, depth + 1, budget)? {
            Answer::List(inner) => items.extend(inner),
            one => items.push(one),
        }
    }
    Ok(items)
}

/// Joins the words when there is nothing but words (and marks or digits after the first of them).
fn only_words(tokens: &[Token]) -> Option<String> {
    let is_mark = |token: &Token| matches!(token, Token::Open(Group::Round | Group::Brace) | Token::Close(_));
    if !matches!(tokens.iter().find(|token| !is_mark(token))?, Token::Text(_)) {
        return None;
    }
    let mut words = Vec::new();
    for token in tokens {
        match token {
            Token::Text(text) | Token::Symbol(text) => words.push(text.clone()),
            Token::Constant(Constant::Euler) => words.push("e".to_owned()),
            Token::Constant(Constant::Imaginary) => words.push("i".to_owned()),
            Token::Number(literal) if literal.decimals.is_none() => words.push(literal.whole.clone()),
            Token::Prime | Token::Bang | Token::Minus | Token::Separator | Token::Ratio | Token::Underscore => {}
            mark if is_mark(mark) => {}
            _ => return None,
        }
    }
    Some(words.join(" "))
}

/// Splits at tokens outside of all brackets.
fn split<'a>(tokens: &'a [Token], at: impl Fn(&Token) -> bool + 'a) -> impl Iterator<Item = &'a [Token]> {
    let mut depth = 0i32;
    tokens.split(move |token| {
        match token {
            Token::Open(_) | Token::BeginMatrix | Token::BeginDeterminant => depth += 1,
            Token::Close(_) | Token::EndMatrix => depth -= 1,
            _ => {}
        }
        depth == 0 && at(token)
    })
}

fn relation(tokens: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let mut sides: Vec<&[Token]> = split(tokens, |token| matches!(token, Token::Relation(_))).collect();
    if sides.len() == 1 {
        return sets(tokens, depth, budget);
    }
    let mut relations = Vec::new();
    let mut end = 0;
    for side in &sides[..sides.len() - 1] {
        end += side.len();
        let Some(Token::Relation(relation)) = tokens.get(end) else { return Err(ParseError::Syntax("no relation")) };
        relations.push(*relation);
        end += 1;
    }
    if let Some(conclusion) = relations.iter().rposition(|relation| *relation == Relation::Implies) {
        let read = sides[..=conclusion].iter().map(|side| side.len() + 1).sum();
        return answer(&tokens[read..], depth + 1, budget);
    }
    if let Some(about) = relations.iter().position(|relation| *relation == Relation::About) {
        // `x = 1/3 ≈ 0.33`: the exact value stands before the sign; `x ≈ 11` has no other.
        if about == 0 && is_name(sides[0]) {
            return answer(&tokens[sides[0].len() + 1..], depth + 1, budget);
        }
        sides.truncate(about + 1);
        relations.truncate(about);
    }
    if let Some(member) = relations.iter().rposition(|relation| *relation == Relation::In) {
        return sets(sides[member + 1], depth, budget);
    }
    let (first, last) = (sides[0], sides[sides.len() - 1]);
    if relations.is_empty() {
        return sets(first, depth, budget);
    }
    if relations.iter().all(|relation| *relation == Relation::Equal) {
        let left = match answer(first, depth + 1, budget) {
            Err(ParseError::TooComplex) => return Err(ParseError::TooComplex),
            left => left.unwrap_or_else(|_| Answer::Opaque(format!("{first:?}"))),
        };
        return Ok(Answer::Equation(Box::new(left), Box::new(answer(last, depth + 1, budget)?)));
    }
    inequality(&sides, &relations, budget)
}

/// Whether these tokens name something and do not calculate.
fn is_name(tokens: &[Token]) -> bool {
    tokens.iter().all(|token| {
        let is_bracket = matches!(token, Token::Open(_) | Token::Close(_) | Token::Bar | Token::Separator);
        is_bracket || matches!(token, Token::Symbol(_) | Token::Text(_) | Token::Underscore)
    })
}

fn inequality(sides: &[&[Token]], relations: &[Relation], budget: &mut Budget) -> Result<Answer, ParseError> {
    let mut side = |at: usize| expression(sides[at], budget);
    match relations {
        [Relation::NotEqual] => Ok(Answer::Inequality(Order::NotEqual, side(0)?, side(1)?)),
        [Relation::Less] => Ok(Answer::Inequality(Order::Less, side(0)?, side(1)?)),
        [Relation::LessOrEqual] => Ok(Answer::Inequality(Order::LessOrEqual, side(0)?, side(1)?)),
        [Relation::Greater] => Ok(Answer::Inequality(Order::Less, side(1)?, side(0)?)),
        [Relation::GreaterOrEqual] => Ok(Answer::Inequality(Order::LessOrEqual, side(1)?, side(0)?)),
        [left, right] => {
            // `a < x ≤ b` is an interval.
            let rising = |relation| matches!(relation, Relation::Less | Relation::LessOrEqual);
            let falling = |relation| matches!(relation, Relation::Greater | Relation::GreaterOrEqual);
            let (low, high, at_low, at_high) = if rising(*left) && rising(*right) {
                (side(0)?, side(2)?, *left, *right)
            } else if falling(*left) && falling(*right) {
                (side(2)?, side(0)?, *right, *left)
            } else {
                return Err(ParseError::Syntax("relations that do not form a chain"));
            };
            let bracket = |relation| match relation {
                Relation::Less | Relation::Greater => Bracket::Round,
                _ => Bracket::Square,
            };
            let items = vec![Answer::Scalar(low), Answer::Scalar(high)];
            Ok(Answer::Sequence { open: bracket(at_low), close: bracket(at_high), items })
        }
        _ => Err(ParseError::Syntax("relations that do not form a chain")),
    }
}

/// Unions of differences of intersections.
fn sets(tokens: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let pieces: Vec<_> = split(tokens, |token| *token == Token::Union).collect();
    if pieces.len() > 1 {
        return Ok(Answer::Union(items(&pieces, depth, budget)?));
    }
    let pieces: Vec<_> = split(tokens, |token| *token == Token::Difference).collect();
    if let [first, rest @ ..] = &pieces[..]
        && !rest.is_empty()
    {
        let mut set = answer(first, depth + 1, budget)?;
        for without in items(rest, depth, budget)? {
            set = Answer::Difference(Box::new(set), Box::new(without));
        }
        return Ok(set);
    }
    let pieces: Vec<_> = split(tokens, |token| *token == Token::Intersection).collect();
    if pieces.len() > 1 {
        return Ok(Answer::Intersection(items(&pieces, depth, budget)?));
    }
    bracketed(tokens, depth, budget)
}

/// A pair of brackets around everything, or an expression.
fn bracketed(tokens: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let tokens = without_units(tokens);
    match tokens {
        [Token::EmptySet] => return Ok(Answer::Set(Vec::new())),
        [Token::Reals] => return Ok(Answer::Reals),
        _ => {}
    }
    let Some((open, inside, close)) = enclosed(tokens) else { return scalar(tokens, budget) };
    let members: Vec<_> = split(inside, |token| *token == Token::Separator).filter(|part| !part.is_empty()).collect();
    let bracket = |group| if group == Group::Square { Bracket::Square } else { Bracket::Round };
    match (open, close, members.len()) {
        (Group::Set, Group::Set, 0) => Ok(Answer::Set(Vec::new())),
        (Group::Set, Group::Set, _) => match condition(inside) {
            Some(condition) => answer(condition, depth + 1, budget),
            None => Ok(Answer::Set(items(&members, depth, budget)?)),
        },
        (Group::Brace, Group::Brace, _) => answer(inside, depth + 1, budget),
        (Group::Round | Group::Square, Group::Round | Group::Square, 2..) => {
            if members.len() > MAX_ITEMS {
                return Err(ParseError::Syntax("too many members"));
            }
            let items = members.iter().map(|member| answer(member, depth + 1, budget)).collect::<Result<_, _>>()?;
            Ok(Answer::Sequence { open: bracket(open), close: bracket(close), items })
        }
        (Group::Round, Group::Round, 1) | (Group::Square, Group::Square, 1) => match scalar(tokens, budget) {
            Ok(scalar) => Ok(scalar),
            Err(ParseError::TooComplex) => Err(ParseError::TooComplex),
            Err(_) => answer(inside, depth + 1, budget),
        },
        _ => scalar(tokens, budget),
    }
}

/// What stands behind the bar of `{x | x > 3}`.
fn condition(inside: &[Token]) -> Option<&[Token]> {
    let is_bar = |token: &Token| matches!(token, Token::Bar | Token::Ratio);
    let is_variable = matches!(inside.first(), Some(Token::Symbol(_)));
    let at = inside.iter().position(is_bar).filter(|_| is_variable)?;
    let condition = &inside[at + 1..];
    let states = condition.iter().any(|token| matches!(token, Token::Relation(_)));
    (states && !condition.iter().any(is_bar)).then_some(condition)
}

/// Cuts units off the end: `(3, 4) \text{ cm}`.
fn without_units(mut tokens: &[Token]) -> &[Token] {
    while let [rest @ .., Token::Over, Token::Text(_)] | [rest @ .., Token::Text(_)] = tokens
        && !rest.is_empty()
    {
        tokens = rest;
    }
    tokens
}

/// The inside of the brackets, when the first one is closed by the last token.
fn enclosed(tokens: &[Token]) -> Option<(Group, &[Token], Group)> {
    let [Token::Open(open), inside @ .., Token::Close(close)] = tokens else { return None };
    let mut depth = 0i32;
    for token in inside {
        match token {
            Token::Open(_) => depth += 1,
            Token::Close(_) => depth -= 1,
            _ => {}
        }
        if depth < 0 {
            return None;
        }
    }
    Some((*open, inside, *close))
}

fn scalar(tokens: &[Token], budget: &mut Budget) -> Result<Answer, ParseError> {
    let expr = expression(tokens, budget)?;
    if matrix::has_matrix(&expr) {
        return matrix::reduce(expr, budget);
    }
    if expr.is_two_valued() {
        let both = [true, false].map(|plus| Answer::Scalar(expr.with_sign(plus)));
        return Ok(Answer::List(both.into()));
    }
    if expr.any(|node| matches!(node, Expr::Call(crate::answer::Function::Determinant, _))) {
        return Err(ParseError::Syntax("a determinant of no matrix"));
    }
    Ok(Answer::Scalar(expr))
}
