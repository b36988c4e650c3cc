//! The recorded answer, and checksums: what shows that a server computes with the weights it was given.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use pacs_types::Sample;
use pacs_weights::VersionId;
use ring::digest::{Context, SHA256};

/// Longest sequence that is recorded (tokens): scoring one costs a server no more than a short prompt.
const LONGEST: usize = 1024;
/// Tokens of an answer that make it worth recording.
const WORTH: usize = 8;

/// A prompt with an answer that some server has generated.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    /// Where the answer begins.
    pub(crate) answer_from: usize,
}

/// A sequence with its answer's log-probs under one version.
#[derive(Clone, Debug)]
pub(crate) struct Scored {
    pub(crate) sequence: Arc<Sequence>,
    pub(crate) version: VersionId,
    pub(crate) logprobs: Vec<f32>,
}

/// The newest recorded answer of all servers.
#[derive(Debug, Default)]
pub(crate) struct Recorded(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// To be scored at the next update.
    next: Option<Arc<Sequence>>,
    scored: Option<Scored>,
}

impl Recorded {
    /// Takes an answer for the next update, if none is there that is as good.
    pub(crate) fn offer(&self, prompt: &[u32], sample: &Sample) {
        let length = prompt.len() + sample.tokens.len();
        if length > LONGEST {
            return;
        }
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let has = inner.next.as_ref().map_or(0, |next| next.tokens.len() - next.answer_from);
        if has >= WORTH.min(sample.tokens.len()) && has > 0 {
            return;
        }
        let tokens = prompt.iter().chain(&sample.tokens).copied().collect();
        inner.next = Some(Arc::new(Sequence { tokens, answer_from: prompt.len() }));
    }

    /// What a server that serves the newest version so far scores before an update: the newest answer.
    pub(crate) fn wanted(&self) -> Option<Arc<Sequence>> {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.next.clone().or_else(|| inner.scored.as_ref().map(|scored| Arc::clone(&scored.sequence)))
    }

    /// The last scores, for a server that has none of its own.
    pub(crate) fn last(&self) -> Option<Scored> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).scored.clone()
    }

    /// Keeps the scores of a verified version, for servers that come later.
    pub(crate) fn keep(&self, scored: Scored) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.scored.as_ref().is_none_or(|kept| kept.version <= scored.version) {
            inner.next.take_if(|next| **next == *scored.sequence);
            inner.scored = Some(scored);
        }
    }
}

/// Mean absolute difference of two lists of log-probs (nats per token).
pub(crate) fn jump(before: &[f32], after: &[f32]) -> f64 {
    let differences = before.iter().zip(after).map(|(before, after)| f64::from((before - after).abs()));
    differences.sum::<f64>() / before.len().max(1) as f64
}

/// Checksums of a whole server: which tensors it has, and what they hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sums {
    /// Digest of the tensors' names: equal for servers that are divided alike.
    pub(crate) names: String,
    /// Digest of everything.
    pub(crate) content: String,
}

impl Sums {
    pub(crate) fn of(checksums: &BTreeMap<String, String>) -> Self {
        let (mut names, mut content) = (Context::new(&SHA256), Context::new(&SHA256));
        for (name, digest) in checksums {
            for part in [name.as_bytes(), b"\0"] {
                names.update(part);
                content.update(part);
            }
            content.update(digest.as_bytes());
            content.update(b"\0");
        }
        let digits = |context: Context| context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Self { names: digits(names), content: digits(content) }
    }
}

/// The newest checksums of servers that are divided alike, by the digest of their tensors' names.
#[derive(Debug, Default)]
pub(crate) struct FleetSums(Mutex<HashMap<String, (String, String)>>);

impl FleetSums {
    /// Compares a server's checksums for the version with `label` with those of others; false when they differ.
    pub(crate) fn agree(&self, label: &str, sums: &Sums) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(&sums.names) {
            Some((version, content)) if version == label => *content == sums.content,
            _ => {
                known.insert(sums.names.clone(), (label.to_owned(), sums.content.clone()));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pacs_types::{FinishReason, WeightVersion};

    use super::*;

    fn sample(tokens: usize) -> Sample {
        Sample {
            tokens: vec![1; tokens],
            logprobs: vec![-1.0; tokens],
            sampled_logprobs: Vec::new(),
            entropy_sum: 0.0,
            text: String::new(),
            finish: FinishReason::Stop,
            version: WeightVersion(0),
            spans: Vec::new(),
        }
    }

    #[test]
    fn an_answer_of_some_length_is_recorded() {
        let recorded = Recorded::default();
        recorded.offer(&[5; 2000], &sample(20));
        assert_eq!(recorded.wanted(), None, "too long");
        recorded.offer(&[5, 6], &sample(2));
        recorded.offer(&[7], &sample(30));
        recorded.offer(&[8], &sample(40));
        let wanted = recorded.wanted().expect("one is recorded");
        assert_eq!((wanted.tokens[0], wanted.answer_from), (7, 1), "the first that is long enough");
        let id = |version| VersionId::new(1, version);
        recorded.keep(Scored { sequence: wanted, version: id(4), logprobs: vec![-1.0; 30] });
        recorded.offer(&[9], &sample(9));
        assert_eq!(recorded.wanted().expect("a newer one").tokens[0], 9);
        let older = Arc::new(Sequence { tokens: vec![1], answer_from: 0 });
        recorded.keep(Scored { sequence: older, version: id(3), logprobs: vec![-1.0] });
        assert_eq!(recorded.last().expect("scores").version, id(4), "older scores say less");
    }

    #[test]
    fn a_jump_is_a_mean_over_tokens() {
        assert_eq!(jump(&[-1.0, -2.0], &[-1.5, -1.0]), 0.75);
        assert_eq!(jump(&[], &[]), 0.0);
    }

    #[test]
    fn servers_that_are_divided_alike_must_agree() {
        let sums = |content: &str| Sums { names: "n".into(), content: content.into() };
        let fleet = FleetSums::default();
        assert!(fleet.agree("v1", &sums("a")) && fleet.agree("v1", &sums("a")));
        assert!(!fleet.agree("v1", &sums("b")));
        assert!(fleet.agree("v2", &sums("b")));
        assert!(fleet.agree("v2", &Sums { names: "other".into(), content: "c".into() }));
        let of = |digest: &str| Sums::of(&[("w".to_owned(), digest.to_owned())].into());
        assert_eq!(of("1").names, of("2").names);
        assert_ne!(of("1").content, of("2").content);
    }
}
