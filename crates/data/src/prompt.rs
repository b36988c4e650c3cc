use std::path::Path;

use pacs_spec::JobSpec;
use pacs_text::{ChatTemplate, Message, Tokenizer};
use serde_json::{Map, Value};

use crate::DataError;

/// Turns questions into prompts: suffix, system message, chat template, token ids.
pub(crate) struct Prompter<'a> {
    spec: &'a JobSpec,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    variables: Map<String, Value>,
}

pub(crate) struct Prompt {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
}

impl<'a> Prompter<'a> {
    pub(crate) fn new(spec: &'a JobSpec) -> Result<Self, DataError> {
        let tokenizer = Tokenizer::read(&spec.model.path)?;
        let mut template = ChatTemplate::read(&spec.model.path)?;
        if let Some(source) = &spec.model.chat_template {
            template = template.replaced(source, Path::new("model.chat_template"))?;
        }
        let variables = match serde_json::to_value(&spec.model.template_variables) {
            Ok(Value::Object(variables)) => variables,
            other => unreachable!("a TOML table became {other:?}"),
        };
        Ok(Self { spec, tokenizer, template, variables })
    }

    pub(crate) fn prompt(&self, question: &str) -> Result<Prompt, DataError> {
        let data = &self.spec.data;
        let user = Message::user(format!("{question}{}", data.prompt_suffix));
        let messages: Vec<Message> = data.system.as_ref().map(Message::system).into_iter().chain([user]).collect();
        let text = self.template.render(&messages, true, &self.variables)?;
        let tokens = self.tokenizer.encode(&text, self.template.is_plain())?;
        Ok(Prompt { text, tokens })
    }
}
