//! Characters to tokens.

use super::ParseError;
use super::literal::{Commas, Literal, literal};
use super::words::{Command, bare_word, command};
use crate::answer::{Constant, Function};

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
    Separator,
    Relation(Relation),
    Union,
    Intersection,
    Difference,
    EmptySet,
    Reals,
    BeginMatrix,
    BeginDeterminant,
    EndMatrix,
    NextCell,
    NextRow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Series {
    Sum,
    Product,
}

/// What an environment between `\begin` and `\end` holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Environment {
    Matrix,
    /// Lines of a system or derivation.
    Lines,
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
    Implies,
}

pub(super) fn tokens(text: &str, commas: Commas) -> Result<Vec<Token>, ParseError> {
    let mut lexer = Lexer { rest: text, out: Vec::new(), depth: 0, environments: Vec::new(), commas };
    while let Some(next) = lexer.rest.chars().next() {
        lexer.token(next)?;
    }
    Ok(lexer.out)
}

struct Lexer<'a> {
    rest: &'a str,
    out: Vec<Token>,
    /// Open round, square and set brackets.
    depth: usize,
    environments: Vec<Environment>,
    commas: Commas,
}

impl Lexer<'_> {
    fn token(&mut self, next: char) -> Result<(), ParseError> {
        match next {
            '0'..='9' => self.number(),
            '.' if self.rest[1..].starts_with(|c: char| c.is_ascii_digit()) => self.number(),
            'a'..='z' | 'A'..='Z' => self.letters(),
            '\\' => self.backslash()?,
            _ => {
                self.skip(next.len_utf8());
                self.character(next)?;
            }
        }
        Ok(())
    }

    fn skip(&mut self, bytes: usize) {
        self.rest = &self.rest[bytes..];
    }

    /// Takes the longest prefix of characters that satisfy `wanted`.
    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
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

    fn number(&mut self) {
        // Within brackets a comma separates coordinates.
        let in_brackets = self.commas == Commas::Thousands && self.depth > 0;
        let commas = if in_brackets { Commas::Lists } else { self.commas };
        let literal = literal(&mut self.rest, commas);
        self.out.push(Token::Number(literal));
    }

    fn letters(&mut self) {
        let word = self.take_while(|c| c.is_ascii_alphabetic());
        if let Some(token) = bare_word(&word) {
            return self.out.push(token);
        }
        self.out.extend(word.chars().map(letter));
    }

    fn backslash(&mut self) -> Result<(), ParseError> {
        self.skip(1);
        let name = self.take_while(|c| c.is_ascii_alphabetic());
        if name.is_empty() {
            let Some(next) = self.rest.chars().next() else { return Ok(()) };
            self.skip(next.len_utf8());
            return self.escaped(next);
        }
        match command(&name) {
            Command::Skip => {
                if matches!(name.as_str(), "hspace" | "vspace" | "tag" | "label" | "phantom") {
                    self.braced();
                }
                if matches!(name.as_str(), "left" | "right") && self.rest.trim_start().starts_with('.') {
                    self.rest = &self.rest.trim_start()[1..];
                }
            }
            Command::Token(token) => self.push(token)?,
            Command::Words => self.words(),
            Command::Font => self.font(name == "mathbb"),
            Command::Begin => self.begin(),
            Command::End => self.end(),
        }
        Ok(())
    }

    /// Backslash and one character that is no letter.
    fn escaped(&mut self, next: char) -> Result<(), ParseError> {
        match next {
            '{' => self.push(Token::Open(Group::Set)),
            '}' => self.push(Token::Close(Group::Set)),
            '%' => self.push(Token::Percent),
            '|' => self.push(Token::Bar),
            '\\' => {
                let Some(environment) = self.environments.last() else { return Ok(()) };
                let row = if *environment == Environment::Matrix { Token::NextRow } else { Token::Separator };
                // The extra space of `\\[2pt]`; a matrix row may start with a bracket of its own.
                if let Some((space, behind)) = self.rest.strip_prefix('[').and_then(|rest| rest.split_once(']'))
                    && space.ends_with(|c: char| c.is_ascii_alphabetic())
                {
                    self.rest = behind;
                }
                self.push(row)
            }
            // Spacing, `\$`, math delimiters, and a backslash that something cut short.
            _ => Ok(()),
        }
    }

    fn character(&mut self, next: char) -> Result<(), ParseError> {
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
            '*' | '×' | '·' | '⋅' => self.push(Token::Times),
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
            ',' | ';' => self.push(Token::Separator),
            '&' if self.environments.last() == Some(&Environment::Matrix) => self.push(Token::NextCell),
            '<' => relation(self, Relation::Less, Relation::LessOrEqual),
            '>' => relation(self, Relation::Greater, Relation::GreaterOrEqual),
            '=' if self.take_prefix("=") => self.push(Token::Relation(Relation::Equal)),
            '=' => self.push(Token::Relation(Relation::Equal)),
            '≤' => self.push(Token::Relation(Relation::LessOrEqual)),
            '≥' => self.push(Token::Relation(Relation::GreaterOrEqual)),
            '≠' => self.push(Token::Relation(Relation::NotEqual)),
            '≈' => self.push(Token::Relation(Relation::About)),
            '∈' => self.push(Token::Relation(Relation::In)),
            '∪' => self.push(Token::Union),
            '∩' => self.push(Token::Intersection),
            '∖' => self.push(Token::Difference),
            '∅' => self.push(Token::EmptySet),
            'ℝ' => self.push(Token::Reals),
            '√' => self.push(Token::Sqrt),
            '∞' => self.push(Token::Constant(Constant::Infinity)),
            'π' => self.push(Token::Constant(Constant::Pi)),
            _ if superscript(next).is_some() => self.superscripts(next),
            _ if vulgar_fraction(next).is_some() => {
                let (above, below) = vulgar_fraction(next).unwrap_or_default();
                self.out.push(Token::Fraction);
                self.out.extend([above, below].map(|digits| Token::Number(Literal::of_digits(digits))));
                Ok(())
            }
            _ if next.is_alphabetic() => self.push(Token::Symbol(next.to_string())),
            '.' | '$' | '~' | '&' | '`' | '"' | '?' | '#' | '@' => Ok(()),
            '€' | '£' | '¥' | '¢' => Ok(()),
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

    /// The content of a brace group that follows; empty when there is none.
    fn braced(&mut self) -> String {
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

    /// `\text{…}`: a separator, a sign, a unit or an answer in words.
    fn words(&mut self) {
        let before = self.rest;
        let content = self.braced();
        let words = content.trim();
        let is_number = words.starts_with(|c: char| c.is_ascii_digit() || c == '-')
            && words.chars().all(|c| "0123456789.,{}-+/".contains(c));
        let has_math = ["\\frac", "\\dfrac", "\\sqrt", "\\pi", "\\left", "\\cdot", "\\infty", "\\text", "\\boxed", "$"]
            .iter()
            .any(|math| words.contains(math));
        if is_number || has_math {
            // A formula in a text font: its brace group is read like any other.
            self.rest = before;
            return;
        }
        let known = match words.to_ascii_lowercase().as_str() {
            "" => return,
            "and" | "or" | ", and" | ", or" | "," | ";" => Some(Token::Separator),
            "%" | "\\%" | "percent" => Some(Token::Percent),
            "if" | "for" | "when" if self.environments.last() == Some(&Environment::Lines) => Some(Token::Separator),
            _ => None,
        };
        let text = || words.replace('\\', "").trim_matches(|c: char| c == '~' || c == ',').trim().to_owned();
        self.out.push(known.unwrap_or_else(|| Token::Text(text())));
    }

    /// `\mathrm{…}`: one letter is a variable (behind a number a unit), several are a function or words.
    fn font(&mut self, is_blackboard: bool) {
        let before = self.rest;
        let content = self.braced();
        let name = content.trim().trim_matches(|c: char| c == '~' || c == '\\' || c == ',').trim();
        let mut letters = name.chars();
        match (letters.next(), letters.next()) {
            (None, _) => {}
            (Some('R'), None) if is_blackboard => self.out.push(Token::Reals),
            (Some(one), None) if one.is_alphabetic() => {
                let behind_number = match &self.out[..] {
                    [.., Token::Number(_)] => true,
                    [.., unit, Token::Times | Token::Over] => matches!(unit, Token::Text(_)),
                    _ => false,
                };
                let is_unit = behind_number && !matches!(one, 'e' | 'i' | 'd') && !is_blackboard;
                self.out.push(if is_unit { Token::Text(one.to_string()) } else { letter(one) });
            }
            _ if name.bytes().all(|b| b.is_ascii_alphabetic()) => {
                self.out.push(bare_word(name).unwrap_or_else(|| Token::Text(name.to_owned())));
            }
            _ if name.chars().all(|c| c.is_alphabetic() || " ~()".contains(c)) => {
                self.out.push(Token::Text(name.replace('~', " ")));
            }
            // A formula in another font: its brace group is read like any other.
            _ => self.rest = before,
        }
    }

    /// Superscript digits in a row are one exponent.
    fn superscripts(&mut self, first: char) -> Result<(), ParseError> {
        let mut digits = String::from(superscript(first).unwrap_or_default());
        while let Some(digit) = self.rest.chars().next().and_then(superscript) {
            digits.push_str(digit);
            self.skip(self.rest.chars().next().map_or(0, char::len_utf8));
        }
        self.out.push(Token::Caret);
        self.push(Token::Number(Literal::of_digits(&digits)))
    }

    fn begin(&mut self) {
        let name = self.braced();
        if name.contains("array") {
            // The columns.
            self.braced();
        }
        match environment(&name) {
            Some(Environment::Matrix) => {
                self.environments.push(Environment::Matrix);
                let is_determinant = name.eq_ignore_ascii_case("vmatrix");
                self.out.push(if is_determinant { Token::BeginDeterminant } else { Token::BeginMatrix });
            }
            Some(Environment::Lines) => self.environments.push(Environment::Lines),
            None => {}
        }
    }

    fn end(&mut self) {
        let name = self.braced();
        if environment(&name).is_some() && self.environments.pop() == Some(Environment::Matrix) {
            self.out.push(Token::EndMatrix);
        }
    }
}

fn environment(name: &str) -> Option<Environment> {
    if name.contains("matrix") || name.contains("array") {
        return Some(Environment::Matrix);
    }
    ["cases", "align", "gather", "split"].iter().any(|lines| name.contains(lines)).then_some(Environment::Lines)
}

fn superscript(c: char) -> Option<&'static str> {
    let digits = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
    "⁰¹²³⁴⁵⁶⁷⁸⁹".chars().position(|digit| digit == c).map(|at| digits[at])
}

fn vulgar_fraction(c: char) -> Option<(&'static str, &'static str)> {
    Some(match c {
        '½' => ("1", "2"),
        '⅓' => ("1", "3"),
        '⅔' => ("2", "3"),
        '¼' => ("1", "4"),
        '¾' => ("3", "4"),
        '⅕' => ("1", "5"),
        '⅖' => ("2", "5"),
        '⅗' => ("3", "5"),
        '⅘' => ("4", "5"),
        '⅙' => ("1", "6"),
        '⅚' => ("5", "6"),
        '⅛' => ("1", "8"),
        '⅜' => ("3", "8"),
        '⅝' => ("5", "8"),
        '⅞' => ("7", "8"),
        _ => return None,
    })
}

fn letter(letter: char) -> Token {
    match letter {
        'e' => Token::Constant(Constant::Euler),
        'i' => Token::Constant(Constant::Imaginary),
        _ => Token::Symbol(letter.to_string()),
    }
}
