//! The clipped policy gradient: advantages, ratios, penalties, and how they add up.

mod advantage;
mod config;
pub(crate) mod importance;
mod loss;
mod normaliser;
mod returns;
mod surrogate;
mod value;
mod whitening;

pub use advantage::{StepBaseline, StepSummary, TokenAdvantages, group_advantages};
pub use config::*;
pub use normaliser::Normaliser;
pub(crate) use normaliser::mean;
pub use value::ValueOutcome;
