//! `docs/METRICS.md` lists exactly the metrics that runs write.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use pacs_tests::{Job, root};
use serde_json::Value;

/// Returns the names in the first column of the tables under the heading that names `file`.
fn documented(file: &str) -> Result<BTreeSet<String>> {
    let text = fs::read_to_string(root().join("docs/METRICS.md")).context("read docs/METRICS.md")?;
    let sections = text.split("\n## ").skip(1);
    let section = sections.filter(|section| section.lines().next().is_some_and(|title| title.contains(file)));
    let rows = section.flat_map(str::lines).filter(|line| line.starts_with("| `"));
    let names = rows.filter_map(|line| line.split('|').nth(1)).flat_map(|cell| cell.split('`').skip(1).step_by(2));
    Ok(names.map(str::to_owned).collect())
}

/// Returns the names of all metrics in the lines, with a verifier's name replaced by `<name>`.
fn names(lines: &[Value]) -> BTreeSet<String> {
    let keys = lines.iter().filter_map(Value::as_object).flat_map(|line| line.keys());
    keys.map(|name| name.replacen("verifier_label_", "verifier_<name>_", 1)).collect()
}

fn run(job: &Job) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    job.start()?.wait()?.expect_code(0);
    Ok((names(&job.json_lines("metrics.jsonl")?), names(&job.json_lines("evaluations.jsonl")?)))
}

fn assert_same(file: &str, written: &BTreeSet<String>) -> Result<()> {
    let documented = documented(file)?;
    assert!(documented.len() > 5, "docs/METRICS.md has no table of {file}");
    let missing: Vec<&String> = written.difference(&documented).collect();
    let surplus: Vec<&String> = documented.difference(written).collect();
    assert!(missing.is_empty(), "{file} has what docs/METRICS.md does not explain: {missing:?}");
    assert!(surplus.is_empty(), "docs/METRICS.md explains what {file} has not: {surplus:?}");
    Ok(())
}

/// A mixture of experts whose rollouts record routes. Checks that its learners replay them.
fn routed() -> Result<Job> {
    let model = root().join("tests/golden/models/qwen3_moe").display().to_string();
    let job = Job::tiny()?.with("model.path", model).with("rollout.router_replay", true);
    let job = job.with("resources.learners", 2).with("resources.rollouts", 2).with("batch.steps", 2);
    job.start()?.wait()?.expect_code(0);
    let lines = job.json_lines("metrics.jsonl")?;
    assert_eq!(lines.len(), 2, "{lines:?}");
    for line in &lines {
        // In float32 engine and learner all but agree on every choice, and so on every log-prob.
        let number = |name: &str| line[name].as_f64().with_context(|| format!("{name}: {line}"));
        assert!(number("router_mismatch")? < 0.01 && number("logprob_mismatch_max")? < 1e-2, "{line}");
    }
    Ok(job)
}

/// A run of PACS, one of PPO with a KL penalty and importance weights, and one of a mixture of experts write every metric between them.
#[test]
fn what_is_written_is_documented_and_the_other_way_round() -> Result<()> {
    let pacs = Job::tiny()?.with("resources.peak_flops", 1e12).with("resources.learners", 2);
    let pacs = pacs.with("evaluation.samples_per_problem", 2).with("evaluation.temperature", 3.0);
    // A named set, so that its lines carry the name.
    let problems = pacs.path("problems.jsonl").display().to_string();
    let named = toml::Table::from_iter([("path".to_owned(), problems.into()), ("limit".to_owned(), 5.into())]);
    let pacs = pacs.with("evaluation.sets", toml::Table::from_iter([("named".to_owned(), named.into())]));
    let ppo = toml::toml! {
        kind = "ppo"
        kl_coefficient = 0.1
        importance = "truncate"
    };
    let ppo = Job::tiny()?.with_section("objective", ppo);
    let (mut steps, evaluations) = run(&pacs)?;
    steps.extend(run(&ppo)?.0);
    steps.extend(names(&routed()?.json_lines("metrics.jsonl")?));
    assert_same("metrics.jsonl", &steps)?;
    assert_same("evaluations.jsonl", &evaluations)
}

/// The quantities needed to explain a step, each with its metric name.
#[test]
fn every_step_says_what_a_step_is_judged_by() -> Result<()> {
    let documented = documented("metrics.jsonl")?;
    for (what, names) in [
        ("loss", &["loss", "value_loss"][..]),
        ("score and its calibration", &["score_abs_mean", "score_auc"]),
        ("reward", &["reward_mean", "reward_std", "reward_min", "reward_max"]),
        ("pass rate of groups", &["pass_rate", "pass_rate_share_0", "pass_rate_share_100", "mixed_share"]),
        ("entropy", &["entropy", "learner_entropy"]),
        ("divergence", &["policy_kl_k1", "policy_kl_k3", "reference_kl"]),
        ("ratio", &["ratio_mean", "ratio_max", "log_ratio_abs_mean"]),
        ("difference of the engines", &["logprob_mismatch_mean", "logprob_mismatch_max", "router_mismatch"]),
        ("gradient", &["grad_norm", "skipped_updates", "clipped_share"]),
        ("bounds", &["ratio_clipped_share", "ratio_dual_clipped_share", "value_clipped_share", "importance_cut_share"]),
        ("answer length", &["answer_tokens_correct_mean", "answer_tokens_wrong_mean", "truncated_share"]),
        ("speed", &["tokens_per_second", "trained_tokens_per_second", "model_flops_utilisation"]),
        ("time", &["sampling_seconds", "training_seconds", "seconds_gradient", "seconds_optimizer", "seconds_publish"]),
        ("communication", &["communication_bytes", "seconds_communication", "communication_hidden_share"]),
        ("memory", &["memory_used_bytes"]),
    ] {
        for name in names {
            assert!(documented.contains(*name), "{what}: docs/METRICS.md has no `{name}`");
        }
    }
    Ok(())
}
