//! `What is 37 + 58?`, every ordered pair of operands once.
//!
//! Harder with more digits; carries make sums harder, signs differences, and products of two digits are beyond small models.

use pacs_spec::GeneratorSpec;

use super::{Generated, Ways};

pub(super) fn ways(generator: &GeneratorSpec, operator: char, value: fn(i64, i64) -> i64) -> Ways {
    let low = generator.low;
    let operands = generator.operands() as u32;
    let make = move |index| problem(low + index / operands, operator, low + index % operands, value);
    Ways::Listed((operands as usize).pow(2), Box::new(make))
}

fn problem(a: u32, operator: char, b: u32, value: fn(i64, i64) -> i64) -> Generated {
    let question = format!("What is {a} {operator} {b}?");
    Generated { question, answer: value(i64::from(a), i64::from(b)).to_string(), response: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_right() {
        assert_eq!(problem(37, '+', 58, |a, b| a + b).answer, "95");
        assert_eq!(problem(37, '-', 58, |a, b| a - b).answer, "-21");
        assert_eq!(problem(9999, '*', 9999, |a, b| a * b).answer, "99980001");
        assert_eq!(problem(37, '+', 58, |a, b| a + b).question, "What is 37 + 58?");
    }
}
