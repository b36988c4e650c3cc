//! From two strings to a verdict.

use pacs_types::{Outcome, Verdict};

use crate::compare::Rule;
use crate::extract;
use crate::form::Work;
use crate::gold;
use crate::limits::{Budget, MAX_ANSWER_BYTES, MAX_RESPONSE_BYTES, MAX_STEPS};
use crate::reading::{Decision, Reading, source_key};
use crate::render::reading;

/// Where the final answer of a response may stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A box, a final-answer phrase, or else the last expression of the text.
    Lenient,
    /// A box or a final-answer phrase.
    Strict,
    /// A box, or else the last number of the text; either way a plain number, without arithmetic left to do.
    Number,
}

/// How far an answer must be worked out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As far as the reference: no arithmetic left between explicit numbers, and no function of explicit numbers that
    /// the reference does not have. `37 + 58` is no answer to `What is 37 + 58?`.
    Evaluated,
    /// Not at all: whatever has the value of the reference is correct, the rule of the PACS paper.
    Any,
}

/// What makes an answer correct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Where it may stand.
    pub mode: Mode,
    /// How far it must be worked out.
    pub form: Form,
}

impl From<Mode> for Rules {
    /// Answers of any form.
    fn from(mode: Mode) -> Self {
        Self { mode, form: Form::Any }
    }
}

/// Most steps of one grading: reading either side, comparing them and looking at their form have a budget each.
pub const MAX_GRADE_STEPS: u32 = 4 * MAX_STEPS;

/// Grades a response against the reference answer.
///
/// Never panics; the work is bounded by the lengths and counts of `limits`. A response that is too long or too deep to
/// be judged is [`Outcome::Unparsable`] and not [`Outcome::Failed`]: a failed verification is not trained on, and no
/// policy should find that way out.
#[must_use]
pub fn grade(response: &str, gold: &str, rules: impl Into<Rules>) -> Verdict {
    grade_counted(response, gold, rules).0
}

/// Grades as [`grade`] does, and says how many steps it took: at most [`MAX_GRADE_STEPS`], whatever the strings are.
#[must_use]
pub fn grade_counted(response: &str, gold: &str, rules: impl Into<Rules>) -> (Verdict, u32) {
    // A budget each, so that no response can use up what the reference needs to be read.
    let mut budgets = [Budget::new(), Budget::new(), Budget::new(), Budget::new()];
    let verdict = grade_within(response, gold, rules.into(), &mut budgets);
    (verdict, budgets.iter().map(Budget::taken).sum())
}

fn grade_within(response: &str, gold: &str, rules: Rules, budgets: &mut [Budget; 4]) -> Verdict {
    let [for_gold, for_response, for_comparison, for_form] = budgets;
    let gold = match gold::read(gold, for_gold) {
        Ok(gold) => gold,
        Err(error) => return verdict(Outcome::Failed, None, error.to_string()),
    };
    // Extraction looks at every byte a few times.
    let _ = for_response.spend(response.len().min(MAX_RESPONSE_BYTES) / 64);
    let candidates = extract::candidates(response, rules.mode);
    let Some(first) = candidates.iter().find(|candidate| !candidate.trim().is_empty()) else {
        return verdict(Outcome::Unparsable, None, "no_answer".to_owned());
    };
    if first.len() > MAX_ANSWER_BYTES {
        return verdict(Outcome::Unparsable, None, "too_long".to_owned());
    }
    if rules.mode == Mode::Number && !extract::is_number(first) {
        return verdict(Outcome::Unparsable, Some(first.clone()), "not_a_number".to_owned());
    }
    let mut problem = None;
    let read = |candidate: &String| match Reading::new(candidate, for_response) {
        Ok(reading) => Some(reading),
        Err(error) => {
            problem.get_or_insert(error);
            None
        }
    };
    let Some(found) = candidates.iter().find_map(read) else {
        // Unreadable, but letter for letter the reference.
        let same = source_key(first) == gold.key;
        let outcome = if same { Outcome::Correct } else { Outcome::Unparsable };
        let why = problem.map_or_else(String::new, |problem| format!(": the answer {problem}"));
        return verdict(
            outcome,
            Some(first.clone()),
            if same { "text".to_owned() } else { format!("unreadable{why}") },
        );
    };
    let decision = gold.judge(&found, for_comparison);
    let why = |rule: &str| reason(rule, &gold, &found, &decision);
    let judgement = decision.judgement;
    if !judgement.equal && for_comparison.is_spent() {
        return verdict(Outcome::Unparsable, Some(found.source.clone()), why("too_complex"));
    }
    let rule = judgement.rule.name();
    if matches!(judgement.rule, Rule::Undecided | Rule::Unread) {
        return verdict(Outcome::Unparsable, Some(found.source.clone()), why(rule));
    }
    if judgement.equal && rules.form == Form::Evaluated && !is_evaluated(&gold, &found, for_form) {
        return verdict(Outcome::Unparsable, Some(found.source.clone()), why("unevaluated"));
    }
    let outcome = if judgement.equal { Outcome::Correct } else { Outcome::Wrong };
    verdict(outcome, Some(found.source.clone()), why(rule))
}

/// Whether an equal answer leaves no more to calculate than the reference.
fn is_evaluated(gold: &Reading, found: &Reading, budget: &mut Budget) -> bool {
    if gold.key == found.key {
        return true;
    }
    let [reference, work] = [gold, found].map(|side| Work::of(&side.raw, budget));
    work.is_within(reference) && !budget.is_spent()
}

/// The rule that decided, and how the reference and the answer were read.
fn reason(rule: &str, gold: &Reading, found: &Reading, decision: &Decision) -> String {
    let [gold, found] = match &decision.readings {
        Some(readings) => [&readings[0], &readings[1]],
        None => [&gold.settled.answer, &found.settled.answer],
    };
    format!("{rule}: {} | {}", reading(gold), reading(found))
}

fn verdict(outcome: Outcome, extracted: Option<String>, rule: String) -> Verdict {
    let label = if outcome == Outcome::Correct { 1.0 } else { 0.0 };
    Verdict { outcome, label, reward: label, extracted, rule }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeating_the_question_is_no_number() {
        let outcome = |response, mode| grade(response, "96", mode).outcome;
        assert_eq!(outcome("We add 56 + 40, first", Mode::Lenient), Outcome::Correct);
        assert_eq!(outcome("We add 56 + 40, first", Mode::Number), Outcome::Wrong);
        assert_eq!(outcome(r"\boxed{56 + 40}", Mode::Number), Outcome::Unparsable);
        assert_eq!(outcome(r"56 + 40 = \boxed{96}, not 97", Mode::Number), Outcome::Correct);
        assert_eq!(outcome("56 + 40 = 96.0", Mode::Number), Outcome::Correct);
        assert_eq!(outcome("no idea", Mode::Number), Outcome::Unparsable);
    }
}
