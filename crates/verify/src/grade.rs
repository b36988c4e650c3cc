//! Grading: from a reference and a response to a verdict.

use pacs_types::{Outcome, Verdict};

use crate::compare::Rule;
use crate::extract;
use crate::form::Work;
use crate::gold;
use crate::limits::{Budget, MAX_ANSWER_BYTES, MAX_RESPONSE_BYTES, MAX_STEPS};
use crate::reading::{Decision, Reading, source_key};
use crate::render::reading;

/// Where the final answer of a response is searched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A box, a final-answer phrase, or else the last expression.
    Lenient,
    /// A box or a final-answer phrase.
    Strict,
    /// A box, or else the last number; in either case a plain number without arithmetic.
    Number,
}

/// How far an answer has to be worked out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As far as the reference: no arithmetic between explicit numbers, and no functions of explicit numbers that the
    /// reference does not have. `37 + 58` does not answer `What is 37 + 58?`.
    Evaluated,
    /// Not at all: any answer with the value of the reference is correct, as in the PACS paper.
    Any,
}

/// Rules by which an answer counts as correct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Where the answer is searched.
    pub mode: Mode,
    /// How far the answer has to be worked out.
    pub form: Form,
}

impl From<Mode> for Rules {
    /// Accepts answers of any form.
    fn from(mode: Mode) -> Self {
        Self { mode, form: Form::Any }
    }
}

/// Most steps of one grading; reading each side, comparing, and checking the form have a budget each.
pub const MAX_GRADE_STEPS: u32 = 4 * MAX_STEPS;

/// Grades a response against the reference answer, and explains the verdict.
///
/// Never panics; the lengths and counts of `limits` bound the work. A response too long or too deep to judge is
/// [`Outcome::Unparsable`] and not [`Outcome::Failed`]: failed verifications are not trained on, and a policy must not
/// learn to escape that way.
///
/// ```
/// use pacs_types::Outcome;
/// use pacs_verify::{Mode, grade};
///
/// let verdict = grade(r"Half of it, so $\boxed{\frac{1}{2}}$.", "0.5", Mode::Strict);
/// assert_eq!((verdict.outcome, verdict.label), (Outcome::Correct, 1.0));
/// assert_eq!(grade("I do not know.", "0.5", Mode::Strict).outcome, Outcome::Unparsable);
/// // A reference that cannot be read says nothing about the answer.
/// assert_eq!(grade(r"\boxed{5}", "(1, 2", Mode::Strict).outcome, Outcome::Failed);
/// ```
#[must_use]
pub fn grade(response: &str, gold: &str, rules: impl Into<Rules>) -> Verdict {
    grade_counted(response, gold, rules).0
}

/// Grades like [`grade`], and also returns the number of steps, at most [`MAX_GRADE_STEPS`].
#[must_use]
pub fn grade_counted(response: &str, gold: &str, rules: impl Into<Rules>) -> (Verdict, u32) {
    // Separate budgets, so that a response cannot use up what the reference needs to be read.
    let mut budgets = [Budget::new(), Budget::new(), Budget::new(), Budget::new()];
    let verdict = grade_within(response, gold, rules.into(), &mut budgets);
    (verdict, budgets.iter().map(Budget::taken).sum())
}

fn grade_within(response: &str, gold: &str, rules: Rules, budgets: &mut [Budget; 4]) -> Verdict {
    let [for_gold, for_response, for_comparison, for_form] = budgets;
    // The reference first, so that a bad row fails whatever the sample says, instead of some samples being judged wrong.
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
        // Unreadable, but identical to the reference.
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
    // Counted apart from wrong answers, because the comparison did not come to an end.
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

/// Describes the rule that decided, and how both sides were read.
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
