//! A program described in English: it reads integers, changes them in a few steps, and prints what the last step makes of them. Harder with more steps.
//!
//! The reference answer is the cases that the verifier `code` runs, and the response a program that is right. What a step does is said
//! three times, in English, in Python and in Rust, and the cases come from the last.

use pacs_order::Numbers;
use pacs_spec::GeneratorSpec;

use super::{Generated, Ways, joined, operand};

/// Cases of a problem; the first is shown in the question.
const CASES: usize = 5;

/// Most numbers of an input.
const MOST_NUMBERS: u64 = 8;

pub(super) fn ways(generator: &GeneratorSpec) -> Ways {
    let generator = generator.clone();
    Ways::Drawn(Box::new(move |random| problem(&generator, random)))
}

/// What is done with the list of numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Add(i64),
    Multiply(i64),
    DropBelow(i64),
    DropMultiples(i64),
    Sort,
    Reverse,
    Differences,
}

/// What is printed of it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Last {
    All,
    Sum,
    Count,
    Largest,
}

impl Step {
    fn draw(generator: &GeneratorSpec, random: &mut Numbers) -> Self {
        let number = i64::try_from(operand(generator, random)).unwrap_or(i64::from(u32::MAX));
        match random.below(7) {
            0 => Self::Add(number),
            // Small, so that a few steps stay within 64 bits.
            1 => Self::Multiply(2 + number.rem_euclid(8)),
            2 => Self::DropBelow(number),
            3 => Self::DropMultiples(2 + number.rem_euclid(5)),
            4 => Self::Sort,
            5 => Self::Reverse,
            _ => Self::Differences,
        }
    }

    fn words(self) -> String {
        match self {
            Self::Add(number) => format!("add {number} to each of them"),
            Self::Multiply(number) => format!("multiply each of them by {number}"),
            Self::DropBelow(number) => format!("drop those that are less than {number}"),
            Self::DropMultiples(number) => format!("drop the multiples of {number}"),
            Self::Sort => "sort them in ascending order".to_owned(),
            Self::Reverse => "reverse their order".to_owned(),
            Self::Differences => {
                "replace them by the differences of neighbours, each number minus the one before it".to_owned()
            }
        }
    }

    fn python(self) -> String {
        match self {
            Self::Add(number) => format!("numbers = [n + {number} for n in numbers]"),
            Self::Multiply(number) => format!("numbers = [n * {number} for n in numbers]"),
            Self::DropBelow(number) => format!("numbers = [n for n in numbers if n >= {number}]"),
            Self::DropMultiples(number) => format!("numbers = [n for n in numbers if n % {number} != 0]"),
            Self::Sort => "numbers = sorted(numbers)".to_owned(),
            Self::Reverse => "numbers = numbers[::-1]".to_owned(),
            Self::Differences => "numbers = [b - a for a, b in zip(numbers, numbers[1:])]".to_owned(),
        }
    }

    fn apply(self, mut numbers: Vec<i64>) -> Vec<i64> {
        match self {
            Self::Add(number) => numbers.iter_mut().for_each(|n| *n += number),
            Self::Multiply(number) => numbers.iter_mut().for_each(|n| *n *= number),
            Self::DropBelow(number) => numbers.retain(|n| *n >= number),
            Self::DropMultiples(number) => numbers.retain(|n| n % number != 0),
            Self::Sort => numbers.sort_unstable(),
            Self::Reverse => numbers.reverse(),
            Self::Differences => return numbers.windows(2).map(|pair| pair[1] - pair[0]).collect(),
        }
        numbers
    }
}

impl Last {
    fn draw(random: &mut Numbers) -> Self {
        [Self::All, Self::Sum, Self::Count, Self::Largest][random.below(4) as usize]
    }

    fn words(self) -> &'static str {
        match self {
            Self::All => "print them in one line, separated by spaces",
            Self::Sum => "print their sum",
            Self::Count => "print how many there are",
            Self::Largest => "print the largest one, or `none` if there is none",
        }
    }

    fn python(self) -> &'static str {
        match self {
            Self::All => "print(*numbers)",
            Self::Sum => "print(sum(numbers))",
            Self::Count => "print(len(numbers))",
            Self::Largest => "print(max(numbers) if numbers else 'none')",
        }
    }

    fn of(self, numbers: &[i64]) -> String {
        match self {
            Self::All => numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(" "),
            Self::Sum => numbers.iter().sum::<i64>().to_string(),
            Self::Count => numbers.len().to_string(),
            Self::Largest => numbers.iter().max().map_or_else(|| "none".to_owned(), i64::to_string),
        }
    }
}

fn problem(generator: &GeneratorSpec, random: &mut Numbers) -> Option<Generated> {
    let steps: Vec<Step> = (0..generator.length()).map(|_| Step::draw(generator, random)).collect();
    let last = Last::draw(random);
    let inputs: Vec<Vec<u64>> =
        (0..CASES).map(|_| (0..1 + random.below(MOST_NUMBERS)).map(|_| operand(generator, random)).collect()).collect();
    let output = |input: &Vec<u64>| {
        let numbers: Vec<i64> = input.iter().map(|number| i64::try_from(*number).unwrap_or_default()).collect();
        last.of(&steps.iter().fold(numbers, |numbers, step| step.apply(numbers)))
    };
    let cases: Vec<(String, String)> = inputs.iter().map(|input| (joined(input, " "), output(input))).collect();
    // A problem whose cases all have one output can be answered without reading.
    if cases.iter().all(|(_, output)| *output == cases[0].1) {
        return None;
    }
    let words: Vec<String> = steps.iter().map(|step| step.words()).collect();
    let (input, shown) = &cases[0];
    let question = format!(
        "Write a Python program that reads integers from one line of standard input. {}: {}. Then {}. For the input `{input}` it prints \
         `{shown}`. Give the program in a block of code that begins with ```python and ends with ```.",
        "Do this with them, in this order",
        words.join("; "),
        last.words()
    );
    let listed: Vec<serde_json::Value> = cases
        .iter()
        .map(|(input, output)| serde_json::json!({ "input": format!("{input}\n"), "output": output }))
        .collect();
    let program = program(&steps, last);
    let answer = serde_json::json!({ "cases": listed, "solution": program }).to_string();
    Some(Generated { question, answer, response: Some(format!("```python\n{program}```")) })
}

fn program(steps: &[Step], last: Last) -> String {
    let mut lines = vec!["numbers = list(map(int, input().split()))".to_owned()];
    lines.extend(steps.iter().map(|step| step.python()));
    lines.push(last.python().to_owned());
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_do_what_they_say() {
        let numbers = vec![12, 7, 30, 9];
        for (step, expected) in [
            (Step::Add(3), vec![15, 10, 33, 12]),
            (Step::Multiply(2), vec![24, 14, 60, 18]),
            (Step::DropBelow(10), vec![12, 30]),
            (Step::DropMultiples(3), vec![7]),
            (Step::Sort, vec![7, 9, 12, 30]),
            (Step::Reverse, vec![9, 30, 7, 12]),
            (Step::Differences, vec![-5, 23, -21]),
        ] {
            assert_eq!(step.apply(numbers.clone()), expected, "{step:?}");
        }
        let lasts = [(Last::All, "12 7 30 9"), (Last::Sum, "58"), (Last::Count, "4"), (Last::Largest, "30")];
        for (last, expected) in lasts {
            assert_eq!(last.of(&numbers), expected);
        }
        assert_eq!(Last::Largest.of(&[]), "none");
    }

    #[test]
    fn the_reference_has_cases_of_different_outputs_and_a_program() {
        let generator = GeneratorSpec::new(pacs_spec::GeneratorTask::Programs);
        let mut random = Numbers::new(pacs_order::Stream::Generator, 3, 0);
        let found: Vec<Generated> = (0..50).filter_map(|_| problem(&generator, &mut random)).collect();
        assert!(found.len() > 20, "{}", found.len());
        for generated in found {
            let suite = pacs_verify::Suite::parse(&generated.answer).unwrap();
            assert_eq!(suite.cases.len(), CASES);
            let solution = suite.solution.unwrap();
            assert!(solution.starts_with("numbers = list(map(int") && solution.contains("print("), "{solution}");
            assert!(generated.response.unwrap().contains(&solution));
        }
    }
}
