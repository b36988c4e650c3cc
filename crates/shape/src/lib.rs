//! What a model is, without its numbers: its configuration, its weight files by their headers, where its parameters lie in memory,
//! and how much memory and work training it takes.
//!
//! Nothing here computes or holds tensors, so the control plane plans a job with it and the learner lays its memory out
//! with it.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod architecture;
mod config;
mod end_tokens;
mod error;
mod flops;
#[cfg(test)]
#[path = "../../../tests/golden/models.rs"]
mod golden_models;
mod layout;
mod lora;
mod memory_plan;
mod routes;
mod sharding;
mod units;
mod weight_files;

pub use architecture::{
    Activation, Architecture, BlockNorms, Defaults, ExpertDefaults, HeadNorms, LayerRotation, Windows,
};
pub use config::{Experts, LayerKind, LongFactors, ModelConfig, RopeScaling, Rotary};
pub use end_tokens::EndToken;
pub use error::ShapeError;
pub use flops::{Flops, PassWork};
pub use layout::{
    Bucket, EMBEDDING, FINAL_NORM, LM_HEAD, LeafSpec, ParameterLayout, ParameterSpec, ROUTER, StackedPart,
    expert_parameter, layer_parameter,
};
pub use lora::{LinearModule, Lora};
pub use memory_plan::{HEAD_ROOM, MemoryPlan, ModelPlan, PassShape, StateCopy, TrainingSetup, WINDOWS, head_chunk};
pub use routes::RouteShape;
pub use sharding::{Division, Sharding};
pub use units::{unit_tokens, units};
pub use weight_files::{WEIGHTS_FILE, WEIGHTS_INDEX, WeightFile, WeightFileError, WeightFiles};
