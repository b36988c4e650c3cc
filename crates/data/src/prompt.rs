use std::path::Path;

use pacs_spec::JobSpec;
use pacs_text::{ChatTemplate, Message, Tokenizer};
use serde_json::{Map, Value};

use crate::DataError;

/// Turns questions and conversations into prompts: suffix, system message, chat template, token ids.
#[derive(Debug)]
pub struct Prompter {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    variables: Map<String, Value>,
    system: Option<String>,
    suffix: String,
}

/// What a model is asked, up to where its answer begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// As the template renders it.
    pub text: String,
    /// Token ids.
    pub tokens: Vec<u32>,
}

impl Prompter {
    /// A prompter for the model in folder `model`, with its own chat template, that adds `suffix` to every question and
    /// puts `system` before it.
    ///
    /// # Errors
    /// When the tokenizer or the chat template cannot be used.
    pub fn read(model: &Path, system: Option<String>, suffix: String) -> Result<Self, DataError> {
        let (tokenizer, template) = (Tokenizer::read(model)?, ChatTemplate::read(model)?);
        Ok(Self { tokenizer, template, variables: Map::new(), system, suffix })
    }

    /// The same with another chat template; `origin` says in errors where it comes from.
    ///
    /// # Errors
    /// When `source` is no valid Jinja text.
    pub fn with_template(self, source: &str, origin: &Path) -> Result<Self, DataError> {
        Ok(Self { template: self.template.replaced(source, origin)?, ..self })
    }

    /// The same with variables that are passed to the chat template.
    #[must_use]
    pub fn with_variables(self, variables: Map<String, Value>) -> Self {
        Self { variables, ..self }
    }

    /// The prompter of a job.
    fn of_job(spec: &JobSpec) -> Result<Self, DataError> {
        let data = &spec.data;
        Self::read(&spec.model.path, data.system.clone(), data.prompt_suffix.clone())?.written_as(spec)
    }

    /// The same with the chat template and the variables of a job, whatever its model and prompts are.
    ///
    /// # Errors
    /// When the template is no valid Jinja text.
    pub fn written_as(self, spec: &JobSpec) -> Result<Self, DataError> {
        let mut prompter = self;
        if let Some(source) = &spec.model.chat_template {
            prompter = prompter.with_template(source, Path::new("model.chat_template"))?;
        }
        match serde_json::to_value(&spec.model.template_variables) {
            Ok(Value::Object(variables)) => Ok(prompter.with_variables(variables)),
            other => unreachable!("a TOML table became {other:?}"),
        }
    }

    /// The prompt of a question.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses.
    pub fn question(&self, question: &str) -> Result<Prompt, DataError> {
        self.question_with(question, &self.suffix)
    }

    /// The prompt of a question with another suffix.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses.
    pub fn question_with(&self, question: &str, suffix: &str) -> Result<Prompt, DataError> {
        let user = Message::user(format!("{question}{suffix}"));
        let messages: Vec<Message> = self.system.as_ref().map(Message::system).into_iter().chain([user]).collect();
        self.messages(&messages)
    }

    /// The prompt of a conversation, as it is.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses.
    pub fn messages(&self, messages: &[Message]) -> Result<Prompt, DataError> {
        let text = self.template.render(messages, true, &self.variables)?;
        let tokens = self.tokenizer.encode(&text, self.template.is_plain())?;
        Ok(Prompt { text, tokens })
    }

    /// What stands there when a conversation was answered: its prompt, and the answer that is its last message up to where
    /// the template ends it. Without a template the answer follows its prompt as it would be generated, with nothing in
    /// between.
    ///
    /// # Errors
    /// When the template refuses.
    pub fn answered(&self, messages: &[Message]) -> Result<String, DataError> {
        match messages.split_last() {
            Some((answer, asked)) if self.template.is_plain() => {
                Ok(self.template.render(asked, true, &self.variables)? + &answer.content)
            }
            _ => Ok(self.template.render(messages, false, &self.variables)?),
        }
    }

    /// Whether there is no chat template.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.template.is_plain()
    }

    /// The tokenizer that prompts are written with.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// A prompt that is not to be written into a template.
    ///
    /// # Errors
    /// When the tokenizer refuses.
    pub fn plain(&self, text: &str) -> Result<Prompt, DataError> {
        Ok(Prompt { tokens: self.tokenizer.encode(text, true)?, text: text.to_owned() })
    }
}

/// The prompter of a job, with its limit.
pub(crate) struct JobPrompter {
    prompter: Prompter,
    max_tokens: usize,
}

impl JobPrompter {
    pub(crate) fn new(spec: &JobSpec) -> Result<Self, DataError> {
        Ok(Self { prompter: Prompter::of_job(spec)?, max_tokens: max_prompt_tokens(spec)? })
    }

    /// Most tokens that a prompt may have: what the spec says, and no more than leaves room for the answer.
    pub(crate) fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    pub(crate) fn prompt(&self, question: &str, suffix: &str) -> Result<Prompt, DataError> {
        self.prompter.question_with(question, suffix)
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
