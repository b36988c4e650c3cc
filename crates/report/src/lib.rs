//! Statistics and figures of evaluations and studies: pure functions of numbers, text out.
//!
//! [`pass_curve`] and [`majority`] estimate what `k` answers to a problem achieve, from `n` of them. A [`Bootstrap`]
//! gives the confidence interval of a mean over problems, and [`Bootstrap::paired`] compares two models on the same
//! problems. [`student`] and [`sign_flip`] serve the few seeds of a study, for which resampling gives intervals that
//! are too narrow. A [`Plot`] is an SVG file without scripts or embedded fonts, a [`Table`] a Markdown table.
//!
//! Nothing here reads a file, a clock or an entropy source: the same numbers and seed give the same bytes.
#![forbid(unsafe_code)]

mod bootstrap;
mod majority;
mod measured;
mod pass_at_k;
mod plot;
mod seeds;
mod table;

pub use bootstrap::{Bootstrap, Difference, Interval};
pub use majority::{Votes, majority};
pub use measured::{MEASURED_PROBLEMS, MeasuredProblem};
pub use pass_at_k::{pass_at, pass_curve, powers_of_two};
pub use plot::{Plot, Point, Scale, Series, swatch};
pub use seeds::{sign_flip, student};
pub use table::Table;
