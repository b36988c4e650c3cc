//! One verdict of what all verifiers say.

use pacs_spec::RewardSpec;
use pacs_types::Verdict;

/// What a reward depends on besides the verifiers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer<'a> {
    pub(crate) text: &'a str,
    /// Tokens, the end token included.
    pub(crate) tokens: u32,
}

/// The verdict of a sample: outcome, label and rule of the verifier that gives the label, with the reward of the spec.
///
/// `rewards` holds weight and reward of each further verifier; overlong answers approach `max_tokens`.
pub(crate) fn combine(
    label: Verdict,
    rewards: impl IntoIterator<Item = (f64, f64)>,
    answer: Answer<'_>,
    spec: &RewardSpec,
    max_tokens: u32,
) -> Verdict {
    // The label stays as it is: it is the verifiable outcome, and shaping it would change what PACS is trained on.
    let mut reward = spec.weight * label.reward;
    reward += rewards.into_iter().map(|(weight, reward)| weight * reward).sum::<f64>();
    if spec.format_bonus != 0.0 && holds_in_order(answer.text, &spec.format_strings) {
        reward += spec.format_bonus;
    }
    reward -= spec.overlong_penalty * overlong(answer.tokens, max_tokens, spec.overlong_tokens);
    Verdict { reward, ..label }
}

/// Whether all `parts` occur in the text in this order.
fn holds_in_order(text: &str, parts: &[String]) -> bool {
    let mut rest = text;
    parts.iter().all(|part| match rest.split_once(part.as_str()) {
        Some((_, following)) => {
            rest = following;
            true
        }
        None => false,
    })
}

/// How far an answer has got into the last `buffer` tokens before the limit: 0 before them, 1 at the limit (the soft
/// overlong punishment of DAPO, arXiv 2503.14476, equation 13, with the sign turned round).
fn overlong(tokens: u32, limit: u32, buffer: u32) -> f64 {
    if buffer == 0 {
        return 0.0;
    }
    let start = limit.saturating_sub(buffer);
    (f64::from(tokens.saturating_sub(start)) / f64::from(buffer)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_types::Outcome;

    fn label(reward: f64) -> Verdict {
        Verdict { outcome: Outcome::Correct, label: 1.0, reward, extracted: Some("5".into()), rule: "number".into() }
    }

    fn reward(spec: &RewardSpec, rewards: &[(f64, f64)], text: &str, tokens: u32) -> f64 {
        let verdict = combine(label(1.0), rewards.iter().copied(), Answer { text, tokens }, spec, 100);
        assert_eq!(Verdict { reward: 1.0, ..verdict.clone() }, label(1.0), "only the reward changes");
        verdict.reward
    }

    #[test]
    fn by_default_the_reward_is_that_of_the_verifier() {
        assert_eq!(reward(&RewardSpec::default(), &[], "x", 100), 1.0);
    }

    #[test]
    fn weights_bonus_and_penalty_add_up() {
        let spec = RewardSpec {
            weight: 2.0,
            format_bonus: 0.25,
            format_strings: vec!["</think>".into(), r"\boxed{".into()],
            overlong_tokens: 20,
            overlong_penalty: 0.5,
            ..RewardSpec::default()
        };
        assert_eq!(reward(&spec, &[(0.5, 3.0), (-1.0, 0.5)], "no format", 10), 3.0);
        assert_eq!(reward(&spec, &[], r"so </think> \boxed{5}", 80), 2.25);
        assert_eq!(reward(&spec, &[], r"\boxed{5} </think>", 90), 1.75);
        assert_eq!(reward(&spec, &[], "cut off", 100), 1.5);
    }

    #[test]
    fn the_penalty_rises_over_the_buffer() {
        let table = [(79, 0.0), (80, 0.0), (81, 0.05), (90, 0.5), (99, 0.95), (100, 1.0), (1000, 1.0)];
        for (tokens, expected) in table {
            assert!((overlong(tokens, 100, 20) - expected).abs() < 1e-12, "{tokens} tokens");
        }
        assert_eq!((overlong(50, 100, 100), overlong(100, 100, 0)), (0.5, 0.0));
    }
}
