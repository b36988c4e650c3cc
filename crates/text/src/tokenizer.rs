mod growth;

use std::fmt;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Text to token ids and back, by a model folder's `tokenizer.json`.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same that spells control tokens out; made when a text holds some.
    spelling: Arc<OnceLock<tokenizers::Tokenizer>>,
    /// Control tokens, the longest first, so that one which begins like another is found as itself.
    control: Arc<[(String, u32)]>,
    /// Bytes that one of them begins with: most texts hold few of these.
    control_begins: Arc<[bool; 256]>,
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
        let mut bytes = std::fs::read(&path).map_err(|e| error(e.to_string()))?;
        if bytes.starts_with(b"\xef\xbb\xbf") {
            bytes.drain(..3);
        }
        if bytes.starts_with(b"version https://git-lfs.github.com/") {
            return Err(error(
                "it is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`".to_owned(),
            ));
        }
        growth::check(&bytes).map_err(error)?;
        let parsed = contained(|| tokenizers::Tokenizer::from_bytes(bytes)).map_err(error)?;
        let mut inner = parsed.map_err(|e| error(e.to_string()))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| error(e.to_string()))?;
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special && !token.content.is_empty());
        let mut control: Vec<(String, u32)> = special.map(|(id, token)| (token.content.clone(), *id)).collect();
        control.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.cmp(b)));
        let mut control_begins = [false; 256];
        control.iter().for_each(|(token, _)| control_begins[usize::from(token.as_bytes()[0])] = true);
        let control = control.into();
        let control_begins = Arc::new(control_begins);
        Ok(Self { inner, spelling: Arc::default(), control, control_begins, path })
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

    /// Token ids of `text` in which no part is a control token: what looks like one is spelt out.
    pub(crate) fn encode_spelt_out(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let spelling = self.spelling.get_or_init(|| {
            let mut spelling = self.inner.clone();
            spelling.set_encode_special_tokens(true);
            spelling
        });
        let failed = |message| self.error("encode text", message);
        let encoding = contained(|| spelling.encode_fast(text, false)).map_err(failed)?;
        let encoding = encoding.map_err(|e| self.error("encode text", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Where control tokens stand in a text.
    #[must_use]
    pub fn control_tokens(&self, text: &str) -> Vec<Range<usize>> {
        let mut places = Vec::new();
        let mut start = 0;
        while let Some(place) = self.next_control_token(text, start) {
            start = place.end;
            places.push(place);
        }
        places
    }

    /// The first at or after `start`, and of those that begin there the longest.
    fn next_control_token(&self, text: &str, start: usize) -> Option<Range<usize>> {
        let bytes = text.as_bytes();
        (start..bytes.len()).filter(|at| self.control_begins[usize::from(bytes[*at])]).find_map(|at| {
            let token = self.control.iter().find(|(token, _)| bytes[at..].starts_with(token.as_bytes()))?;
            Some(at..at + token.0.len())
        })
    }

    /// Whether a token is a control token, which [`Self::decode`] may leave out.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.control.iter().any(|(_, known)| *known == id)
    }

    /// The id of a token that was added to the vocabulary, as control tokens are; those of the vocabulary itself are written in
    /// letters of their own.
    #[must_use]
    pub fn added_token_id(&self, token: &str) -> Option<u32> {
        let id = self.inner.token_to_id(token)?;
        self.inner.get_added_tokens_decoder().contains_key(&id).then_some(id)
    }

    /// One more than the largest token id: rows that the embedding of a model must have.
    #[must_use]
    pub fn rows(&self) -> usize {
        let largest = self.inner.get_vocab(true).into_values().max();
        largest.map_or(0, |id| id as usize + 1)
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

/// Calls the tokenizer's library, which panics at some files that are no tokenizers: the file's author may not end the
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
