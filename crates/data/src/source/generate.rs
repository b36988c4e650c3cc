use std::ops::Range;

use pacs_order::{Stream, permutation};
use pacs_spec::{GeneratorPart, GeneratorSpec, GeneratorTask};

use super::{Row, Take};
use crate::DataError;

/// Every ordered pair of operands once, in a random order that the seed decides; the first `held_out` are held out.
pub(super) fn rows(generator: &GeneratorSpec, window: Range<usize>, take: &mut Take<'_>) -> Result<(), DataError> {
    let order = permutation(Stream::Generator, generator.seed, 0, generator.pairs());
    let (held_out, train) = order.split_at(generator.held_out.min(order.len()));
    let part = match generator.part {
        GeneratorPart::Train => train,
        GeneratorPart::HeldOut => held_out,
    };
    let operands = generator.high - generator.low + 1;
    for (position, pair) in part.iter().enumerate().skip(window.start).take(window.len()) {
        let (a, b) = (generator.low + pair / operands, generator.low + pair % operands);
        let (question, answer) = problem(generator.task, i64::from(a), i64::from(b));
        take(Ok(Row { question, answer, place: format!("generated problem {}", position + 1) }))?;
    }
    Ok(())
}

fn problem(task: GeneratorTask, a: i64, b: i64) -> (String, String) {
    let (operator, value) = match task {
        GeneratorTask::Addition => ('+', a + b),
        GeneratorTask::Subtraction => ('-', a - b),
        GeneratorTask::Multiplication => ('*', a * b),
    };
    (format!("What is {a} {operator} {b}?"), value.to_string())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn questions(part: GeneratorPart, seed: u64) -> Vec<String> {
        let generator = GeneratorSpec { task: GeneratorTask::Addition, low: 10, high: 29, held_out: 50, part, seed };
        let mut questions = Vec::new();
        rows(&generator, 0..usize::MAX, &mut |row| {
            questions.push(row?.question);
            Ok(())
        })
        .expect("taking cannot fail");
        questions
    }

    #[test]
    fn the_parts_share_nothing_and_miss_nothing() {
        let (train, held_out) = (questions(GeneratorPart::Train, 3), questions(GeneratorPart::HeldOut, 3));
        assert_eq!((train.len(), held_out.len()), (350, 50));
        let all: BTreeSet<&String> = train.iter().chain(&held_out).collect();
        assert_eq!(all.len(), 400);
        assert!(all.contains(&"What is 10 + 29?".to_owned()) && all.contains(&"What is 29 + 10?".to_owned()));
        assert_ne!(held_out, questions(GeneratorPart::HeldOut, 4));
        assert_eq!(held_out, questions(GeneratorPart::HeldOut, 3));
    }

    #[test]
    fn answers_are_right() {
        let answer = |task, a, b| problem(task, a, b).1;
        assert_eq!(answer(GeneratorTask::Addition, 37, 58), "95");
        assert_eq!(answer(GeneratorTask::Subtraction, 37, 58), "-21");
        assert_eq!(answer(GeneratorTask::Multiplication, 9999, 9999), "99980001");
        assert_eq!(problem(GeneratorTask::Addition, 37, 58).0, "What is 37 + 58?");
    }
}
