//! `Write 37 in base 2.`, every number once. Harder with larger numbers, of which more digits follow.

use pacs_spec::GeneratorSpec;

use super::{Generated, Ways};

pub(super) fn ways(generator: &GeneratorSpec) -> Ways {
    let low = generator.low;
    let base = generator.base();
    Ways::Listed(generator.operands() as usize, Box::new(move |index| problem(low + index, base)))
}

fn problem(number: u32, base: u32) -> Generated {
    Generated { question: format!("Write {number} in base {base}."), answer: digits(number, base), response: None }
}

/// Digits above 9 are small letters.
fn digits(mut number: u32, base: u32) -> String {
    let mut digits = Vec::new();
    loop {
        digits.push(char::from_digit(number % base, base).expect("the spec bounds the base to 36"));
        number /= base;
        if number == 0 {
            return digits.into_iter().rev().collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_right() {
        assert_eq!(problem(37, 2).answer, "100101");
        assert_eq!(problem(37, 2).question, "Write 37 in base 2.");
        for number in [0, 1, 35, 36, 999_999] {
            for base in [2, 3, 16, 36] {
                let written = digits(number, base);
                assert_eq!(u32::from_str_radix(&written, base), Ok(number), "{written}");
                assert!(written == "0" || !written.starts_with('0'));
            }
        }
    }
}
