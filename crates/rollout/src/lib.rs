//! The rollout worker: leases groups from the coordinator, generates their samples, hands them in one by one.
//!
//! [`run`] is the service; [`Engine`] is generation itself, without any service around it. What is not here: grading
//! (the verifier's) and deciding what is sampled (the coordinator's).
#![forbid(unsafe_code)]

mod cache;
mod engine;
mod sampler;
mod service;
mod stop;
mod thread;
mod weights;

pub use engine::{Engine, EngineError, EngineLimits, Finished, GroupJob, SamplingOptions};
pub use service::{RolloutError, RolloutOptions, run};
