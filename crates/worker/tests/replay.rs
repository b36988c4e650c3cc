//! `pacs-worker replay`: takes the steps of the file, refuses what it cannot train on, and moves the weights to where
//! plain PyTorch moves them.

mod support;

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pacs_model::{ModelConfig, Parameters};
use pacs_spec::ObjectiveKind;
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_types::mix;
use serde_json::{Value, json};
use support::{failure, golden, lines, text, worker};

/// A job of 4 groups a step in two mini-batches. With this epsilon AdamW is nearly gradient descent, which does not blow
/// up rounding in a gradient that is almost zero; the weights move a hundred times further than they may differ.
fn job(model: &Path, objective: &str, batch: &str) -> String {
    format!(
        "name = 'replay'\n[model]\npath = {:?}\nprecision = 'float32'\n[data.train]\npath = 'unread.jsonl'\n\
         [evaluation]\nbefore = false\nafter = false\nevery_steps = 0\n[rollout]\nmax_new_tokens = 12\n\
         samples_per_prompt = 4\ntemperature = 0.9\n[batch]\nsteps = 5\nprompts_per_step = 4\nmini_batches = 2\n\
         micro_batch_tokens = 60\n{batch}\n[optimizer]\nlearning_rate = 0.05\nepsilon = 1.0\n[objective]\n{objective}\n",
        text(model)
    )
}

/// Rows of 13 groups: three steps, and a group that is none. Samples have 1 to 11 tokens; the second group has one
/// label and one reward only, the rewards of the others are not quite their labels.
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
            let reward = if group == 1 { 1.0 } else { label as f64 + number([group, sample, 6]) as f64 % 5.0 / 10.0 };
            let logprob = |i| -6.3 + (number([group * 10 + sample, i, 7]) % 100) as f64 / 125.0;
            let logprobs: Vec<f64> = (0..tokens.len() as u64).map(logprob).collect();
            rows.push(json!({"group": group + 100, "prompt_tokens": prompt, "tokens": tokens, "label": label,
                             "logprobs": logprobs, "reward": reward,
                             "truncated": number([group, sample, 8]).is_multiple_of(4)}));
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

fn replay(model: &str, objective: &str, batch: &str) -> Replayed {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let (job, groups, out) = (at("job.toml"), at("groups.jsonl"), at("out"));
    fs::write(&job, self::job(&golden(model), objective, batch)).expect("written");
    fs::write(&groups, written(&rows())).expect("written");
    let run = ["replay", "--job", text(&job), "--groups", text(&groups), "--out", text(&out), "--threads", "1"];
    let printed = lines(&worker(&run));
    Replayed { job, groups, out, printed, _folder: folder }
}

#[test]
fn steps_are_taken_in_the_order_of_the_file() {
    let replayed = replay("qwen3", "kind = 'pacs'", "");
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
    fs::write(&job, self::job(&golden("qwen3"), "kind = 'grpo'", "")).expect("written");
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

/// Model, objective, and what of the batch is not as above.
///
/// Settings change so that they decide something: bounds are narrow enough to be met, and caps to be exceeded. The
/// penalty `abs` is in the reward only: as a loss its derivative where policy and reference are one is the sign of a
/// rounding error.
const CASES: [(&str, &str, &str); 37] = [
    ("qwen3", "kind = 'pacs'\nbeta = 0.7", ""),
    ("qwen2-untied", "kind = 'pacs'", ""),
    ("qwen3", "kind = 'pacs'\nscore = 'dr_grpo'\nlabel_weights = 'none'", ""),
    ("qwen3", "kind = 'pacs'\nscore = 'grpo'", ""),
    ("qwen3", "kind = 'pacs'\nscore = 'naive'\nlabel_weights = 'only_positive'", ""),
    ("qwen3", "kind = 'pacs'\nbeta = 5.0\nlabel_weights = 'only_negative'", ""),
    ("qwen3", "kind = 'pacs'\nreward_method = 'mean_logprob'\nbeta = 3.0", ""),
    ("qwen3", "kind = 'pacs'\nactor_term = true", ""),
    ("qwen3", "kind = 'pacs'\nreference_reset_steps = 2", ""),
    ("qwen3", "kind = 'pacs'\nreference_reset_steps = 2\nreset_optimizer = true", ""),
    ("qwen3", "kind = 'pacs'\nreference_reset_steps = 3\nscore = 'grpo'", ""),
    ("qwen3", "kind = 'pacs'", "old_logprobs = 'rollout'"),
    ("qwen3", "kind = 'grpo'\nclip_low = 0.02\nclip_high = 0.03", ""),
    ("qwen3", "kind = 'grpo'\naggregation = 'token_sum_norm'\nmask_truncated = true", ""),
    ("qwen3", "kind = 'grpo'\nclip_low = 1.0\nclip_high = 9.0\ndual_clip = 1.2", "old_logprobs = 'rollout'"),
    ("qwen3", "kind = 'grpo'\nkl_coefficient = 0.5", ""),
    ("qwen3", "kind = 'grpo'\nkl_coefficient = 2.0\nkl_kind = 'abs'\nkl_place = 'reward'", ""),
    ("qwen3", "kind = 'grpo'\nentropy_coefficient = 0.1", ""),
    ("qwen3", "kind = 'grpo'\nimportance = 'truncate'\nimportance_cap = 1.2", ""),
    ("qwen3", "kind = 'dr_grpo'", ""),
    ("qwen3", "kind = 'dr_grpo'\nimportance = 'mask'\nimportance_cap = 1.3\nkl_coefficient = 0.3\nkl_kind = 'k1'", ""),
    ("qwen3", "kind = 'dapo'", ""),
    ("qwen3", "kind = 'dapo'\nimportance = 'mask'\nimportance_level = 'sequence'\nentropy_coefficient = 0.05", ""),
    ("qwen3", "kind = 'gspo'", ""),
    (
        "qwen3",
        "kind = 'gspo'\nclip_low = 0.2\nclip_high = 0.2\nimportance = 'truncate'\nimportance_level = 'sequence'\n\
               importance_cap = 1.1",
        "",
    ),
    ("qwen3", "kind = 'rloo'", ""),
    ("qwen3", "kind = 'rloo'\nkl_coefficient = 0.4\nkl_kind = 'k2'\nreference_reset_steps = 2", ""),
    ("qwen3", "kind = 'rloo'\nkl_coefficient = 2.0\nkl_place = 'reward'\nentropy_coefficient = 0.02", ""),
    ("qwen3", "kind = 'reinforce_pp'\ngamma = 0.9", ""),
    ("qwen3", "kind = 'reinforce_pp'\nkl_coefficient = 2.0\nkl_kind = 'k1'\nkl_place = 'reward'", ""),
    ("qwen3", "kind = 'reinforce_pp'\nmask_truncated = true\naggregation = 'seq_mean_token_mean'", ""),
    ("qwen3", "kind = 'reinforce_pp_baseline'", ""),
    ("qwen3", "kind = 'reinforce_pp_baseline'\nkl_coefficient = 2.0\nkl_kind = 'k2'\nkl_place = 'reward'", ""),
    ("qwen3", "kind = 'ppo'\ngamma = 0.99\nlambda = 0.9\nvalue_clip = 0.05\ncritic_learning_rate = 0.05", ""),
    ("qwen2-untied", "kind = 'ppo'\ncritic_warmup_steps = 1\ncritic_learning_rate = 0.02", ""),
    (
        "qwen3",
        "kind = 'ppo'\nkl_coefficient = 1.0\nkl_kind = 'k1'\nkl_place = 'reward'\nmask_truncated = true\n\
               critic_learning_rate = 0.05",
        "",
    ),
    ("qwen3", "kind = 'ppo'\nkl_coefficient = 0.3\nimportance = 'truncate'\nimportance_cap = 1.1\nlambda = 0.8", ""),
];

#[test]
fn every_kind_and_every_setting_is_compared_with_plain_pytorch() {
    let tables = CASES.map(|(_, objective, _)| toml::from_str::<toml::Table>(objective).expect("TOML"));
    for kind in ObjectiveKind::ALL {
        let of_kind = |table: &&toml::Table| table["kind"].as_str() == Some(kind.name());
        assert!(tables.iter().filter(of_kind).count() >= 2, "{}", kind.name());
        let settings = toml::Table::try_from(kind.defaults()).expect("a table");
        let missing: Vec<&String> =
            settings.keys().filter(|key| !tables.iter().any(|table| table.contains_key(*key))).collect();
        assert!(missing.is_empty(), "no case changes {missing:?} of {}", kind.name());
    }
}

/// The same three steps with plain PyTorch, where `PACS_PYTHON` names a Python that has it.
#[test]
fn weights_move_where_plain_pytorch_moves_them() {
    let Some(python) = std::env::var_os("PACS_PYTHON") else {
        eprintln!("skipped: set PACS_PYTHON to a Python 3.11 with torch to compare with plain PyTorch");
        return;
    };
    let replayed = CASES.map(|(model, objective, batch)| replay(model, objective, batch));
    let mut peer = Command::new(&python);
    peer.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/peers/replay.py"));
    for Replayed { job, groups, out, .. } in &replayed {
        peer.args(["--job", text(job), "--groups", text(groups), "--replayed", text(out)]);
    }
    let results = lines(&peer.output().expect("PACS_PYTHON starts"));
    assert_eq!(results.len(), CASES.len());
    let mut apart = Vec::new();
    for (result, case) in results.iter().zip(CASES) {
        eprintln!("{case:?}: {result}");
        let number = |name: &str| result[name].as_f64().expect("a number");
        if result["steps"] != 3 || number("largest_difference") >= 1e-5 || number("largest_move") <= 1e-3 {
            apart.push(format!("{case:?}: {result}"));
        }
    }
    assert!(apart.is_empty(), "{}", apart.join("\n"));
}
