use std::io;
use std::path::{Path, PathBuf};

use pacs_shape::ShapeError;
use pacs_torch::tch::TchError;

/// Why a model folder cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The configuration, or another JSON file of the folder, cannot be used.
    #[error(transparent)]
    Shape(#[from] ShapeError),
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
    /// The folder holds no safetensors weights.
    #[error(
        "no weights in `{}`: neither model.safetensors nor model.safetensors.index.json is there (PyTorch .bin files \
         are not read)", folder.display()
    )]
    NoWeights {
        /// The model folder that was searched.
        folder: PathBuf,
    },
    /// The index names a file that is not a plain file name.
    #[error("`{}` places tensor `{tensor}` in `{shard}`, which is outside the model folder", index.display())]
    ShardEscapes {
        /// The index file.
        index: PathBuf,
        /// Name of the tensor, as the file has it.
        tensor: String,
        /// The file name given for it.
        shard: String,
    },
    /// The header of a safetensors file is not one.
    #[error("`{}` is corrupt: {detail}; fetch or export it again", file.display())]
    Corrupt {
        /// Path of the safetensors file.
        file: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A file ends before a tensor does.
    #[error(
        "`{}` is truncated: tensor `{tensor}` ends at byte {needed}, the file at byte {found}; \
         fetch or export it again",
        file.display()
    )]
    Truncated {
        /// Path of the safetensors file.
        file: PathBuf,
        /// The first tensor that is not whole.
        tensor: String,
        /// Where the tensor ends.
        needed: u64,
        /// Where the file ends.
        found: u64,
    },
    /// Tensors that the architecture has are not in the files.
    #[error("`{}` lacks {}", place.display(), list(tensors))]
    Missing {
        /// The file or folder.
        place: PathBuf,
        /// Names of the missing tensors, as the architecture has them.
        tensors: Vec<String>,
    },
    /// A file holds a tensor that the architecture does not have (or that the index does not place there).
    #[error("`{}` holds tensor `{tensor}`, which {reason}", file.display())]
    Unexpected {
        /// Path of the safetensors file.
        file: PathBuf,
        /// Name of the tensor, as the file has it.
        tensor: String,
        /// Why it does not belong there.
        reason: &'static str,
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

    pub(crate) fn corrupt(file: &Path, detail: impl Into<String>) -> Self {
        Self::Corrupt { file: file.to_owned(), detail: detail.into() }
    }
}

fn list(tensors: &[String]) -> String {
    let shown: Vec<_> = tensors.iter().take(3).map(|name| format!("`{name}`")).collect();
    let noun = if tensors.len() == 1 { "tensor" } else { "tensors" };
    match tensors.len().saturating_sub(shown.len()) {
        0 => format!("{noun} {}", shown.join(", ")),
        more => format!("{noun} {} and {more} more", shown.join(", ")),
    }
}
