use serde::{Deserialize, Serialize};

use crate::WeightVersion;

/// What a group is sampled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The samples are trained on.
    Train,
    /// The samples only measure the policy.
    Evaluate,
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token or a stop string was generated; the end token is part of the sample.
    Stop,
    /// The limit of new tokens was reached.
    Length,
}

/// Most bytes that one sample may take in a message: what cannot be divided bounds the size of all messages.
pub const MAX_SAMPLE_BYTES: usize = 12 << 20;

/// One generated answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Generated tokens, the end token included, never empty.
    pub tokens: Vec<u32>,
    /// Log-probability of each token under the temperature-scaled policy, before top-k, top-p and min-p, as the rollout
    /// engine computed it (nats). The learner computes the same, so this is what it is compared with.
    pub logprobs: Vec<f32>,
    /// Log-probability of each token under the distribution that it was drawn from, that is, after top-k, top-p and
    /// min-p (nats): above `logprobs` by the log of the share of probability that was cut off. Importance weights divide
    /// by this one. Empty when nothing was cut off: then it is `logprobs`.
    pub sampled_logprobs: Vec<f32>,
    /// Sum over the tokens of the entropy of the temperature-scaled policy, before top-k, top-p and min-p (nats).
    pub entropy_sum: f64,
    /// The answer as text, without special tokens: what the verifier reads.
    pub text: String,
    /// Why generation ended.
    pub finish: FinishReason,
    /// The oldest weights that generated any of it: what bounds its staleness.
    pub version: WeightVersion,
    /// Which weights generated which of its tokens, from the first token on. More than one span when the weights were
    /// replaced while it was being generated.
    pub spans: Vec<VersionSpan>,
    /// The experts of a mixture of experts that computed the tokens of the prompt and then those of the answer, without the last one,
    /// which nothing was computed of; laid out as `pacs_shape::RouteShape` says. Those of an answer's token are of the pass that drew
    /// the token after it. Empty where they are not recorded.
    pub routes: Vec<u8>,
}

/// Consecutive tokens of a sample that one version of the weights generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VersionSpan {
    /// Version of the weights that generated the span.
    pub version: WeightVersion,
    /// How many tokens, above 0.
    pub tokens: u32,
}

impl Sample {
    /// Log-probability of each token under the distribution that it was drawn from (nats).
    #[must_use]
    pub fn behaviour_logprobs(&self) -> &[f32] {
        if self.sampled_logprobs.is_empty() { &self.logprobs } else { &self.sampled_logprobs }
    }
}

/// How a verification ended. Only the first three say something about the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The answer equals the reference.
    Correct,
    /// The answer was read and differs from the reference.
    Wrong,
    /// No answer could be found or read in the sample: a wrong answer, counted apart.
    Unparsable,
    /// The verifier itself failed (an unreadable reference answer, a crash): inconclusive about the sample.
    Failed,
    /// The verifier ran out of time: inconclusive about the sample.
    TimedOut,
}

impl Outcome {
    /// Whether the outcome says something about the answer, so that it may be trained on.
    #[must_use]
    pub fn is_conclusive(self) -> bool {
        matches!(self, Self::Correct | Self::Wrong | Self::Unparsable)
    }

    /// Lower-case name, as in JSON output and the archive.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Correct => "correct",
            Self::Wrong => "wrong",
            Self::Unparsable => "unparsable",
            Self::Failed => "failed",
            Self::TimedOut => "timed_out",
        }
    }
}

/// What a verifier says of one sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// How the verification ended.
    pub outcome: Outcome,
    /// The verifiable outcome that PACS trains on, in `[0, 1]`; meaningful when the outcome is conclusive.
    pub label: f64,
    /// The reward that is reported (and that reward-based objectives train on).
    pub reward: f64,
    /// The answer that was found in the sample, as written there.
    pub extracted: Option<String>,
    /// The rule that decided, or what went wrong.
    pub rule: String,
}
