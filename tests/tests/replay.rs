//! The archive of a run is complete: replaying it reproduces the training bit for bit.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use pacs_tests::{Job, program};

/// Runs a job with two updates per step, replays its archive, and compares the weights bit for bit.
fn replays(objective: &str) -> Result<()> {
    let job = Job::tiny()?.with("batch.steps", 2).with("evaluation.before", false).with("evaluation.after", false);
    job.start_with(&["--objective", objective])?.wait()?.expect_code(0);
    let out = job.path("replayed");
    let output = Command::new(program("pacs-worker")?)
        .args(["replay", "--threads", "1", "--job"])
        .arg(job.run_path("job.toml"))
        .arg("--archive")
        .arg(job.run_path(""))
        .arg("--out")
        .arg(&out)
        .output()
        .context("start the replay")?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let trained = fs::read(job.run_path("checkpoints/step-000002/model/model.safetensors"))?;
    let replayed = fs::read(out.join("model.safetensors"))?;
    assert!(trained == replayed, "{objective}: the replayed weights are not those of the run");
    let printed = String::from_utf8_lossy(&output.stdout);
    let metrics = job.json_lines("metrics.jsonl")?;
    for (line, ours) in printed.lines().zip(&metrics) {
        let line: serde_json::Value = serde_json::from_str(line).context("read a line of the replay")?;
        for name in ["loss", "grad_norm", "trained_tokens", "truncated_share"] {
            assert_eq!(line["metrics"][name], ours[name], "{objective}, {name} of step {}", ours["step"]);
        }
    }
    Ok(())
}

#[test]
fn the_archive_of_pacs_gives_the_same_weights() -> Result<()> {
    replays("pacs")
}

#[test]
fn the_archive_of_ppo_gives_the_same_weights() -> Result<()> {
    replays("ppo")
}
