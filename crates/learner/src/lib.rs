//! The learner worker: owns the weights, computes the gradient of the objective, publishes every new version.
//!
//! [`run`] is the service; [`Trainer`] is training itself, over any [`pacs_collective::Collective`]; [`FineTuner`] is
//! supervised fine-tuning in one process. The objective is a
//! pure function in `pacs-algo`; what happens here is: forward every sequence, exchange the few numbers a sequence that
//! the objective asks for, evaluate it on every rank, backward each sequence with its own coefficients.
#![forbid(unsafe_code)]

mod around;
mod batch;
mod checkpoint;
mod critic;
mod external;
mod file;
mod gradient;
mod intake;
mod memory;
mod metrics;
mod network;
mod objective;
mod optimizer;
mod outcomes;
mod publish;
mod segment;
mod service;
mod settings;
mod sft;
mod state;
mod state_files;
mod thread;
mod trainer;
mod wire;
mod writer;

pub use batch::{BatchError, IndexEntry, SequenceTokens, TrainBatch};
pub use checkpoint::{Captured, CheckpointError, exported};
pub use external::{ExternalError, ExternalSettings};
pub use service::{LearnerError, LearnerOptions, run};
pub use settings::{LoraSettings, TrainerSettings};
pub use sft::{FineTuneLoss, FineTuneReport, FineTuner, FineTunerSettings, Text};
pub use thread::Backend;
pub use trainer::{StepReport, TrainError, Trainer};
