//! One file an objective: what it is, where it comes from, its published settings.

mod grpo;
pub(crate) mod pacs;
mod ppo;
mod reinforce_pp;
mod remax;
mod rloo;

pub use grpo::{dapo, dr_grpo, grpo, gspo};
pub use pacs::{PacsStep, Sequence, pacs};
pub use ppo::ppo;
pub use reinforce_pp::{reinforce_pp, reinforce_pp_baseline};
pub use remax::remax;
pub use rloo::rloo;
