//! The learner worker: owns the weights, computes the gradient of the objective, publishes every new version.
//!
//! [`run`] is the service; [`Trainer`] is training itself, over any [`pacs_collective::Collective`]; [`FineTuner`] is
//! supervised fine-tuning in one process. The objective is a
//! pure function in `pacs-algo`; what happens here is: forward every sequence, exchange the few numbers a sequence that
//! the objective asks for, evaluate it on every rank, backward each sequence with its own coefficients.
#![forbid(unsafe_code)]

mod checkpoint;
mod comm;
mod error;
mod process;
mod settings;
mod update;
mod weights;

pub use checkpoint::{Captured, exported};
pub use error::{BatchError, CheckpointError, ExternalError, TrainError};
pub use process::{Backend, LearnerError, LearnerOptions, run};
pub use settings::{ExternalSettings, LoraSettings, TrainerSettings};
pub use update::{
    FineTuneLoss, FineTuneReport, FineTuner, FineTunerSettings, IndexEntry, SampleSignal, SequenceTokens, StepReport,
    Text, TrainBatch, Trainer,
};
