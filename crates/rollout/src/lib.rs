//! The rollout worker: leases groups from the coordinator, generates their samples, hands them in one by one.
//!
//! [`run`] is the service; [`Engine`] is generation itself, without any service around it. What is not here: grading
//! (the verifier's) and deciding what is sampled (the coordinator's).
#![forbid(unsafe_code)]

mod cache;
mod engine;
mod follow;
mod graphs;
mod leases;
mod memory;
mod sampler;
mod schedule;
mod service;
mod submit;
mod thread;
mod weights;

pub use engine::{Engine, EngineCounts, EngineError, EngineOptions, Finished, GroupJob, SamplingOptions};
pub use memory::cache_tokens;
pub use schedule::BlockCounts;
pub use service::{RolloutError, RolloutOptions, run};
pub use weights::{Base, MappedWeights, WeightsError};
