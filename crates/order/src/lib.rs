//! In which order training problems are drawn, and which draws are skipped: pure functions of a plan, a position and a
//! history.
//!
//! [`DrawOrder`] says which problem a draw is about, whatever was drawn before. A [`Curriculum`] says which draws are worth
//! a group of samples, by the [`History`] of their problems: retired ones are skipped, and those that teach little are drawn
//! less often. No clock, no state of a random number generator, no text of a problem.
#![forbid(unsafe_code)]

mod curriculum;
mod draw_order;
mod history;
mod train_order;

pub use curriculum::{Choice, Curriculum, Draw};
pub use draw_order::{DrawOrder, DrawPlan, SetShare};
pub use history::{Evidence, History, Seen};
pub use train_order::{Numbers, Stream, TrainOrder, permutation};
