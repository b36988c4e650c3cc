//! What a rollout engine promises, and all that its worker does with a coordinator.
//!
//! [`RolloutEngine`] is the seam: leased groups go in, finished samples with tokens, log-probs and version spans come out of
//! a channel of [`Output`]. [`serve`] leases groups, follows published weights and submits samples for any engine. What is
//! not here: how samples are generated (`rollout` with libtorch, `vllm` over HTTP).
#![forbid(unsafe_code)]

mod error;
mod follow;
mod job;
mod leases;
mod seam;
mod serve;
mod submit;

pub use error::{RolloutError, ServeError};
pub use follow::{Following, HostWeights};
pub use job::{Finished, GroupJob, Output, SamplingOptions};
pub use seam::{EngineGone, NotPrepared, RolloutEngine};
pub use serve::{LeaseTerms, serve};

use std::time::Duration;

/// How long any call may take beyond its own waiting time.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(20);
