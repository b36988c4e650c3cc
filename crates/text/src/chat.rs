mod child;
mod jinja;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value as Json;

use self::child::ChildRenderer;
pub use self::child::{enter_renderer, render_apart, serve_templates};
use self::jinja::Jinja;
use crate::Day;

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
/// list of named ones, of which `default` is taken), then in `chat_template.json`. A folder without any is a base model: its prompts are the plain
/// contents of the messages with an empty line in between, and the tokenizer adds its special tokens
/// ([`ChatTemplate::is_plain`]).
pub struct ChatTemplate {
    /// `None`: plain text.
    renderer: Option<Renderer>,
    special_tokens: BTreeMap<&'static str, String>,
    /// The text of the template.
    source: Option<String>,
    origin: PathBuf,
}

/// What renders a template.
enum Renderer {
    /// A child process with limits.
    Child(ChildRenderer),
    /// This process, where no program has said that it can be such a child.
    Within(Jinja),
}

impl Renderer {
    fn compile(source: &str, origin: &Path, day: Day) -> Result<Self, TemplateError> {
        let compiled = match ChildRenderer::compile(source, day) {
            Some(child) => child.map(Self::Child),
            None => Jinja::compile(source, day).map(Self::Within),
        };
        compiled.map_err(|message| TemplateError { path: origin.to_owned(), doing: "parse", message })
    }

    fn render(&self, variables: &Json) -> Result<String, String> {
        match self {
            Self::Child(child) => child.render(variables),
            Self::Within(jinja) => jinja.render(variables),
        }
    }
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

/// What every caller passes to a template.
const GIVEN: [&str; 4] = ["messages", "add_generation_prompt", "tools", "documents"];

/// A value as Jinja text.
fn literal(value: &serde_json::Value) -> String {
    let list = |items: Vec<String>| items.join(", ");
    match value {
        Json::Null => "none".to_owned(),
        Json::Array(items) => format!("[{}]", list(items.iter().map(literal).collect())),
        Json::Object(fields) => {
            let field = |(name, value): (&String, &Json)| {
                format!("{}: {}", literal(&Json::String(name.clone())), literal(value))
            };
            format!("{{{}}}", list(fields.iter().map(field).collect()))
        }
        // Numbers, texts and truth values are the same in both.
        other => other.to_string(),
    }
}

/// Special tokens that templates may refer to.
const SPECIAL_TOKENS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

impl ChatTemplate {
    /// Reads the chat template of the model folder `dir`, with the special tokens of its `tokenizer_config.json` and, for those
    /// that are not there, of its `special_tokens_map.json`.
    ///
    /// # Errors
    /// When a file is there and cannot be read, or the template is no valid Jinja text.
    pub fn read(dir: &Path) -> Result<Self, TemplateError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_config(&config_path)?;
        let mut special_tokens = special_tokens(&read_config(&dir.join("special_tokens_map.json"))?);
        special_tokens.extend(self::special_tokens(&config));
        let (origin, source) = find_template(dir, &config_path, &config)?;
        let renderer = source.as_ref().map(|source| Renderer::compile(source, &origin, Day::today())).transpose()?;
        Ok(Self { renderer, special_tokens, source, origin })
    }

    /// The same special tokens with another template; `origin` says in errors where that comes from.
    ///
    /// # Errors
    /// When `source` is no valid Jinja text.
    pub fn replaced(self, source: &str, origin: &Path) -> Result<Self, TemplateError> {
        let renderer = Some(Renderer::compile(source, origin, Day::today())?);
        Ok(Self { renderer, source: Some(source.to_owned()), origin: origin.to_owned(), ..self })
    }

    /// The same template on another day: `strftime_now` of templates that write a date gives this one. Prompts of a run have to
    /// be the same after every start, whenever that is.
    ///
    /// # Errors
    /// Never in practice: the template was read before.
    pub fn on(self, day: Day) -> Result<Self, TemplateError> {
        let renderer = self.source.as_ref().map(|source| Renderer::compile(source, &self.origin, day)).transpose()?;
        Ok(Self { renderer, ..self })
    }

    /// The text of the template in which `variables` are what callers need not say: for a folder that others render with, who do not
    /// know what a job passed. None where there is no template.
    #[must_use]
    pub fn with_defaults(&self, variables: &serde_json::Map<String, serde_json::Value>) -> Option<String> {
        let source = self.source.as_ref()?;
        let is_word = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        // A template cannot ask for what is no word of its language.
        let is_free = |name: &str| is_word(name) && !GIVEN.contains(&name);
        let mut text = String::new();
        for (name, value) in variables.iter().filter(|(name, _)| is_free(name)) {
            // The line break is taken away again by the block before it, so that a template that begins with one keeps its own.
            text.push_str(&format!(
                "{{% if {name} is not defined %}}{{% set {name} = {} %}}{{% endif %}}\n",
                literal(value)
            ));
        }
        text.push_str(source);
        Some(text)
    }

    /// Whether there is no template, so that rendered text is plain and the tokenizer has to add special tokens.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.renderer.is_none()
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
        // A base model has no turns to mark; inventing markers would put tokens into the prompt that it never saw.
        let Some(renderer) = &self.renderer else {
            let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
            return Ok(contents.join("\n\n"));
        };
        // Later ones win. Templates ask whether tools and documents are none, which an undefined name is not.
        let mut context: serde_json::Map<String, Json> =
            self.special_tokens.iter().map(|(name, token)| ((*name).to_owned(), token.as_str().into())).collect();
        let given = serde_json::json!({
            "messages": messages, "add_generation_prompt": add_generation_prompt, "tools": null, "documents": null
        });
        if let Json::Object(given) = given {
            context.extend(given);
        }
        // The job's variables come last: they are the user's explicit choice.
        context.extend(variables.clone());
        let rendered = renderer.render(&Json::Object(context));
        rendered.map_err(|message| TemplateError { path: self.origin.clone(), doing: "render", message })
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
}

/// The template of a folder and the file that it comes from.
fn find_template(
    dir: &Path,
    config_path: &Path,
    config: &serde_json::Value,
) -> Result<(PathBuf, Option<String>), TemplateError> {
    // The order of transformers, which reads the separate file first.
    let own_file = dir.join("chat_template.jinja");
    if let Some(text) = read_if_there(&own_file)? {
        return Ok((own_file, Some(text)));
    }
    if let Some(text) = template_of(config).map_err(|m| TemplateError::reading(config_path, m))? {
        return Ok((config_path.to_owned(), Some(text)));
    }
    // Processors of some releases have it in a file of their own.
    let older = dir.join("chat_template.json");
    let text = template_of(&read_config(&older)?).map_err(|m| TemplateError::reading(&older, m))?;
    Ok((if text.is_some() { older } else { config_path.to_owned() }, text))
}

fn read_if_there(path: &Path) -> Result<Option<String>, TemplateError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))),
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
