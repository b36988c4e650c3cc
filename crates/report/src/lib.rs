//! Statistics and figures of evaluations and studies: pure functions of numbers, text out.
//!
//! [`pass_curve`] and [`majority`] estimate what `k` answers to a problem are worth from `n` of them. A [`Bootstrap`] says how sure a mean
//! over problems is, [`Bootstrap::paired`] compares two models on the same problems, and [`student`] and [`sign_flip`] serve the
//! handful of seeds of a study, for which resampling is too narrow. A [`Plot`] is an SVG file without scripts or embedded fonts, a
//! [`Table`] a Markdown table.
//!
//! Nothing here reads a file, a clock or an entropy source: the same numbers and the same seed give the same bytes.
#![forbid(unsafe_code)]

mod bootstrap;
mod majority;
mod pass;
mod plot;
mod seeds;
mod table;

pub use bootstrap::{Bootstrap, Difference, Interval};
pub use majority::{Votes, majority};
pub use pass::{pass_at, pass_curve, powers_of_two};
pub use plot::{Plot, Point, Scale, Series};
pub use seeds::{sign_flip, student};
pub use table::Table;
