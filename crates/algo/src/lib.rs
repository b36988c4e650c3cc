//! Objectives and the small arithmetic around them, as pure functions on slices: no tensors, no autograd, no I/O.
//!
//! The learner reduces each sequence to a few scalars, calls an objective with the scalars of the whole mini-batch,
//! and seeds its backward pass with the derivatives that come back. Start with [`pacs`].
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod auc;
mod balance;
mod config;
mod error;
mod estimator;
mod group;
mod pacs;
mod pass_at_k;
mod schedule;
mod weights;

pub use auc::auc;
pub use balance::balance;
pub use config::{LabelWeights, PacsConfig, RewardMethod, ScoreEstimator};
pub use error::ObjectiveError;
pub use pacs::{PacsStep, Sequence, pacs};
pub use pass_at_k::pass_at_k;
pub use schedule::warmup;
