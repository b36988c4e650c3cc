use std::fs;
use std::path::{Path, PathBuf};

use pacs_shape::EndToken;
use pacs_text::ChatTemplate;
use pacs_torch::tch::Kind;
use serde_json::{Map, Value};

use crate::save::{WEIGHTS, copy_companions, sync_folder, write_config, write_file, write_tensors};
use crate::{ModelError, Parameters};

/// What the folder of a trained model says besides its weights.
///
/// It is the folder that training began with, but for what the job decided: the chat template that prompts were written with, and all
/// tokens that ended answers. A folder with the old template would be asked in another way than it was trained, and lose much of
/// what it learnt.
#[derive(Clone, Debug)]
pub struct Export {
    source: PathBuf,
    /// In the place of that of the source.
    chat_template: Option<String>,
    end_tokens: Vec<u32>,
}

const TEMPLATE: &str = "chat_template.jinja";
const OLDER_TEMPLATE: &str = "chat_template.json";
const TOKENIZER: &str = "tokenizer_config.json";
const GENERATION: &str = "generation_config.json";

impl Export {
    /// The export of a model that began as the folder `source` and was trained with `chat_template` in the place of its own, and with
    /// these variables of the template. The variables become defaults of the exported template.
    ///
    /// # Errors
    /// When the template, or a file of `source` that names end tokens, cannot be used.
    pub fn new(source: &Path, chat_template: Option<&str>, variables: &Map<String, Value>) -> Result<Self, ModelError> {
        let end_tokens = EndToken::of_folder(source)?.into_iter().map(|token| token.id).collect();
        let mut export = Self { source: source.to_owned(), chat_template: None, end_tokens };
        if chat_template.is_some() || !variables.is_empty() {
            let own = ChatTemplate::read(source)?;
            let used = match chat_template {
                Some(text) => own.replaced(text, Path::new("the job's chat template"))?,
                None => own,
            };
            export.chat_template = used.with_defaults(variables);
        }
        Ok(export)
    }

    /// The folder that training began with.
    #[must_use]
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Writes the folder; `write_weights` writes its weights, of `kind`.
    pub(crate) fn write(
        &self,
        out_dir: &Path,
        kind: Kind,
        write_weights: impl FnOnce(&Path) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        fs::create_dir_all(out_dir).map_err(ModelError::io("create", out_dir))?;
        write_weights(&out_dir.join(WEIGHTS))?;
        copy_companions(&self.source, out_dir)?;
        self.write_texts(out_dir)?;
        write_config(&self.source.join("config.json"), &out_dir.join("config.json"), kind)?;
        sync_folder(out_dir)
    }

    fn write_texts(&self, out_dir: &Path) -> Result<(), ModelError> {
        if let Some(template) = &self.chat_template {
            write_file(&out_dir.join(TEMPLATE), template.as_bytes())?;
            // Readers differ in which of these they take first.
            let older = out_dir.join(OLDER_TEMPLATE);
            if older.exists() {
                fs::remove_file(&older).map_err(ModelError::io("remove", &older))?;
            }
            change(&out_dir.join(TOKENIZER), |fields| {
                fields.insert("chat_template".to_owned(), template.as_str().into());
            })?;
        }
        match self.end_tokens[..] {
            [] => Ok(()),
            [one] => self.write_end(out_dir, one.into()),
            _ => self.write_end(out_dir, self.end_tokens.clone().into()),
        }
    }

    fn write_end(&self, out_dir: &Path, tokens: Value) -> Result<(), ModelError> {
        change(&out_dir.join(GENERATION), |fields| {
            fields.insert("eos_token_id".to_owned(), tokens);
        })
    }
}

impl Parameters {
    /// Writes the parameters as a Hugging Face folder: `model.safetensors` in `kind`, the configuration of the export's source with its
    /// kind updated, the tokenizer as it is, and chat template and end tokens as the model was trained with.
    ///
    /// Each file is written under a temporary name, synced, and renamed; `config.json` comes last, so that a folder
    /// that loads is whole.
    ///
    /// # Errors
    /// When a file cannot be read or written, or `kind` is none that weights are stored in.
    pub fn export(&self, export: &Export, out_dir: &Path, kind: Kind) -> Result<(), ModelError> {
        export.write(out_dir, kind, |path| write_tensors(self, path, kind, str::to_owned))
    }
}

/// Changes the object of a JSON file, which may not be there yet; one that says the same already stays as it is.
fn change(path: &Path, change: impl FnOnce(&mut Map<String, Value>)) -> Result<(), ModelError> {
    let text =
        if path.exists() { fs::read_to_string(path).map_err(ModelError::io("read", path))? } else { "{}".to_owned() };
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let before: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| ModelError::config(path, error.to_string()))?;
    let mut after = before.clone();
    change(&mut after);
    if before == after {
        return Ok(());
    }
    write_file(path, format!("{:#}\n", Value::Object(after)).as_bytes())
}
