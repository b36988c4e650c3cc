//! The job spec: what a job may say, and the only door through which it comes in.
//!
//! [`parse`] and [`read`] turn TOML into a [`JobSpec`] whose every value is within its documented bounds, or report
//! all problems at once ([`SpecErrors`]). Nothing here looks at the model, the data or any other file: whether the
//! things that a spec names exist is for those to say who open them. Start with [`JobSpec`]: the doc comment of a
//! field is its meaning, default and range.
#![forbid(unsafe_code)]

mod advice;
mod bounds;
mod code;
mod difference;
mod errors;
mod evaluation;
mod fields;
mod file_format;
mod flow;
mod generator;
mod hub;
mod init;
mod lines;
mod lora;
mod memory;
mod objective;
mod parse;
mod positions;
mod routes;
mod types;
mod verifier;
mod vllm;
mod weight;

pub use code::{CodeSpec, CodeStop, ExecSandboxSpec, SANDBOX_LAYERS};
pub use difference::{Difference, differences};
pub use errors::{Problem, SpecErrors};
pub use evaluation::{EvaluationPreset, EvaluationSet, EvaluationSetSpec};
pub use file_format::FileFormat;
pub use flow::{AsynchronySpec, GroupsSpec, StalenessKind, UniformKind, WatchdogSpec};
pub use generator::{GeneratorPart, GeneratorSpec, GeneratorTask};
pub use hub::{HubData, HubKind, HubRepo, snapshot_of};
pub use init::init_template;
pub use lora::{LORA_LEARNING_RATE, LoraSpec};
pub use objective::{AggregationKind, ImportanceKind, ObjectiveKind, ObjectiveSpec};
pub use pacs_algo::Schedule;
pub use pacs_shape::Sharding;
pub use parse::{parse, read};
pub use types::*;
pub use verifier::{
    ExecLimits, ExecSpec, Extraction, Form, JudgeKind, JudgeSpec, MathSpec, RewardSpec, RewardVerifierSpec,
    ServiceAddress, VerifierKind, VerifierSpec,
};
pub use vllm::{RolloutEngineKind, VllmServerSpec, VllmSpec, endpoint_authority};
pub use weight::StepWeight;
