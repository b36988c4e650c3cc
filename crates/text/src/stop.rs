use crate::{Tokenizer, TokenizerError};

/// Strings that end an answer, made ready for one tokenizer.
///
/// A string is looked for in the text with its special tokens, in the text without them, and as a token of its own. The text alone,
/// without special tokens, is what verifiers see, but a stop string often is such a token (`<|im_end|>`) or ends with one, and a
/// decoder may write spaces around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopStrings {
    strings: Vec<String>,
    /// Those of them that are one added token.
    tokens: Vec<u32>,
    longest: usize,
}

impl StopStrings {
    /// Makes `strings` ready.
    #[must_use]
    pub fn new(tokenizer: Option<&Tokenizer>, strings: &[String]) -> Self {
        let token = |text: &String| tokenizer?.added_token_id(text);
        Self {
            tokens: strings.iter().filter_map(token).collect(),
            longest: strings.iter().map(String::len).max().unwrap_or(0),
            strings: strings.to_vec(),
        }
    }

    /// Whether the newest token completed a stop string. Looks at the tail of the answer only, so that the cost of a step does not
    /// grow with the answer.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn ends(&self, tokenizer: &Tokenizer, tokens: &[u32]) -> Result<bool, TokenizerError> {
        if self.strings.is_empty() {
            return Ok(false);
        }
        if tokens.last().is_some_and(|token| self.tokens.contains(token)) {
            return Ok(true);
        }
        // A token is at least one byte of text, but special ones may decode to nothing: look a little further back.
        let tail = &tokens[tokens.len().saturating_sub(self.longest + 8)..];
        if self.place(&tokenizer.decode(tail, false)?).is_some() {
            return Ok(true);
        }
        let has_special = tail.iter().any(|token| tokenizer.is_special(*token));
        Ok(has_special && self.place(&tokenizer.decode(tail, true)?).is_some())
    }

    /// The text of an answer without its special tokens, up to the first stop string in it.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn text(&self, tokenizer: &Tokenizer, tokens: &[u32]) -> Result<String, TokenizerError> {
        let mut text = tokenizer.decode(tokens, true)?;
        if let Some(place) = self.place(&text) {
            text.truncate(place);
        }
        if let Some(before) = self.text_before_special(tokenizer, tokens)?
            && before.len() < text.len()
        {
            return Ok(before);
        }
        Ok(text)
    }

    /// The text before the first stop string, if one begins at or reaches into a special token.
    fn text_before_special(&self, tokenizer: &Tokenizer, tokens: &[u32]) -> Result<Option<String>, TokenizerError> {
        if self.strings.is_empty() {
            return Ok(None);
        }
        let as_token = tokens.iter().position(|token| self.tokens.contains(token));
        let whole = tokenizer.decode(tokens, false)?;
        let Some(place) = self.place(&whole) else {
            return as_token.map(|end| tokenizer.decode(&tokens[..end], true)).transpose();
        };
        // Tokens that lie before the stop string as a whole. It is what ended the answer, so they are most of it.
        let mut kept = as_token.unwrap_or(tokens.len());
        let mut written = tokenizer.decode(&tokens[..kept], false)?;
        while kept > 0 && (written.len() > place || !whole.starts_with(&written)) {
            kept -= 1;
            written = tokenizer.decode(&tokens[..kept], false)?;
        }
        let mut text = tokenizer.decode(&tokens[..kept], true)?;
        // What the next token has before the stop string; that of a special one is no text.
        if tokens.get(kept).is_some_and(|token| !tokenizer.is_special(*token)) {
            text.push_str(whole.get(written.len()..place).unwrap_or_default());
        }
        Ok(Some(text))
    }

    /// Where the earliest of them is.
    fn place(&self, text: &str) -> Option<usize> {
        self.strings.iter().filter_map(|stop| text.find(stop.as_str())).min()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
        Tokenizer::read(&model).expect("a golden tokenizer")
    }

    /// The number of tokens after which generation ends, and the text that is left.
    fn stopped(text: &str, stop: &[&str]) -> Option<(usize, String)> {
        let tokenizer = tokenizer();
        let strings: Vec<String> = stop.iter().map(|text| (*text).to_owned()).collect();
        let stop = StopStrings::new(Some(&tokenizer), &strings);
        let tokens = tokenizer.encode(text, false).expect("encoded");
        let ended = (1..=tokens.len()).find(|end| stop.ends(&tokenizer, &tokens[..*end]).expect("decoded"))?;
        Some((ended, stop.text(&tokenizer, &tokens[..ended]).expect("decoded")))
    }

    #[test]
    fn the_earliest_stop_string_cuts() {
        let text = "a = 3\nQ: next\n\n";
        assert_eq!(stopped(text, &["\n\n", "Q:"]).expect("it ends").1, "a = 3\n");
        assert_eq!(stopped("a = 3", &["\n\n", "Q:"]), None);
        assert_eq!(stopped(text, &[]), None);
    }

    #[test]
    fn a_stop_string_may_be_a_special_token_or_reach_into_one() {
        let text = "The sum is 5.<|im_end|>\nmore";
        for (stop, left) in [
            ("<|im_end|>", "The sum is 5."),
            ("5.<|im_end|>", "The sum is "),
            ("um is 5.<|im", "The s"),
            ("im_end|>\nm", "The sum is 5."),
            ("5.\nm", "The sum is "),
        ] {
            let (_, text) = stopped(text, &[stop]).unwrap_or_else(|| panic!("{stop:?} was not found"));
            assert_eq!(text, left, "{stop:?}");
        }
        let tokens = tokenizer().encode("The sum is 5.<|im_end|>", false).expect("encoded").len();
        assert_eq!(stopped(text, &["<|im_end|>"]).expect("it ends").0, tokens, "at that token");
    }

    #[test]
    fn a_letter_of_the_vocabulary_is_no_token_of_that_name() {
        // The vocabulary writes a line break as `Ċ`.
        assert_eq!(stopped("one\ntwo", &["Ċ"]), None);
    }
}
