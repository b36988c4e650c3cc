use thiserror::Error;

use crate::ScoreEstimator;

/// Why an objective refused its input. `index` is the position in the slice that was passed.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum ObjectiveError {
    /// There is nothing to average over.
    #[error("the objective was given no sequences; skip the update instead")]
    NoSequences,
    /// The scale of the proxy is not a positive number.
    #[error("beta is {beta}; it must be a finite number above 0")]
    Beta {
        /// The value that was configured.
        beta: f64,
    },
    /// A setting is out of its bounds.
    #[error("{name} is {value}; expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// The value that was configured.
        value: f64,
        /// What it may be.
        expected: &'static str,
    },
    /// An answer has no tokens, so it has neither a log-probability nor a gradient.
    #[error("sequence {index} of group {group} has no answer tokens; leave it out")]
    EmptyAnswer {
        /// Position of the sequence.
        index: usize,
        /// Its group.
        group: u64,
    },
    /// A label is not a probability: outside of `[0, 1]` the cross entropy has no lower bound.
    #[error("sequence {index} of group {group} has label {label}; labels lie in [0, 1]")]
    Label {
        /// Position of the sequence.
        index: usize,
        /// Its group.
        group: u64,
        /// The label that was given.
        label: f64,
    },
    /// A reward is infinite or not a number.
    #[error("sequence {index} of group {group} has reward {reward}; it must be finite")]
    Reward {
        /// Position of the sequence.
        index: usize,
        /// Its group.
        group: u64,
        /// The reward that was given.
        reward: f64,
    },
    /// ReMax compares with the greedy answer, and its reward is missing or not finite.
    #[error("sequence {index} of group {group} has no finite reward of the greedy answer to its prompt")]
    GreedyReward {
        /// Position of the sequence.
        index: usize,
        /// Its group.
        group: u64,
    },
    /// A sum of log-probabilities is infinite or not a number.
    #[error("sequence {index} of group {group} has log-prob sums {new} (new) and {old} (old); both must be finite")]
    LogprobSum {
        /// Position of the sequence.
        index: usize,
        /// Its group.
        group: u64,
        /// Sum under the policy being trained.
        new: f64,
        /// Sum under the reference policy.
        old: f64,
    },
    /// Numbers of tokens that the objective reads are missing, or are not one a token.
    #[error("sequence {index} of group {group} has {values} {what} for {tokens} tokens")]
    Tokens {
        /// Position of the sequence.
        index: usize,
        /// Its group.
        group: u64,
        /// Which numbers.
        what: &'static str,
        /// Tokens of the sequence.
        tokens: usize,
        /// How many numbers were given.
        values: usize,
    },
    /// A number of a token is infinite or not a number.
    #[error("sequence {index} of group {group}: the {what} hold {value} at token {token}; all must be finite")]
    NotFinite {
        /// Position of the sequence.
        index: usize,
        /// Its group.
        group: u64,
        /// Which numbers.
        what: &'static str,
        /// The token.
        token: usize,
        /// The number.
        value: f64,
    },
    /// The estimator compares a sample with the others of its group, and there are too few.
    #[error("group {group} has {size} sequences; the {estimator:?} score needs {}", estimator.min_group_size())]
    GroupTooSmall {
        /// The group.
        group: u64,
        /// How many of its sequences were passed.
        size: usize,
        /// The configured estimator.
        estimator: ScoreEstimator,
    },
    /// The objective compares a sample with the others of its group, and there are none.
    #[error("group {group} has one sequence; this objective compares the samples of a prompt, which takes 2 or more")]
    LonelySample {
        /// The group.
        group: u64,
    },
    /// The objective is a program of its own, and nothing was asked of it.
    #[error("the objective is a program; its answer has to be passed in")]
    NoProgram,
    /// A program has not answered for every answer.
    #[error("{values} {what} were given for {answers} answers")]
    Answers {
        /// Losses or coefficients.
        what: &'static str,
        /// How many were given.
        values: usize,
        /// How many answers there are.
        answers: usize,
    },
    /// Advantages are divided by their deviation over all tokens, and one token has none.
    #[error("advantages are divided by their deviation over all tokens, which takes 2 tokens that count or more")]
    TooFewTokens,
    /// The inputs are finite but so large that the arithmetic overflowed.
    #[error(
        "the objective overflowed at sequence {index} of group {group}: a log-ratio, a reward or a setting is too large"
    )]
    Overflow {
        /// Position of the first sequence that overflowed.
        index: usize,
        /// Its group.
        group: u64,
    },
}
