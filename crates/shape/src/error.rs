use std::io;
use std::path::{Path, PathBuf};

/// Why the configuration of a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ShapeError {
    /// A file could not be read.
    #[error("read `{}`: {error}", path.display())]
    Io {
        /// Path of the file of the model folder.
        path: PathBuf,
        /// The operating system's answer.
        error: io::Error,
    },
    /// A JSON file does not parse or lacks a field.
    #[error("read `{}`: {detail}", path.display())]
    Config {
        /// Path of the file of the model folder.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// The configuration asks for something that is not computed here.
    #[error("`{}` asks for {feature}, which is not supported ({hint})", path.display())]
    Unsupported {
        /// Path of the file of the model folder.
        path: PathBuf,
        /// What it asks for.
        feature: String,
        /// What is supported.
        hint: &'static str,
    },
    /// The model cannot have the adapters that are asked for.
    #[error("adapters: {detail}")]
    Lora {
        /// What does not fit.
        detail: String,
    },
}

impl ShapeError {
    pub(crate) fn config(path: &Path, detail: impl Into<String>) -> Self {
        Self::Config { path: path.to_owned(), detail: detail.into() }
    }
}
