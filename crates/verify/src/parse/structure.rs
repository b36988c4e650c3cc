//! From tokens to answers: lists, relations, ratios, sets and brackets. `expression` parses the rest; `measure` handles
//! what follows a value.

use super::ParseError;
use super::expression::expression;
use super::lexer::{Group, Relation, Token};
use super::measure;
use crate::answer::{Answer, Bracket, Constant, Expr, Joint, Order};
use crate::limits::{Budget, MAX_DEPTH, MAX_ITEMS};

/// Most tuples that the signs `±` of one tuple stand for.
const MAX_TUPLES: usize = 16;

/// Parses a whole answer, which may start with the letter of a choice.
pub(super) fn whole(tokens: &[Token], budget: &mut Budget) -> Result<Answer, ParseError> {
    if let Some(interval) = turned_brackets(tokens) {
        return answer(&interval, 0, budget);
    }
    if let Some((letter, value)) = choice(tokens)
        && let Ok(value) = answer(value, 0, budget)
    {
        return Ok(Answer::Choice(letter, Box::new(value)));
    }
    answer(tokens, 0, budget)
}

/// Rewrites `]2, 3]` and `]2, 3[`, the French and German notation of open ends, with round brackets.
fn turned_brackets(tokens: &[Token]) -> Option<Vec<Token>> {
    let (open, inside, close) = match tokens {
        [Token::Close(Group::Square), inside @ .., close] => (Group::Round, inside, close),
        [Token::Open(Group::Square), inside @ .., close @ Token::Open(Group::Square)] => (Group::Square, inside, close),
        _ => return None,
    };
    let close = match close {
        Token::Open(Group::Square) => Group::Round,
        Token::Close(Group::Square) => Group::Square,
        _ => return None,
    };
    is_closed(inside).then(|| [&[Token::Open(open)], inside, &[Token::Close(close)]].concat())
}

/// Parses an answer or a part of one.
pub(super) fn answer(tokens: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    if depth > MAX_DEPTH {
        return Err(ParseError::TooDeep);
    }
    budget.spend(tokens.len()).ok_or(ParseError::TooComplex)?;
    if let Some((rest, variables)) = without_quantifier(tokens) {
        let inner = answer(&rest, depth + 1, budget)?;
        return Ok(Answer::For(Box::new(inner), variables));
    }
    if let Some(words) = only_words(tokens) {
        return Ok(Answer::Text(words));
    }
    let members: Vec<_> = split(tokens, is_separator).filter(|part| !part.is_empty()).collect();
    match members[..] {
        [] => Err(ParseError::Empty),
        [one] => relation(one, depth, budget),
        _ => list(&members, joint(tokens), depth, budget),
    }
}

fn is_separator(token: &Token) -> bool {
    matches!(token, Token::Separator(_))
}

/// Returns the strongest word between the members of a list.
fn joint(tokens: &[Token]) -> Joint {
    let mut depth = 0i32;
    let mut found = Joint::Comma;
    for token in tokens {
        depth += nesting(token);
        match token {
            Token::Separator(Joint::Or) if depth == 0 => return Joint::Or,
            Token::Separator(Joint::And) if depth == 0 => found = Joint::And,
            _ => {}
        }
    }
    found
}

fn list(members: &[&[Token]], joint: Joint, depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let items = items(members, depth, budget)?;
    let is_parameter = |item: &Answer| matches!(item, Answer::Member(_, domain) if *domain != "ℂ");
    let has_inequality = items.iter().any(|item| matches!(item, Answer::Inequality(..) | Answer::Chain(..)));
    // `k\pi, k \in \mathbb{Z}` is one answer for every k; `x > 3, x \in \mathbb{Z}` are two conditions.
    if has_inequality || !items.iter().any(is_parameter) || items.iter().all(is_parameter) {
        return Ok(Answer::List(items, joint));
    }
    let (parameters, mut values): (Vec<_>, Vec<_>) = items.into_iter().partition(is_parameter);
    let names = parameters.iter().filter_map(|parameter| match parameter {
        Answer::Member(name, _) => symbol(name),
        _ => None,
    });
    let names = names.collect();
    let inner = if values.len() == 1 { values.remove(0) } else { Answer::List(values, joint) };
    Ok(Answer::For(Box::new(inner), names))
}

fn symbol(answer: &Answer) -> Option<String> {
    match answer {
        Answer::Scalar(Expr::Symbol(name)) => Some(name.clone()),
        _ => None,
    }
}

/// Parses the members of a list; a member with several values (`±2`) is expanded.
fn items(members: &[&[Token]], depth: usize, budget: &mut Budget) -> Result<Vec<Answer>, ParseError> {
    if members.len() > MAX_ITEMS {
        return Err(ParseError::Syntax("too many members"));
    }
    let mut items = Vec::with_capacity(members.len());
    for member in members {
        match answer(member, depth + 1, budget)? {
            Answer::List(inner, _) => items.extend(inner),
            one => items.push(one),
        }
    }
    Ok(items)
}

/// Returns the letter of a choice and its content: `\textbf{(D)}\ 42`, `\text{A}\ 12`, `(A) 12`, `A) 12`.
fn choice(tokens: &[Token]) -> Option<(String, &[Token])> {
    let is_letter = |name: &str| matches!(name.as_bytes(), [b'A'..=b'J']);
    let (letter, is_marked, rest) = match tokens {
        [Token::Open(Group::Round), Token::Text(name), Token::Close(Group::Round), rest @ ..] => (name, true, rest),
        [Token::Open(Group::Round), Token::Symbol(name), Token::Close(Group::Round), rest @ ..] => (name, false, rest),
        [Token::Text(name), Token::Close(Group::Round), rest @ ..] => (name, true, rest),
        [Token::Symbol(name), Token::Close(Group::Round), rest @ ..] => (name, true, rest),
        [Token::Text(name), rest @ ..] => (name, true, rest),
        _ => return None,
    };
    let starts_value = match rest.first()? {
        Token::Number(_) | Token::Fraction | Token::Sqrt | Token::Currency(_) => true,
        Token::Text(_) | Token::Minus | Token::Constant(_) | Token::Open(_) | Token::Symbol(_) => is_marked,
        _ => false,
    };
    (is_letter(letter) && starts_value && !rest.iter().any(is_separator)).then(|| (letter.clone(), rest))
}

/// Removes `for all x \in \mathbb{R}`, `for some integer k` and similar; returns the variables that they name.
fn without_quantifier(tokens: &[Token]) -> Option<(Vec<Token>, Vec<String>)> {
    const WORDS: &[&str] = &[
        "for",
        "all",
        "any",
        "every",
        "each",
        "some",
        "where",
        "with",
        "is",
        "are",
        "an",
        "a",
        "arbitrary",
        "integer",
        "integers",
        "real",
        "reals",
        "number",
        "numbers",
        "natural",
        "rational",
        "complex",
        "positive",
        "nonnegative",
        "values",
        "of",
    ];
    let is_quantifier = |text: &str| {
        let mut words = text.split_whitespace();
        let first = words.next().unwrap_or_default();
        let second = words.next();
        (first == "for" && matches!(second, Some("all" | "any" | "every" | "each" | "some")))
            || (first == "where" && second.is_none())
            || text == "∀"
    };
    let mut depth = 0i32;
    let start = tokens.iter().position(|token| {
        depth += nesting(token);
        depth == 0 && matches!(token, Token::Text(text) if is_quantifier(text))
    })?;
    // With nothing before it, it does not qualify an answer.
    if start == 0 {
        return None;
    }
    let length = tokens[start..].iter().position(is_separator).unwrap_or(tokens.len() - start);
    let mut names = Vec::new();
    for token in &tokens[start..start + length] {
        match token {
            Token::Text(text) if text.split_whitespace().all(|word| WORDS.contains(&word)) => {}
            Token::Symbol(name) => names.push(name.clone()),
            Token::Relation(Relation::In) | Token::Domain(_) | Token::Reals => {}
            // `for all n \ge 1` tells for which values the answer holds.
            Token::Relation(Relation::Greater | Relation::GreaterOrEqual) | Token::Number(_) if !names.is_empty() => {}
            Token::Open(Group::Brace) | Token::Close(Group::Brace) => {}
            _ => return None,
        }
    }
    let rest = [&tokens[..start], &tokens[start + length..]].concat();
    Some((rest, names))
}

/// Joins the words if there are only words (with marks or digits among them), or a single sign.
fn only_words(tokens: &[Token]) -> Option<String> {
    if let [sign] = tokens
        && let Some(sign) = sign_name(sign)
    {
        return Some(sign.to_owned());
    }
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
            // The meaning of a mark between words depends on the words, so it is kept.
            Token::Ratio if !labels_a_value(tokens) => words.push(":".to_owned()),
            Token::Minus => words.push("-".to_owned()),
            Token::Separator(_) if !labels_a_value(tokens) => words.push(",".to_owned()),
            Token::Prime | Token::Bang | Token::Underscore => {}
            mark if is_mark(mark) => {}
            _ => return None,
        }
    }
    Some(words.join(" "))
}

/// Whether words label values: `Alice: 1, Bob: 23`.
fn labels_a_value(tokens: &[Token]) -> bool {
    tokens.windows(2).any(|pair| matches!(pair, [Token::Ratio, Token::Number(_)]))
}

fn sign_name(token: &Token) -> Option<&'static str> {
    Some(match token {
        Token::Relation(Relation::Less) => "<",
        Token::Relation(Relation::Greater) => ">",
        Token::Relation(Relation::LessOrEqual) => "≤",
        Token::Relation(Relation::GreaterOrEqual) => "≥",
        Token::Relation(Relation::Equal) => "=",
        Token::Relation(Relation::NotEqual) => "≠",
        Token::Plus => "+",
        Token::Minus => "-",
        Token::Times => "×",
        Token::Over => "÷",
        _ => return None,
    })
}

fn nesting(token: &Token) -> i32 {
    match token {
        Token::Open(_) | Token::BeginMatrix | Token::BeginDeterminant | Token::BeginCases => 1,
        Token::Close(_) | Token::EndMatrix | Token::EndCases => -1,
        _ => 0,
    }
}

/// Splits at tokens outside of all brackets.
pub(super) fn split<'a>(tokens: &'a [Token], at: impl Fn(&Token) -> bool + 'a) -> impl Iterator<Item = &'a [Token]> {
    let mut depth = 0i32;
    tokens.split(move |token| {
        depth += nesting(token);
        depth == 0 && at(token)
    })
}

fn relation(tokens: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let mut sides: Vec<&[Token]> = split(tokens, |token| matches!(token, Token::Relation(_))).collect();
    if sides.len() == 1 {
        return ratio(tokens, depth, budget);
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
        // `x = 1/3 ≈ 0.33`: the exact value precedes the sign; `x ≈ 11` has no other value.
        if about == 0 && (sides[0].is_empty() || is_name(sides[0])) {
            return answer(&tokens[sides[0].len() + 1..], depth + 1, budget);
        }
        sides.truncate(about + 1);
        relations.truncate(about);
    }
    if let Some(member) = relations.iter().rposition(|relation| matches!(relation, Relation::In | Relation::NotIn)) {
        return membership(&sides, &relations, member, depth, budget);
    }
    let first = sides[0];
    if relations.is_empty() {
        return ratio(first, depth, budget);
    }
    if relations.iter().all(|relation| *relation == Relation::Equal) {
        return equation(&sides, depth, budget);
    }
    inequality(&sides, &relations, budget)
}

/// Parses `x \in S`; the left side may only name what is in the set.
fn membership(
    sides: &[&[Token]],
    relations: &[Relation],
    member: usize,
    depth: usize,
    budget: &mut Budget,
) -> Result<Answer, ParseError> {
    if member != 0 || relations.len() != 1 || !is_name(sides[0]) {
        return Err(ParseError::Syntax("a value that is said to be in a set"));
    }
    let set = answer(sides[1], depth + 1, budget)?;
    match (set, relations[0]) {
        (Answer::Domain(domain), Relation::In) => {
            Ok(Answer::Member(Box::new(answer(sides[0], depth + 1, budget)?), domain))
        }
        (set, Relation::In) => Ok(set),
        (set, _) => Ok(Answer::Difference(Box::new(Answer::Reals), Box::new(set))),
    }
}

fn equation(sides: &[&[Token]], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let mut read = Vec::with_capacity(sides.len());
    let last = sides.len() - 1;
    for (at, side) in sides.iter().enumerate() {
        // `= 5`
        if side.is_empty() && at == 0 {
            continue;
        }
        let side = match answer(side, depth + 1, budget) {
            Err(ParseError::TooComplex) => return Err(ParseError::TooComplex),
            // Any name of the value is allowed on the left.
            Err(_) if at < last => Answer::Opaque(format!("{side:?}")),
            side => side?,
        };
        read.push(side);
    }
    let names = is_definition(sides[0]);
    match read.len() {
        0 => Err(ParseError::Empty),
        1 => Ok(read.remove(0)),
        2 => {
            let right = Box::new(read.remove(1));
            Ok(Answer::Equation { left: Box::new(read.remove(0)), right, names })
        }
        _ => Ok(Answer::Equalities { sides: read, names }),
    }
}

/// Whether these tokens are a name rather than a calculation.
fn is_name(tokens: &[Token]) -> bool {
    tokens.iter().all(|token| {
        let is_bracket = matches!(token, Token::Open(_) | Token::Close(_) | Token::Bar | Token::Separator(_));
        let is_letter = matches!(token, Token::Symbol(_) | Token::Constant(Constant::Euler | Constant::Imaginary));
        is_bracket || is_letter || matches!(token, Token::Text(_) | Token::Underscore | Token::Prime | Token::Number(_))
    }) && tokens.iter().any(|token| !matches!(token, Token::Number(_)))
}

/// Whether the left side of an `=` only names the right side, which alone is then the answer: a letter, a function of
/// letters or numbers, a figure in capitals, words, or several of these. A product of variables is not a name: `xy = 6`
/// is a curve.
fn is_definition(tokens: &[Token]) -> bool {
    let tokens = match tokens {
        [Token::Open(Group::Round | Group::Brace), inside @ .., Token::Close(_)] if is_closed(inside) => inside,
        _ => tokens,
    };
    let mut parts = split(tokens, |token| matches!(token, Token::Separator(_) | Token::Ratio));
    !tokens.is_empty() && parts.all(is_one_name)
}

fn is_one_name(tokens: &[Token]) -> bool {
    let Some((first, rest)) = tokens.split_first() else { return false };
    let is_letter = |token: &Token| matches!(token, Token::Symbol(_) | Token::Constant(_));
    /// Commands before or over the letters of a figure.
    const FIGURES: &[&str] = &[
        "angle",
        "measuredangle",
        "triangle",
        "bigtriangleup",
        "overline",
        "overrightarrow",
        "overarc",
        "widehat",
        "vec",
        "odot",
        "square",
        "arc",
        "wideparen",
    ];
    let is_figure = |token: &Token| match token {
        Token::Symbol(name) => name.chars().next().is_some_and(char::is_uppercase) || FIGURES.contains(&name.as_str()),
        Token::Bar | Token::Prime | Token::Underscore | Token::Number(_) => true,
        Token::Open(Group::Brace) | Token::Close(Group::Brace) => true,
        _ => false,
    };
    match first {
        Token::Text(_) => rest.iter().all(|token| {
            matches!(token, Token::Text(_) | Token::Symbol(_) | Token::Number(_) | Token::Open(_) | Token::Close(_))
        }),
        // `\frac{dM}{dt}`
        Token::Fraction => {
            let is_differential =
                |token: &Token| matches!(token, Token::Symbol(name) if name == "d" || name == "partial");
            rest.iter().filter(|token| is_differential(token)).count() == 2
        }
        Token::Function(_) if rest.is_empty() => true,
        // A letter with index and primes, possibly applied to letters and numbers.
        _ if is_letter(first) && is_applied(without_index(rest)) => true,
        // `AB`, `\angle ABC`, `|AB|`, `m\angle A`
        Token::Symbol(name) if name == "m" || name == "d" => !rest.is_empty() && rest.iter().all(is_figure),
        _ => matches!(first, Token::Symbol(_) | Token::Bar) && is_figure(first) && rest.iter().all(is_figure),
    }
}

/// Skips index, primes and an inverse sign.
fn without_index(tokens: &[Token]) -> &[Token] {
    match tokens {
        [Token::Prime, rest @ ..] => without_index(rest),
        [Token::Underscore | Token::Caret, Token::Open(Group::Brace), rest @ ..] => {
            let close =
                rest.iter().position(|token| *token == Token::Close(Group::Brace)).map_or(rest.len(), |at| at + 1);
            without_index(&rest[close..])
        }
        [Token::Underscore, _, rest @ ..] => without_index(rest),
        [Token::Caret, Token::Prime, rest @ ..] => without_index(rest),
        _ => tokens,
    }
}

fn is_applied(tokens: &[Token]) -> bool {
    match tokens {
        [] => true,
        [Token::Open(Group::Round), arguments @ .., Token::Close(Group::Round)] => {
            let mut arguments = arguments.split(is_separator);
            arguments.all(|argument| match argument {
                [Token::Minus, Token::Number(_)] | [Token::Number(_)] => true,
                [Token::Symbol(_) | Token::Constant(_), index @ ..] => without_index(index).is_empty(),
                _ => false,
            })
        }
        _ => false,
    }
}

fn inequality(sides: &[&[Token]], relations: &[Relation], budget: &mut Budget) -> Result<Answer, ParseError> {
    let order = |relation: Relation| match relation {
        Relation::Less | Relation::Greater => Some(Order::Less),
        Relation::LessOrEqual | Relation::GreaterOrEqual => Some(Order::LessOrEqual),
        Relation::NotEqual => Some(Order::NotEqual),
        _ => None,
    };
    let falls = |relation: &Relation| matches!(relation, Relation::Greater | Relation::GreaterOrEqual);
    let mut read = Vec::with_capacity(sides.len());
    for side in sides {
        read.push(expression(side, budget)?);
    }
    let mut orders = relations.iter().map(|relation| order(*relation)).collect::<Option<Vec<_>>>();
    let not_a_chain = ParseError::Syntax("relations that do not form a chain");
    if relations.iter().all(falls) {
        read.reverse();
        if let Some(orders) = &mut orders {
            orders.reverse();
        }
    } else if relations.iter().any(falls) {
        return Err(not_a_chain);
    }
    match (orders.ok_or(not_a_chain)?.as_slice(), &mut read[..]) {
        ([order], [left, right]) => Ok(Answer::Inequality(*order, left.clone(), right.clone())),
        (orders, _) if orders.contains(&Order::NotEqual) || orders.len() > MAX_ITEMS => Err(not_a_chain),
        (orders, _) => Ok(Answer::Chain(read.clone(), orders.to_vec())),
    }
}

/// Parses parts with colons between them: a ratio, a time, or a value with its label.
fn ratio(tokens: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let parts: Vec<_> = split(tokens, |token| *token == Token::Ratio).collect();
    if let Some(clock) = measure::clock(tokens) {
        return Ok(Answer::Clock(clock));
    }
    if parts.len() == 1 {
        return sets(tokens, depth, budget);
    }
    if let [label, value] = parts[..]
        && matches!(label.first(), Some(Token::Text(_)))
        && is_one_name(label)
    {
        let left = Box::new(answer(label, depth + 1, budget)?);
        return Ok(Answer::Equation { left, right: Box::new(answer(value, depth + 1, budget)?), names: true });
    }
    let parts = parts.into_iter().map(|part| expression(part, budget)).collect::<Result<Vec<_>, _>>()?;
    if parts.len() > MAX_ITEMS {
        return Err(ParseError::Syntax("too many members"));
    }
    Ok(Answer::Ratio(parts))
}

/// Parses unions of differences of intersections.
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
    measure::measured(tokens, &mut |value| bracketed(value, depth, budget))
}

/// Parses a pair of brackets around everything, or an expression.
fn bracketed(tokens: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    match tokens {
        [Token::EmptySet] => return Ok(Answer::Set(Vec::new())),
        [Token::Reals] => return Ok(Answer::Reals),
        [Token::Domain(domain)] => return Ok(Answer::Domain(domain)),
        [Token::BeginCases, inside @ .., Token::EndCases] => return cases(inside, depth, budget),
        _ => {}
    }
    let Some((open, inside, close)) = enclosed(tokens) else { return scalar(tokens, budget) };
    let members: Vec<_> = split(inside, is_separator).filter(|part| !part.is_empty()).collect();
    let bracket = |group| if group == Group::Square { Bracket::Square } else { Bracket::Round };
    match (open, close, members.len()) {
        (Group::Set, Group::Set, 0) => Ok(Answer::Set(Vec::new())),
        (Group::Set, Group::Set, _) => match condition(inside) {
            Some(condition) => conditions(condition, inside, depth, budget),
            None => Ok(Answer::Set(items(&members, depth, budget)?)),
        },
        (Group::Brace, Group::Brace, _) => answer(inside, depth + 1, budget),
        (Group::Round | Group::Square, Group::Round | Group::Square, 2..) => {
            if members.len() > MAX_ITEMS {
                return Err(ParseError::Syntax("too many members"));
            }
            let mut items = Vec::with_capacity(members.len());
            for member in &members {
                items.push(answer(member, depth + 1, budget)?);
            }
            tuples(bracket(open), bracket(close), &items)
        }
        (Group::Round, Group::Round, 1) | (Group::Square, Group::Square, 1) => match scalar(tokens, budget) {
            Ok(scalar) => Ok(scalar),
            Err(ParseError::TooComplex) => Err(ParseError::TooComplex),
            Err(_) => answer(inside, depth + 1, budget),
        },
        _ => scalar(tokens, budget),
    }
}

/// Builds a tuple, or those that a tuple with signs `±` stands for.
fn tuples(open: Bracket, close: Bracket, items: &[Answer]) -> Result<Answer, ParseError> {
    let mut all: Vec<Vec<Answer>> = vec![Vec::with_capacity(items.len())];
    for item in items {
        let values = match item {
            Answer::List(values, _) => values.as_slice(),
            one => std::slice::from_ref(one),
        };
        if all.len() * values.len() > MAX_TUPLES {
            return Err(ParseError::Syntax("more signs than can be written out"));
        }
        all = all
            .iter()
            .flat_map(|tuple| values.iter().map(|value| [tuple.as_slice(), std::slice::from_ref(value)].concat()))
            .collect();
    }
    let mut tuples: Vec<_> = all.into_iter().map(|items| Answer::Sequence { open, close, items }).collect();
    Ok(if tuples.len() == 1 { tuples.remove(0) } else { Answer::List(tuples, Joint::Comma) })
}

/// Returns the condition after the bar of `{x | x > 3}`.
fn condition(inside: &[Token]) -> Option<&[Token]> {
    let is_bar = |token: &Token| matches!(token, Token::Bar | Token::Ratio);
    let is_variable = matches!(inside.first(), Some(Token::Symbol(_)));
    let at = inside.iter().position(is_bar).filter(|_| is_variable)?;
    let condition = &inside[at + 1..];
    let states = condition.iter().any(|token| matches!(token, Token::Relation(_)));
    (states && !condition.iter().any(is_bar)).then_some(condition)
}

/// Builds the set of numbers that fulfil a condition, within the domain before the bar: `{n \in \mathbb{Z} | n > 3}`.
fn conditions(condition: &[Token], inside: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let before = &inside[..inside.len() - condition.len() - 1];
    let condition = answer(condition, depth + 1, budget)?;
    if before.len() == 1 {
        return Ok(condition);
    }
    match answer(before, depth + 1, budget)? {
        Answer::Reals => Ok(condition),
        of => {
            let mut all = vec![of];
            match condition {
                Answer::List(items, _) => all.extend(items),
                one => all.push(one),
            }
            Ok(Answer::List(all, Joint::And))
        }
    }
}

/// Parses the lines of a function by cases.
fn cases(inside: &[Token], depth: usize, budget: &mut Budget) -> Result<Answer, ParseError> {
    let mut lines = Vec::new();
    let is_row = |token: &Token| *token == Token::NextRow;
    for line in split(inside, is_row).filter(|line| !line.is_empty()) {
        let cells: Vec<_> = split(line, |token| *token == Token::NextCell).collect();
        let [value, condition] = cells[..] else { return Err(ParseError::Syntax("a case without its condition")) };
        let value = value.strip_suffix(&[Token::Separator(Joint::Comma)]).unwrap_or(value);
        let value = answer(value, depth + 1, budget)?;
        let condition = match condition {
            [Token::Text(word), rest @ ..]
                if !rest.is_empty() && ["if", "for", "when", "where"].contains(&word.as_str()) =>
            {
                rest
            }
            whole => whole,
        };
        let condition = condition.strip_suffix(&[Token::Separator(Joint::Comma)]).unwrap_or(condition);
        lines.push((value, answer(condition, depth + 1, budget)?));
        if lines.len() > MAX_ITEMS {
            return Err(ParseError::Syntax("too many cases"));
        }
    }
    if lines.is_empty() { Err(ParseError::Empty) } else { Ok(Answer::Cases(lines)) }
}

/// Returns the content of brackets if the first token is closed by the last one.
fn enclosed(tokens: &[Token]) -> Option<(Group, &[Token], Group)> {
    let [Token::Open(open), inside @ .., Token::Close(close)] = tokens else { return None };
    is_closed(inside).then_some((*open, inside, *close))
}

/// Whether a bracket that opens before these tokens is closed after them, and not within.
fn is_closed(inside: &[Token]) -> bool {
    let mut depth = 0i32;
    inside.iter().all(|token| {
        match token {
            Token::Open(_) => depth += 1,
            Token::Close(_) => depth -= 1,
            _ => {}
        }
        depth >= 0
    })
}

fn scalar(tokens: &[Token], budget: &mut Budget) -> Result<Answer, ParseError> {
    let expr = expression(tokens, budget)?;
    if expr.is_two_valued() {
        let both = [true, false].map(|plus| Answer::Scalar(expr.with_sign(plus)));
        return Ok(Answer::List(both.into(), Joint::And));
    }
    Ok(Answer::Scalar(expr))
}
