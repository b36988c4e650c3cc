//! Chat templates that double, nest and compare without end: each is one error in bounded time and memory, in whatever way it
//! creates its values.

use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use pacs_text::{ChatTemplate, Message, TemplateError, render_apart, serve_templates};
use serde_json::Map;

/// Longest that a template may take: its processor time, and what a busy machine makes of that.
const PATIENCE: Duration = Duration::from_secs(60);

/// Not a test: what the children of the tests below do.
#[test]
#[ignore = "the part of a child process"]
fn renders_for_its_parent() {
    std::process::exit(i32::from(serve_templates() != ExitCode::SUCCESS));
}

fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
    render_apart(&["--exact", "renders_for_its_parent", "--ignored", "--nocapture"]);
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs::write(dir.path().join("chat_template.jinja"), source).expect("written");
    ChatTemplate::read(dir.path())
}

fn rendered(template: &ChatTemplate) -> Result<String, TemplateError> {
    template.render(&[Message::user("Hi")], true, &Map::new())
}

/// Memory that this process has ever had.
fn most_resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Checks that a template fails, in words that hold one of `said`, and takes none of this process's memory.
fn fails(source: &str, said: &[&str]) {
    let (began, before) = (Instant::now(), most_resident());
    let ended = template(source).and_then(|template| rendered(&template));
    let Err(error) = ended else { panic!("{source} is rendered") };
    let error = error.to_string();
    assert!(said.iter().any(|said| error.contains(said)), "{source}: {error}");
    assert!(error.contains("chat_template.jinja`: ") && error.len() < 10_000, "{source}: {error}");
    assert!(began.elapsed() < PATIENCE, "{source} takes {:?}", began.elapsed());
    // A text of 64 MiB may be on its way here when it is refused.
    let grown = most_resident().saturating_sub(before);
    assert!(grown < 200 << 20, "{source} takes {grown} bytes of its reader");
}

const MEMORY: &[&str] = &["MiB of memory"];

#[test]
fn texts_that_double_are_stopped() {
    let start = "{% set ns = namespace(s='0123456789abcdef', n=0) %}{% for i in range(60) %}";
    for step in [
        "{% set ns.s = ns.s ~ ns.s %}",
        "{% set ns.s = ns.s + ns.s %}",
        "{% set ns.s = [ns.s, ns.s] | join(ns.s) %}",
        "{% set ns.s = ns.s | replace('0', ns.s) %}",
        "{% set ns.s = ns.s.replace('0', ns.s) %}",
        "{% set ns.s = '%s%s' | format(ns.s, ns.s) %}",
        "{% set ns.s = ns.s.join([ns.s, ns.s]) %}",
        "{% set ns.s = [ns.s, ns.s] | tojson %}",
        "{% set ns.s = ([ns.s, ns.s] | string) %}",
        "{% set ns.s = {'a': ns.s, 'b': ns.s} | tojson(indent=2) %}",
        "{% set ns.s = ns.s ~ (ns.s | upper) ~ (ns.s | title) %}",
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
        "{% set ns.s %}{% filter upper %}{{ ns.s }}{{ ns.s }}{% endfilter %}{% endset %}",
        "{% set ns.s = ([ns.s, ns.s] | pprint) %}",
        "{% set ns.s = (ns.s ~ '\\n' ~ ns.s) | indent(16, true) %}",
    ] {
        fails(&format!("{start}{step}{{% endfor %}}{{{{ ns.s | length }}}}"), MEMORY);
    }
    // By a macro, and by inheritance of scope in a loop that calls itself.
    fails(
        "{% macro m(s, n) %}{% if n > 0 %}{{ m(s ~ s, n - 1) }}{% else %}{{ s | length }}{% endif %}{% endmacro %}{{ m('0123456789abcdef', 60) }}",
        &["MiB of memory", "recursion"],
    );
}

#[test]
fn long_values_of_few_instructions_are_stopped() {
    for source in [
        // Each is within the library's own limit of one repetition.
        "{% set ns = namespace(l=[]) %}{% for i in range(1000) %}{% set ns.l = ns.l + ['x' * (99999999 + i * 0)] %}{% endfor %}{{ ns.l | length }}",
        "{{ ([0] * 2000000000) | list | length }}",
        "{{ (range(100000) | list * 100000) | list | length }}",
        "{{ ('x' * 90000000) | list | length }}",
        "{{ ('x ' * 45000000).split() | length }}",
        "{{ ('x' * 90000000) | indent(1, true) | batch(1) | list | length }}",
        "{{ [1] | batch(2000000000, 'x') | list | length }}",
        "{{ '%2000000000d' | format(1) | length }}",
        "{{ '%.2000000000f' | format(1.5) | length }}",
        "{{ ('x\\n' * 40000000) | indent(1000000) | length }}",
        "{{ 'x' | indent(4000000000, true) | length }}",
        "{{ ('x' * 99999999)[::-1] | length }}",
    ] {
        fails(
            source,
            &[
                "MiB of memory",
                "processor time",
                "too large",
                "too many",
                "fuel",
                "invalid",
                "cannot",
                "format",
                "panics",
            ],
        );
    }
}

#[test]
fn constants_are_bounded_before_anything_runs() {
    let constants = (0..1000).map(|i| format!("{{% if false %}}{{{{ 'x' * (99000000 + {i}) }}}}{{% endif %}}"));
    fails(&constants.collect::<String>(), MEMORY);
}

#[test]
fn values_that_hold_each_other_are_stopped() {
    let start = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(64) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}";
    for end in [
        // The comparison would take 2⁶⁴ steps of one instruction; `in`, `sort`, `unique` and keys of maps do the same.
        "{{ ns.a == ns.b }}",
        "{{ ns.a }}",
        "{{ ns.a | tojson }}",
    ] {
        fails(&format!("{start}{end}"), &["MiB of memory", "processor time", "bytes"]);
    }
    // Deeper than the stack of whoever drops it.
    fails(
        "{% set ns = namespace(a=[]) %}{% for i in range(90000) %}{% for j in range(10) %}{% set ns.a = [ns.a] %}{% endfor %}{% endfor %}x",
        &["MiB of memory", "fuel"],
    );
}

#[test]
fn an_ended_child_is_restarted() {
    let template = template("{{ messages[0].content }}{% if messages[0].content == 'double' %}{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{% endif %}").expect("valid");
    let render = |content: &str| template.render(&[Message::user(content)], true, &Map::new());
    for _ in 0..2 {
        assert_eq!(render("a").expect("rendered"), "a");
        assert!(render("double").is_err());
    }
    assert_eq!(render("b").expect("rendered"), "b");
}

#[test]
fn a_signal_to_all_processes_of_a_job_is_no_error() {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    let template = template("{{ messages[0].content }}").expect("valid");
    let own = std::process::id();
    let mut ended = 0;
    for entry in fs::read_dir("/proc").expect("processes") {
        let Ok(pid) = entry.expect("an entry").file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
        let is_own =
            status.lines().any(|line| line.strip_prefix("PPid:").is_some_and(|id| id.trim() == own.to_string()));
        if is_own && kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok() {
            ended += 1;
        }
    }
    assert!(ended > 0, "the template has a process");
    assert_eq!(rendered(&template).expect("rendered by another one"), "Hi");
}

#[test]
fn what_a_template_says_is_the_same_in_a_process_of_its_own() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
    let mut tried = 0;
    for model in fs::read_dir(dir).expect("models") {
        let path = model.expect("an entry").path().join("chat_template.jinja");
        if let Ok(source) = fs::read_to_string(&path) {
            let text = rendered(&template(&source).expect("valid")).expect("rendered");
            assert!(text.contains("Hi"), "{}: {text}", path.display());
            tried += 1;
        }
    }
    assert!(tried > 0);
    let error = template("ok\n{% if %}").expect_err("no condition").to_string();
    assert!(error.starts_with("parse chat template") && error.contains("line 2"), "{error}");
    let error = rendered(&template("a\n{{ raise_exception('no') }}").expect("valid")).expect_err("raised").to_string();
    assert!(error.starts_with("render chat template") && error.ends_with("line 2: no"), "{error}");
}
