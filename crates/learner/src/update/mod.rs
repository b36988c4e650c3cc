//! A training step: from a batch to new weights.
//!
//! [`Trainer`] makes the updates of a step, [`FineTuner`] those of supervised fine-tuning. Both go through [`pass`], one forward and
//! backward of packed sequences.

mod batch;
mod critic;
mod external;
mod metrics;
mod mini_batch;
mod objective;
mod outcomes;
mod pass;
mod probe;
mod sft;
mod signals;
mod trainer;

pub use self::batch::{IndexEntry, SequenceTokens, Text, TrainBatch};
pub use self::sft::{FineTuneLoss, FineTuneReport, FineTuner, FineTunerSettings};
pub use self::signals::SampleSignal;
pub use self::trainer::{StepReport, Trainer};
