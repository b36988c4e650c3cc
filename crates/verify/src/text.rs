//! Answers that are texts: correct if they equal the reference, character for character.

use pacs_types::{Outcome, Verdict};

use crate::extract::final_text;
use crate::limits::MAX_ANSWER_BYTES;

/// Grades a response whose answer is a text: the content of its last box, or else its last line that is not blank.
///
/// Runs of white space count as one space and are removed at both ends; everything else has to be equal, including
/// case. `3, 17` is not `3 17`: a rule that ignored separators would have to know the task.
#[must_use]
pub fn grade_text(response: &str, gold: &str) -> Verdict {
    let gold = spaced(gold);
    if gold.is_empty() {
        return verdict(Outcome::Failed, None, "the reference answer is empty");
    }
    let Some(answer) = final_text(response) else { return verdict(Outcome::Unparsable, None, "no_answer") };
    if answer.len() > MAX_ANSWER_BYTES.max(gold.len()) {
        return verdict(Outcome::Unparsable, None, "too_long");
    }
    let answer = spaced(&answer);
    let outcome = if answer == gold { Outcome::Correct } else { Outcome::Wrong };
    verdict(outcome, Some(answer), "text")
}

fn spaced(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

pub(crate) fn verdict(outcome: Outcome, extracted: Option<String>, rule: impl Into<String>) -> Verdict {
    let label = f64::from(outcome == Outcome::Correct);
    Verdict { outcome, label, reward: label, extracted, rule: rule.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reference_is_right() {
        use Outcome::{Correct, Failed, Unparsable, Wrong};
        for (response, gold, expected) in [
            ("tac", "tac", Correct),
            ("  tac \n\n", "tac", Correct),
            ("Let me see.\ntac", "tac", Correct),
            (r"So it is \boxed{tac}.", "tac", Correct),
            ("<think>cat</think>\ntac", "tac", Correct),
            ("3  17\t58", "3 17 58", Correct),
            ("Tac", "tac", Wrong),
            ("tac.", "tac", Wrong),
            ("tac\nor cat", "tac", Wrong),
            ("it is tac", "tac", Wrong),
            ("3, 17, 58", "3 17 58", Wrong),
            ("0101", "101", Wrong),
            // The last box is the answer, whatever stands in an earlier one.
            (r"\boxed{tac} or rather \boxed{cat}", "tac", Wrong),
            ("", "tac", Unparsable),
            (" \n", "tac", Unparsable),
            ("x", " ", Failed),
        ] {
            assert_eq!(grade_text(response, gold).outcome, expected, "{response:?} for {gold:?}");
        }
        let long = "a".repeat(MAX_ANSWER_BYTES + 1);
        assert_eq!(grade_text(&long, "a").outcome, Unparsable);
        assert_eq!(grade_text(&long, &long).outcome, Correct, "a reference may be as long as it is");
    }
}
