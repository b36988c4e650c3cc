//! Text in and out of a model: its tokenizer and its chat template, both read from the model's folder.
//!
//! Nothing here knows what a problem or an answer is. Start with [`Tokenizer`] and [`ChatTemplate`].
#![forbid(unsafe_code)]

mod as_text;
mod chat;
mod day;
mod json;
mod python;
mod stop;
mod tokenizer;

pub use as_text::{AsText, Written};
pub use chat::{ChatTemplate, Message, TemplateError};
pub use day::Day;
pub use stop::StopStrings;
pub use tokenizer::{Tokenizer, TokenizerError};
