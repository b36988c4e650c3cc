//! Meanings of words and LaTeX commands.

use super::lexer::{Group, Relation, Series, Token};
use crate::answer::{Constant, Function, Joint};

/// Symbol name of dots in an expression or list, for what is left out.
pub(super) const ELLIPSIS: &str = "…";

/// Short words that are answers or parts of sentences, and not products.
const SHORT_WORDS: &[&str] = &[
    "no", "yes", "odd", "red", "the", "is", "are", "for", "of", "not", "all", "any", "if", "to", "per", "by", "dne",
    "one", "two", "six", "ten", "new", "each", "left", "it", "at", "on", "with", "than", "has", "was", "be", "an",
    "as", "may", "east", "west", "both", "when",
];

/// Whether two or three letters form a word, rather than adjacent variables.
pub(super) fn is_short_word(word: &str) -> bool {
    SHORT_WORDS.contains(&word.to_lowercase().as_str())
}

/// Meaning of adjacent letters without a backslash in a formula; `None` if they are no word of formulas.
pub(super) fn bare_word(word: &str) -> Option<Token> {
    let lower = word.to_ascii_lowercase();
    match lower.as_str() {
        "and" => return Some(Token::Separator(Joint::And)),
        "or" => return Some(Token::Separator(Joint::Or)),
        "pi" => return Some(Token::Constant(Constant::Pi)),
        "infinity" | "infty" | "inf" | "oo" => return Some(Token::Constant(Constant::Infinity)),
        "percent" | "percentage" | "pct" => return Some(Token::Percent),
        "sqrt" => return Some(Token::Sqrt),
        "frac" => return Some(Token::Fraction),
        "emptyset" => return Some(Token::EmptySet),
        _ => {}
    }
    // Without a backslash `min` is minutes.
    function(&lower).filter(|_| lower != "min").map(Token::Function)
}

pub(super) fn function(name: &str) -> Option<Function> {
    Some(match name {
        "sin" => Function::Sin,
        "cos" => Function::Cos,
        "tan" | "tg" => Function::Tan,
        "cot" | "ctg" => Function::Cot,
        "sec" => Function::Sec,
        "csc" | "cosec" => Function::Csc,
        "arcsin" | "asin" => Function::Arcsin,
        "arccos" | "acos" => Function::Arccos,
        "arctan" | "atan" | "arctg" => Function::Arctan,
        "sinh" => Function::Sinh,
        "cosh" => Function::Cosh,
        "tanh" => Function::Tanh,
        "ln" => Function::Ln,
        "log" => Function::Log,
        "lg" => Function::Lg,
        "cis" => Function::Cis,
        "gcd" => Function::Gcd,
        "lcm" => Function::Lcm,
        "max" => Function::Max,
        "min" => Function::Min,
        "det" => Function::Determinant,
        "exp" => Function::Exp,
        "abs" => Function::Abs,
        "floor" => Function::Floor,
        "ceil" => Function::Ceil,
        "binom" => Function::Binomial,
        _ => return None,
    })
}

/// Meaning of a LaTeX command.
pub(super) enum Command {
    /// Layout, which is skipped.
    Skip,
    /// A single token.
    Token(Token),
    /// Its argument holds words.
    Words,
    /// Its argument holds letters in a font.
    Font,
    /// `\begin` and `\end`.
    Begin,
    End,
}

pub(super) fn command(name: &str) -> Command {
    use Token::{Close, Constant as C, Open, Relation as R};
    Command::Token(match name {
        "left" | "right" | "big" | "Big" | "bigg" | "Bigg" | "bigl" | "bigr" | "Bigl" | "Bigr" | "biggl" | "biggr"
        | "displaystyle" | "textstyle" | "scriptstyle" | "limits" | "nolimits" | "quad" | "qquad" | "boxed"
        | "fbox" | "hspace" | "vspace" | "thinspace" | "nonumber" | "ensuremath" | "mathstrut" | "tag" | "label"
        | "phantom" | "hphantom" | "vphantom" | "middle" | "Large" | "large" | "hfill" | "hline" | "strut"
        | "mathclose" | "mathopen" => {
            return Command::Skip;
        }
        "text" | "textbf" | "textit" | "textrm" | "textnormal" | "mbox" | "hbox" | "textsf" | "texttt" | "emph" => {
            return Command::Words;
        }
        "mathrm" | "mathbf" | "mathit" | "mathcal" | "mathbb" | "mathsf" | "mathfrak" | "boldsymbol" | "bm" | "bf"
        | "rm" | "operatorname" => return Command::Font,
        "begin" => return Command::Begin,
        "end" => return Command::End,
        "frac" | "dfrac" | "tfrac" | "cfrac" => Token::Fraction,
        "over" => Token::FractionBar,
        "choose" => Token::Choose,
        "sum" => Token::Series(Series::Sum),
        "prod" => Token::Series(Series::Product),
        "cap" | "bigcap" => Token::Intersection,
        "setminus" | "smallsetminus" | "backslash" => Token::Difference,
        "emptyset" | "varnothing" => Token::EmptySet,
        "R" | "reals" | "Reals" => Token::Reals,
        "Z" | "integers" => Token::Domain("ℤ"),
        "N" | "naturals" => Token::Domain("ℕ"),
        "Q" => Token::Domain("ℚ"),
        "sqrt" => Token::Sqrt,
        "binom" | "dbinom" | "tbinom" => Token::Function(Function::Binomial),
        "pi" => C(Constant::Pi),
        "infty" => C(Constant::Infinity),
        "cdot" | "times" | "ast" | "cdotp" => Token::Times,
        "div" => Token::Over,
        "pm" => Token::PlusMinus,
        "mp" => Token::MinusPlus,
        "circ" | "degree" => Token::Degree,
        "prime" => Token::Prime,
        "cup" | "bigcup" => Token::Union,
        "colon" => Token::Ratio,
        "lvert" | "rvert" | "vert" | "mid" => Token::Bar,
        "lfloor" => Open(Group::Floor),
        "rfloor" => Close(Group::Floor),
        "lceil" => Open(Group::Ceil),
        "rceil" => Close(Group::Ceil),
        "lbrace" => Open(Group::Set),
        "rbrace" => Close(Group::Set),
        "lbrack" => Open(Group::Square),
        "rbrack" => Close(Group::Square),
        "langle" => Open(Group::Round),
        "rangle" => Close(Group::Round),
        "le" | "leq" | "leqslant" | "leqq" => R(Relation::LessOrEqual),
        "ge" | "geq" | "geqslant" | "geqq" => R(Relation::GreaterOrEqual),
        "lt" => R(Relation::Less),
        "gt" => R(Relation::Greater),
        "ne" | "neq" => R(Relation::NotEqual),
        "approx" | "simeq" | "sim" | "approxeq" => R(Relation::About),
        "in" => R(Relation::In),
        "notin" => R(Relation::NotIn),
        "ldots" | "cdots" | "dots" | "dotsc" | "dotsb" | "vdots" | "hdots" => Token::Symbol(ELLIPSIS.to_owned()),
        "Rightarrow" | "implies" | "Longrightarrow" | "iff" | "Leftrightarrow" => R(Relation::Implies),
        "equiv" | "coloneqq" => R(Relation::Equal),
        "land" | "wedge" => Token::Separator(Joint::And),
        "lor" | "vee" => Token::Separator(Joint::Or),
        _ => match function(name) {
            Some(function) => Token::Function(function),
            None => Token::Symbol(name.to_owned()),
        },
    })
}
