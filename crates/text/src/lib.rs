//! Text in and out of a model: its tokenizer and its chat template, both read from the model's folder.
//!
//! Nothing here knows what a problem or an answer is. Start with [`Tokenizer`] and [`ChatTemplate`]. Programs that read model folders
//! call [`enter_renderer`] first, so that a chat template cannot take more than its share of memory and time.
#![forbid(unsafe_code)]

mod as_text;
mod chat;
mod day;
mod json;
mod python;
mod stop;
mod tokenizer;

pub use as_text::{AsText, Written};
pub use chat::{ChatTemplate, Message, TemplateError, enter_renderer, render_apart, serve_templates};
pub use day::Day;
pub use stop::StopStrings;
pub use tokenizer::{Tokenizer, TokenizerError};
