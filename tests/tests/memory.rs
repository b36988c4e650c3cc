//! The memory plan that `pacs job check` prints is what training takes.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pacs_tests::program;
use serde_json::{Value, json};

/// Metrics of the last step of `pacs-worker bench train` on a model of 50 million parameters with random weights.
fn train(options: &[&str]) -> Result<Value> {
    let folder = tempfile::tempdir()?;
    let config = json!({
        "model_type": "llama", "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "eos_token_id": 7, "tie_word_embeddings": true
    });
    fs::write(folder.path().join("config.json"), config.to_string())?;
    let output = Command::new(program("pacs-worker")?)
        .args(["bench", "train", "--random-weights", "--precision", "float32", "--steps", "1", "--model"])
        .arg(folder.path())
        .args(["--groups", "4", "--samples", "4", "--prompt-tokens", "64", "--answer-tokens", "160"])
        .args(options)
        .output()
        .context("start pacs-worker")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let first: Value = serde_json::from_str(text.lines().next().context("a line")?)?;
    Ok(first["metrics"].clone())
}

#[test]
fn the_plan_is_confirmed_within_ten_percent() -> Result<()> {
    let mut used_bytes = Vec::new();
    for (limit, least_kept, most_kept) in [("0", 12.0, 12.0), ("1.5", 1.0, 11.0)] {
        let metrics = train(&["--memory-gib", limit])?;
        let number = |name: &str| metrics[name].as_f64().with_context(|| format!("{name} in {metrics}"));
        let (used, planned) = (number("memory_used_bytes")?, number("memory_planned_bytes")?);
        assert!((used / planned - 1.0).abs() < 0.1, "{used} bytes were used, {planned} planned (limit {limit})");
        let kept = number("memory_kept_layers")?;
        assert!((least_kept..=most_kept).contains(&kept), "{kept} layers were kept (limit {limit})");
        used_bytes.push(used);
    }
    assert!(used_bytes[1] < 0.9 * used_bytes[0], "recomputation saves nothing: {used_bytes:?}");
    Ok(())
}
