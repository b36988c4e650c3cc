use std::path::PathBuf;

use pacs_shape::ShapeError;
use pacs_text::{TemplateError, TokenizerError};

use crate::SourceReport;

/// Problems that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The file cannot be read.
    #[error("read data file `{}`: {error}", path.display())]
    Read {
        /// Path of the data file, as the job spec names it.
        path: PathBuf,
        /// The error of the operating system.
        error: std::io::Error,
    },
    /// The file is none that can be used.
    #[error("read data file `{}`: {message}", path.display())]
    Format {
        /// Path of the data file, as the job spec names it.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// One row of the file is not a problem.
    #[error("read data file `{}`:{row}: {message}", path.display())]
    Row {
        /// Path of the data file, as the job spec names it.
        path: PathBuf,
        /// Line of a JSONL file, row of a Parquet file, from 1.
        row: usize,
        /// What is wrong with it.
        message: String,
    },
    /// The model's tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A file of the model folder cannot be used.
    #[error(transparent)]
    Model(#[from] ShapeError),
    /// Nothing ends an answer but its limit.
    #[error(
        "model `{}` names no token that ends an answer: every one would run to `rollout.max_new_tokens`; set `eos_token_id` in its \
         generation_config.json, or `rollout.stop` in the job", model.display()
    )]
    NoEnd {
        /// The model folder.
        model: PathBuf,
    },
    /// A prompt has a token that the model has not.
    #[error(
        "{place}: its prompt has the token {token}, and the embedding of the model has {rows} rows (`vocab_size` of config.json): the \
         tokenizer is that of another model, or tokens were added to it without resizing the model"
    )]
    BeyondEmbedding {
        /// Where the problem is from: `FILE:ROW`, or its place in a generator.
        place: String,
        /// Id of the token, which has no row in the embedding.
        token: u32,
        /// Rows of the embedding.
        rows: u32,
    },
    /// The longest answer takes all positions of the model.
    #[error(
        "`rollout.max_new_tokens` = {max_new_tokens} leaves no room for a prompt: model `{}` has {positions} positions",
        model.display()
    )]
    NoRoom {
        /// The model folder.
        model: PathBuf,
        /// `max_position_embeddings` of its config.json.
        positions: u64,
        /// `rollout.max_new_tokens` of the spec.
        max_new_tokens: u64,
    },
    /// Nothing is left to train on or to evaluate with.
    #[error("no problem is left in `{part}`: {report}")]
    Empty {
        /// `data.train` or `data.evaluation`.
        part: String,
        /// Where the rows went.
        report: Box<SourceReport>,
    },
}
