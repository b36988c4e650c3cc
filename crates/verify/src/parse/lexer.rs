//! Characters to tokens.

use super::ParseError;
use super::words::{Command, bare_word, command};
use crate::answer::{Constant, Function};

/// What a comma between digits and exactly three more digits is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commas {
    /// A thousands separator, outside of brackets.
    Thousands,
    /// A separator of list members.
    Lists,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Number(Literal),
    Symbol(String),
    Text(String),
    Constant(Constant),
    Function(Function),
    Fraction,
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
    BeginMatrix,
    EndMatrix,
    NextCell,
    NextRow,
}

/// Digits as written.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Literal {
    pub(super) whole: String,
    /// Digits after the point; `None` without a point.
    pub(super) decimals: Option<String>,
    /// Digits under an overline.
    pub(super) repeating: String,
    pub(super) exponent: i32,
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
}

pub(super) fn tokens(text: &str, commas: Commas) -> Result<Vec<Token>, ParseError> {
    let mut lexer = Lexer { rest: text, out: Vec::new(), depth: 0, matrices: 0, commas };
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
    matrices: usize,
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
        let mut literal = Literal { whole: self.take_while(|c| c.is_ascii_digit()), ..Literal::default() };
        if (1..=3).contains(&literal.whole.len()) {
            while let Some((group, bytes)) = self.thousands() {
                literal.whole.push_str(&group);
                self.skip(bytes);
            }
        }
        let is_point = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit()) || rest.starts_with("\\overline");
        if self.rest.strip_prefix('.').is_some_and(is_point) {
            self.skip(1);
            literal.decimals = Some(self.take_while(|c| c.is_ascii_digit()));
            if self.rest.starts_with("\\overline{") {
                let inside = &self.rest["\\overline{".len()..];
                let digits = inside.find('}').map_or("", |end| &inside[..end]);
                if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
                    literal.repeating = digits.to_owned();
                    self.skip("\\overline{}".len() + digits.len());
                }
            }
        }
        literal.exponent = self.exponent();
        self.out.push(Token::Number(literal));
    }

    /// The three digits of a thousands group, and the bytes they and their separator take.
    fn thousands(&self) -> Option<(String, usize)> {
        let (separator, plain) = [("{,}", false), (",\\!", false), ("\\,", false), (",", true)]
            .into_iter()
            .find(|(separator, _)| self.rest.starts_with(separator))?;
        if plain && (self.commas == Commas::Lists || self.depth > 0) {
            return None;
        }
        let behind = &self.rest[separator.len()..];
        let digits = if separator == ",\\!" { behind.trim_start_matches(' ') } else { behind };
        let count = digits.bytes().take_while(u8::is_ascii_digit).count();
        (count == 3).then(|| (digits[..3].to_owned(), self.rest.len() - digits.len() + 3))
    }

    /// The power of ten of `1.5e-3`; 0 when there is none.
    fn exponent(&mut self) -> i32 {
        let Some(behind) = self.rest.strip_prefix(['e', 'E']) else { return 0 };
        let digits = behind.strip_prefix(['-', '+']).unwrap_or(behind);
        let count = digits.bytes().take_while(u8::is_ascii_digit).count();
        let ends = !digits[count..].starts_with(|c: char| c.is_ascii_alphanumeric() || c == '.');
        if !(1..=4).contains(&count) || !ends {
            return 0;
        }
        let length = behind.len() - digits.len() + count;
        let value = behind[..length].parse().unwrap_or(0);
        self.skip(1 + length);
        value
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
                if matches!(name.as_str(), "hspace" | "vspace" | "tag" | "label") {
                    self.braced();
                }
                if matches!(name.as_str(), "left" | "right") && self.rest.trim_start().starts_with('.') {
                    self.rest = &self.rest.trim_start()[1..];
                }
            }
            Command::Token(token) => self.push(token)?,
            Command::Words => self.words(),
            Command::Font => self.font(),
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
                if self.rest.starts_with('[') && self.matrices > 0 {
                    let end = self.rest.find(']').map_or(0, |end| end + 1);
                    self.skip(end);
                }
                if self.matrices > 0 { self.push(Token::NextRow) } else { Ok(()) }
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
            '&' if self.matrices > 0 => self.push(Token::NextCell),
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
            '√' => self.push(Token::Sqrt),
            '∞' => self.push(Token::Constant(Constant::Infinity)),
            'π' => self.push(Token::Constant(Constant::Pi)),
            '²' | '³' => {
                let digit = if next == '²' { "2" } else { "3" };
                self.out.push(Token::Caret);
                self.push(Token::Number(Literal { whole: digit.to_owned(), ..Literal::default() }))
            }
            '½' | '¼' | '¾' => {
                let (above, below) =
                    if next == '½' { ("1", "2") } else { (if next == '¼' { "1" } else { "3" }, "4") };
                self.out.push(Token::Fraction);
                for whole in [above, below] {
                    self.out.push(Token::Number(Literal { whole: whole.to_owned(), ..Literal::default() }));
                }
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
        if words.starts_with(|c: char| c.is_ascii_digit()) && words.chars().all(|c| "0123456789.,{}".contains(c)) {
            // A number in a text font: its brace group is read like any other.
            self.rest = before;
            return;
        }
        let known = match words.to_ascii_lowercase().as_str() {
            "" => return,
            "and" | "or" | ", and" | ", or" | "," => Some(Token::Separator),
            "%" | "\\%" | "percent" => Some(Token::Percent),
            _ => None,
        };
        self.out.push(known.unwrap_or_else(|| Token::Text(words.to_owned())));
    }

    /// `\mathrm{…}`: one letter is a variable, several are a function or a unit.
    fn font(&mut self) {
        let before = self.rest;
        let content = self.braced();
        let name = content.trim().trim_matches(|c: char| c == '~' || c == '\\' || c == ',').trim();
        let mut letters = name.chars();
        match (letters.next(), letters.next()) {
            (None, _) => {}
            (Some(one), None) => self.out.push(letter(one)),
            _ if name.bytes().all(|b| b.is_ascii_alphabetic()) => {
                self.out.push(bare_word(name).unwrap_or_else(|| Token::Text(name.to_owned())));
            }
            // A formula in another font: its brace group is read like any other.
            _ => self.rest = before,
        }
    }

    fn begin(&mut self) {
        let name = self.braced();
        if !(name.contains("matrix") || name.contains("array")) {
            return;
        }
        if name.contains("array") {
            self.braced();
        }
        self.matrices += 1;
        self.out.push(Token::BeginMatrix);
    }

    fn end(&mut self) {
        let name = self.braced();
        if self.matrices > 0 && (name.contains("matrix") || name.contains("array")) {
            self.matrices -= 1;
            self.out.push(Token::EndMatrix);
        }
    }
}

fn letter(letter: char) -> Token {
    match letter {
        'e' => Token::Constant(Constant::Euler),
        'i' => Token::Constant(Constant::Imaginary),
        _ => Token::Symbol(letter.to_string()),
    }
}
