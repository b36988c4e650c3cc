//! `pacs-worker replay`: takes the steps of the file, refuses what it cannot train on, and moves the weights to where
//! plain PyTorch moves them.

mod support;

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pacs_model::{ModelConfig, Parameters};
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_types::mix;
use serde_json::{Value, json};
use support::{failure, golden, lines, text, worker};

/// A job of 4 groups a step in two mini-batches. With this epsilon AdamW is nearly gradient descent, which does not blow
/// up rounding in a gradient that is almost zero; the weights move a hundred times further than they may differ.
fn job(model: &Path, objective: &str) -> String {
    format!(
        "name = 'replay'\n[model]\npath = {:?}\nprecision = 'float32'\n[data.train]\npath = 'unread.jsonl'\n\
         [evaluation]\nbefore = false\nafter = false\nevery_steps = 0\n[rollout]\nmax_new_tokens = 12\n\
         samples_per_prompt = 4\ntemperature = 0.9\n[batch]\nsteps = 5\nprompts_per_step = 4\nmini_batches = 2\n\
         micro_batch_tokens = 60\n[optimizer]\nlearning_rate = 0.05\nepsilon = 1.0\n[objective]\n{objective}\n",
        text(model)
    )
}

/// Rows of 13 groups: three steps, and a group that is none. Samples have 1 to 11 tokens; the second group has one
/// label only.
fn rows() -> Vec<Value> {
    let number = |parts: [u64; 3]| mix(parts.iter().fold(11, |key, part| mix(key ^ part)));
    let token = |parts| number(parts) % 300;
    let mut rows = Vec::new();
    for group in 0..13 {
        let prompt: Vec<u64> = (0..3 + number([group, 0, 1]) % 6).map(|i| token([group, i, 2])).collect();
        for sample in 0..4 {
            let tokens: Vec<u64> =
                (0..1 + number([group, sample, 3]) % 11).map(|i| token([group * 10 + sample, i, 4])).collect();
            let label = if group == 1 { 1 } else { number([group, sample, 5]) % 2 };
            rows.push(json!({"group": group + 100, "prompt_tokens": prompt, "tokens": tokens, "label": label,
                             "logprobs": vec![-5.9; tokens.len()], "reward": label}));
        }
    }
    rows
}

fn written(rows: &[Value]) -> String {
    rows.iter().fold(String::new(), |mut text, row| {
        writeln!(text, "{row}").expect("a string takes everything");
        text
    })
}

struct Replayed {
    _folder: tempfile::TempDir,
    job: PathBuf,
    groups: PathBuf,
    out: PathBuf,
    printed: Vec<Value>,
}

fn replay(model: &str, objective: &str) -> Replayed {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let (job, groups, out) = (at("job.toml"), at("groups.jsonl"), at("out"));
    fs::write(&job, self::job(&golden(model), objective)).expect("written");
    fs::write(&groups, written(&rows())).expect("written");
    let run = ["replay", "--job", text(&job), "--groups", text(&groups), "--out", text(&out), "--threads", "1"];
    let printed = lines(&worker(&run));
    Replayed { job, groups, out, printed, _folder: folder }
}

#[test]
fn steps_are_taken_in_the_order_of_the_file() {
    let replayed = replay("qwen3", "kind = 'pacs'");
    let steps: Vec<&Value> = replayed.printed.iter().filter(|line| line["event"] == "step").collect();
    assert_eq!(steps.len(), 3, "{:?}", replayed.printed);
    for (line, number) in steps.iter().zip(1..) {
        assert_eq!(line["step"], number);
        assert!(line["metrics"]["grad_norm"].as_f64().is_some_and(|norm| norm > 0.0), "{line}");
    }
    let config = ModelConfig::read(&replayed.out).expect("a folder that loads");
    let load = |folder: &Path| Parameters::load(folder, &config, Kind::Float, Device::Cpu).expect("loads").flat;
    let moved = load(&replayed.out) - load(&golden("qwen3"));
    assert!(moved.abs().max().double_value(&[]) > 1e-3);
    assert!(moved.isfinite().all().equal(&Tensor::from(true)));
}

#[test]
fn what_cannot_be_trained_on_is_refused_by_its_place() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let (job, groups, out) = (at("job.toml"), at("groups.jsonl"), at("out"));
    fs::write(&job, self::job(&golden("qwen3"), "kind = 'grpo'")).expect("written");
    let refused = |change: fn(&mut Vec<Value>)| {
        let mut rows = rows();
        change(&mut rows);
        fs::write(&groups, written(&rows)).expect("written");
        failure(&worker(&["replay", "--job", text(&job), "--groups", text(&groups), "--out", text(&out)]))
    };
    for (change, expected) in [
        ((|rows| rows[5]["logprobs"] = json!([])) as fn(&mut Vec<Value>), "step 1, group 101"),
        (|rows| rows[5]["tokens"][0] = json!(5000), "token 5000 lies beyond the model's 384"),
        (|rows| rows[5]["prompt_tokens"] = json!([1]), "the rows of group 101 have different prompts"),
        (|rows| rows[5]["surplus"] = json!(1), "line 6"),
        (|rows| rows[5]["reward"] = json!(null), "line 6"),
        (|rows| rows.swap(0, 7), "its rows do not stand together"),
        (|rows| rows.truncate(10), "not one whole step of 4 groups"),
    ] {
        let error = refused(change);
        assert!(error.contains(expected), "{error} does not say `{expected}`");
    }
    let none =
        failure(&worker(&["replay", "--job", text(&job), "--archive", text(folder.path()), "--out", text(&out)]));
    assert!(none.contains("samples"), "{none}");
}

/// The same three steps with plain PyTorch, where `PACS_PYTHON` names a Python that has it.
#[test]
fn weights_move_where_plain_pytorch_moves_them() {
    let Some(python) = std::env::var_os("PACS_PYTHON") else {
        eprintln!("skipped: set PACS_PYTHON to a Python 3.11 with torch to compare with plain PyTorch");
        return;
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/peers/replay.py");
    for (model, objective) in [
        ("qwen3", "kind = 'pacs'\nbeta = 0.7"),
        ("qwen2-untied", "kind = 'pacs'"),
        ("qwen3", "kind = 'grpo'\nclip_low = 0.02\nclip_high = 0.03"),
        ("qwen3", "kind = 'ppo'\ngamma = 0.99\nlambda = 0.9\nvalue_clip = 0.05\ncritic_learning_rate = 0.05"),
        ("qwen2-untied", "kind = 'ppo'\ncritic_warmup_steps = 1\ncritic_learning_rate = 0.02"),
    ] {
        let replayed = replay(model, objective);
        let peer = Command::new(&python)
            .arg(&script)
            .args(["--job", text(&replayed.job), "--groups", text(&replayed.groups), "--replayed", text(&replayed.out)])
            .output()
            .expect("PACS_PYTHON starts");
        assert!(peer.status.success(), "{}", String::from_utf8_lossy(&peer.stderr));
        let result: Value = serde_json::from_slice(&peer.stdout).expect("a JSON line");
        eprintln!("{model}: {result}");
        let number = |name: &str| result[name].as_f64().expect("a number");
        assert_eq!(result["steps"], 3);
        assert!(number("largest_difference") < 1e-5, "{model}, {objective}: {result}");
        assert!(number("largest_move") > 1e-3, "{model}, {objective}: {result}");
    }
}
