//! `Sort 58 3 17 44.`, smallest first. Harder with more numbers and more digits.

use pacs_order::Numbers;
use pacs_spec::GeneratorSpec;

use super::{Generated, Ways, joined, operand};

pub(super) fn ways(generator: &GeneratorSpec) -> Ways {
    let generator = generator.clone();
    Ways::Drawn(Box::new(move |random| Some(problem(&generator, random))))
}

fn problem(generator: &GeneratorSpec, random: &mut Numbers) -> Generated {
    let mut numbers: Vec<u64> = (0..generator.length()).map(|_| operand(generator, random)).collect();
    let question = format!("Sort {}.", joined(&numbers, " "));
    numbers.sort_unstable();
    Generated { question, answer: joined(&numbers, " "), response: None }
}
