//! Text in and out of a model: its tokenizer and its chat template, both read from the model's folder.
//!
//! Nothing here knows what a problem or an answer is. Start with [`Tokenizer`] and [`ChatTemplate`].
#![forbid(unsafe_code)]

mod chat;
mod json;
mod tokenizer;

pub use chat::{ChatTemplate, Message, TemplateError};
pub use tokenizer::{Tokenizer, TokenizerError};
