use std::path::Path;

use std::borrow::Cow;

use pacs_spec::JobSpec;
use pacs_text::{AsText, ChatTemplate, Day, Message, Tokenizer, Written};
use serde_json::{Map, Value};

use crate::DataError;
use crate::source::Asked;

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
    /// Token ids of the prompt, special tokens included.
    pub tokens: Vec<u32>,
    /// Control tokens of the model in what is asked. They are written as text: a question that could end its turn could also begin
    /// the answer.
    pub control_tokens: usize,
}

impl Prompter {
    /// A prompter for the model in folder `model`, with its own chat template, that adds `suffix` to every question and
    /// puts `system` before it.
    ///
    /// # Errors
    /// When the tokenizer or the chat template cannot be used.
    pub fn read(model: &Path, system: Option<String>, suffix: String) -> Result<Self, DataError> {
        let tokenizer = Tokenizer::read(model)?;
        let template = ChatTemplate::read(model)?;
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

    /// The same on a day: that is the date of templates which write one.
    ///
    /// # Errors
    /// When the template cannot be used.
    pub fn on(self, day: Day) -> Result<Self, DataError> {
        Ok(Self { template: self.template.on(day)?, ..self })
    }

    /// The prompter of a job.
    ///
    /// # Errors
    /// When the tokenizer or the chat template cannot be used.
    pub fn of_job(spec: &JobSpec) -> Result<Self, DataError> {
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
        self.asked(&Asked::Question(question.to_owned()), &self.suffix)
    }

    /// The prompt of a row: `suffix` follows its question, and the system message precedes it where it brings none.
    pub(crate) fn asked(&self, asked: &Asked, suffix: &str) -> Result<Prompt, DataError> {
        let messages = asked.messages(self.system.as_deref(), suffix);
        self.messages(&messages)
    }

    /// The prompt of a conversation, as it is.
    ///
    /// # Errors
    /// When the template or the tokenizer refuses.
    pub fn messages(&self, messages: &[Message]) -> Result<Prompt, DataError> {
        // Control tokens in what users wrote are marked before rendering, because the rendered text no longer tells whose they are.
        let (as_text, messages) = self.as_text(messages);
        let rendered = self.template.render(&messages, true, &self.variables)?;
        let Written { text, tokens } = as_text.encode(&rendered, self.template.is_plain())?;
        Ok(Prompt { text, tokens, control_tokens: as_text.found() })
    }

    /// Makes messages ready to be rendered part by part: their control tokens are marked, and what is rendered of them is encoded by
    /// what comes with them.
    #[must_use]
    pub fn as_text<'m>(&self, messages: &'m [Message]) -> (AsText<'_>, Cow<'m, [Message]>) {
        AsText::new(&self.tokenizer, messages)
    }

    /// What stands there up to where the next answer begins.
    ///
    /// # Errors
    /// When the template refuses.
    pub fn asking(&self, messages: &[Message]) -> Result<String, DataError> {
        Ok(self.template.render(messages, true, &self.variables)?)
    }

    /// The control token that the template writes after an answer, if it writes one: what a model of this template learnt to end
    /// with.
    #[must_use]
    pub fn turn_end(&self) -> Option<String> {
        const SAID: &str = "4711";
        if self.is_plain() {
            return None;
        }
        let said = Message { role: "assistant".to_owned(), content: SAID.to_owned() };
        let text = self.template.render(&[Message::user("?"), said], false, &self.variables).ok()?;
        let (_, after) = text.rsplit_once(SAID)?;
        let place = self.tokenizer.control_tokens(after).into_iter().next()?;
        after[..place.start].trim().is_empty().then(|| after[place].to_owned())
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
        Ok(Prompt { tokens: self.tokenizer.encode(text, true)?, text: text.to_owned(), control_tokens: 0 })
    }
}

/// The prompter of a job, with its limit.
pub(crate) struct JobPrompter {
    prompter: Prompter,
    max_tokens: usize,
    rows: u32,
}

impl JobPrompter {
    pub(crate) fn new(spec: &JobSpec, day: Day) -> Result<Self, DataError> {
        let prompter = Prompter::of_job(spec)?.on(day)?;
        let config = std::fs::read_to_string(spec.model.path.join("config.json")).ok();
        let config = config.map(|text| text.trim_start_matches('\u{feff}').to_owned());
        let config: Option<Value> = config.and_then(|text| serde_json::from_str(&text).ok());
        let rows = config.as_ref().and_then(|config| config.get("vocab_size")?.as_u64());
        let rows = rows.and_then(|rows| u32::try_from(rows).ok()).unwrap_or(u32::MAX);
        Ok(Self { prompter, max_tokens: max_prompt_tokens(spec, config.as_ref())?, rows })
    }

    pub(crate) fn prompter(&self) -> &Prompter {
        &self.prompter
    }

    /// Rows of the model's embedding.
    pub(crate) fn rows(&self) -> u32 {
        self.rows
    }

    /// Most tokens that a prompt may have: what the spec says, and no more than leaves room for the answer.
    pub(crate) fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    pub(crate) fn prompt(&self, asked: &Asked, suffix: &str) -> Result<Prompt, DataError> {
        self.prompter.asked(asked, suffix)
    }
}

/// The limit of the spec, or of the model's positions less the longest answer.
fn max_prompt_tokens(spec: &JobSpec, config: Option<&Value>) -> Result<usize, DataError> {
    // A folder without a readable number is refused by those who load the model; here it only sets no limit.
    let positions = config.and_then(|config| config.get("max_position_embeddings")?.as_u64());
    let Some(positions) = positions else { return Ok(spec.data.max_prompt_tokens) };
    let max_new_tokens = u64::from(spec.rollout.max_new_tokens);
    match positions.checked_sub(max_new_tokens).and_then(|room| usize::try_from(room).ok()) {
        None | Some(0) => Err(DataError::NoRoom { model: spec.model.path.clone(), positions, max_new_tokens }),
        Some(room) => Ok(room.min(spec.data.max_prompt_tokens)),
    }
}
