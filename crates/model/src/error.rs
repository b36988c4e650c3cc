use std::io;
use std::path::{Path, PathBuf};

use pacs_shape::{ShapeError, WeightFileError};
use pacs_torch::tch::TchError;

/// Why a model folder cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The configuration, or another JSON file of the folder, cannot be used.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The weight files cannot be used, or do not hold the tensors of the architecture.
    #[error(transparent)]
    Weights(#[from] WeightFileError),
    /// The chat template cannot be used.
    #[error(transparent)]
    Template(#[from] pacs_text::TemplateError),
    /// A file could not be read, written, or renamed.
    #[error("{verb} `{}`: {source}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// Path of the file that could not be used.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor `{tensor}` in `{}` has shape {found:?}, config.json asks for {expected:?}", file.display())]
    WrongShape {
        /// Path of the safetensors file.
        file: PathBuf,
        /// Name of the tensor, as the file has it.
        tensor: String,
        /// Shape by the configuration.
        expected: Vec<i64>,
        /// Shape in the file.
        found: Vec<i64>,
    },
    /// A tensor's elements are of a kind that weights are not stored in.
    #[error("tensor `{tensor}` in `{}` has kind {found} (float32, float16 and bfloat16 are read)", file.display())]
    WrongKind {
        /// Path of the safetensors file.
        file: PathBuf,
        /// Name of the tensor, as the file has it.
        tensor: String,
        /// Kind in the file.
        found: String,
    },
    /// A tensor holds NaN or infinity.
    #[error("tensor `{tensor}` in `{}` holds values that are not finite; the file is corrupt", file.display())]
    NotFinite {
        /// Path of the safetensors file.
        file: PathBuf,
        /// Name of the tensor, as the file has it.
        tensor: String,
    },
    /// libtorch refused an operation, most likely for want of memory.
    #[error("libtorch: {0}")]
    Torch(#[from] TchError),
}

impl ModelError {
    pub(crate) fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { verb, path, source }
    }

    pub(crate) fn config(path: &Path, detail: impl Into<String>) -> Self {
        ShapeError::Config { path: path.to_owned(), detail: detail.into() }.into()
    }
}
