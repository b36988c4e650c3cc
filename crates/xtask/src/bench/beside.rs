//! `cargo xtask bench train | rollout`: the benchmarks of `pacs-worker`, compared with Python on the same work.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};

use crate::process::{cargo, check, command, root, target};

/// Model, and Python to compare with.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cargo xtask bench train --model models/smollm2-135m-instruct --python venv/bin/python\n  \
                  cargo xtask bench rollout --model models/smollm2-135m-instruct --python venv/bin/python -- --groups 1"
)]
pub(crate) struct Arguments {
    /// Hugging Face folder with weights.
    #[arg(long)]
    model: PathBuf,
    /// A Python that has torch, safetensors and transformers [default: ours alone is measured]
    #[arg(long)]
    python: Option<PathBuf>,
    /// Options of `pacs-worker bench`.
    #[arg(last = true)]
    options: Vec<String>,
}

/// Measures `what`, the name of both our benchmark and the program in `tests/peers`.
pub(crate) fn run(what: &str, arguments: &Arguments) -> Result<()> {
    check("build the worker", &mut cargo(&["build", "--quiet", "--release", "--workspace", "--bins"]))?;
    let model = absolute(&arguments.model)?;
    let ours = ours(what, &model, &arguments.options)?;
    let Some(python) = &arguments.python else {
        println!("{}", json!({"bench": what, "skipped": "Python was not measured: name one with --python"}));
        return Ok(());
    };
    let theirs = theirs(what, &absolute(python)?, &model, &ours)?;
    println!("{theirs}");
    let seconds = |line: &Value| line["seconds"].as_f64().context("read the seconds of a measurement");
    println!("{}", json!({"bench": what, "times_as_fast": seconds(&theirs)? / seconds(&ours)?}));
    Ok(())
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("make {} absolute", path.display()))
}

/// Prints the output of our benchmark, and returns its last line, the summary.
fn ours(what: &str, model: &Path, options: &[String]) -> Result<Value> {
    let mut worker = command(target().join("release/pacs-worker"));
    worker.args(["bench", what, "--model"]).arg(model).args(options);
    let output = worker.stderr(Stdio::inherit()).output().context("start pacs-worker")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    if !output.status.success() {
        bail!("measure with pacs-worker: it ended with {}", output.status);
    }
    let last = text.lines().last().context("read what pacs-worker measured: it printed nothing")?;
    serde_json::from_str(last).context("read what pacs-worker measured")
}

/// Runs the same work in Python.
fn theirs(what: &str, python: &Path, model: &Path, ours: &Value) -> Result<Value> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut script = command(python);
    script.arg(root().join("tests/peers").join(format!("{what}.py"))).arg("--model").arg(model);
    script.args(["--threads", &text(&ours["model"]["threads"]), "--precision", &text(&ours["model"]["precision"])]);
    let mut child = script
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", python.display()))?;
    let mut input = child.stdin.take().context("reach the standard input of Python")?;
    input.write_all(ours["work"].to_string().as_bytes()).context("give Python its work")?;
    drop(input);
    let output = child.wait_with_output().context("wait for Python")?;
    if !output.status.success() {
        bail!("measure with {}: it ended with {}", python.display(), output.status);
    }
    serde_json::from_slice(&output.stdout).context("read what Python measured")
}
