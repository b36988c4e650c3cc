//! Plain numbers: digits with sign, thousands separators and decimal point, without arithmetic.

use crate::limits::MAX_ANSWER_BYTES;

/// Returns the last plain number of a text.
pub(super) fn last_number(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let mut start = end - 1;
    while start > 0 && continues_backwards(bytes, start, end) {
        start -= 1;
    }
    let before = text[..start].trim_end();
    // After a number or a bracket a minus subtracts; anywhere else it is a sign.
    let signed = text[..start].ends_with('-')
        && !before[..before.len() - 1].trim_end().ends_with(|c: char| c.is_ascii_digit() || c == ')' || c == '}');
    Some(text[if signed { start - 1 } else { start }..end].to_owned())
}

/// Whether the byte before `start` belongs to the number `start..end`.
fn continues_backwards(bytes: &[u8], start: usize, end: usize) -> bool {
    let so_far = &bytes[start..end];
    match bytes[start - 1] {
        // Longer than any number that is read.
        _ if so_far.len() > MAX_ANSWER_BYTES => false,
        b'0'..=b'9' => true,
        b'.' => !so_far.contains(&b'.') && !so_far.contains(&b','),
        b',' => {
            let digits = so_far.iter().take(4).take_while(|byte| byte.is_ascii_digit()).count();
            start >= 2 && bytes[start - 2].is_ascii_digit() && digits == 3
        }
        _ => false,
    }
}

/// Whether a text is a plain number and nothing else, ignoring math delimiters.
pub(crate) fn is_number(text: &str) -> bool {
    let text = text.trim().trim_matches('$').trim().trim_end_matches('.');
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text).trim_start();
    last_number(unsigned).is_some_and(|number| number == unsigned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_number_is_read_whole() {
        for (text, number) in [
            ("63 + 11 = 74", "74"),
            ("63 + 11", "11"),
            ("it is 1,234.50 dollars.", "1,234.50"),
            ("so -5", "-5"),
            ("8 - 5", "5"),
            ("(3)-5", "5"),
            ("x = -0.25 m", "-0.25"),
            ("1, 2,345", "2,345"),
            ("12,34", "34"),
            ("version 1.2.3", "2.3"),
            (".5", ".5"),
        ] {
            assert_eq!(last_number(text).as_deref(), Some(number), "{text}");
        }
        assert_eq!(last_number("none at all"), None);
    }

    #[test]
    fn arithmetic_is_not_a_number() {
        assert!(["96", "$96$", "-96", "1,000", " 3.5 "].iter().all(|text| is_number(text)));
        assert!(!["56 + 40", "x = 96", "96 apples", "", "2^3", "1/2"].iter().any(|text| is_number(text)));
    }
}
