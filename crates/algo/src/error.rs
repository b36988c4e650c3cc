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
    /// The inputs are finite but so large that the arithmetic overflowed.
    #[error("the objective overflowed at sequence {index} of group {group}; beta or the log-prob sums are too large")]
    Overflow {
        /// Position of the first sequence that overflowed.
        index: usize,
        /// Its group.
        group: u64,
    },
}
