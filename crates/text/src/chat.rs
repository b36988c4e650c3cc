use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;

use crate::json::tojson;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of the system.
    #[must_use]
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".to_owned(), content: content.into() }
    }

    /// A message of the user.
    #[must_use]
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".to_owned(), content: content.into() }
    }
}

/// How a model wants a conversation written down, by the template of its folder.
///
/// The template is looked for in `chat_template.jinja`, then in `tokenizer_config.json` (`chat_template`, a text or a
/// list of named ones, of which `default` is taken). A folder without any is a base model: its prompts are the plain
/// contents of the messages with an empty line in between, and the tokenizer adds its special tokens
/// ([`ChatTemplate::is_plain`]).
pub struct ChatTemplate {
    /// `None`: plain text.
    environment: Option<Environment<'static>>,
    special_tokens: BTreeMap<&'static str, String>,
    origin: PathBuf,
}

/// A chat template that cannot be read or used.
#[derive(Debug, thiserror::Error)]
#[error("{doing} chat template `{}`: {message}", path.display())]
pub struct TemplateError {
    /// The file that the template comes from.
    pub path: PathBuf,
    doing: &'static str,
    message: String,
}

/// Special tokens that templates may refer to.
const SPECIAL_TOKENS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

impl ChatTemplate {
    /// Reads the chat template of the model folder `dir`, with the special tokens of its `tokenizer_config.json`.
    ///
    /// # Errors
    /// When a file is there and cannot be read, or the template is no valid Jinja text.
    pub fn read(dir: &Path) -> Result<Self, TemplateError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_config(&config_path)?;
        let special_tokens = special_tokens(&config);
        let own_file = dir.join("chat_template.jinja");
        let (origin, source) = match read_if_there(&own_file)? {
            Some(text) => (own_file, Some(text)),
            None => (config_path.clone(), template_of(&config).map_err(|m| TemplateError::reading(&config_path, m))?),
        };
        let environment = source.map(|source| compile(source, &origin)).transpose()?;
        Ok(Self { environment, special_tokens, origin })
    }

    /// The same special tokens with another template; `origin` says in errors where that comes from.
    ///
    /// # Errors
    /// When `source` is no valid Jinja text.
    pub fn replaced(self, source: &str, origin: &Path) -> Result<Self, TemplateError> {
        let environment = Some(compile(source.to_owned(), origin)?);
        Ok(Self { environment, origin: origin.to_owned(), ..self })
    }

    /// Whether there is no template, so that rendered text is plain and the tokenizer has to add special tokens.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.environment.is_none()
    }

    /// Writes `messages` down for the model, with `add_generation_prompt` up to where its answer begins.
    ///
    /// `variables` go into the template by name and win over everything that is passed otherwise.
    ///
    /// # Errors
    /// What the template raises, and whatever it cannot do with these messages.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        variables: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<String, TemplateError> {
        let Some(environment) = &self.environment else {
            let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
            return Ok(contents.join("\n\n"));
        };
        // Templates ask whether tools and documents are none, which an undefined name is not.
        let given = context! { messages, add_generation_prompt, tools => (), documents => () };
        let tokens = Value::from_serialize(&self.special_tokens);
        let context = context! { ..Value::from_serialize(variables), ..given, ..tokens };
        let template = environment.get_template(NAME).map_err(|e| TemplateError::rendering(&self.origin, &e))?;
        let mut rendered = Bounded::default();
        let done = template.render_captured_to(context, &mut rendered).map(drop);
        let failed = |message| TemplateError { path: self.origin.clone(), doing: "render", message };
        if rendered.is_full {
            return Err(failed(format!("the text has more than {MOST_RENDERED} bytes")));
        }
        done.map_err(|e| TemplateError::rendering(&self.origin, &e))?;
        String::from_utf8(rendered.text).map_err(|e| failed(e.to_string()))
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("origin", &self.origin)
            .field("is_plain", &self.is_plain())
            .field("special_tokens", &self.special_tokens)
            .finish_non_exhaustive()
    }
}

impl TemplateError {
    fn reading(path: &Path, message: impl fmt::Display) -> Self {
        Self { path: path.to_owned(), doing: "read", message: message.to_string() }
    }

    fn rendering(path: &Path, error: &Error) -> Self {
        Self { path: path.to_owned(), doing: "render", message: describe(error) }
    }
}

/// The name of the only template in an environment.
const NAME: &str = "chat";

/// Instructions that one rendering may take: loops end, whatever a model folder says. A real template takes some hundred a message,
/// and this many take about a second.
const FUEL: u64 = 10_000_000;

/// Bytes that a rendered conversation may have: more than any model's context.
const MOST_RENDERED: usize = 64 << 20;

/// Takes a rendered text up to its limit.
#[derive(Default)]
struct Bounded {
    text: Vec<u8>,
    is_full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.is_full |= self.text.len() + bytes.len() > MOST_RENDERED;
        if self.is_full {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn compile(source: String, origin: &Path) -> Result<Environment<'static>, TemplateError> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_template_owned(NAME, source).map_err(|e| TemplateError {
        path: origin.to_owned(),
        doing: "parse",
        message: describe(&e),
    })?;
    Ok(environment)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The error without the internal name of the template.
fn describe(error: &Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), ToOwned::to_owned);
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>, TemplateError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TemplateError::reading(path, error)),
    }
}

fn read_config(path: &Path) -> Result<serde_json::Value, TemplateError> {
    match read_if_there(path)? {
        Some(text) => serde_json::from_str(&text).map_err(|e| TemplateError::reading(path, e)),
        None => Ok(serde_json::Value::Null),
    }
}

fn special_tokens(config: &serde_json::Value) -> BTreeMap<&'static str, String> {
    let text = |value: &serde_json::Value| match value {
        serde_json::Value::Object(token) => Some(token.get("content")?.as_str()?.to_owned()),
        other => Some(other.as_str()?.to_owned()),
    };
    SPECIAL_TOKENS.into_iter().filter_map(|name| Some((name, text(config.get(name)?)?))).collect()
}

/// The template in `tokenizer_config.json`, if it has one.
fn template_of(config: &serde_json::Value) -> Result<Option<String>, String> {
    match config.get("chat_template") {
        None | Some(serde_json::Value::Null) => Ok(None),
        Some(serde_json::Value::String(text)) => Ok(Some(text.clone())),
        Some(serde_json::Value::Array(named)) => {
            let default = named.iter().find(|entry| entry["name"] == "default");
            let text = default.and_then(|entry| entry["template"].as_str());
            text.map(|text| Some(text.to_owned())).ok_or("`chat_template` lists no template named `default`".to_owned())
        }
        Some(_) => Err("`chat_template` is neither a text nor a list of named ones".to_owned()),
    }
}

#[cfg(test)]
mod tests;
