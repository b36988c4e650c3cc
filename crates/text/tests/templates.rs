//! Chat templates against what Jinja2 makes of them: construct by construct, and whole ones of the ways in which families of models
//! write conversations (`tests/golden/templates/generate.py`).

use std::path::Path;

use pacs_text::{ChatTemplate, Day, Message};
use serde_json::{Map, Value};

fn cases() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/templates/cases.json");
    let text = std::fs::read_to_string(path).expect("the golden files are in the repository");
    serde_json::from_str(&text).expect("the golden files are JSON")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

/// Renders a template as a model folder with it does.
struct Folder {
    folder: tempfile::TempDir,
    day: Day,
}

impl Folder {
    fn new(day: &Value) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let tokens = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;
        std::fs::write(folder.path().join("tokenizer_config.json"), tokens).expect("written");
        Self { folder, day: text(day).parse().expect("a day") }
    }

    fn render(&self, template: &str, messages: &Value, generate: bool, variables: &Value) -> Result<String, String> {
        std::fs::write(self.folder.path().join("chat_template.jinja"), template).expect("written");
        let message = |message: &Value| Message {
            role: text(&message["role"]).to_owned(),
            content: text(&message["content"]).to_owned(),
        };
        let messages: Vec<Message> = messages.as_array().expect("a list").iter().map(message).collect();
        let variables: Map<String, Value> = variables.as_object().expect("an object").clone();
        let template = ChatTemplate::read(self.folder.path()).and_then(|template| template.on(self.day));
        template
            .and_then(|template| template.render(&messages, generate, &variables))
            .map_err(|error| error.to_string())
    }
}

/// What is wrong with a rendering; nothing where it is that of Jinja2, or both refuse.
fn difference(rendered: Result<String, String>, expected: &Value) -> Option<String> {
    match (rendered, expected["text"].as_str(), expected["error"].as_str()) {
        (Ok(text), Some(expected), _) if text == expected => None,
        (Err(error), None, Some(expected)) if error.contains(expected) => None,
        (rendered, Some(expected), _) => Some(format!("  is   {rendered:?}\n  want {expected:?}")),
        (rendered, None, error) => Some(format!("  is   {rendered:?}\n  want the error {error:?}")),
    }
}

#[test]
fn every_construct_is_that_of_jinja2() {
    let cases = cases();
    let folder = Folder::new(&cases["day"]);
    let constructs = cases["constructs"].as_array().expect("a list");
    assert!(constructs.len() > 100);
    let wrong: Vec<String> = constructs
        .iter()
        .filter_map(|construct| {
            let template = text(&construct["template"]);
            let rendered = folder.render(template, &cases["messages"], true, &cases["variables"]);
            Some(format!("{}: {template}\n{}", text(&construct["kind"]), difference(rendered, construct)?))
        })
        .collect();
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), constructs.len(), wrong.join("\n"));
}

#[test]
fn every_familys_conversations_are_those_of_jinja2() {
    let cases = cases();
    let folder = Folder::new(&cases["day"]);
    let families = cases["families"].as_array().expect("a list");
    assert!(families.len() >= 20);
    let conversations = cases["conversations"].as_array().expect("a list");
    let mut wrong = Vec::new();
    for family in families {
        let rendered = family["rendered"].as_array().expect("a list");
        assert_eq!(rendered.len(), conversations.len());
        for (number, (conversation, expected)) in conversations.iter().zip(rendered).enumerate() {
            let generate = conversation["add_generation_prompt"] == true;
            let template = text(&family["template"]);
            let made = folder.render(template, &conversation["messages"], generate, &conversation["variables"]);
            wrong.extend(difference(made, expected).map(|said| format!("{} {number}:\n{said}", family["name"])));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
