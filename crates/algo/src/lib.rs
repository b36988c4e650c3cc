//! Objectives and their small arithmetic as pure functions on slices: no tensors, no autograd, no I/O.
//!
//! Start with [`Objective`]: log-probs, verdicts and settings in; the loss and the coefficient of every token out. The
//! learner multiplies the coefficients into its backward pass.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod auc;
mod balance;
mod config;
mod error;
mod estimator;
mod group;
mod kl;
mod metrics;
mod objective;
mod objectives;
mod policy;
mod schedule;
mod sequence;
mod weights;

pub use auc::auc;
pub use balance::balance;
pub use config::{LabelWeights, PacsConfig, RewardMethod, ScoreEstimator};
pub use error::ObjectiveError;
pub use kl::KlKind;
pub use metrics::ObjectiveMetrics;
pub use objective::{Contrasts, LogprobSums, Needs, Objective, ObjectiveStep, SequenceOutcome, UpdateState};
pub use objectives::*;
pub use policy::{
    AdvantageEstimator, Aggregation, Clip, Divergence, ImportanceLevel, ImportanceMode, ImportanceWeights, KlPenalty,
    KlPlace, Normaliser, PolicyConfig, RatioLevel, StepBaseline, StepSummary, Surrogate, TokenAdvantages, ValueConfig,
    ValueOutcome, group_advantages,
};
pub use schedule::{LearningRate, Schedule};
pub use sequence::{Answer, SequenceInfo, TokenData};
