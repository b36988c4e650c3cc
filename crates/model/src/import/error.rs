use std::path::PathBuf;

use pacs_torch::tch::TchError;

use crate::ModelError;

/// Why a GGUF file cannot become a Hugging Face folder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// The file does not start like a GGUF file.
    #[error("`{}` is not a GGUF file", file.display())]
    NotGguf {
        /// Path of the GGUF file.
        file: PathBuf,
    },
    /// The file is damaged.
    #[error("`{}` is corrupt or truncated: {detail}; fetch it again", file.display())]
    Corrupt {
        /// Path of the GGUF file.
        file: PathBuf,
        /// What does not fit.
        detail: String,
    },
    /// The architecture is not one that can be imported.
    #[error("`{}` holds {feature}; {hint}", file.display())]
    UnsupportedArchitecture {
        /// Path of the GGUF file.
        file: PathBuf,
        /// What it holds.
        feature: String,
        /// What can be imported, or what to do instead.
        hint: &'static str,
    },
    /// A tensor is quantised in a way that cannot be read.
    #[error("`{}` is quantised in a way that is not supported ({detail}); try its Q8_0 or F16 variant", file.display())]
    UnsupportedQuantisation {
        /// Path of the GGUF file.
        file: PathBuf,
        /// The reader's words.
        detail: String,
    },
    /// The tokenizer is not a byte-level BPE whose splitting rule is known.
    #[error("`{}` has {feature}, which is not supported (supported are {supported})", file.display())]
    UnsupportedTokenizer {
        /// Path of the GGUF file.
        file: PathBuf,
        /// What it has.
        feature: String,
        /// What would be read.
        supported: &'static str,
    },
    /// A metadata entry is missing or of the wrong type.
    #[error("`{}`: metadata `{key}` {problem}", file.display())]
    Metadata {
        /// Path of the GGUF file.
        file: PathBuf,
        /// Key of the metadata entry.
        key: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A tensor is missing, left over, or of the wrong shape.
    #[error("`{}`: tensor `{tensor}` {problem}", file.display())]
    Tensor {
        /// Path of the GGUF file.
        file: PathBuf,
        /// Name in the GGUF file.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The folder cannot be written, or its configuration is refused.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(#[from] TchError),
}
