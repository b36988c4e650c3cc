use pacs_types::{NoiseKey, Sample};

/// How the samples of a group are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// Nucleus, above 0 to 1; 1 is off.
    pub top_p: f64,
    /// Most probable tokens kept; 0 is off.
    pub top_k: u32,
    /// Least probability relative to the most probable token, 0 to below 1; 0 is off.
    pub min_p: f64,
    /// Most tokens of an answer, at least 1.
    pub max_new_tokens: u32,
    /// Strings that end an answer, besides the model's end tokens; control tokens count as they are written.
    pub stop: Vec<String>,
}

impl SamplingOptions {
    /// Whether some tokens are never drawn, so that a token has two log-probs.
    #[must_use]
    pub fn cuts_off(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// One prompt and the samples that are wanted of it.
#[derive(Clone, Debug)]
pub struct GroupJob {
    /// The caller's name for the group; comes back with every sample.
    pub ticket: u64,
    /// Rendered prompt, not empty.
    pub prompt: Vec<u32>,
    /// Index and noise of each sample.
    pub samples: Vec<(u32, NoiseKey)>,
    /// How they are drawn.
    pub options: SamplingOptions,
    /// Whether samples record the experts that computed their tokens ([`Sample::routes`]).
    pub records_routes: bool,
}

/// A sample that is complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Ticket of its group.
    pub ticket: u64,
    /// Index within the group.
    pub index: u32,
    /// Tokens, log-probs, version spans and finish reason.
    pub sample: Sample,
}

/// What an engine says, in the order in which it happened.
#[derive(Debug)]
pub enum Output {
    /// A sample is complete.
    Finished(Box<Finished>),
    /// A sample cannot be generated, and nobody will submit it. The coordinator issues the group again when its time is over
    /// (`groups.timeout_seconds`).
    GivenUp {
        /// Ticket of its group.
        ticket: u64,
        /// Index within the group.
        index: u32,
        /// What was tried and failed.
        reason: String,
    },
    /// The engine failed and is gone.
    Failed(String),
    /// What the engine was given cannot be used, by no process of this job.
    Refused(String),
}
