use pacs_types::{FinishReason, Outcome, Purpose, Role, Sample, Verdict, VersionSpan, WeightVersion};

use crate::v1;

/// A message that is well-formed protobuf but has an invalid value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field `{field}`: {problem}")]
pub struct WireError {
    /// Name of the field in the `.proto` file.
    pub field: &'static str,
    /// The value and what was expected.
    pub problem: String,
}

/// Lowest accepted log-probability of a token, in nats. A draw with 53 random bits reaches no token below -37, and
/// rounding in float32 none below -104. A lower one was not sampled, and the exponential of a few of them
/// overflows in importance weights.
pub const LOWEST_LOGPROB: f32 = -500.0;
/// Highest accepted log-probability: they are at most 0, but engines round.
pub const HIGHEST_LOGPROB: f32 = 0.01;
/// Largest absolute reward of a verdict: up to nine verifiers of up to 1e6 (see
/// docs/VERIFIERS.md), weighted by up to 1000.
pub const MOST_REWARD: f64 = 1e10;

impl WireError {
    /// Creates an error for a field, with the value found and the limit.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }

    fn unspecified(field: &'static str) -> Self {
        Self::new(field, "is not specified")
    }
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        Self::invalid_argument(error.to_string())
    }
}

macro_rules! enums {
    ($wire:ident, $domain:ident, $field:literal, $($variant:ident),+) => {
        impl From<$domain> for v1::$wire {
            fn from(value: $domain) -> Self {
                match value {
                    $($domain::$variant => Self::$variant),+
                }
            }
        }

        impl TryFrom<v1::$wire> for $domain {
            type Error = WireError;

            fn try_from(value: v1::$wire) -> Result<Self, WireError> {
                match value {
                    v1::$wire::Unspecified => Err(WireError::unspecified($field)),
                    $(v1::$wire::$variant => Ok(Self::$variant)),+
                }
            }
        }
    };
}

enums!(FinishReason, FinishReason, "finish", Stop, Length);
enums!(Outcome, Outcome, "outcome", Correct, Wrong, Unparsable, Failed, TimedOut);
enums!(Purpose, Purpose, "purpose", Train, Evaluate);
enums!(Role, Role, "role", Rollout, Learner, Verifier);

impl From<Sample> for v1::Sample {
    fn from(sample: Sample) -> Self {
        Self {
            tokens: sample.tokens,
            logprobs: sample.logprobs,
            entropy_sum: sample.entropy_sum,
            text: sample.text,
            finish: v1::FinishReason::from(sample.finish).into(),
            version: sample.version.0,
            sampled_logprobs: sample.sampled_logprobs,
            spans: sample.spans.into_iter().map(Into::into).collect(),
            routes: sample.routes.into(),
        }
    }
}

impl From<VersionSpan> for v1::VersionSpan {
    fn from(span: VersionSpan) -> Self {
        Self { version: span.version.0, tokens: span.tokens }
    }
}

impl TryFrom<v1::Sample> for Sample {
    type Error = WireError;

    fn try_from(wire: v1::Sample) -> Result<Self, WireError> {
        let finish = wire.finish().try_into()?;
        if wire.tokens.is_empty() {
            return Err(WireError::new("tokens", "is empty"));
        }
        if wire.tokens.len() != wire.logprobs.len() {
            let problem = format!("has {} values for {} tokens", wire.logprobs.len(), wire.tokens.len());
            return Err(WireError::new("logprobs", problem));
        }
        // At the door and not in the learner, where a NaN would have cost the whole batch.
        within_bounds("logprobs", &wire.logprobs)?;
        if !wire.sampled_logprobs.is_empty() && wire.tokens.len() != wire.sampled_logprobs.len() {
            let problem = format!("has {} values for {} tokens", wire.sampled_logprobs.len(), wire.tokens.len());
            return Err(WireError::new("sampled_logprobs", problem));
        }
        within_bounds("sampled_logprobs", &wire.sampled_logprobs)?;
        if !wire.entropy_sum.is_finite() {
            return Err(WireError::new("entropy_sum", format!("is {}", wire.entropy_sum)));
        }
        let spans = spans(&wire)?;
        Ok(Self {
            tokens: wire.tokens,
            logprobs: wire.logprobs,
            entropy_sum: wire.entropy_sum,
            text: wire.text,
            finish,
            version: WeightVersion(wire.version),
            sampled_logprobs: wire.sampled_logprobs,
            spans,
            // A copy: what was decoded is a part of the whole message.
            routes: wire.routes.to_vec(),
        })
    }
}

/// Refuses log-probabilities that no sampled token can have.
fn within_bounds(field: &'static str, logprobs: &[f32]) -> Result<(), WireError> {
    match logprobs.iter().find(|value| !(LOWEST_LOGPROB..=HIGHEST_LOGPROB).contains(*value)) {
        Some(bad) => {
            Err(WireError::new(field, format!("holds {bad:e}, expected {LOWEST_LOGPROB} to {HIGHEST_LOGPROB}")))
        }
        None => Ok(()),
    }
}

/// The spans of a sample. They must cover its tokens, and the oldest must have the version of the sample.
fn spans(wire: &v1::Sample) -> Result<Vec<VersionSpan>, WireError> {
    let tokens = wire.tokens.len();
    if wire.spans.is_empty() {
        let tokens = u32::try_from(tokens).map_err(|_| WireError::new("tokens", format!("has {tokens} values")))?;
        return Ok(vec![VersionSpan { version: WeightVersion(wire.version), tokens }]);
    }
    // In 64 bits: a hostile message may hold spans whose sum overflows 32.
    let covered: u64 = wire.spans.iter().map(|span| u64::from(span.tokens)).sum();
    if covered != tokens as u64 || wire.spans.iter().any(|span| span.tokens == 0) {
        return Err(WireError::new("spans", format!("cover {covered} of {tokens} tokens, or have an empty span")));
    }
    // Weights only ever get newer while a sample runs. The staleness bound relies on the first span being the oldest.
    if !wire.spans.is_sorted_by_key(|span| span.version) {
        return Err(WireError::new("spans", "go back to older weights"));
    }
    let oldest = wire.spans.iter().map(|span| span.version).min();
    if oldest != Some(wire.version) {
        return Err(WireError::new("version", format!("is {}, but the oldest span is {oldest:?}", wire.version)));
    }
    let span = |span: &v1::VersionSpan| VersionSpan { version: WeightVersion(span.version), tokens: span.tokens };
    Ok(wire.spans.iter().map(span).collect())
}

impl From<Verdict> for v1::Verdict {
    fn from(verdict: Verdict) -> Self {
        Self {
            outcome: v1::Outcome::from(verdict.outcome).into(),
            label: verdict.label,
            reward: verdict.reward,
            extracted: verdict.extracted,
            rule: verdict.rule,
        }
    }
}

impl TryFrom<v1::Verdict> for Verdict {
    type Error = WireError;

    fn try_from(wire: v1::Verdict) -> Result<Self, WireError> {
        let outcome = wire.outcome().try_into()?;
        if !(0.0..=1.0).contains(&wire.label) {
            return Err(WireError::new("label", format!("is {}, expected 0 to 1", wire.label)));
        }
        if !(-MOST_REWARD..=MOST_REWARD).contains(&wire.reward) {
            let problem = format!("is {:e}, expected -{MOST_REWARD:e} to {MOST_REWARD:e}", wire.reward);
            return Err(WireError::new("reward", problem));
        }
        // The label is trained on and the outcome is reported, so they must not contradict each other.
        match outcome {
            Outcome::Correct if wire.label == 0.0 => {
                return Err(WireError::new("label", "is 0 for a correct answer, expected above 0"));
            }
            Outcome::Wrong | Outcome::Unparsable if wire.label == 1.0 => {
                return Err(WireError::new(
                    "label",
                    format!("is 1 for one that is {}, expected below 1", outcome.name()),
                ));
            }
            Outcome::Correct | Outcome::Wrong | Outcome::Unparsable | Outcome::Failed | Outcome::TimedOut => {}
        }
        Ok(Self { outcome, label: wire.label, reward: wire.reward, extracted: wire.extracted, rule: wire.rule })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        Sample {
            tokens: vec![5, 7],
            logprobs: vec![-0.5, -1.0],
            sampled_logprobs: vec![-0.25, -0.75],
            entropy_sum: 2.5,
            text: "42".into(),
            finish: FinishReason::Stop,
            version: WeightVersion(3),
            spans: [3, 4].map(|version| VersionSpan { version: WeightVersion(version), tokens: 1 }).to_vec(),
            routes: vec![1, 0, 7, 2],
        }
    }

    #[test]
    fn a_sample_without_spans_is_of_one_version() {
        let wire = v1::Sample { spans: Vec::new(), ..sample().into() };
        let spans = Sample::try_from(wire).expect("well-formed").spans;
        assert_eq!(spans, [VersionSpan { version: WeightVersion(3), tokens: 2 }]);
    }

    #[test]
    fn sample_survives_the_wire() {
        assert_eq!(Sample::try_from(v1::Sample::from(sample())), Ok(sample()));
    }

    #[test]
    fn senseless_samples_are_refused_by_field() {
        let refused = |change: fn(&mut v1::Sample)| {
            let mut wire = v1::Sample::from(sample());
            change(&mut wire);
            Sample::try_from(wire).expect_err("must be refused").field
        };
        assert_eq!(refused(|s| s.finish = 0), "finish");
        assert_eq!(refused(|s| s.tokens.clear()), "tokens");
        assert_eq!(refused(|s| s.logprobs.truncate(1)), "logprobs");
        assert_eq!(refused(|s| s.logprobs[0] = f32::NAN), "logprobs");
        assert_eq!(refused(|s| s.sampled_logprobs.truncate(1)), "sampled_logprobs");
        assert_eq!(refused(|s| s.sampled_logprobs[1] = f32::INFINITY), "sampled_logprobs");
        assert_eq!(refused(|s| s.logprobs[0] = -3e38), "logprobs");
        assert_eq!(refused(|s| s.sampled_logprobs[0] = 3e38), "sampled_logprobs");
        assert_eq!(refused(|s| s.sampled_logprobs[0] = 0.1), "sampled_logprobs");
        assert_eq!(refused(|s| s.entropy_sum = f64::INFINITY), "entropy_sum");
        assert_eq!(refused(|s| (s.spans[0].version, s.spans[1].version) = (4, 3)), "spans");
        assert_eq!(refused(|s| s.spans[0].tokens = 2), "spans");
        assert_eq!(refused(|s| (s.spans[0].tokens, s.spans[1].tokens) = (0, 2)), "spans");
        assert_eq!(refused(|s| s.version = 4), "version");
    }

    #[test]
    fn labels_outside_zero_to_one_are_refused() {
        let verdict =
            Verdict { outcome: Outcome::Correct, label: 1.0, reward: 1.0, extracted: None, rule: "number".into() };
        assert_eq!(Verdict::try_from(v1::Verdict::from(verdict.clone())), Ok(verdict.clone()));
        let wire = v1::Verdict { label: 1.5, ..verdict.into() };
        assert_eq!(Verdict::try_from(wire).expect_err("must be refused").field, "label");
    }

    #[test]
    fn verdicts_that_contradict_themselves_are_refused_by_field() {
        use Outcome::{Correct, Failed, TimedOut, Unparsable, Wrong};
        let read = |outcome, label, reward| {
            let verdict = Verdict { outcome, label, reward, extracted: None, rule: String::new() };
            Verdict::try_from(v1::Verdict::from(verdict)).map_err(|error| error.field).err()
        };
        for (outcome, label, reward, refused) in [
            (Correct, 1.0, 1.0, None),
            (Correct, 0.2, -MOST_REWARD, None),
            (Correct, 0.0, 0.0, Some("label")),
            (Correct, -0.0, 0.0, Some("label")),
            (Wrong, 0.9, 0.0, None),
            (Wrong, 1.0, 0.0, Some("label")),
            (Unparsable, 1.0, 0.0, Some("label")),
            (Failed, 0.0, 0.0, None),
            (TimedOut, 1.0, 0.0, None),
            (Wrong, 0.0, 1e308, Some("reward")),
            (Wrong, 0.0, -1e308, Some("reward")),
            (Wrong, 0.0, f64::NAN, Some("reward")),
            (Wrong, f64::NAN, 0.0, Some("label")),
        ] {
            assert_eq!(read(outcome, label, reward), refused, "{outcome:?} {label} {reward}");
        }
    }
}
