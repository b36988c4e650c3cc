//! In which order training problems are drawn, and which draws are skipped: pure functions of a plan, a position and a
//! history.
//!
//! [`DrawOrder`] maps a position to a problem, whatever was drawn before. A [`Curriculum`] decides by the [`History`]
//! of its problem whether a draw is worth a group of samples: retired problems are skipped, and those with little
//! contrast are drawn less often. There is no clock, no random generator with state, and no problem text here.
#![forbid(unsafe_code)]

mod curriculum;
mod draw_order;
mod history;
mod train_order;

pub use curriculum::{Choice, Curriculum, Draw};
pub use draw_order::{DrawOrder, DrawPlan, SetShare};
pub use history::{Evidence, History, Seen};
pub use train_order::{Numbers, Stream, TrainOrder, permutation};
