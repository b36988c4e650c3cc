//! The lexer: characters to tokens.

use super::ParseError;
use super::characters::{is_letter, subscript, superscript, vulgar_fraction};
use super::literal::{Commas, Literal, literal};
use super::units;
use super::words::{Command, ELLIPSIS, bare_word, command, function, is_short_word};
use super::{Letters, Notation};
use crate::answer::{Constant, Function, Joint};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Number(Literal),
    Symbol(String),
    Text(String),
    Constant(Constant),
    Function(Function),
    Fraction,
    /// `{a \over b}`.
    FractionBar,
    /// `{n \choose k}`.
    Choose,
    /// `\sum` or `\prod`.
    Series(Series),
    Sqrt,
    Plus,
    Minus,
    PlusMinus,
    MinusPlus,
    Times,
    Over,
    Ratio,
    Caret,
    Underscore,
    Bang,
    Prime,
    Percent,
    Degree,
    Bar,
    Open(Group),
    Close(Group),
    Separator(Joint),
    Relation(Relation),
    Union,
    Intersection,
    Difference,
    EmptySet,
    Reals,
    /// Another number set: `ℤ`.
    Domain(&'static str),
    /// A currency sign.
    Currency(char),
    BeginMatrix,
    BeginDeterminant,
    EndMatrix,
    BeginCases,
    EndCases,
    NextCell,
    NextRow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Series {
    Sum,
    Product,
}

/// Content of an environment between `\begin` and `\end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Environment {
    Matrix,
    /// Lines of a system or derivation.
    Lines,
    /// Values with their conditions.
    Cases,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Group {
    Round,
    Square,
    Brace,
    Set,
    Floor,
    Ceil,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relation {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    About,
    In,
    NotIn,
    Implies,
}

pub(super) fn tokens(text: &str, notation: Notation) -> Result<Vec<Token>, ParseError> {
    let mut lexer = Lexer { rest: text, out: Vec::new(), depth: 0, environments: Vec::new(), notation, spaced: false };
    while let Some(next) = lexer.rest.chars().next() {
        lexer.token(next)?;
    }
    Ok(lexer.out)
}

/// Lexer over a text, which it consumes from the front.
pub(super) struct Lexer<'a> {
    pub(super) rest: &'a str,
    pub(super) out: Vec<Token>,
    /// Number of open round, square and set brackets.
    pub(super) depth: usize,
    pub(super) environments: Vec<Environment>,
    pub(super) notation: Notation,
    /// Whether white space precedes the current position.
    pub(super) spaced: bool,
}

impl Lexer<'_> {
    fn token(&mut self, next: char) -> Result<(), ParseError> {
        let spaced = self.spaced;
        match next {
            '0'..='9' => self.number(),
            '.' if self.rest[1..].starts_with(|c: char| c.is_ascii_digit()) => self.number(),
            '.' if self.rest.starts_with("...") => {
                self.skip(3);
                self.push(Token::Symbol(ELLIPSIS.to_owned()))?;
            }
            c if is_letter(c) => self.letters(),
            '\\' => self.backslash()?,
            _ => {
                self.skip(next.len_utf8());
                self.character(next)?;
            }
        }
        self.spaced = next.is_whitespace() || (spaced && self.spaced && next == '$');
        Ok(())
    }

    pub(super) fn skip(&mut self, bytes: usize) {
        self.rest = &self.rest[bytes..];
    }

    /// Takes the longest prefix of characters that satisfy `wanted`.
    pub(super) fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let end = self.rest.find(|c| !wanted(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken.to_owned()
    }

    fn take_prefix(&mut self, prefix: &str) -> bool {
        match self.rest.strip_prefix(prefix) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    pub(super) fn number(&mut self) {
        if let Some(digits) = self.digits_with_letters() {
            return self.out.push(Token::Symbol(digits));
        }
        // Within brackets a comma separates coordinates.
        let in_brackets = self.notation.commas == Commas::Thousands && self.depth > 0;
        let commas = if in_brackets { Commas::Lists } else { self.notation.commas };
        let literal = literal(&mut self.rest, commas);
        let ordinal = ordinal(&literal).filter(|suffix| self.rest.starts_with(suffix));
        self.out.push(Token::Number(literal));
        if let Some(suffix) = ordinal.filter(|_| !self.rest[2..].starts_with(|c: char| c.is_alphanumeric())) {
            self.skip(suffix.len());
            self.out.push(Token::Text(suffix.to_owned()));
        }
    }

    /// Takes `A3` before a base: digits of which some are letters.
    fn digits_with_letters(&mut self) -> Option<String> {
        let end = self.rest.find(|c: char| !matches!(c, '0'..='9' | 'A'..='F')).unwrap_or(self.rest.len());
        let (digits, following) = self.rest.split_at(end);
        let is_mixed =
            digits.contains(|c: char| c.is_ascii_digit()) && digits.contains(|c: char| c.is_ascii_alphabetic());
        if !is_mixed || !following.trim_start().starts_with('_') {
            return None;
        }
        self.rest = following;
        Some(digits.to_owned())
    }

    /// Whether a value ends here, so that its unit or a factor may follow.
    pub(super) fn is_after_value(&self) -> bool {
        let value = |token: &Token| {
            matches!(token, Token::Number(_) | Token::Constant(_) | Token::Close(_) | Token::Percent | Token::Degree)
        };
        self.out.last().is_some_and(value)
    }

    /// Reads letters without a font: words of formulas, words of a language, units, or adjacent variables.
    fn letters(&mut self) {
        if let Some(digits) = self.digits_with_letters() {
            return self.out.push(Token::Symbol(digits));
        }
        let spaced = self.spaced;
        let word = self.take_while(is_letter);
        let after_value = self.is_after_value();
        let after_words = matches!(self.out.last(), Some(Token::Text(_)));
        let is_time = matches!(&self.out[..], [.., Token::Ratio, Token::Number(_)]) && units::half_day(&word).is_some();
        let is_unit = self.notation.letters == Letters::Units && after_value && units::is_abbreviation(&word);
        if is_unit || is_time {
            return self.out.push(Token::Text(word));
        }
        if word == "x" && matches!(self.out.last(), Some(Token::Number(_))) && is_power_of_ten(self.rest) {
            return self.out.push(Token::Times);
        }
        if let Some(token) = bare_word(&word) {
            return self.out.push(token);
        }
        let letters = word.chars().count();
        // `A stopped clock`, `Day a`: an article.
        if matches!(word.as_str(), "A" | "a" | "I") && !after_value && starts_word(self.rest) {
            return self.text(&word);
        }
        if letters == 1 && word.is_ascii() {
            return self.out.push(letter(word.chars().next().unwrap_or_default()));
        }
        // Spaces distinguish a short noun after a number from a product of three variables.
        let is_word = units::is_word(&word) && (letters > 3 || !word.is_ascii() || (after_value && spaced));
        let is_product = self.rest.trim_start().starts_with(['+', '*', '/', '^', '_', '<', '>'])
            || self.notation.letters == Letters::Products;
        // `by-bz` are products; `by the` are words, and so is an isolated `no`.
        let is_apart = self.rest.is_empty() || self.rest.starts_with([' ', ',', '.', ';', '!', '~', '\\', '}', '$']);
        let of_language = is_short_word(&word) && (spaced || self.out.is_empty()) && is_apart && !is_product;
        if (is_word && (after_value || !is_product)) || of_language || after_words || !word.is_ascii() {
            return self.text_word(&word, self.rest);
        }
        // Capitals name a figure, an angle or an order; unlike the factors of a product they do not commute.
        if letters >= 3 && word.bytes().all(|b| b.is_ascii_uppercase()) {
            return self.out.push(Token::Symbol(word));
        }
        let may_be_word = letters >= 4 && !after_value && !is_product;
        if may_be_word && self.notation.letters != Letters::Products {
            return self.text(&word);
        }
        self.out.extend(word.chars().map(letter));
    }

    pub(super) fn backslash(&mut self) -> Result<(), ParseError> {
        self.skip(1);
        let name = self.take_while(|c| c.is_ascii_alphabetic());
        if name.is_empty() {
            let Some(next) = self.rest.chars().next() else { return Ok(()) };
            self.skip(next.len_utf8());
            return self.escaped(next);
        }
        match command(&name) {
            Command::Skip => {
                if matches!(name.as_str(), "hspace" | "vspace" | "tag" | "label" | "phantom" | "hphantom" | "vphantom")
                {
                    self.braced();
                }
                if matches!(name.as_str(), "left" | "right") && self.rest.trim_start().starts_with('.') {
                    self.rest = &self.rest.trim_start()[1..];
                }
            }
            Command::Token(token) => self.push(token)?,
            Command::Words => self.words()?,
            Command::Font => self.font(name == "mathbb"),
            Command::Begin => self.begin(),
            Command::End => self.end(),
        }
        Ok(())
    }

    /// Reads a backslash followed by a character that is not a letter.
    fn escaped(&mut self, next: char) -> Result<(), ParseError> {
        match next {
            '{' => self.push(Token::Open(Group::Set)),
            '}' => self.push(Token::Close(Group::Set)),
            '%' => self.push(Token::Percent),
            '|' => self.push(Token::Bar),
            '$' => self.push(Token::Currency('$')),
            '\\' => {
                let Some(environment) = self.environments.last() else { return Ok(()) };
                let is_lines = *environment == Environment::Lines;
                let row = if is_lines { Token::Separator(Joint::Comma) } else { Token::NextRow };
                // Skips the extra space of `\\[2pt]`; but a matrix row may start with a bracket of its own.
                if let Some((space, following)) = self.rest.strip_prefix('[').and_then(|rest| rest.split_once(']'))
                    && space.ends_with(|c: char| c.is_ascii_alphabetic())
                {
                    self.rest = following;
                }
                self.push(row)
            }
            // Spacing, math delimiters, and a backslash at a truncated end.
            _ => Ok(()),
        }
    }

    pub(super) fn character(&mut self, next: char) -> Result<(), ParseError> {
        let relation = |lexer: &mut Self, plain, or_equal| {
            let relation = if lexer.take_prefix("=") { or_equal } else { plain };
            lexer.push(Token::Relation(relation))
        };
        match next {
            '(' => self.push(Token::Open(Group::Round)),
            ')' => self.push(Token::Close(Group::Round)),
            '[' => self.push(Token::Open(Group::Square)),
            ']' => self.push(Token::Close(Group::Square)),
            '{' => self.push(Token::Open(Group::Brace)),
            '}' => self.push(Token::Close(Group::Brace)),
            '+' => self.push(Token::Plus),
            '-' | '−' | '–' => self.push(Token::Minus),
            '±' => self.push(Token::PlusMinus),
            '∓' => self.push(Token::MinusPlus),
            '*' if self.take_prefix("*") => self.push(Token::Caret),
            '*' | '×' | '·' | '⋅' | '∙' | '•' | '∗' => self.push(Token::Times),
            '/' | '÷' | '⁄' => self.push(Token::Over),
            ':' if self.take_prefix("=") => self.push(Token::Relation(Relation::Equal)),
            ':' => self.push(Token::Ratio),
            '^' => self.push(Token::Caret),
            '_' => self.push(Token::Underscore),
            '!' if self.take_prefix("=") => self.push(Token::Relation(Relation::NotEqual)),
            '!' => self.push(Token::Bang),
            '\'' | '′' | '’' => self.push(Token::Prime),
            '%' => self.push(Token::Percent),
            '°' => self.push(Token::Degree),
            '|' => self.push(Token::Bar),
            ',' | ';' | '，' | '、' | '；' => self.push(Token::Separator(Joint::Comma)),
            '&' if matches!(self.environments.last(), Some(Environment::Matrix | Environment::Cases)) => {
                self.push(Token::NextCell)
            }
            '<' => relation(self, Relation::Less, Relation::LessOrEqual),
            '>' => relation(self, Relation::Greater, Relation::GreaterOrEqual),
            '=' if self.take_prefix("=") => self.push(Token::Relation(Relation::Equal)),
            '=' => self.push(Token::Relation(Relation::Equal)),
            '≤' | '⩽' | '≦' => self.push(Token::Relation(Relation::LessOrEqual)),
            '≥' | '⩾' | '≧' => self.push(Token::Relation(Relation::GreaterOrEqual)),
            '≠' => self.push(Token::Relation(Relation::NotEqual)),
            '≈' => self.push(Token::Relation(Relation::About)),
            '∈' => self.push(Token::Relation(Relation::In)),
            '∉' => self.push(Token::Relation(Relation::NotIn)),
            '⇒' | '→' | '⟹' | '⇔' => self.push(Token::Relation(Relation::Implies)),
            '∧' => self.push(Token::Separator(Joint::And)),
            '∨' => self.push(Token::Separator(Joint::Or)),
            '…' | '⋯' => self.push(Token::Symbol(ELLIPSIS.to_owned())),
            '⌊' => self.push(Token::Open(Group::Floor)),
            '⌋' => self.push(Token::Close(Group::Floor)),
            '⌈' => self.push(Token::Open(Group::Ceil)),
            '⌉' => self.push(Token::Close(Group::Ceil)),
            '∪' => self.push(Token::Union),
            '∩' => self.push(Token::Intersection),
            '∖' => self.push(Token::Difference),
            '∅' => self.push(Token::EmptySet),
            'ℝ' => self.push(Token::Reals),
            'ℤ' => self.push(Token::Domain("ℤ")),
            'ℕ' => self.push(Token::Domain("ℕ")),
            'ℚ' => self.push(Token::Domain("ℚ")),
            'ℂ' => self.push(Token::Domain("ℂ")),
            '√' => self.push(Token::Sqrt),
            '∞' => self.push(Token::Constant(Constant::Infinity)),
            'π' => self.push(Token::Constant(Constant::Pi)),
            '∛' => {
                let index =
                    [Token::Open(Group::Square), Token::Number(Literal::of_digits("3")), Token::Close(Group::Square)];
                self.out.push(Token::Sqrt);
                self.out.extend(index);
                Ok(())
            }
            _ if superscript(next).is_some() => self.raised(next, superscript, Token::Caret),
            _ if subscript(next).is_some() => self.raised(next, subscript, Token::Underscore),
            _ if vulgar_fraction(next).is_some() => {
                let (above, below) = vulgar_fraction(next).unwrap_or_default();
                self.out.push(Token::Fraction);
                self.out.extend([above, below].map(|digits| Token::Number(Literal::of_digits(digits))));
                Ok(())
            }
            _ if next.is_alphabetic() => self.push(Token::Symbol(next.to_string())),
            '.' | '$' | '~' | '&' | '`' | '"' | '?' | '#' | '@' | '。' | '“' | '”' => Ok(()),
            '€' | '£' | '¥' | '¢' | '₹' | '₩' => self.push(Token::Currency(next)),
            _ if next.is_whitespace() || next.is_control() => Ok(()),
            _ => Err(ParseError::Syntax("a character that is not part of any notation")),
        }
    }

    fn push(&mut self, token: Token) -> Result<(), ParseError> {
        let counted = |group: &Group| matches!(group, Group::Round | Group::Square | Group::Set);
        match &token {
            Token::Open(group) if counted(group) => self.depth += 1,
            Token::Close(group) if counted(group) => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.out.push(token);
        Ok(())
    }

    /// Takes the content of a brace group; empty if none follows.
    pub(super) fn braced(&mut self) -> String {
        let trimmed = self.rest.trim_start();
        if !trimmed.starts_with('{') {
            return String::new();
        }
        let mut depth = 0;
        let end = trimmed.char_indices().find(|(_, c)| {
            depth += i32::from(*c == '{') - i32::from(*c == '}');
            depth == 0
        });
        let Some((end, _)) = end else { return String::new() };
        self.rest = &trimmed[end + 1..];
        trimmed[1..end].to_owned()
    }

    /// Reads `\mathrm{…}`: one letter is a variable (after a number a unit), several are a function or words.
    fn font(&mut self, is_blackboard: bool) {
        let before = self.rest;
        let content = self.braced();
        let name = content.trim().trim_matches(|c: char| c == '~' || c == '\\' || c == ',').trim();
        let mut letters = name.chars();
        match (letters.next(), letters.next()) {
            (None, _) => {}
            (Some('R'), None) if is_blackboard => self.out.push(Token::Reals),
            (Some('Z'), None) if is_blackboard => self.out.push(Token::Domain("ℤ")),
            (Some('N'), None) if is_blackboard => self.out.push(Token::Domain("ℕ")),
            (Some('Q'), None) if is_blackboard => self.out.push(Token::Domain("ℚ")),
            (Some('C'), None) if is_blackboard => self.out.push(Token::Domain("ℂ")),
            (Some(one), None) if one.is_alphabetic() => {
                let after_number = match &self.out[..] {
                    [.., Token::Number(_) | Token::Degree] => true,
                    [.., unit, Token::Times | Token::Over] => matches!(unit, Token::Text(_)),
                    _ => false,
                };
                let is_unit = after_number && !matches!(one, 'e' | 'i' | 'd') && !is_blackboard;
                self.out.push(if is_unit { Token::Text(one.to_string()) } else { letter(one) });
            }
            _ if name.bytes().all(|b| b.is_ascii_alphabetic()) => {
                self.out.push(bare_word(name).unwrap_or_else(|| Token::Text(name.to_owned())));
            }
            _ if name.chars().all(|c| c.is_alphabetic() || " ~()".contains(c)) => {
                self.text(&name.replace('~', " "));
            }
            // A formula in another font; its brace group is read like any other.
            _ => self.rest = before,
        }
    }

    /// Reads a row of superscript (or subscript) digits as one exponent (or index).
    fn raised(&mut self, first: char, of: fn(char) -> Option<char>, mark: Token) -> Result<(), ParseError> {
        let mut plain = String::from(of(first).unwrap_or_default());
        while let Some(next) = self.rest.chars().next()
            && let Some(digit) = of(next)
        {
            plain.push(digit);
            self.skip(next.len_utf8());
        }
        self.out.extend([mark, Token::Open(Group::Brace)]);
        for c in plain.chars() {
            match c {
                '-' => self.out.push(Token::Minus),
                '+' => self.out.push(Token::Plus),
                '0'..='9' => match self.out.last_mut() {
                    Some(Token::Number(literal)) => literal.whole.push(c),
                    _ => self.out.push(Token::Number(Literal::of_digits(&c.to_string()))),
                },
                _ => self.out.push(letter(c)),
            }
        }
        self.push(Token::Close(Group::Brace))
    }

    fn begin(&mut self) {
        let name = self.braced();
        if name.contains("array") {
            // Skips the column specification.
            self.braced();
        }
        match environment(&name) {
            Some(Environment::Matrix) => {
                self.environments.push(Environment::Matrix);
                let is_determinant = name.eq_ignore_ascii_case("vmatrix");
                self.out.push(if is_determinant { Token::BeginDeterminant } else { Token::BeginMatrix });
            }
            // `\begin{cases} x, & x > 0 \\ … \end{cases}`; without conditions it holds a system.
            Some(Environment::Lines) if name.contains("cases") && self.has_conditions(&name) => {
                self.environments.push(Environment::Cases);
                self.out.push(Token::BeginCases);
            }
            Some(Environment::Lines | Environment::Cases) => self.environments.push(Environment::Lines),
            None => {}
        }
    }

    fn end(&mut self) {
        let name = self.braced();
        if environment(&name).is_none() {
            return;
        }
        match self.environments.pop() {
            Some(Environment::Matrix) => self.out.push(Token::EndMatrix),
            Some(Environment::Cases) => self.out.push(Token::EndCases),
            Some(Environment::Lines) | None => {}
        }
    }

    /// Whether lines of an environment have a second column other than the right side of a relation.
    fn has_conditions(&self, name: &str) -> bool {
        let content = self.rest.split_once(&format!("\\end{{{name}}}")).map_or(self.rest, |(content, _)| content);
        let is_side = |cell: &str| cell.trim_start().starts_with(['=', '<', '>']);
        content.split('&').skip(1).any(|cell| !is_side(cell))
    }
}

/// Returns the suffix of an ordinal number: `21st`, `12th`.
fn ordinal(literal: &Literal) -> Option<&'static str> {
    let digits = literal.plain_digits()?.as_bytes();
    let tens = digits.len().checked_sub(2).map(|at| digits[at]);
    Some(match digits.last()? {
        _ if tens == Some(b'1') => "th",
        b'1' => "st",
        b'2' => "nd",
        b'3' => "rd",
        _ => "th",
    })
}

fn is_power_of_ten(rest: &str) -> bool {
    let rest = rest.trim_start().strip_prefix("10").unwrap_or_default();
    rest.starts_with('^') || rest.starts_with("**") || rest.starts_with(|c| superscript(c).is_some())
}

/// Whether a word follows after a space.
fn starts_word(rest: &str) -> bool {
    let word = rest.strip_prefix(' ').map(str::trim_start).unwrap_or_default();
    let letters = word.chars().take_while(|c| is_letter(*c)).count();
    letters >= 3 && function(&word[..word.find(|c| !is_letter(c)).unwrap_or(word.len())]).is_none()
}

fn environment(name: &str) -> Option<Environment> {
    if name.contains("matrix") || name.contains("array") {
        return Some(Environment::Matrix);
    }
    ["cases", "align", "gather", "split", "aligned", "gathered"]
        .iter()
        .any(|lines| name.contains(lines))
        .then_some(Environment::Lines)
}

/// Returns the token of a letter in a formula: a constant or a variable.
pub(super) fn letter(letter: char) -> Token {
    match letter {
        'e' => Token::Constant(Constant::Euler),
        'i' => Token::Constant(Constant::Imaginary),
        _ => Token::Symbol(letter.to_string()),
    }
}
