//! `pacs-worker replay`: takes the steps of the file, refuses what it cannot train on, and moves the weights to where
//! plain PyTorch moves them.

mod support;

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pacs_model::{Model, ModelConfig, Parameters, score};
use pacs_spec::ObjectiveKind;
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_types::mix;
use serde_json::{Value, json};
use support::{failure, golden, lines, text, worker};

/// A job of 4 groups a step in two mini-batches. With this epsilon AdamW is nearly gradient descent, which does not blow
/// up rounding in a gradient that is almost zero; the weights move a hundred times further than they may differ. The
/// gradient's norm is not clipped, so that the size of a loss is seen as well as its direction.
fn job(case: &Case) -> String {
    let Case { model, objective, batch, max_grad_norm } = case;
    format!(
        "name = 'replay'\n[model]\npath = {:?}\nprecision = 'float32'\n[data.train]\npath = 'unread.jsonl'\n\
         [evaluation]\nbefore = false\nafter = false\nevery_steps = 0\n[rollout]\nmax_new_tokens = 12\n\
         samples_per_prompt = 4\ntemperature = 0.9\n[batch]\nsteps = 5\nprompts_per_step = 4\nmini_batches = 2\n\
         micro_batch_tokens = 60\n{batch}\n[optimizer]\nlearning_rate = 0.05\nepsilon = 1.0\n\
         weight_decay = 0.001\nmax_grad_norm = {max_grad_norm:?}\n[objective]\n{objective}\n",
        text(&golden(model))
    )
}

/// Rows of 13 groups: three steps, and a group that is none. Samples have 1 to 11 tokens; the second group has one
/// label and one reward only, the rewards of the others are not quite their labels.
///
/// Log-probs of the rollout engine are those of the model, less or more by up to 0.4: an engine that is not quite the
/// learner's.
fn rows(model: &str) -> Vec<Value> {
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
            rows.push(json!({"group": group + 100, "prompt_tokens": prompt, "tokens": tokens, "label": label,
                             "reward": reward,
                             "truncated": number([group, sample, 8]).is_multiple_of(4)}));
        }
    }
    let noise = |row: usize, i: usize| (number([row as u64, i as u64, 7]) % 100) as f64 / 125.0 - 0.4;
    let scored = logprobs(model, &rows);
    for ((place, row), logprobs) in rows.iter_mut().enumerate().zip(scored) {
        let noisy: Vec<f64> = logprobs.iter().enumerate().map(|(i, x)| f64::from(*x) + noise(place, i)).collect();
        row["logprobs"] = json!(noisy);
    }
    rows
}

/// Log-probs of the answers under the golden model.
fn logprobs(model: &str, rows: &[Value]) -> Vec<Vec<f32>> {
    let config = ModelConfig::read(&golden(model)).expect("golden model");
    let parameters = Parameters::load(&golden(model), &config, Kind::Float, Device::Cpu).expect("golden model");
    let tokens = |row: &Value, name: &str| -> Vec<u32> {
        let tokens = row[name].as_array().expect("a list").iter();
        tokens.map(|token| token.as_u64().expect("a token") as u32).collect()
    };
    let items = rows.iter().map(|row| (tokens(row, "prompt_tokens"), tokens(row, "tokens"))).collect();
    score(&Model::new(&config, &parameters), items, 0.9, 1000).expect("scores")
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

fn replay(case: &Case) -> Replayed {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    let (job, groups, out) = (at("job.toml"), at("groups.jsonl"), at("out"));
    fs::write(&job, self::job(case)).expect("written");
    fs::write(&groups, written(&rows(case.model))).expect("written");
    let run = ["replay", "--job", text(&job), "--groups", text(&groups), "--out", text(&out), "--threads", "1"];
    let printed = lines(&worker(&run));
    Replayed { job, groups, out, printed, _folder: folder }
}

#[test]
fn steps_are_taken_in_the_order_of_the_file() {
    let replayed = replay(&case("qwen3", "kind = 'pacs'"));
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
    fs::write(&job, self::job(&case("qwen3", "kind = 'grpo'"))).expect("written");
    let refused = |change: fn(&mut Vec<Value>)| {
        let mut rows = rows("qwen3");
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
        (|rows| rows.swap(0, 7), "its rows are not consecutive"),
        (|rows| rows.truncate(10), "not one whole step of 4 groups"),
    ] {
        let error = refused(change);
        assert!(error.contains(expected), "{error} does not say `{expected}`");
    }
    let none =
        failure(&worker(&["replay", "--job", text(&job), "--archive", text(folder.path()), "--out", text(&out)]));
    assert!(none.contains("samples"), "{none}");
}

/// What is replayed.
#[derive(Clone, Debug)]
struct Case {
    model: &'static str,
    objective: &'static str,
    /// More of the section `batch`.
    batch: &'static str,
    max_grad_norm: f64,
}

fn case(model: &'static str, objective: &'static str) -> Case {
    Case { model, objective, batch: "", max_grad_norm: 1e4 }
}

impl Case {
    fn batch(self, batch: &'static str) -> Self {
        Self { batch, ..self }
    }

    fn clipped(self, max_grad_norm: f64) -> Self {
        Self { max_grad_norm, ..self }
    }
}

/// Settings change so that they decide something: bounds are narrow enough to be met, and caps to be exceeded. The
/// penalty `abs` is in the reward only: as a loss its derivative where policy and reference are one is the sign of a
/// rounding error. The score `grpo` divides by the deviation of proxies, which is 0 in a first update: without a clip the
/// step would be a hundred thousand times too large. Some others are clipped because their steps are so large that rounding
/// grows in them.
fn cases() -> Vec<Case> {
    vec![
        case("qwen3", "kind = 'pacs'").clipped(0.3),
        case("qwen3", "kind = 'pacs'\nbeta = 0.7"),
        case("qwen2-untied", "kind = 'pacs'"),
        case("qwen3", "kind = 'pacs'\nscore = 'dr_grpo'\nlabel_weights = 'none'"),
        case("qwen3", "kind = 'pacs'\nscore = 'grpo'").clipped(1.0),
        case("qwen3", "kind = 'pacs'\nscore = 'naive'\nlabel_weights = 'only_positive'"),
        case("qwen3", "kind = 'pacs'\nbeta = 5.0\nlabel_weights = 'only_negative'"),
        case("qwen3", "kind = 'pacs'\nreward_method = 'mean_logprob'\nbeta = 3.0"),
        case("qwen3", "kind = 'pacs'\nactor_term = true").clipped(1.0),
        case("qwen3", "kind = 'pacs'\nreference_reset_steps = 2"),
        case("qwen3", "kind = 'pacs'\nreference_reset_steps = 2\nreset_optimizer = true"),
        case("qwen3", "kind = 'pacs'\nreference_reset_steps = 3\nscore = 'grpo'").clipped(1.0),
        case("qwen3", "kind = 'pacs'").batch("old_logprobs = 'rollout'"),
        case("qwen3", "kind = 'grpo'\nclip_low = 0.02\nclip_high = 0.03"),
        case("qwen3", "kind = 'grpo'\naggregation = 'token_sum_norm'\nmask_truncated = true"),
        case("qwen3", "kind = 'grpo'\nclip_low = 1.0\nclip_high = 9.0\ndual_clip = 1.2")
            .batch("old_logprobs = 'rollout'"),
        case("qwen3", "kind = 'grpo'\nkl_coefficient = 0.5"),
        case("qwen3", "kind = 'grpo'\nkl_coefficient = 2.0\nkl_kind = 'abs'\nkl_place = 'reward'"),
        case("qwen3", "kind = 'grpo'\nentropy_coefficient = 0.1"),
        case("qwen3", "kind = 'grpo'\nimportance = 'truncate'\nimportance_cap = 1.2"),
        case("qwen3", "kind = 'dr_grpo'"),
        case(
            "qwen3",
            "kind = 'dr_grpo'\nimportance = 'mask'\nimportance_cap = 1.3\nkl_coefficient = 0.3\nkl_kind = 'k1'",
        ),
        case("qwen3", "kind = 'dapo'"),
        case("qwen3", "kind = 'dapo'\nimportance = 'mask'\nimportance_level = 'sequence'\nentropy_coefficient = 0.05"),
        case("qwen3", "kind = 'gspo'"),
        case(
            "qwen3",
            "kind = 'gspo'\nclip_low = 0.2\nclip_high = 0.2\nimportance = 'truncate'\nimportance_level = 'sequence'\n\
               importance_cap = 1.1",
        ),
        case("qwen3", "kind = 'rloo'"),
        case("qwen3", "kind = 'rloo'\nkl_coefficient = 0.4\nkl_kind = 'k2'\nreference_reset_steps = 2"),
        case("qwen3", "kind = 'rloo'\nkl_coefficient = 2.0\nkl_place = 'reward'\nentropy_coefficient = 0.02")
            .clipped(1.0),
        case("qwen3", "kind = 'reinforce_pp'\ngamma = 0.9"),
        case("qwen3", "kind = 'reinforce_pp'\nkl_coefficient = 2.0\nkl_kind = 'k1'\nkl_place = 'reward'"),
        case("qwen3", "kind = 'reinforce_pp'\nmask_truncated = true\naggregation = 'seq_mean_token_mean'"),
        case("qwen3", "kind = 'reinforce_pp_baseline'"),
        case("qwen3", "kind = 'reinforce_pp_baseline'\nkl_coefficient = 2.0\nkl_kind = 'k2'\nkl_place = 'reward'"),
        case("qwen3", "kind = 'ppo'\ngamma = 0.99\nlambda = 0.9\nvalue_clip = 0.05\ncritic_learning_rate = 0.05"),
        case("qwen2-untied", "kind = 'ppo'\ncritic_warmup_steps = 1\ncritic_learning_rate = 0.02"),
        case("qwen3", "kind = 'pacs'\nimportance = 'truncate'\nimportance_cap = 1.2").clipped(1.0),
        case("qwen3", "kind = 'pacs'\nimportance = 'mask'\nimportance_level = 'geometric'\nimportance_cap = 1.05"),
        case("qwen3", "kind = 'weighted_rloo'\npass_exponent = 0.5"),
        case("qwen3", "kind = 'weighted_rloo'\nfail_exponent = 2.0\nimportance = 'truncate'\nimportance_cap = 1.1")
            .clipped(1.0),
        case("qwen3", "kind = 'maxrl'"),
        case("qwen3", "kind = 'maxrl'\nclip_low = 0.02\nclip_high = 0.03\ndual_clip = 0.0").clipped(1.0),
        case("qwen3", "kind = 'cispo'"),
        case("qwen3", "kind = 'cispo'\nclip_low = 0.02\nclip_high = 0.02\naggregation = 'seq_mean_token_sum'"),
        case("qwen3", "kind = 'dppo'\nclip_low = 0.001\nclip_high = 0.0005\nratio_cap = 1.2"),
        case("qwen3", "kind = 'dppo'\ndivergence = 'kl'\nclip_low = 0.0001\nclip_high = 0.0001"),
        case("qwen3", "kind = 'real'"),
        case("qwen3", "kind = 'real'\ntau = 0.1"),
        case("qwen3", "kind = 'disco'").clipped(1.0),
        case("qwen3", "kind = 'disco'\ntau = 0.2\nconstraint_delta = 0.001\nconstraint_penalty = 100.0"),
        case(
            "qwen3",
            concat!(
                "kind = 'external'\ntimeout_seconds = 30.0\ncommand = ['python3', '",
                env!("CARGO_MANIFEST_DIR"),
                "/../../deploy/objectives/pairwise.py', '0.5']"
            ),
        ),
        case(
            "qwen3",
            concat!(
                "kind = 'external'\ntimeout_seconds = 31.0\ncommand = ['python3', '",
                env!("CARGO_MANIFEST_DIR"),
                "/../../deploy/objectives/pairwise.py', '2.0']"
            ),
        ),
        case(
            "qwen3",
            "kind = 'ppo'\nkl_coefficient = 1.0\nkl_kind = 'k1'\nkl_place = 'reward'\nmask_truncated = true\n\
               critic_learning_rate = 0.05",
        ),
        case(
            "qwen3",
            "kind = 'ppo'\nkl_coefficient = 0.3\nimportance = 'truncate'\nimportance_cap = 1.1\nlambda = 0.8",
        ),
    ]
}

#[test]
fn every_kind_and_every_setting_is_compared_with_plain_pytorch() {
    let tables: Vec<toml::Table> = cases().iter().map(|case| toml::from_str(case.objective).expect("TOML")).collect();
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
    let cases = cases();
    let replayed: Vec<Replayed> = cases.iter().map(replay).collect();
    every_case_is_another(&cases, &replayed);
    let mut peer = Command::new(&python);
    peer.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/peers/replay.py"));
    for Replayed { job, groups, out, .. } in &replayed {
        peer.args(["--job", text(job), "--groups", text(groups), "--replayed", text(out)]);
    }
    let results = lines(&peer.output().expect("PACS_PYTHON starts"));
    assert_eq!(results.len(), cases.len());
    let mut apart = Vec::new();
    for (result, case) in results.iter().zip(&cases) {
        eprintln!("{case:?}: {result}");
        let number = |name: &str| result[name].as_f64().expect("a number");
        if result["steps"] != 3 || number("largest_difference") >= 1e-5 || number("largest_move") <= 1e-3 {
            apart.push(format!("{case:?}: {result}"));
        }
    }
    assert!(apart.is_empty(), "{}", apart.join("\n"));
}

/// Settings that change nothing would be compared in vain.
fn every_case_is_another(cases: &[Case], replayed: &[Replayed]) {
    let load = |replayed: &Replayed| {
        let config = ModelConfig::read(&replayed.out).expect("a folder that loads");
        Parameters::load(&replayed.out, &config, Kind::Float, Device::Cpu).expect("loads").flat
    };
    let weights: Vec<Tensor> = replayed.iter().map(load).collect();
    for (i, one) in weights.iter().enumerate() {
        for (j, other) in weights.iter().enumerate().skip(i + 1).filter(|(j, _)| cases[*j].model == cases[i].model) {
            let difference = (one - other).abs().max().double_value(&[]);
            assert!(difference > 3e-5, "{:?} leads to the weights of {:?} ({difference})", cases[i], cases[j]);
        }
    }
}
