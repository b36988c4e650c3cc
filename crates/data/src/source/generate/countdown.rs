//! `Make 44 of 3, 5, 19.`: an expression that uses each number once and has the target's value; most problems have several.
//!
//! Harder with more numbers. Targets come from random expressions, so that each can be made: numbers put together from the left
//! by random operators, with no negative or broken value on the way.

use pacs_order::Numbers;
use pacs_spec::GeneratorSpec;

use super::{Generated, Ways, joined, operand};

/// Largest target: three digits, so that a model has to combine numbers instead of copying one.
const MOST_TARGET: u64 = 999;

pub(super) fn ways(generator: &GeneratorSpec) -> Ways {
    let generator = generator.clone();
    Ways::Drawn(Box::new(move |random| problem(&generator, random)))
}

fn problem(generator: &GeneratorSpec, random: &mut Numbers) -> Option<Generated> {
    let mut numbers: Vec<u64> = (0..generator.length()).map(|_| operand(generator, random)).collect();
    let mut expression = numbers[0].to_string();
    let mut value = numbers[0];
    for (at, number) in numbers.iter().enumerate().skip(1) {
        let operator = ['+', '-', '*', '/'][random.below(4) as usize];
        value = apply(value, operator, *number)?;
        // A sum has to be made before it is multiplied.
        if at > 1 && matches!(operator, '*' | '/') {
            expression = format!("({expression})");
        }
        expression = format!("{expression} {operator} {number}");
    }
    if !(1..=MOST_TARGET).contains(&value) {
        return None;
    }
    // In the order of their use they would be half of the answer.
    numbers.sort_unstable();
    let list = joined(&numbers, ", ");
    let question = format!("Make {value} of {list}.");
    let answer = format!("{value} from all of {list}");
    Some(Generated { question, answer, response: Some(expression) })
}

fn apply(value: u64, operator: char, number: u64) -> Option<u64> {
    match operator {
        '+' => value.checked_add(number),
        '-' => value.checked_sub(number),
        '*' => value.checked_mul(number),
        _ => (number > 0 && value.is_multiple_of(number)).then(|| value / number),
    }
}

#[cfg(test)]
mod tests {
    use pacs_order::Stream;
    use pacs_spec::GeneratorTask;

    use super::*;

    #[test]
    fn problems_are_of_the_given_numbers() {
        let generator =
            GeneratorSpec { low: 1, high: 9, length: Some(4), ..GeneratorSpec::new(GeneratorTask::Countdown) };
        let mut random = Numbers::new(Stream::Generator, 0, 0);
        let made: Vec<_> = (0..2000).filter_map(|_| problem(&generator, &mut random)).collect();
        assert!(made.len() > 200, "{}", made.len());
        for Generated { question, answer, response } in &made {
            let (target, list) = answer.split_once(" from all of ").expect("a reference");
            assert_eq!(*question, format!("Make {target} of {list}."));
            let numbers: Vec<u64> = list.split(", ").map(|number| number.parse().expect("a number")).collect();
            assert!(numbers.len() == 4 && numbers.is_sorted() && numbers.iter().all(|n| (1..=9).contains(n)));
            let response = response.as_ref().expect("an expression");
            assert_eq!(pacs_verify::grade_countdown(response, answer).label, 1.0, "{response} for {answer}");
        }
        let signs = |sign| made.iter().any(|one| one.response.as_ref().is_some_and(|text| text.contains(sign)));
        assert!(['+', '-', '*', '/', '('].into_iter().all(signs));
    }
}
