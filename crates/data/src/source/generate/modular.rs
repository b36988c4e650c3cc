//! `What is 37 * 58 mod 7?`, every ordered pair of factors once.
//!
//! Harder with a larger modulus: a guess is right once in `modulus` times, so that a start above that is more than luck.

use pacs_spec::GeneratorSpec;

use super::{Generated, Ways};

pub(super) fn ways(generator: &GeneratorSpec) -> Ways {
    let low = generator.low;
    let operands = generator.operands() as u32;
    let modulus = generator.modulus();
    let make = move |index| problem(low + index / operands, low + index % operands, modulus);
    Ways::Listed((operands as usize).pow(2), Box::new(make))
}

fn problem(a: u32, b: u32, modulus: u32) -> Generated {
    let answer = u64::from(a) * u64::from(b) % u64::from(modulus);
    Generated { question: format!("What is {a} * {b} mod {modulus}?"), answer: answer.to_string(), response: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_right() {
        let made = problem(37, 58, 7);
        assert_eq!((made.question.as_str(), made.answer.as_str()), ("What is 37 * 58 mod 7?", "4"));
        assert_eq!(problem(9999, 9999, 1_000_000).answer, "980001");
    }
}
