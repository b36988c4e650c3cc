//! Classes of characters beyond ASCII.

/// Whether a letter makes up words. Greek letters are variables, one by one.
pub(super) fn is_letter(c: char) -> bool {
    c.is_ascii_alphabetic() || (!c.is_ascii() && c.is_alphabetic() && !is_symbol(c))
}

/// Whether a letter beyond ASCII is a symbol of formulas: Greek, letter-like signs, modifiers, mathematical alphabets.
fn is_symbol(c: char) -> bool {
    matches!(c, '\u{370}'..='\u{3ff}' | '\u{1d00}'..='\u{1dbf}' | '\u{2070}'..='\u{209f}' | '\u{2100}'..='\u{214f}' | 'ª' | 'º' | 'µ' | '\u{1d400}'..='\u{1d7ff}')
}

/// Returns the plain form of a superscript character.
pub(super) fn superscript(c: char) -> Option<char> {
    let at = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ".chars().position(|raised| raised == c)?;
    "0123456789+-ni".chars().nth(at)
}

/// Returns the plain form of a subscript character.
pub(super) fn subscript(c: char) -> Option<char> {
    let at = "₀₁₂₃₄₅₆₇₈₉₊₋ₐₑₒₓₙₖₘₚₛₜ".chars().position(|lowered| lowered == c)?;
    "0123456789+-aeoxnkmpst".chars().nth(at)
}

/// Returns numerator and denominator of a fraction character.
pub(super) fn vulgar_fraction(c: char) -> Option<(&'static str, &'static str)> {
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
