//! Countdown: make a target from given numbers. There are many right answers, so the reference names the target and the
//! numbers, and the answer is evaluated.

use num_rational::BigRational;
use num_traits::Zero;
use pacs_types::{Outcome, Verdict};

use crate::extract::final_text;
use crate::limits::{MAX_ANSWER_BYTES, MAX_DEPTH};
use crate::text::verdict;

/// Bounds of numbers in a problem and of their digits, which bound the size of exact values.
const MAX_NUMBERS: usize = 16;
const MAX_DIGITS: usize = 12;

/// Grades an answer to a countdown problem. The reference reads `44 from 3, 5, 19` or `44 from all of 3, 5, 19`.
///
/// The answer is the content of the last box, or else the last line that is not blank. It is one expression of
/// integers, `+`, `-`, `*`, `/` (also `×`, `·`, `÷` and their LaTeX) and round brackets, optionally followed by `= 44`.
/// It is right if its exact value is the target and it uses no number more often than the reference lists it; after
/// `all of`, it has to use each exactly that often. There is no sign, power, decimal point or joining of digits, each
/// of which would allow numbers that were not given.
#[must_use]
pub fn grade_countdown(response: &str, gold: &str) -> Verdict {
    let goal = match Goal::read(gold) {
        Ok(goal) => goal,
        Err(problem) => return verdict(Outcome::Failed, None, problem),
    };
    let Some(answer) = final_text(response) else { return verdict(Outcome::Unparsable, None, "no_answer") };
    if answer.len() > MAX_ANSWER_BYTES {
        return verdict(Outcome::Unparsable, None, "too_long");
    }
    let (outcome, rule) = goal.judge(&answer);
    verdict(outcome, Some(answer), rule)
}

/// Checks whether [`grade_countdown`] can read a reference.
///
/// # Errors
/// A description of what is wrong with it.
pub fn check_countdown(gold: &str) -> Result<(), String> {
    Goal::read(gold).map(|_| ())
}

/// Finds an expression that [`grade_countdown`] accepts, by exhaustive search. `None` if there is none, if the
/// reference cannot be read, or if it has more than five numbers, for which the search would take long.
#[must_use]
pub fn solve_countdown(gold: &str) -> Option<String> {
    let goal = Goal::read(gold).ok().filter(|goal| goal.numbers.len() <= 5)?;
    let terms = goal.numbers.iter().map(|number| (whole(*number), number.to_string())).collect();
    solve(&goal, terms)
}

/// The target, and the numbers to make it from.
#[derive(Debug, PartialEq)]
struct Goal {
    target: u64,
    numbers: Vec<u64>,
    uses_all: bool,
}

impl Goal {
    fn read(gold: &str) -> Result<Self, String> {
        let problem =
            || format!("reference answer `{gold:.80}` is not like `44 from 3, 5, 19` or `44 from all of 3, 5, 19`");
        let (target, rest) = gold.split_once(" from ").ok_or_else(problem)?;
        let (uses_all, list) = match rest.trim().strip_prefix("all of ") {
            Some(list) => (true, list),
            None => (false, rest),
        };
        let number = |text: &str| number(text.trim()).ok_or_else(problem);
        let numbers: Vec<u64> = list.split(',').map(number).collect::<Result<_, _>>()?;
        if numbers.len() > MAX_NUMBERS {
            return Err(format!(
                "reference answer `{gold:.80}` has {} numbers, more than {MAX_NUMBERS}",
                numbers.len()
            ));
        }
        Ok(Self { target: self::number(target.trim()).ok_or_else(problem)?, numbers, uses_all })
    }

    fn judge(&self, answer: &str) -> (Outcome, String) {
        let wrong = |rule: &str| (Outcome::Wrong, rule.to_owned());
        let plain =
            answer.trim().trim_matches('$').replace(r"\times", "*").replace(r"\cdot", "*").replace(r"\div", "/");
        let plain = plain.replace(['×', '·'], "*").replace('÷', "/");
        let expression = match plain.split_once('=') {
            None => plain.as_str(),
            // A false claim makes the answer wrong; a claim that is not a number makes it unreadable.
            Some((left, right)) => match number(right.trim()) {
                Some(claim) if claim == self.target => left,
                Some(_) => return wrong("another_target"),
                None => return (Outcome::Unparsable, "no_expression".to_owned()),
            },
        };
        let mut reader = Reader { rest: expression, used: Vec::new() };
        let value = match reader.whole() {
            Ok(value) => value,
            Err(Unread::Syntax) => return (Outcome::Unparsable, "no_expression".to_owned()),
            Err(Unread::DividedByZero) => return wrong("division_by_zero"),
            Err(Unread::TooManyNumbers) => return wrong("numbers"),
        };
        let mut left = self.numbers.clone();
        for number in &reader.used {
            match left.iter().position(|known| known == number) {
                Some(at) => left.swap_remove(at),
                None => return wrong("numbers"),
            };
        }
        if self.uses_all && !left.is_empty() {
            return wrong("numbers_left");
        }
        if value != whole(self.target) {
            return wrong("value");
        }
        (Outcome::Correct, "value".to_owned())
    }
}

/// Why a text is not an expression with a value.
#[derive(Debug)]
enum Unread {
    Syntax,
    DividedByZero,
    TooManyNumbers,
}

/// Recursive-descent parser that evaluates while it reads: sums of products of numbers and bracketed sums.
struct Reader<'a> {
    rest: &'a str,
    used: Vec<u64>,
}

impl Reader<'_> {
    fn whole(&mut self) -> Result<BigRational, Unread> {
        let value = self.sum(0)?;
        if self.rest.trim().is_empty() { Ok(value) } else { Err(Unread::Syntax) }
    }

    fn sum(&mut self, depth: usize) -> Result<BigRational, Unread> {
        let mut value = self.product(depth)?;
        loop {
            if self.takes('+') {
                value += self.product(depth)?;
            } else if self.takes('-') {
                value -= self.product(depth)?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self, depth: usize) -> Result<BigRational, Unread> {
        let mut value = self.operand(depth)?;
        loop {
            if self.takes('*') {
                value *= self.operand(depth)?;
            } else if self.takes('/') {
                let divisor = self.operand(depth)?;
                if divisor.is_zero() {
                    return Err(Unread::DividedByZero);
                }
                value /= divisor;
            } else {
                return Ok(value);
            }
        }
    }

    fn operand(&mut self, depth: usize) -> Result<BigRational, Unread> {
        if self.takes('(') {
            if depth == MAX_DEPTH {
                return Err(Unread::Syntax);
            }
            let value = self.sum(depth + 1)?;
            return if self.takes(')') { Ok(value) } else { Err(Unread::Syntax) };
        }
        let text = self.rest.trim_start();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let value = number(&text[..digits]).ok_or(Unread::Syntax)?;
        if self.used.len() == MAX_NUMBERS {
            return Err(Unread::TooManyNumbers);
        }
        self.used.push(value);
        self.rest = &text[digits..];
        Ok(whole(value))
    }

    fn takes(&mut self, sign: char) -> bool {
        let rest = self.rest.trim_start().strip_prefix(sign);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }
}

/// Parses a plain integer: no sign, no leading zero, bounded length.
fn number(digits: &str) -> Option<u64> {
    let is_plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    digits.parse().ok().filter(|_| is_plain && digits.len() <= MAX_DIGITS)
}

fn whole(number: u64) -> BigRational {
    BigRational::from_integer(number.into())
}

/// Combines two terms in every way until a single one is left, which is the target.
fn solve(goal: &Goal, terms: Vec<(BigRational, String)>) -> Option<String> {
    if !goal.uses_all || terms.len() == 1 {
        let target = whole(goal.target);
        if let Some((_, text)) = terms.iter().find(|(value, _)| *value == target) {
            return Some(text.clone());
        }
    }
    for first in 0..terms.len() {
        for second in (0..terms.len()).filter(|second| *second != first) {
            let ((a, left), (b, right)) = (&terms[first], &terms[second]);
            let quotient = (!b.is_zero()).then(|| a / b);
            // Commutative operations are tried in one order only.
            let both = if first < second { [Some((a + b, '+')), Some((a * b, '*'))] } else { [None, None] };
            let more = [Some((a - b, '-')), quotient.map(|value| (value, '/'))];
            for (value, sign) in both.into_iter().chain(more).flatten() {
                let rest = terms.iter().enumerate().filter(|(at, _)| *at != first && *at != second);
                let mut next: Vec<_> = rest.map(|(_, term)| term.clone()).collect();
                next.push((value, format!("({left} {sign} {right})")));
                if let Some(found) = solve(goal, next) {
                    return Some(found);
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graded(response: &str, gold: &str) -> (Outcome, String) {
        let verdict = grade_countdown(response, gold);
        (verdict.outcome, verdict.rule)
    }

    #[test]
    fn every_right_expression_is_right() {
        for (response, gold) in [
            ("19 + 5 * 5", "44 from 19, 5, 5"),
            ("(5*5)+19", "44 from all of 19, 5, 5"),
            ("5 × 5 + 19 = 44", "44 from 5, 19, 5"),
            (r"Try: \boxed{5 \times 5 + 19}", "44 from 5, 19, 5"),
            ("first 5 + 5\n5*5+19", "44 from 5, 19, 5"),
            ("$8 / (3 - 8 / 3)$", "24 from all of 3, 3, 8, 8"),
            ("7 * (3 + 3 / 7)", "24 from all of 3, 3, 7, 7"),
            ("44", "44 from 44, 1"),
            ("2 - 3 + 9", "8 from 2, 3, 9"),
        ] {
            assert_eq!(graded(response, gold).0, Outcome::Correct, "{response} for {gold}");
        }
    }

    #[test]
    fn nothing_but_the_given_numbers_makes_the_target() {
        use Outcome::{Unparsable, Wrong};
        let gold = "44 from all of 3, 5, 19";
        for (response, expected, rule) in [
            ("44", Wrong, "numbers"),
            ("44 = 44", Wrong, "numbers"),
            ("3 + 5 + 19", Wrong, "value"),
            ("3 + 5 + 19 = 44", Wrong, "value"),
            ("(19 - 5) * 3 + 2", Wrong, "numbers"),
            ("19 * 3 - 5 - 5 - 3", Wrong, "numbers"),
            // The number is joined from two given digits.
            ("35 + 19 - 10", Wrong, "numbers"),
            ("19 * 3 = 44", Wrong, "numbers_left"),
            ("19 + 5 + 3 = 45", Wrong, "another_target"),
            ("3 / (5 - 5)", Wrong, "division_by_zero"),
            ("3 5 19", Unparsable, "no_expression"),
            ("19 + 5²", Unparsable, "no_expression"),
            ("19 + 5^2", Unparsable, "no_expression"),
            ("19 + 5 ** 2", Unparsable, "no_expression"),
            ("-3 + 5 + 42", Unparsable, "no_expression"),
            ("03 + 5 + 19", Unparsable, "no_expression"),
            ("3.0 + 5 + 19", Unparsable, "no_expression"),
            ("3! + 5 + 19", Unparsable, "no_expression"),
            ("x + 3", Unparsable, "no_expression"),
            ("3 + 5 = 8, 8 + 19 = 44", Unparsable, "no_expression"),
            ("(3 + 5", Unparsable, "no_expression"),
            ("3 + 5) + 19", Unparsable, "no_expression"),
            ("３ + 5 + 19", Unparsable, "no_expression"),
            ("", Unparsable, "no_answer"),
            ("I do not know.", Unparsable, "no_expression"),
        ] {
            assert_eq!(graded(response, gold), (expected, rule.to_owned()), "{response}");
        }
        assert_eq!(graded("5 + 5", "10 from 5, 3").1, "numbers", "a number counts as often as it is given");
        assert_eq!(graded("5 + 5", "10 from 5, 3, 5").0, Outcome::Correct);
        assert_eq!(graded(&"(".repeat(1000), gold).0, Unparsable);
        assert_eq!(graded(&"1+".repeat(900), gold).1, "numbers", "and no stack or number grows with an answer");
        assert_eq!(graded(&format!("{}1", "1*".repeat(5000)), gold).1, "too_long");
    }

    #[test]
    fn a_reference_that_cannot_be_read_is_no_wrong_answer() {
        for gold in ["44", "44 from", "44 from 3,, 5", "44 from 3 5", "-4 from 3, 5", "x from 3", "4 from all of"] {
            assert_eq!(graded("3 + 5", gold).0, Outcome::Failed, "{gold}");
            assert!(check_countdown(gold).is_err());
        }
        check_countdown(" 44 from all of 3,5 , 19 ").expect("spaces do not matter");
    }

    #[test]
    fn what_is_solved_is_right() {
        for gold in ["24 from all of 3, 3, 8, 8", "76 from 25, 50, 75, 1", "7 from 7", "44 from all of 5, 19, 5"] {
            let Some(found) = solve_countdown(gold) else { panic!("{gold} has a solution") };
            assert_eq!(graded(&found, gold).0, Outcome::Correct, "{found} for {gold}");
        }
        assert_eq!(solve_countdown("1000 from all of 1, 1"), None);
    }
}
