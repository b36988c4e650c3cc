//! One file per objective: its equation, its source, and its published settings.

mod cispo;
mod disco;
mod dppo;
mod grpo;
mod maxrl;
pub(crate) mod pacs;
mod ppo;
mod real;
mod reinforce_pp;
mod remax;
mod rloo;
pub(crate) mod scalar;
mod weighted_rloo;

pub use cispo::cispo;
pub use disco::{DiscoConfig, disco};
pub use dppo::dppo;
pub use grpo::{dapo, dr_grpo, grpo, gspo};
pub use maxrl::maxrl;
pub use pacs::{PacsStep, Sequence, pacs};
pub use ppo::ppo;
pub use real::{RealConfig, real};
pub use reinforce_pp::{reinforce_pp, reinforce_pp_baseline};
pub use remax::remax;
pub use rloo::rloo;
pub use scalar::ScalarStep;
pub use weighted_rloo::weighted_rloo;
