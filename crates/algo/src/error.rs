use thiserror::Error;

use crate::ScoreEstimator;

/// Why an objective refused its input. `index` is the position in the slice that the caller passed.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum ObjectiveError {
    /// The mini-batch is empty, so there is nothing to average over.
    #[error("the objective was given no sequences; skip the update instead")]
    NoSequences,
    /// `beta`, the scale of the reward proxy, is not a positive number.
    #[error("beta is {beta}; it must be a finite number above 0")]
    Beta {
        /// The configured value.
        beta: f64,
    },
    /// A setting is out of bounds.
    #[error("{name} is {value}; expected {expected}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// The configured value.
        value: f64,
        /// The allowed values, as text.
        expected: &'static str,
    },
    /// An answer has no tokens, so it has neither a log-prob nor a gradient.
    #[error("sequence {index} of group {group} has no answer tokens; leave it out")]
    EmptyAnswer {
        /// Position of the sequence in the input.
        index: usize,
        /// Group of the sequence.
        group: u64,
    },
    /// A label is no probability; outside `[0, 1]` the cross entropy has no lower bound.
    #[error("sequence {index} of group {group} has label {label}; labels lie in [0, 1]")]
    Label {
        /// Position of the sequence in the input.
        index: usize,
        /// Group of the sequence.
        group: u64,
        /// The label that was given.
        label: f64,
    },
    /// A reward is infinite or NaN.
    #[error("sequence {index} of group {group} has reward {reward}; it must be finite")]
    Reward {
        /// Position of the sequence in the input.
        index: usize,
        /// Group of the sequence.
        group: u64,
        /// The reward that was given.
        reward: f64,
    },
    /// The reward of the greedy answer, ReMax's baseline, is missing or not finite.
    #[error("sequence {index} of group {group} has no finite reward of the greedy answer to its prompt")]
    GreedyReward {
        /// Position of the sequence in the input.
        index: usize,
        /// Group of the sequence.
        group: u64,
    },
    /// A log-prob sum is infinite or NaN.
    #[error("sequence {index} of group {group} has log-prob sums {new} (new) and {old} (old); both must be finite")]
    LogprobSum {
        /// Position of the sequence in the input.
        index: usize,
        /// Group of the sequence.
        group: u64,
        /// Sum under the policy being trained.
        new: f64,
        /// Sum under the reference policy.
        old: f64,
    },
    /// Per-token numbers that the objective reads are missing, or their count is not that of the tokens.
    #[error("sequence {index} of group {group} has {values} {what} for {tokens} tokens")]
    Tokens {
        /// Position of the sequence in the input.
        index: usize,
        /// Group of the sequence.
        group: u64,
        /// Name of the numbers.
        what: &'static str,
        /// Tokens of the sequence.
        tokens: usize,
        /// Count of numbers that were given.
        values: usize,
    },
    /// A per-token number is infinite or NaN.
    #[error("sequence {index} of group {group}: the {what} hold {value} at token {token}; all must be finite")]
    NotFinite {
        /// Position of the sequence in the input.
        index: usize,
        /// Group of the sequence.
        group: u64,
        /// Name of the numbers.
        what: &'static str,
        /// Position of the token in the answer.
        token: usize,
        /// The offending value.
        value: f64,
    },
    /// A group is too small for an estimator that compares its samples.
    #[error("group {group} has {size} sequences; the {estimator:?} score needs {}", estimator.min_group_size())]
    GroupTooSmall {
        /// Id of the group.
        group: u64,
        /// Number of its sequences in the input.
        size: usize,
        /// The configured estimator.
        estimator: ScoreEstimator,
    },
    /// A group has one sequence, and the objective compares samples of a group.
    #[error("group {group} has one sequence; this objective compares the samples of a prompt, which takes 2 or more")]
    LonelySample {
        /// Id of the group.
        group: u64,
    },
    /// The objective is an external program, whose reply was not passed in.
    #[error("the objective is a program; its answer has to be passed in")]
    NoProgram,
    /// An external program's reply has the wrong length.
    #[error("{values} {what} were given for {answers} answers")]
    Answers {
        /// `losses` or `coefficients`.
        what: &'static str,
        /// Number of values in the reply.
        values: usize,
        /// Number of answers that were asked about.
        answers: usize,
    },
    /// Whitening divides by the standard deviation over all tokens, which needs two tokens.
    #[error("advantages are divided by their deviation over all tokens, which takes 2 tokens that count or more")]
    TooFewTokens,
    /// The inputs are finite but so large that the arithmetic overflowed.
    #[error(
        "the objective overflowed at sequence {index} of group {group}: a log-ratio, a reward or a setting is too large"
    )]
    Overflow {
        /// Position of the first sequence that overflowed.
        index: usize,
        /// Group of the sequence.
        group: u64,
    },
}
