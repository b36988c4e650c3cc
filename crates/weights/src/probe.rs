//! The probe of a version: one sequence with the learner's log-probs under it.

use pacs_protocol::{HIGHEST_LOGPROB, LOWEST_LOGPROB, WireError, v1};
use pacs_types::WeightVersion;

/// A prompt and its answer, with the learner's log-probs of the answer under one version and under the version before.
///
/// A rollout engine that cannot hash the weights it computes with scores the same tokens, and is compared with both. The log-probs
/// are raw, as vLLM scores prompts: at temperature 1 and before top-k, top-p and min-p, whatever the job samples with.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    tokens: Vec<u32>,
    answer_from: usize,
    logprobs: Vec<f32>,
    previous_logprobs: Vec<f32>,
    previous: WeightVersion,
}

impl Probe {
    /// Longest probe (tokens of prompt and answer): scoring one costs a server no more than a short prompt.
    pub const MOST_TOKENS: usize = 1024;

    /// A probe of `tokens`, whose answer starts at `answer_from`. `logprobs` and `previous_logprobs` have one value for each answer token
    /// (nats): under the version that the probe belongs to, and under version `previous` of the same generation.
    ///
    /// # Errors
    /// When the sequence is too long or has no prompt or no answer, or the log-probs are not those of its answer's tokens.
    pub fn new(
        tokens: Vec<u32>,
        answer_from: usize,
        logprobs: Vec<f32>,
        previous_logprobs: Vec<f32>,
        previous: WeightVersion,
    ) -> Result<Self, WireError> {
        if tokens.len() > Self::MOST_TOKENS {
            let problem = format!("has {} values, {} at most", tokens.len(), Self::MOST_TOKENS);
            return Err(WireError { field: "weights.probe.tokens", problem });
        }
        // Nothing predicts the first token, so it is never scored.
        if answer_from == 0 || answer_from >= tokens.len() {
            let problem = format!("is {answer_from} of {} tokens", tokens.len());
            return Err(WireError { field: "weights.probe.answer_from", problem });
        }
        let answer = tokens.len() - answer_from;
        check("weights.probe.logprobs", &logprobs, answer)?;
        check("weights.probe.previous_logprobs", &previous_logprobs, answer)?;
        Ok(Self { tokens, answer_from, logprobs, previous_logprobs, previous })
    }

    /// Token ids of prompt and answer.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Number of prompt tokens, at least 1.
    #[must_use]
    pub fn answer_from(&self) -> usize {
        self.answer_from
    }

    /// Log-prob of each answer token under the version that the probe belongs to (nats).
    #[must_use]
    pub fn logprobs(&self) -> &[f32] {
        &self.logprobs
    }

    /// Log-prob of each answer token under version [`Self::previous`] (nats).
    #[must_use]
    pub fn previous_logprobs(&self) -> &[f32] {
        &self.previous_logprobs
    }

    /// The version before, of the same generation.
    #[must_use]
    pub fn previous(&self) -> WeightVersion {
        self.previous
    }
}

/// Refuses log-probs that an answer of `tokens` tokens cannot have. NaN is in no range.
fn check(field: &'static str, logprobs: &[f32], tokens: usize) -> Result<(), WireError> {
    if logprobs.len() != tokens {
        let problem = format!("has {} values for an answer of {tokens} tokens", logprobs.len());
        return Err(WireError { field, problem });
    }
    match logprobs.iter().find(|value| !(LOWEST_LOGPROB..=HIGHEST_LOGPROB).contains(*value)) {
        Some(bad) => {
            let problem = format!("holds {bad:e}, expected {LOWEST_LOGPROB} to {HIGHEST_LOGPROB}");
            Err(WireError { field, problem })
        }
        None => Ok(()),
    }
}

impl From<&Probe> for v1::Probe {
    fn from(probe: &Probe) -> Self {
        Self {
            tokens: probe.tokens.clone(),
            // At most `MOST_TOKENS`.
            answer_from: probe.answer_from as u32,
            logprobs: probe.logprobs.clone(),
            previous_logprobs: probe.previous_logprobs.clone(),
            previous_version: probe.previous.0,
        }
    }
}

impl TryFrom<&v1::Probe> for Probe {
    type Error = WireError;

    fn try_from(wire: &v1::Probe) -> Result<Self, WireError> {
        Self::new(
            wire.tokens.clone(),
            wire.answer_from as usize,
            wire.logprobs.clone(),
            wire.previous_logprobs.clone(),
            WeightVersion(wire.previous_version),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Announcement, Description, VersionId, WeightKind};

    fn announcement() -> Announcement {
        let probe = Probe::new(vec![5, 6, u32::MAX, 8], 2, vec![-1.5, 0.0], vec![-1.25, -0.5], WeightVersion(6));
        let description = Description::of(VersionId::new(2, 7), WeightKind::Float32, &[1; 8]);
        Announcement { description, address: String::new(), probe: Some(probe.expect("a probe").into()) }
    }

    #[test]
    fn a_probe_survives_the_wire() {
        let wire = v1::WeightsRef::from(&announcement());
        assert_eq!(Announcement::try_from(&wire), Ok(announcement()));
        let bare = Announcement { probe: None, ..announcement() };
        assert_eq!(Announcement::try_from(&v1::WeightsRef::from(&bare)), Ok(bare));
    }

    #[test]
    fn senseless_probes_are_refused_by_field() {
        let refused = |change: fn(&mut v1::Probe)| {
            let mut wire = v1::WeightsRef::from(&announcement());
            change(wire.probe.as_mut().expect("it has a probe"));
            let error = Announcement::try_from(&wire).expect_err("must be refused");
            error.field.strip_prefix("weights.probe.").expect("a field of the probe")
        };
        assert_eq!(refused(|wire| wire.tokens = vec![1; 1025]), "tokens");
        assert_eq!(refused(|wire| wire.tokens.clear()), "answer_from");
        assert_eq!(refused(|wire| wire.answer_from = 0), "answer_from");
        assert_eq!(refused(|wire| wire.answer_from = 4), "answer_from");
        assert_eq!(refused(|wire| wire.answer_from = u32::MAX), "answer_from");
        assert_eq!(refused(|wire| wire.answer_from = 3), "logprobs");
        assert_eq!(refused(|wire| wire.tokens.push(9)), "logprobs");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5, -501.0] {
            let mut wire = v1::Probe::from(&**announcement().probe.as_ref().expect("it has one"));
            wire.logprobs[1] = bad;
            assert_eq!(Probe::try_from(&wire).expect_err("must be refused").field, "weights.probe.logprobs", "{bad}");
        }
        assert_eq!(refused(|wire| wire.previous_logprobs[0] = f32::NAN), "previous_logprobs");
        assert_eq!(refused(|wire| wire.previous_logprobs.truncate(1)), "previous_logprobs");
        assert_eq!(refused(|wire| wire.previous_version = 7), "previous_version");
        let longest = Probe::new(vec![1; 1024], 1, vec![-1.0; 1023], vec![-1.0; 1023], WeightVersion(0));
        assert!(longest.is_ok());
    }
}
