use serde::{Deserialize, Serialize};

/// File of a run folder with one [`MeasuredProblem`] a line.
pub const MEASURED_PROBLEMS: &str = "evaluation_problems.jsonl";

/// What came of one problem in one measurement: all that a report is made of.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MeasuredProblem {
    /// Training steps that the policy has seen.
    pub step: u64,
    /// Name of the set; `evaluation` for that of `data.evaluation`.
    pub set: String,
    /// Its position in the set, from 0.
    pub problem: u64,
    /// Digest of question and reference answer: two measurements of one problem agree in it, whatever their files are called.
    pub key: String,
    /// The beginning of the question.
    pub question: String,
    /// The beginning of the reference answer.
    pub gold: String,
    /// Answers that were judged.
    pub samples: u32,
    /// Those that were right.
    pub right: u32,
    /// Those that were cut off at the limit of tokens.
    pub truncated: u32,
    /// Those in which no answer could be read.
    pub unparsable: u32,
    /// Tokens of all of them.
    pub tokens: u64,
    /// What was found in them: text, how often, and how often it was right. Ordered by text.
    pub answers: Vec<(String, u32, u32)>,
}
