use serde::{Deserialize, Serialize};

/// File of a run folder with one [`MeasuredProblem`] per line.
pub const MEASURED_PROBLEMS: &str = "evaluation_problems.jsonl";

/// Result of one problem in one measurement; reports are made of these alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MeasuredProblem {
    /// Training steps of the measured policy.
    pub step: u64,
    /// Name of the evaluation set; `evaluation` for the one of `data.evaluation`.
    pub set: String,
    /// Position of the problem in its set, from 0.
    pub problem: u64,
    /// Digest of question and reference answer, which identifies a problem across sets and file names.
    pub key: String,
    /// Start of the question, for display.
    pub question: String,
    /// Start of the reference answer, for display.
    pub gold: String,
    /// Number of answers with a verdict.
    pub samples: u32,
    /// Number of right answers.
    pub right: u32,
    /// Number of answers cut off at the token limit.
    pub truncated: u32,
    /// Number of answers in which no result was found.
    pub unparsable: u32,
    /// Total tokens of the answers.
    pub tokens: u64,
    /// Distinct results, ordered by text: the text, how often it was found, and how often it was right.
    pub answers: Vec<(String, u32, u32)>,
}
