use std::fs;

use serde_json::{Map, json};

use super::*;

/// A model folder with these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, text) in files {
        fs::write(dir.path().join(name), text).expect("written");
    }
    dir
}

fn template(source: &str) -> ChatTemplate {
    let dir = folder(&[("chat_template.jinja", source)]);
    ChatTemplate::read(dir.path()).expect("a valid template")
}

fn rendered(template: &ChatTemplate) -> String {
    template.render(&[Message::user("Hi")], true, &Map::new()).expect("rendered")
}

#[test]
fn the_template_file_wins_over_the_configuration() {
    let config = r#"{"chat_template": "config", "bos_token": {"content": "<s>", "special": true}, "eos_token": null}"#;
    let both =
        folder(&[("tokenizer_config.json", config), ("chat_template.jinja", "{{ bos_token }}file{{ eos_token }}")]);
    assert_eq!(rendered(&ChatTemplate::read(both.path()).expect("valid")), "<s>file");
    let one = folder(&[("tokenizer_config.json", config)]);
    assert_eq!(rendered(&ChatTemplate::read(one.path()).expect("valid")), "config");
}

#[test]
fn of_named_templates_the_default_is_taken() {
    let config = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    let dir = folder(&[("tokenizer_config.json", config)]);
    assert_eq!(rendered(&ChatTemplate::read(dir.path()).expect("valid")), "d");
    let none = folder(&[("tokenizer_config.json", r#"{"chat_template": [{"name": "tool_use", "template": "t"}]}"#)]);
    let error = ChatTemplate::read(none.path()).expect_err("no default").to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("`default`"), "{error}");
}

#[test]
fn without_a_template_prompts_are_plain() {
    let dir = folder(&[]);
    let plain = ChatTemplate::read(dir.path()).expect("nothing to read");
    assert!(plain.is_plain());
    let messages = [Message::system("Be brief."), Message::user("Hi")];
    assert_eq!(plain.render(&messages, true, &Map::new()).expect("rendered"), "Be brief.\n\nHi");
}

#[test]
fn a_replaced_template_keeps_the_special_tokens() {
    let dir = folder(&[("tokenizer_config.json", r#"{"bos_token": "<s>"}"#)]);
    let plain = ChatTemplate::read(dir.path()).expect("valid");
    let replaced = plain.replaced("{{ bos_token }}{{ messages[0].content }}", Path::new("job.toml")).expect("valid");
    assert!(!replaced.is_plain());
    assert_eq!(rendered(&replaced), "<s>Hi");
}

#[test]
fn variables_reach_the_template_and_win() {
    let template = template("{{ mood }} {{ add_generation_prompt }} {{ tools is none }}");
    let variables = json!({"mood": "calm", "add_generation_prompt": false});
    let variables = variables.as_object().expect("an object");
    assert_eq!(template.render(&[], true, variables).expect("rendered"), "calm False True");
}

#[test]
fn json_is_spaced_as_python_does() {
    let template = template("{{ value | tojson }}|{{ value.b | tojson(indent=1) }}");
    let variables = json!({"value": {"a": "<é & 'x'>", "b": [1, 2.5]}});
    let text = template.render(&[], true, variables.as_object().expect("an object")).expect("rendered");
    assert_eq!(text, "{\"a\": \"<é & 'x'>\", \"b\": [1, 2.5]}|[\n 1,\n 2.5\n]");
}

#[test]
fn errors_name_file_line_and_cause() {
    let raising = template("a\n{{ raise_exception('no ' + messages[0].role) }}");
    let error = raising.render(&[Message::user("Hi")], true, &Map::new()).expect_err("it raises").to_string();
    assert!(error.starts_with("render chat template"), "{error}");
    assert!(error.ends_with("chat_template.jinja`: line 2: no user"), "{error}");
    let broken = folder(&[("chat_template.jinja", "ok\n{% if %}")]);
    let error = ChatTemplate::read(broken.path()).expect_err("no condition").to_string();
    assert!(error.starts_with("parse chat template") && error.contains("line 2"), "{error}");
    let garbled = folder(&[("tokenizer_config.json", "{")]);
    let error = ChatTemplate::read(garbled.path()).expect_err("no JSON").to_string();
    assert!(error.starts_with("read chat template") && error.contains("tokenizer_config.json"), "{error}");
}

#[test]
fn a_template_that_would_not_end_is_stopped() {
    for (source, said) in [
        ("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}", "fuel"),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "recursion"),
        ("{{ [1] | tojson(indent=18446744073709551615) }}", "indent"),
        ("{{ [[1]] | tojson(indent=1000000000) }}", "at most 64"),
        ("{% for a in range(100000) %}{{ long }}{% endfor %}", "more than 67108864 bytes"),
    ] {
        let long = "x".repeat(4096);
        let variables = json!({"long": long});
        let error = template(source).render(&[], true, variables.as_object().expect("an object")).expect_err(source);
        assert!(error.to_string().contains(said), "{source}: {error}");
    }
    // What real templates do over a long conversation is nowhere near.
    let template = template(
        "{% for m in messages %}{% if m.role != 'x' %}<{{ m.role }}>{{ m.content | trim }}{% endif %}{% endfor %}",
    );
    let messages = vec![Message::user("Hi"); 10_000];
    assert!(template.render(&messages, true, &Map::new()).expect("rendered").len() == 80_000);
}
