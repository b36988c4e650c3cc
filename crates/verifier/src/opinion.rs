use pacs_types::{Outcome, Verdict};
use serde::Deserialize;

use crate::fault::Fault;

/// Longest text of a verdict that is kept, in bytes: it is archived with every sample.
const MOST_TEXT: usize = 4096;

/// Largest reward, either way: sums of weighted rewards stay finite.
const MOST_REWARD: f64 = 1e6;

/// What a verifier of the user's own says, with what it may leave out.
#[derive(Debug, Deserialize)]
pub(crate) struct Opinion {
    pub(crate) outcome: Outcome,
    /// Without it 1 for a correct answer and 0 for others.
    pub(crate) label: Option<f64>,
    /// Without it the label.
    pub(crate) reward: Option<f64>,
    pub(crate) extracted: Option<String>,
    pub(crate) rule: Option<String>,
}

impl Opinion {
    /// The verdict; an opinion that makes none is a fault. `by` is the rule of those who name none.
    pub(crate) fn verdict(self, by: &str) -> Result<Verdict, Fault> {
        let Self { outcome, label, reward, extracted, rule } = self;
        let rule = rule.filter(|rule| !rule.is_empty());
        if !outcome.is_conclusive() {
            return Err(Fault::Reported(shorten(rule.unwrap_or_else(|| outcome.name().to_owned()))));
        }
        let garbage = |problem| Err(Fault::Garbage { problem });
        let label = label.unwrap_or(if outcome == Outcome::Correct { 1.0 } else { 0.0 });
        if !(0.0..=1.0).contains(&label) {
            return garbage(format!("label is {label}, expected 0 to 1"));
        }
        // The coordinator refuses them: the label is trained on, the outcome reported, and one of them would be a lie.
        match outcome {
            Outcome::Correct if label == 0.0 => return garbage("label is 0 for a correct answer".to_owned()),
            Outcome::Wrong | Outcome::Unparsable if label == 1.0 => {
                return garbage(format!("label is 1 for an answer that is {}", outcome.name()));
            }
            Outcome::Correct | Outcome::Wrong | Outcome::Unparsable | Outcome::Failed | Outcome::TimedOut => {}
        }
        let reward = reward.unwrap_or(label);
        if !(-MOST_REWARD..=MOST_REWARD).contains(&reward) {
            return garbage(format!("reward is {reward}, expected -{MOST_REWARD} to {MOST_REWARD}"));
        }
        let rule = shorten(rule.unwrap_or_else(|| by.to_owned()));
        Ok(Verdict { outcome, label, reward, extracted: extracted.map(shorten), rule })
    }
}

fn shorten(mut text: String) -> String {
    if text.len() > MOST_TEXT {
        text.truncate(text.floor_char_boundary(MOST_TEXT));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opinion(outcome: Outcome) -> Opinion {
        Opinion { outcome, label: None, reward: None, extracted: None, rule: None }
    }

    #[test]
    fn what_is_left_out_follows_from_the_outcome() {
        let verdict = |outcome| {
            let verdict = opinion(outcome).verdict("exec").expect("conclusive");
            (verdict.label, verdict.reward, verdict.rule)
        };
        assert_eq!(verdict(Outcome::Correct), (1.0, 1.0, "exec".into()));
        assert_eq!(verdict(Outcome::Wrong), (0.0, 0.0, "exec".into()));
        let partial = Opinion { label: Some(0.5), rule: Some("half".into()), ..opinion(Outcome::Wrong) };
        let verdict = partial.verdict("exec").expect("conclusive");
        assert_eq!((verdict.label, verdict.reward, verdict.rule.as_str()), (0.5, 0.5, "half"));
    }

    #[test]
    fn senseless_opinions_are_faults() {
        let fault = |opinion: Opinion| opinion.verdict("exec").expect_err("no verdict").to_string();
        assert!(fault(Opinion { label: Some(1.5), ..opinion(Outcome::Correct) }).contains("label is 1.5"));
        assert!(fault(Opinion { label: Some(f64::NAN), ..opinion(Outcome::Correct) }).contains("label is NaN"));
        assert!(fault(Opinion { label: Some(0.0), ..opinion(Outcome::Correct) }).contains("label is 0 for a correct"));
        assert!(fault(Opinion { label: Some(1.0), ..opinion(Outcome::Unparsable) }).contains("that is unparsable"));
        for reward in [f64::INFINITY, f64::NAN, -1e300] {
            let rewarded = Opinion { reward: Some(reward), ..opinion(Outcome::Wrong) };
            assert!(fault(rewarded).contains("expected -1000000 to 1000000"), "{reward}");
        }
        let failed = Opinion { rule: Some("no such test".into()), label: Some(1.0), ..opinion(Outcome::Failed) };
        assert_eq!(fault(failed), "the verifier failed: no such test");
        assert_eq!(fault(opinion(Outcome::TimedOut)), "the verifier failed: timed_out");
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let long = Opinion { extracted: Some("ä".repeat(5000)), ..opinion(Outcome::Wrong) };
        let extracted = long.verdict("exec").expect("conclusive").extracted.expect("kept");
        assert!(extracted.len() <= MOST_TEXT + '…'.len_utf8() && extracted.ends_with("ä…"));
    }
}
