//! Tokenizer and chat template against what the reference implementation makes of the same model folders.

#[path = "../../../tests/golden/models.rs"]
mod golden_models;

use std::path::PathBuf;

use pacs_text::{ChatTemplate, Message, Tokenizer};
use serde_json::{Map, Value};

fn folder(model: &str) -> PathBuf {
    golden_models::folder().join(model)
}

/// The models that have text fixtures; the small ones have none.
fn models() -> Vec<String> {
    let mut models = golden_models::names();
    models.retain(|model| folder(model).join("tokenizer_cases.json").exists());
    assert!(!models.is_empty());
    models
}

fn cases(model: &str, file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(folder(model).join(file)).expect("the golden files are in the repository");
    let cases: Vec<Value> = serde_json::from_str(&text).expect("the golden files are JSON");
    assert!(!cases.is_empty());
    cases
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("a list of token ids")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

#[test]
fn tokens_equal_the_reference() {
    for model in &models() {
        let tokenizer = Tokenizer::read(&folder(model)).expect("a tokenizer");
        for case in cases(model, "tokenizer_cases.json") {
            let input = text(&case["text"]);
            let plain = ids(&case["ids"]);
            assert_eq!(tokenizer.encode(input, false).expect("encoded"), plain, "{model}: {input:?}");
            let special = ids(&case["ids_with_special"]);
            assert_eq!(tokenizer.encode(input, true).expect("encoded"), special, "{model}: {input:?}");
            assert_eq!(tokenizer.decode(&plain, false).expect("decoded"), text(&case["decoded"]), "{model}");
            let skipped = tokenizer.decode(&plain, true).expect("decoded");
            assert_eq!(skipped, text(&case["decoded_skip_special"]), "{model}: {input:?}");
        }
    }
}

#[test]
fn chats_equal_the_reference() {
    for model in &models() {
        let tokenizer = Tokenizer::read(&folder(model)).expect("a tokenizer");
        let template = ChatTemplate::read(&folder(model)).expect("a chat template");
        for case in cases(model, "chat_cases.json") {
            let messages = case["messages"].as_array().expect("messages").iter().map(|message| Message {
                role: text(&message["role"]).to_owned(),
                content: text(&message["content"]).to_owned(),
            });
            let messages: Vec<Message> = messages.collect();
            let mut variables: Map<String, Value> = case["template_vars"].as_object().expect("an object").clone();
            let generate = variables.remove("add_generation_prompt").and_then(|v| v.as_bool()).unwrap_or(false);
            let rendered = template.render(&messages, generate, &variables).expect("rendered");
            assert_eq!(rendered, text(&case["text"]), "{model}: {}", case["name"]);
            assert_eq!(tokenizer.encode(&rendered, false).expect("encoded"), ids(&case["ids"]), "{model}");
        }
    }
}

#[test]
fn ids_beyond_the_tokenizer_give_no_text() {
    let tokenizer = Tokenizer::read(&folder("qwen2-untied")).expect("a tokenizer");
    let mut ids = tokenizer.encode("12", false).expect("encoded");
    ids.push(410);
    assert_eq!(tokenizer.decode(&ids, true).expect("decoded"), "12");
}
