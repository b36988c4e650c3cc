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
    max_tokens: usize,
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
        let max_tokens = max_prompt_tokens(spec)?;
        Ok(Self { spec, tokenizer, template, variables, max_tokens })
    }

    /// Most tokens that a prompt may have: what the spec says, and no more than leaves room for the answer.
    pub(crate) fn max_tokens(&self) -> usize {
        self.max_tokens
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

/// The limit of the spec, or of the model's positions less the longest answer.
fn max_prompt_tokens(spec: &JobSpec) -> Result<usize, DataError> {
    // A folder without a readable number is refused by those who load the model; here it only sets no limit.
    let config = std::fs::read(spec.model.path.join("config.json")).ok();
    let config: Option<Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let positions = config.and_then(|config| config.get("max_position_embeddings")?.as_u64());
    let Some(positions) = positions else { return Ok(spec.data.max_prompt_tokens) };
    let max_new_tokens = u64::from(spec.rollout.max_new_tokens);
    match positions.checked_sub(max_new_tokens).and_then(|room| usize::try_from(room).ok()) {
        None | Some(0) => Err(DataError::NoRoom { model: spec.model.path.clone(), positions, max_new_tokens }),
        Some(room) => Ok(room.min(spec.data.max_prompt_tokens)),
    }
}
