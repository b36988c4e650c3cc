//! Problems to train on and to evaluate with: read from files or generated, turned into prompts, counted, and put into
//! an order that can be resumed.
//!
//! [`load`] does all of it and says in a [`LoadReport`] what it left out; [`Problems::train_at`] is the data cursor.
//! [`check`] uses nothing and names all that is wrong, row by row. [`read_prompts`] reads prompts without answers, for
//! generation outside a job.
//! Nothing here samples or grades. Questions are never shortened: a prompt that is too long is left out and counted.
#![forbid(unsafe_code)]

mod check;
mod demonstrations;
mod error;
mod load;
mod problem;
mod prompt;
mod prompt_rows;
mod report;
mod source;

pub use check::{DataCheck, Findings, PromptLengths, Solution, SourceCheck, check};
pub use demonstrations::{Demonstration, demonstrations};
pub use error::DataError;
pub use load::{GoldCheck, gold_check, load, load_on, load_with};
/// The order of one set, for those who walk through it alone.
pub use pacs_order::TrainOrder;
/// The date of templates that write one; see [`load_on`].
pub use pacs_text::Day;
pub use problem::{MeasuredSet, Problem, Problems};
pub use prompt::{Prompt, Prompter};
pub use prompt_rows::{PromptRow, read_prompts};
pub use report::{Ends, LoadReport, SourceReport};
pub use source::text::open as open_text;
pub use source::value::exact_text;
pub use source::{count_rows, is_there};
