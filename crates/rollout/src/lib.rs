//! The rollout worker with the project's own engine, on libtorch.
//!
//! [`run`] is the service; [`Engine`] is generation itself, without any service around it. What is not here: leasing groups and
//! submitting samples, which is the same for every engine (`engine`), grading (the verifier's) and deciding what is sampled (the
//! coordinator's).
#![forbid(unsafe_code)]

mod cache;
mod engine;
mod graphs;
mod memory;
mod native;
mod sampler;
mod schedule;
mod service;
mod thread;
mod weights;

pub use engine::{Engine, EngineCounts, EngineError, EngineOptions};
pub use memory::cache_tokens;
pub use pacs_engine::{Finished, GroupJob, RolloutError, SamplingOptions};
pub use schedule::BlockCounts;
pub use service::{RolloutOptions, run};
pub use weights::{Base, MappedWeights, WeightsError};
