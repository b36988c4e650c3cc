//! Prompt formatting outside a job: the same flags for every command that formats prompts.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use pacs_data::Prompter;
use pacs_model::Export;
use serde_json::{Map, Value};

/// Chat template and its variables, as `model.chat_template` and `model.template_variables` of a job.
#[derive(Debug, Args)]
pub(crate) struct Prompting {
    /// File with a Jinja chat template that replaces the folder's, as `model.chat_template` does in a job.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Variables for the chat template as a JSON object, as `model.template_variables` in a
    /// job: '{"enable_thinking": false}'
    #[arg(long, value_name = "JSON", value_parser = variables)]
    template_variables: Option<Map<String, Value>>,
}

impl Prompting {
    /// Creates the prompter of the model in `folder`, like a job with these settings.
    pub(crate) fn prompter(&self, folder: &Path, system: Option<String>, suffix: String) -> Result<Prompter> {
        let mut prompter = Prompter::read(folder, system, suffix)?;
        if let (Some(source), Some(path)) = (self.template()?, &self.chat_template) {
            prompter = prompter.with_template(&source, path)?;
        }
        Ok(prompter.with_variables(self.template_variables.clone().unwrap_or_default()))
    }

    /// Describes the export of the model in `folder`, with the chat template that prompts were formatted with.
    pub(crate) fn export(&self, folder: &Path) -> Result<Export> {
        let variables = self.template_variables.clone().unwrap_or_default();
        Ok(Export::new(folder, self.template()?.as_deref(), &variables)?)
    }

    fn template(&self) -> Result<Option<String>> {
        let read = |path: &PathBuf| std::fs::read_to_string(path).with_context(|| format!("read `{}`", path.display()));
        self.chat_template.as_ref().map(read).transpose()
    }
}

impl Prompting {
    /// Whether any of the flags was given.
    pub(crate) fn is_given(&self) -> bool {
        self.chat_template.is_some() || self.template_variables.is_some()
    }
}

fn variables(text: &str) -> Result<Map<String, Value>, String> {
    serde_json::from_str(text).map_err(|error| format!("expected a JSON object such as {{\"key\": true}}: {error}"))
}
