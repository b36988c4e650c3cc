//! The vocabulary of the trainer: identifiers and plain values that every other crate shares.
//!
//! No I/O, no tensors, no wire format (see `pacs-protocol` for that). Identifiers are distinct types on purpose: a
//! lease is never compared with a group, nor a weight version with a step.
#![forbid(unsafe_code)]

pub mod bits;
mod ids;
mod noise;
mod sample;

pub use ids::{
    EVALUATION_GROUPS, Generation, GroupId, LeaseId, Role, SampleId, WeightVersion, WorkerId, evaluation_problem,
};
pub use noise::{NoiseKey, mix};
pub use sample::{FinishReason, MAX_SAMPLE_BYTES, Outcome, Purpose, Sample, Verdict, VersionSpan};
