//! Natural-language words among the tokens: those of `\text{…}`, and those in a formula without a font.

use super::ParseError;
use super::characters::is_letter;
use super::lexer::{Lexer, Relation, Token, letter};
use super::literal::Literal;
use super::words::function;
use crate::answer::Joint;

impl Lexer<'_> {
    /// Adds words, joined to words directly before them.
    pub(super) fn text(&mut self, words: &str) {
        match self.out.last_mut() {
            Some(Token::Text(text)) => {
                text.push(' ');
                text.push_str(words);
            }
            _ => self.out.push(Token::Text(words.to_owned())),
        }
    }

    /// Reads `\text{…}`: words, with the numbers and marks among them.
    pub(super) fn words(&mut self) -> Result<(), ParseError> {
        let before = self.rest;
        let content = self.braced();
        let words = content.trim();
        let commands =
            ["\\frac", "\\dfrac", "\\tfrac", "\\sqrt", "\\pi", "\\left", "\\cdot", "\\infty", "\\text", "\\boxed"];
        if commands.iter().any(|math| words.contains(math)) {
            // A formula in a text font; its brace group is read like any other.
            self.rest = before;
            return Ok(());
        }
        let name = words.trim_start_matches('\\').to_ascii_lowercase();
        if let Some(function) =
            function(&name).filter(|_| self.rest.trim_start().starts_with(['(', '\\', '^', '{', '_']))
        {
            self.out.push(Token::Function(function));
            return Ok(());
        }
        // `\text{A3}_{16}`
        let is_digit = |c: char| matches!(c, '0'..='9' | 'A'..='F');
        if self.rest.trim_start().starts_with('_') && words.starts_with(is_digit) && words.chars().all(is_digit) {
            self.out.push(Token::Symbol(words.to_owned()));
            return Ok(());
        }
        let mut inside = Lexer {
            rest: words,
            out: std::mem::take(&mut self.out),
            depth: self.depth,
            environments: Vec::new(),
            notation: self.notation,
            spaced: true,
        };
        let read = inside.prose(self.rest);
        self.out = inside.out;
        read
    }

    /// Reads words; `after` is the text that follows them.
    fn prose(&mut self, after: &str) -> Result<(), ParseError> {
        while let Some(next) = self.rest.chars().next() {
            let is_number =
                next.is_ascii_digit() || (next == '.' && self.rest[1..].starts_with(|c: char| c.is_ascii_digit()));
            if is_number {
                self.number();
            } else if is_letter(next) {
                let mut word = self.take_while(is_letter);
                // `o'clock`, `p.m.`, `right-angled`
                while let Some(mark) = self.rest.chars().next().filter(|c| matches!(c, '.' | '-' | '\'' | '’'))
                    && self.rest[mark.len_utf8()..].starts_with(is_letter)
                {
                    self.skip(mark.len_utf8());
                    word.push(mark);
                    word.push_str(&self.take_while(is_letter));
                }
                let rest = if self.rest.trim().is_empty() { after } else { self.rest };
                // `km/h`, `m/s`
                let is_unit =
                    self.is_after_value() || matches!(&self.out[..], [.., Token::Text(_), Token::Over | Token::Times]);
                if word.chars().count() == 1 && !is_unit && is_variable_in(self.rest, self.out.last()) {
                    self.out.extend(word.chars().map(letter));
                } else {
                    self.text_word(&word, rest);
                }
            } else if next == '\\' {
                self.backslash()?;
            } else if next == '.' || next == '!' {
                self.skip(1);
            } else {
                self.skip(next.len_utf8());
                self.character(next)?;
            }
        }
        Ok(())
    }

    /// Adds a natural-language word: one that stands for a mark, or a part of a phrase.
    pub(super) fn text_word(&mut self, word: &str, rest: &str) {
        let lower = word.to_lowercase();
        let rest = rest.trim_start();
        let before_value = rest.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '\\' | '(' | '$' | '-' | '.'));
        let after_value = self.is_after_value() || matches!(self.out.last(), Some(Token::Symbol(_)));
        let starts = !matches!(self.out.last(), Some(Token::Text(_)));
        let token = match lower.as_str() {
            "and" => Token::Separator(Joint::And),
            "or" => Token::Separator(Joint::Or),
            "percent" | "percentage" | "pct" if after_value => Token::Percent,
            "to" if after_value && before_value => Token::Ratio,
            "plus" if before_value => Token::Plus,
            "minus" | "negative" if before_value && starts => Token::Minus,
            "times" if after_value && before_value => Token::Times,
            "over" if after_value && before_value => Token::Over,
            "is" | "equals" | "are" | "be" if !self.out.is_empty() && before_value => Token::Relation(Relation::Equal),
            "approximately" | "approx" | "about" | "roughly" if before_value && starts => {
                Token::Relation(Relation::About)
            }
            "exactly" | "only" | "just" if before_value && starts && !after_value => return,
            "squared" | "cubed" if after_value => {
                self.out.push(Token::Caret);
                Token::Number(Literal::of_digits(if lower == "squared" { "2" } else { "3" }))
            }
            _ => return self.text(word),
        };
        self.out.push(token);
    }
}

/// Whether a letter among words is a variable, because a mark of formulas is next to it.
fn is_variable_in(rest: &str, last: Option<&Token>) -> bool {
    let marks = ['<', '>', '=', '+', '-', '*', '/', '^', '_', '≤', '≥', '≠', '∈'];
    let is_mark = |token: &Token| {
        matches!(token, Token::Relation(_) | Token::Plus | Token::Minus | Token::Times | Token::Over | Token::Caret)
    };
    rest.trim_start().starts_with(marks) || last.is_some_and(is_mark)
}
