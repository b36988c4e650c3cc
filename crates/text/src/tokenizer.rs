mod growth;

use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};

/// Text to token ids and back, by a model folder's `tokenizer.json`.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
}

/// A tokenizer that cannot be read or used.
#[derive(Debug, thiserror::Error)]
#[error("{doing} with tokenizer `{}`: {message}", path.display())]
pub struct TokenizerError {
    /// The tokenizer's file.
    pub path: PathBuf,
    doing: &'static str,
    message: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in the folder `dir`.
    ///
    /// Truncation and padding that the file may ask for are switched off: a prompt is never shortened in silence.
    ///
    /// # Errors
    /// When the file is not there or is no tokenizer.
    pub fn read(dir: &Path) -> Result<Self, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let error = |message: String| TokenizerError { path: path.clone(), doing: "start", message };
        let bytes = std::fs::read(&path).map_err(|e| error(e.to_string()))?;
        growth::check(&bytes).map_err(error)?;
        let parsed = contained(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(error)?;
        let mut inner = parsed.map_err(|e| error(e.to_string()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| error(e.to_string()))?;
        Ok(Self { inner, path })
    }

    /// Token ids of `text`; with `add_special` also those that the tokenizer puts around every text (a begin token).
    ///
    /// Special tokens that stand in the text as such, as chat templates write them, become their ids either way.
    ///
    /// # Errors
    /// When the tokenizer has no token for a part of the text and none for unknown ones.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let failed = |message| self.error("encode text", message);
        let encoding = contained(|| self.inner.encode_fast(text, add_special)).map_err(failed)?;
        let encoding = encoding.map_err(|e| self.error("encode text", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of token ids; with `skip_special` without the special tokens among them. Ids that the tokenizer does not
    /// have (models often have more) give no text.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let failed = |message| self.error("decode tokens", message);
        let decoded = contained(|| self.inner.decode(ids, skip_special)).map_err(failed)?;
        decoded.map_err(|e| self.error("decode tokens", e))
    }

    /// The id of a token, given as it is written in the vocabulary (`<|im_end|>`).
    #[must_use]
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// How many tokens there are, added ones included.
    #[must_use]
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    fn error(&self, doing: &'static str, error: impl fmt::Display) -> TokenizerError {
        TokenizerError { path: self.path.clone(), doing, message: error.to_string() }
    }
}

/// Calls the tokenizer's library, which panics at some files that are no tokenizers: whoever gave us the file may not end the
/// process with it.
fn contained<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    panic::catch_unwind(AssertUnwindSafe(call)).map_err(|_| "its parts do not fit together".to_owned())
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let missing = Tokenizer::read(dir.path()).expect_err("nothing is there").to_string();
        assert!(missing.contains("tokenizer.json") && missing.contains("No such file"), "{missing}");
        std::fs::write(dir.path().join("tokenizer.json"), "{\"version\": ").expect("written");
        let broken = Tokenizer::read(dir.path()).expect_err("that is no tokenizer").to_string();
        assert!(broken.contains("tokenizer.json"), "{broken}");
    }
}
