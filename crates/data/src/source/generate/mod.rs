//! Built-in tasks: a module each, which says how a problem is made; which problems a source has is decided here.
//!
//! A further task is a module with a function `ways`, a line in [`ways`], and a variant of [`GeneratorTask`] with its sizes.

mod arithmetic;
mod base_conversion;
mod countdown;
mod modular;
mod programs;
mod reverse;
mod sorting;

use std::collections::HashSet;
use std::ops::Range;

use pacs_order::{Numbers, Stream, permutation};
use pacs_spec::{GeneratorPart, GeneratorSpec, GeneratorTask};

use super::{Row, Take};
use crate::DataError;

/// A problem as a task makes it.
#[derive(Debug, PartialEq)]
struct Generated {
    question: String,
    /// The reference answer, for the verifier of the task.
    answer: String,
    /// A response that the verifier takes for right, to learn from; `None` where the reference answer is one.
    response: Option<String>,
}

/// How the problems of a task are found.
enum Ways {
    /// All of them, by their number.
    Listed(usize, Box<dyn Fn(u32) -> Generated>),
    /// By chance, because there are too many; `None` for numbers that make no problem.
    Drawn(Box<Draw>),
}

/// Makes a problem of random numbers.
type Draw = dyn Fn(&mut Numbers) -> Option<Generated>;

fn ways(generator: &GeneratorSpec) -> Ways {
    match generator.task {
        GeneratorTask::Addition => arithmetic::ways(generator, '+', |a, b| a + b),
        GeneratorTask::Subtraction => arithmetic::ways(generator, '-', |a, b| a - b),
        GeneratorTask::Multiplication => arithmetic::ways(generator, '*', |a, b| a * b),
        GeneratorTask::Modular => modular::ways(generator),
        GeneratorTask::BaseConversion => base_conversion::ways(generator),
        GeneratorTask::Countdown => countdown::ways(generator),
        GeneratorTask::Sorting => sorting::ways(generator),
        GeneratorTask::Reverse => reverse::ways(generator),
        GeneratorTask::Programs => programs::ways(generator),
    }
}

/// The problems of a part, each once, in a random order that the seed decides; the first `held_out` are held out.
///
/// What is held out does not depend on how many problems are trained on.
pub(super) fn rows(generator: &GeneratorSpec, window: Range<usize>, take: &mut Take<'_>) -> Result<(), DataError> {
    let held_out = generator.held_out;
    let (first, count) = match generator.part {
        GeneratorPart::Train => (held_out, generator.most_problems()),
        GeneratorPart::HeldOut => (0, held_out),
    };
    let mut position = 0;
    each(generator, first.saturating_add(count.min(window.end)), &mut |number, problem| {
        if number < first {
            return Ok(());
        }
        position += 1;
        if position <= window.start {
            return Ok(());
        }
        let Generated { question, answer, response } = problem;
        take(Ok(Row { question, answer, response, place: format!("generated problem {position}") }))
    })
}

/// What becomes of the problem of a number.
type Each<'a> = dyn FnMut(usize, Generated) -> Result<(), DataError> + 'a;

/// The first `most` problems of both parts, with their numbers.
fn each(generator: &GeneratorSpec, most: usize, found: &mut Each<'_>) -> Result<(), DataError> {
    /// Draws in a row that bring nothing new, after which a task counts as exhausted.
    const IDLE: u32 = 100_000;
    match ways(generator) {
        Ways::Listed(count, make) => {
            let order = permutation(Stream::Generator, generator.seed, 0, count);
            order.into_iter().take(most).enumerate().try_for_each(|(number, index)| found(number, make(index)))
        }
        Ways::Drawn(make) => {
            let mut random = Numbers::new(Stream::Generator, generator.seed, 0);
            let mut seen = HashSet::new();
            let mut idle = 0;
            while seen.len() < most && idle < IDLE {
                match make(&mut random) {
                    Some(problem) if seen.insert(problem.question.clone()) => {
                        idle = 0;
                        found(seen.len() - 1, problem)?;
                    }
                    _ => idle += 1,
                }
            }
            Ok(())
        }
    }
}

/// A number within the bounds of a generator.
fn operand(generator: &GeneratorSpec, random: &mut Numbers) -> u64 {
    u64::from(generator.low) + random.below(generator.operands())
}

/// Numbers in a row, as questions and answers show them.
fn joined(numbers: &[u64], separator: &str) -> String {
    numbers.iter().map(u64::to_string).collect::<Vec<_>>().join(separator)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pacs_types::Outcome;

    use super::*;

    fn of_task(task: GeneratorTask) -> GeneratorSpec {
        let high = if task == GeneratorTask::BaseConversion { 999 } else { 99 };
        GeneratorSpec { high, ..GeneratorSpec::new(task) }
    }

    fn part(generator: &GeneratorSpec, part: GeneratorPart) -> Vec<Row> {
        let mut found = Vec::new();
        let generator = GeneratorSpec { part, ..generator.clone() };
        let mut take = |row: Result<Row, DataError>| {
            found.push(row?);
            Ok(())
        };
        rows(&generator, 0..usize::MAX, &mut take).expect("taking cannot fail");
        found
    }

    fn questions(generator: &GeneratorSpec, of: GeneratorPart) -> Vec<String> {
        part(generator, of).into_iter().map(|row| row.question).collect()
    }

    #[test]
    fn the_parts_share_nothing_and_miss_nothing() {
        let seeded =
            |seed| GeneratorSpec { high: 29, held_out: 50, seed, ..GeneratorSpec::new(GeneratorTask::Addition) };
        let train = questions(&seeded(3), GeneratorPart::Train);
        let held_out = questions(&seeded(3), GeneratorPart::HeldOut);
        assert_eq!((train.len(), held_out.len()), (350, 50));
        let all: BTreeSet<&String> = train.iter().chain(&held_out).collect();
        assert_eq!(all.len(), 400);
        assert!(all.contains(&"What is 10 + 29?".to_owned()) && all.contains(&"What is 29 + 10?".to_owned()));
        assert_ne!(held_out, questions(&seeded(4), GeneratorPart::HeldOut));
        assert_eq!(held_out, questions(&seeded(3), GeneratorPart::HeldOut));
    }

    #[test]
    fn every_task_has_two_parts_of_different_problems() {
        for task in GeneratorTask::ALL {
            let generator = of_task(task);
            let (train, held_out) =
                (questions(&generator, GeneratorPart::Train), questions(&generator, GeneratorPart::HeldOut));
            assert_eq!(held_out.len(), 200, "{task:?}");
            assert!(train.len() > 700 && train.len() as u64 + 200 <= generator.space(), "{task:?}: {}", train.len());
            let all: BTreeSet<&String> = train.iter().chain(&held_out).collect();
            assert_eq!(all.len(), train.len() + held_out.len(), "{task:?}");
            let fewer = GeneratorSpec { problems: Some(100), ..generator.clone() };
            assert_eq!(questions(&fewer, GeneratorPart::HeldOut), held_out, "{task:?}");
            assert_eq!(questions(&fewer, GeneratorPart::Train), train[..100], "{task:?}");
            assert_ne!(questions(&GeneratorSpec { seed: 1, ..generator }, GeneratorPart::HeldOut), held_out);
        }
    }

    #[test]
    fn what_is_shown_to_learn_from_is_right() {
        for task in GeneratorTask::ALL {
            // Programs are run by their verifier; tests of `programs` say what is expected of them.
            if task == GeneratorTask::Programs {
                continue;
            }
            for row in part(&of_task(task), GeneratorPart::HeldOut) {
                let response = row.response.as_ref().unwrap_or(&row.answer);
                let verdict = match task {
                    GeneratorTask::Countdown => pacs_verify::grade_countdown(response, &row.answer),
                    GeneratorTask::BaseConversion | GeneratorTask::Sorting | GeneratorTask::Reverse => {
                        pacs_verify::grade_text(response, &row.answer)
                    }
                    _ => pacs_verify::grade(response, &row.answer, pacs_verify::Mode::Number),
                };
                assert_eq!(verdict.outcome, Outcome::Correct, "{}: {response} for {}", row.question, row.answer);
            }
        }
    }

    #[test]
    fn a_task_with_few_problems_ends() {
        let generator = GeneratorSpec {
            low: 1,
            high: 2,
            length: Some(2),
            held_out: 1,
            ..GeneratorSpec::new(GeneratorTask::Sorting)
        };
        assert_eq!(questions(&generator, GeneratorPart::Train).len(), 3, "all pairs of 1 and 2 but one");
    }
}
