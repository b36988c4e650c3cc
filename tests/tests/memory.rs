//! The memory plan that `pacs job check` prints matches what training uses.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pacs_tests::program;
use serde_json::{Value, json};

/// Runs a `pacs-worker bench` command on a random model of 50 million parameters and parses its output. One thread a rank: how many
/// there are is not planned for, and other tests run meanwhile.
fn bench(name: &str, options: &[&str]) -> Result<Vec<Value>> {
    let folder = tempfile::tempdir()?;
    let config = json!({
        "model_type": "llama", "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "eos_token_id": 7, "tie_word_embeddings": true
    });
    fs::write(folder.path().join("config.json"), config.to_string())?;
    let output = Command::new(program("pacs-worker")?)
        .args(["bench", name, "--random-weights", "--precision", "float32", "--steps", "1", "--model"])
        .arg(folder.path())
        .args(["--threads", "1"])
        .args(options)
        .output()
        .context("start pacs-worker")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

/// Steps whose activations take about as much memory as the state: what is kept of layers shows.
const LARGE: [&str; 8] = ["--groups", "2", "--samples", "4", "--prompt-tokens", "64", "--answer-tokens", "160"];
/// Steps whose memory is that of the state.
const SMALL: [&str; 8] = ["--groups", "2", "--samples", "2", "--prompt-tokens", "16", "--answer-tokens", "32"];

/// Returns the metrics of the last step of `pacs-worker bench train`.
fn train(options: &[&str]) -> Result<Value> {
    let lines = bench("train", &[&LARGE[..], options].concat())?;
    Ok(lines.first().context("a line")?["metrics"].clone())
}

/// Checks that the used bytes are within a tenth of the plan, and returns them.
fn confirmed(memory: &Value, used: &str, planned: &str, what: &str) -> Result<f64> {
    let number = |name: &str| memory[name].as_f64().with_context(|| format!("{name} in {memory}"));
    let (used, planned) = (number(used)?, number(planned)?);
    ensure!((used / planned - 1.0).abs() < 0.1, "{used} bytes were used, {planned} planned ({what})");
    Ok(used)
}

/// Trains without a memory limit (activations of all layers kept) and with one (some kept), and checks the plan both times.
/// Returns the memory of the second run as a share of the first.
fn used_with_limit(limit: &str, options: &[&str], kept_layers: &[&str]) -> Result<f64> {
    let mut used_bytes = Vec::new();
    for (limit, least_kept, most_kept) in [("0", 12.0, 12.0), (limit, 1.0, 11.0)] {
        let metrics = train(&[options, &["--memory-gib", limit]].concat())?;
        used_bytes.push(confirmed(
            &metrics,
            "memory_used_bytes",
            "memory_planned_bytes",
            &format!("{options:?}, limit {limit}"),
        )?);
        for name in kept_layers {
            let kept = metrics[name].as_f64().with_context(|| format!("{name} in {metrics}"))?;
            ensure!((least_kept..=most_kept).contains(&kept), "{name}: {kept} (limit {limit})");
        }
    }
    Ok(used_bytes[1] / used_bytes[0])
}

#[test]
fn the_plan_is_confirmed_within_ten_percent() -> Result<()> {
    let share = used_with_limit("1.13", &[], &["memory_kept_layers"])?;
    assert!(share < 0.9, "recomputation saves nothing: {share}");
    Ok(())
}

#[test]
fn the_plan_holds_the_value_model_and_divides_what_is_kept_of_both() -> Result<()> {
    let both = ["memory_kept_layers", "memory_value_model_kept_layers"];
    let share = used_with_limit("2.0", &["--objective", "ppo"], &both)?;
    assert!(share < 0.95, "recomputation saves nothing: {share}");
    Ok(())
}

#[test]
fn the_plans_of_ranks_that_divide_their_state_are_confirmed_together() -> Result<()> {
    for (size, objective, sharding) in
        [(SMALL, "ppo", "replicated"), (SMALL, "ppo", "shard_optimizer"), (LARGE, "pacs", "shard_all")]
    {
        let options = ["--ranks", "2", "--objective", objective, "--sharding", sharding];
        let lines = bench("train", &[&size[..], &options].concat())?;
        let memory = &lines.last().context("a line")?["host_memory"];
        confirmed(memory, "used_bytes", "planned_bytes", &format!("{objective}, {sharding}"))?;
    }
    Ok(())
}

#[test]
fn the_plan_holds_the_copy_that_a_checkpoint_is_written_from() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let folder = folder.path().to_str().context("a name")?;
    let lines = bench("save", &[&SMALL[..], &["--folder", folder]].concat())?;
    let last = lines.last().context("a line")?;
    let used = confirmed(&last["memory"], "used_bytes", "planned_bytes", "with a copy")?;
    let state = last["state_bytes"].as_f64().context("bytes of the state")?;
    assert!(state > 0.1 * used, "the copy is so small that its absence would not be noticed");
    Ok(())
}
