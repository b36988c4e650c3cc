//! `cargo xtask demo`: from a fresh clone to a trained model. The demo itself is `pacs demo`.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::process::{cargo, check, command, target};
use crate::setup;

/// Job spec of the demo.
const JOB: &str = "deploy/jobs/demo.toml";

/// Model and data of the demo.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cargo xtask demo\n  cargo xtask demo --dataset problems.jsonl --model ../Qwen2.5-0.5B-Instruct"
)]
pub(crate) struct Arguments {
    /// Problems of your own: a file (JSON lines, Parquet, CSV, …; docs/DATA.md says from which fields), or hf://datasets/… of the hub.
    #[arg(long)]
    dataset: Option<PathBuf>,
    /// A Hugging Face folder of the Qwen2, Qwen2.5, Qwen3 or Llama 3 architecture, or OWNER/NAME of the hub.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Where the run is kept [default: runs/demo, with the names of the model and data set when they are given]
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Anything else for `pacs run`.
    #[arg(last = true)]
    run_options: Vec<String>,
}

/// Replaces this process by the demo, so that Ctrl-C and the exit code are its own. Returns only on failure.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::libtorch()?;
    println!("building (some minutes the first time)");
    check("build the trainer", &mut cargo(&["build", "--release", "--workspace", "--bins"]))?;
    let mut demo = command(target().join("release/pacs"));
    demo.args(["demo", "--job", JOB]);
    let paths = [("--run-dir", &arguments.run_dir), ("--dataset", &arguments.dataset), ("--model", &arguments.model)];
    for (option, path) in paths {
        if let Some(path) = path {
            // A name of the hub is none of a file.
            let is_of_hub = path.starts_with("hf:") || (option == "--model" && !path.exists());
            demo.arg(option).arg(if is_of_hub { path.clone() } else { absolute(path)? });
        }
    }
    demo.arg("--").args(&arguments.run_options);
    Err(demo.exec()).context("start the demo")
}

/// Makes a path absolute: the demo runs in the repository's root, the user may be elsewhere.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("make {} absolute", path.display()))
}
