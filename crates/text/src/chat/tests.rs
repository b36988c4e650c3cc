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

#[test]
fn marks_of_what_to_train_on_change_nothing() {
    let marked = "{% for m in messages %}\n  {% generation %}\n{{ m.content }}\n  {%- endgeneration %}\n\n{% endfor %}{% raw %}{% x{% endraw %}";
    let always = marked.replace("generation %}", "if true %}").replace("endif true", "endif");
    assert_eq!(rendered(&template(marked)), rendered(&template(&always)));
    let case = "{% for message in messages %}{% if message['role']=='user' %}<|im_start|>user\n\
                {% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n{% endif %}{% endfor %}";
    assert_eq!(rendered(&template(case)), "<|im_start|>user\nHi<|im_end|>\n".trim_end());
    assert_eq!(rendered(&template("{%-generation-%} a {%-endgeneration-%} b")), "ab");
}

#[test]
fn templates_may_write_the_day() {
    let template = template("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}");
    let day: Day = "2024-07-26".parse().expect("a day");
    assert_eq!(rendered(&template.on(day).expect("compiled before")), "26 Jul 2024");
}

#[test]
fn tokens_that_only_the_map_names_are_known() {
    let dir = folder(&[
        ("special_tokens_map.json", r#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#),
        (
            "tokenizer_config.json",
            "\u{feff}{\"eos_token\": \"<end>\", \"chat_template\": \"{{ bos_token }}|{{ eos_token }}\"}",
        ),
    ]);
    assert_eq!(rendered(&ChatTemplate::read(dir.path()).expect("valid")), "<s>|<end>");
}

#[test]
fn variables_become_defaults_of_the_text() {
    let source = "\n{{ mood }} {{ list[1].a }} {{ flag }} {{ none_too is none }}";
    let variables =
        json!({"mood": "\"calm\"\n", "list": [1, {"a": 2.5}], "flag": false, "none_too": null, "messages": []});
    let variables = variables.as_object().expect("an object");
    let text = template(source).with_defaults(variables).expect("there is a template");
    let expected = template(source).render(&[Message::user("Hi")], true, variables).expect("rendered");
    assert_eq!(rendered(&template(&text)), expected);
    let told = json!({"mood": "told"});
    let told = template(&text).render(&[], true, told.as_object().expect("an object")).expect("rendered");
    assert!(told.contains("told") && !told.contains("calm"), "{told}");
}

fn case(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases").join(path)
}

#[test]
fn the_case_of_a_generation_tag_is_rendered_without_it() {
    let template = ChatTemplate::read(&case("generation-tag")).expect("valid");
    let messages = [Message::user("Hi"), Message { role: "assistant".into(), content: "Yes".into() }];
    let text = template.render(&messages, true, &Map::new()).expect("rendered");
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|><|im_start|>assistant\n");
}

#[test]
fn the_case_of_a_begin_token_in_the_map_begins_with_it() {
    let template = ChatTemplate::read(&case("bos-map")).expect("valid");
    assert!(rendered(&template).starts_with("<|begin_of_text|><|start_header_id|>system"), "{}", rendered(&template));
}

/// What the templates of current instruction models use of Jinja and Python, with what transformers makes of it.
#[test]
fn idioms_of_current_templates_are_known() {
    let messages = [
        Message::system(" S "),
        Message::user("Hi"),
        Message { role: "assistant".into(), content: "<think>\nt\n</think>\n\nYes".into() },
        Message::user("Why?"),
    ];
    let variables = json!({"custom": {"b": 1, "a": [1, 2]}, "nothing": null, "enable_thinking": false});
    let variables = variables.as_object().expect("an object");
    for (source, expected) in [
        // Qwen, DeepSeek: the reasoning of earlier answers is left out.
        ("{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}", "Yes"),
        ("{{ messages[2]['content'].split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}", "t"),
        ("{% for m in messages[::-1] %}{{ (messages|length - 1) - loop.index0 }}{% endfor %}", "3210"),
        (
            "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.last }}",
            "3",
        ),
        (
            "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
            "<think></think>",
        ),
        (
            "{% if messages[1].content is string %}s{% endif %}{% if custom is mapping %}m{% endif %}{% if custom.a is iterable %}i{% endif %}{% if custom is not string %}n{% endif %}",
            "smin",
        ),
        // Llama, Mistral, Gemma: roles alternate, and the system message is taken out.
        (
            "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] | trim %}{% endif %}{{ system }}{{ loop_messages | length }}",
            "S3",
        ),
        (
            "{% for m in messages[1:] %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}{% endfor %}ok",
            "ok",
        ),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "2"),
        (
            "{{ messages | rejectattr('role', 'equalto', 'system') | map(attribute='role') | join(',') }}",
            "user,assistant,user",
        ),
        (
            "{% for m in messages %}{{ '<start_of_turn>' + (m.role if m.role != 'assistant' else 'model') + '|' }}{% endfor %}",
            "<start_of_turn>system|<start_of_turn>user|<start_of_turn>model|<start_of_turn>user|",
        ),
        // Texts as of Python.
        (
            "{{ 'user'.title() }}{{ 'x'.upper() }}{{ ' a '.strip() }}{{ 'ab'.startswith('a') }}{{ 'ab'.endswith('a') }}{{ 'aXa'.replace('X', '-') }}",
            "UserXaTrueFalsea-a",
        ),
        (
            "{{ 'a' in 'abc' }}{{ 'role' in messages[0] }}{{ 'tool_calls' in messages[0] }}{{ messages[0].get('tool_calls', 'none') }}",
            "TrueTrueFalsenone",
        ),
        (
            "{% for k, v in custom.items() %}{{ k }}={{ v }};{% endfor %}{% for k in custom | dictsort %}{{ k[0] }}{% endfor %}",
            "b=1;a=[1, 2];ab",
        ),
        ("{{ custom | tojson }}{{ custom.a | tojson(ensure_ascii=False) }}", "{\"b\": 1, \"a\": [1, 2]}[1, 2]"),
        (
            "{{ ([1] + [2]) | length }}{{ 'a' ~ 1 ~ none }}{{ nothing is none }}{{ tools is none }}{{ tools is not none }}",
            "2a1NoneTrueTrueFalse",
        ),
        (
            "{{ nothing | default('d', true) }}{{ missing | default('e') }}{{ [1, 2, 3] | last }}{{ [3, 1] | first }}{{ ['a', 'b'][-1] }}{{ 'abcdef'[1:3] }}",
            "de33bbc",
        ),
        (
            "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{% if loop.index0 == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
            "system",
        ),
        (
            "{%- macro turn(role, text='') -%}<{{ role }}>{{ text }}{%- endmacro -%}{{ turn('user', text='x') }}{{ turn(role='a') }}",
            "<user>x<a>",
        ),
        (
            "{% set text %}a{{ 1 }}{% endset %}{{ text }}{% set d = {'x': 1, 'y': [2]} %}{{ d.x }}{{ d['y'][0] }}{{ dict(z=3).z }}",
            "a1123",
        ),
        (
            "{% if messages[-1].role == 'user' and not (tools or documents) %}y{% else %}n{% endif %}{{ 7 // 2 }}{{ 7 % 4 }}",
            "y33",
        ),
        ("{%- for m in messages -%}\n  {%- if loop.first %}a{% elif loop.last %}z{% endif -%}\n{%- endfor %}", "az"),
    ] {
        let text =
            template(source).render(&messages, true, variables).unwrap_or_else(|error| panic!("{source}: {error}"));
        assert_eq!(text, expected, "{source}");
    }
}
