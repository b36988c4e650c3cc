//! `Reverse crate.`: random letters from the end to the beginning. Harder with more letters.

use pacs_order::Numbers;
use pacs_spec::GeneratorSpec;

use super::{Generated, Ways};

pub(super) fn ways(generator: &GeneratorSpec) -> Ways {
    let length = generator.length();
    Ways::Drawn(Box::new(move |random| Some(problem(length, random))))
}

fn problem(length: u32, random: &mut Numbers) -> Generated {
    let letters: String = (0..length).map(|_| char::from(b'a' + random.below(26) as u8)).collect();
    let answer = letters.chars().rev().collect();
    Generated { question: format!("Reverse {letters}."), answer, response: None }
}
