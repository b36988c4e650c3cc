use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::ShapeError;
use crate::config::{parse, read, read_if_there};

/// A token that ends an answer, and the files of the model folder that say so.
///
/// Folders disagree: config.json of a chat model often still names the end token of its base model, while the tokenizer's is the
/// one that the chat template writes. Taking the first file that names one makes such a model run into the limit of every answer, so
/// all of them count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndToken {
    /// Id of the token that ends an answer.
    pub id: u32,
    /// How it is written, where a file says that.
    pub text: Option<String>,
    /// Names of the files.
    pub named_by: Vec<&'static str>,
}

impl fmt::Display for EndToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.text {
            Some(text) => write!(f, "`{}` ({}, ", text.escape_debug(), self.id)?,
            None => write!(f, "{} (", self.id)?,
        }
        write!(f, "{})", self.named_by.join(", "))
    }
}

impl EndToken {
    /// The end tokens of a Hugging Face folder, those of generation_config.json first.
    ///
    /// # Errors
    /// When a file that is there is malformed, or names what is no token.
    pub fn of_folder(dir: &Path) -> Result<Vec<Self>, ShapeError> {
        let vocabulary = Vocabulary::read(dir)?;
        let mut found: Vec<Self> = Vec::new();
        let mut add = |id: u32, by: &'static str| match found.iter_mut().find(|token| token.id == id) {
            Some(token) => token.named_by.push(by),
            None => found.push(Self { id, text: vocabulary.text(id), named_by: vec![by] }),
        };
        for name in ["generation_config.json", "config.json"] {
            let path = dir.join(name);
            let Some(text) = read_if_there(&path)? else { continue };
            let NamesEnd { eos_token_id } = parse(&text, &path)?;
            ids(eos_token_id.as_ref(), &path)?.into_iter().for_each(|id| add(id, name));
        }
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = dir.join(name);
            let Some(text) = read_if_there(&path)? else { continue };
            let config: Value = parse(&text, &path)?;
            let token = &config["eos_token"];
            // A text, or an object that also says how the token is found in texts.
            let token = token.as_str().or_else(|| token["content"].as_str());
            let id = token.and_then(|token| vocabulary.id(token));
            id.into_iter().for_each(|id| add(id, name));
        }
        Ok(found)
    }
}

#[derive(Deserialize)]
struct NamesEnd {
    eos_token_id: Option<Value>,
}

/// Hugging Face writes one end token as a number and several as a list.
pub(crate) fn ids(value: Option<&Value>, path: &Path) -> Result<Vec<u32>, ShapeError> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| {
            let detail = format!(
                "`eos_token_id` holds {value}, which is not a token; expected the number of the token that ends an answer, a list of \
                 them, or null"
            );
            ShapeError::config(path, detail)
        })
    };
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(list)) => list.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
    }
}

/// Numbers of the added tokens, which every end token is one of.
struct Vocabulary(Vec<(u32, String)>);

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

impl Vocabulary {
    fn read(dir: &Path) -> Result<Self, ShapeError> {
        let path = dir.join("tokenizer.json");
        let Some(text) = read_if_there(&path)? else { return Ok(Self(Vec::new())) };
        // The vocabulary itself, megabytes, is passed over.
        let TokenizerFile { added_tokens } = parse(&text, &path)?;
        Ok(Self(added_tokens.into_iter().map(|token| (token.id, token.content)).collect()))
    }

    fn id(&self, token: &str) -> Option<u32> {
        self.0.iter().find(|(_, text)| text == token).map(|(id, _)| *id)
    }

    fn text(&self, wanted: u32) -> Option<String> {
        self.0.iter().find(|(id, _)| *id == wanted).map(|(_, text)| text.clone())
    }
}

/// Ids that a config.json alone names.
pub(crate) fn of_config(text: &str, path: &Path) -> Result<Vec<u32>, ShapeError> {
    let NamesEnd { eos_token_id } = parse(text, path)?;
    ids(eos_token_id.as_ref(), path)
}

/// The text of config.json in a folder; for a folder that is an adapter or has none, what it is instead.
pub(crate) fn config_text(dir: &Path) -> Result<String, ShapeError> {
    let path = dir.join("config.json");
    if !path.exists() && dir.join("adapter_config.json").exists() {
        return Err(ShapeError::config(
            dir,
            "it is a LoRA adapter (adapter_config.json) and not a whole model; merge it into its base model first \
             (`merge_and_unload` of PEFT) and name the merged folder",
        ));
    }
    read(&path)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;
    use crate::ModelConfig;

    fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, value)| fs::write(dir.path().join(name), value.to_string()).unwrap());
        dir
    }

    fn tokenizer() -> Value {
        json!({"added_tokens": [{"id": 0, "content": "<|endoftext|>"}, {"id": 2, "content": "<|im_end|>"}], "model": {"vocab": {"a": 7}}})
    }

    /// The case of a SmolLM2 folder whose config.json still names the token of the base model.
    #[test]
    fn all_files_of_a_folder_name_end_tokens() {
        let dir = folder(&[
            ("config.json", json!({"eos_token_id": 0})),
            ("generation_config.json", json!({"eos_token_id": 0})),
            ("tokenizer_config.json", json!({"eos_token": {"content": "<|im_end|>", "special": true}})),
            ("special_tokens_map.json", json!({"eos_token": "<|im_end|>"})),
            ("tokenizer.json", tokenizer()),
        ]);
        let tokens = EndToken::of_folder(dir.path()).unwrap();
        let shown: Vec<String> = tokens.iter().map(ToString::to_string).collect();
        assert_eq!(
            shown,
            [
                "`<|endoftext|>` (0, generation_config.json, config.json)",
                "`<|im_end|>` (2, tokenizer_config.json, special_tokens_map.json)"
            ]
        );
    }

    #[test]
    fn the_case_of_a_special_stop_ends_at_the_token_of_its_tokenizer() {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases/special-stop");
        let dir = folder(&[("tokenizer.json", tokenizer())]);
        for name in ["config.json", "generation_config.json", "tokenizer_config.json"] {
            fs::copy(case.join(name), dir.path().join(name)).unwrap();
        }
        assert_eq!(ModelConfig::read(dir.path()).unwrap().end_tokens, [0, 2]);
    }

    #[test]
    fn a_folder_may_name_none() {
        let dir = folder(&[
            ("config.json", json!({"eos_token_id": null})),
            ("tokenizer_config.json", json!({"eos_token": null})),
        ]);
        assert_eq!(EndToken::of_folder(dir.path()).unwrap(), []);
        let unknown =
            folder(&[("tokenizer_config.json", json!({"eos_token": "</s>"})), ("tokenizer.json", tokenizer())]);
        assert_eq!(EndToken::of_folder(unknown.path()).unwrap(), [], "a token that the tokenizer does not have");
    }

    #[test]
    fn what_is_no_token_is_refused_in_words() {
        for value in [json!(-1), json!([1, -1]), json!("</s>"), json!(1.5), json!(4_294_967_296u64)] {
            let dir = folder(&[("config.json", json!({"eos_token_id": value}))]);
            let error = EndToken::of_folder(dir.path()).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains("which is not a token"), "{error}");
        }
    }

    #[test]
    fn an_adapter_is_named_as_one() {
        let dir = folder(&[("adapter_config.json", json!({"peft_type": "LORA"}))]);
        let error = ModelConfig::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("LoRA adapter") && error.contains("merge"), "{error}");
    }
}
