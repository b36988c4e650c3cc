//! Arguments of `pacs eval`, `pacs eval report` and `pacs eval compare`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{ExtractionMode, Local};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Examples:
  pacs eval job.toml                                    all sets of the job, with its model
  pacs eval job.toml --model runs/demo/checkpoints/step-000040/model
  pacs eval --model models/qwen3-0.6b --data aime24.jsonl --data math500.parquet --preset paper
  pacs eval report runs/eval-demo                       print the report again
  pacs eval compare runs/eval-demo runs/eval-demo-model  which model is better, and how sure

The folder of the evaluation gets report.md, report.json (with a table of problems) and pass_at_k.svg. Ctrl-C ends at once with
exit code 75; the same command continues with every sample that there is, also after a kill. docs/EVALUATION.md says how the
numbers are estimated.
Exit codes: 0 done, 2 usage, 70 bug, 75 start again, 78 wrong job spec, model or data.")]
pub(crate) struct Eval {
    #[command(subcommand)]
    pub(crate) command: Option<EvalCommand>,
    #[command(flatten)]
    pub(crate) measure: Measure,
}

#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Writes the report of an evaluation, or of one of a training run, again.
    Report(EvalReport),
    /// Compares two or more models problem by problem.
    Compare(EvalCompare),
}

/// What to evaluate, and how.
#[derive(Debug, Args)]
pub(crate) struct Measure {
    /// The job spec whose model, sets, sampling and verifier are used. Without it give --model and --data.
    pub(crate) job: Option<PathBuf>,
    /// Evaluate this model (a folder, or OWNER/NAME of the hub) instead of the job's. The job's chat template applies where both have the same tokenizer, as a
    /// checkpoint of the job has; otherwise the model's own.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Evaluate on this file (.jsonl, .parquet, …, or hf://datasets/… of the hub), named after the file or NAME, instead of the job's sets; may be given several
    /// times.
    #[arg(long, value_name = "[NAME=]FILE")]
    pub(crate) data: Vec<String>,
    /// Evaluate on this set of the job only; may be given several times. `evaluation` is the set of `data.evaluation`.
    #[arg(long, value_name = "NAME", conflicts_with = "data")]
    pub(crate) set: Vec<String>,
    /// Use published settings. `paper`: temperature 0.6, top-p 0.95, 128 samples, the paper's prompt suffix.
    #[arg(long, value_enum)]
    pub(crate) preset: Option<Preset>,
    /// Samples per problem; pass@k is estimated up to this k, and well up to a quarter of it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) samples: Option<u32>,
    /// Sampling temperature of all sets.
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f64>,
    /// Nucleus (top-p) of all sets; 1 is off.
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f64>,
    /// Limit of an answer, in tokens.
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<u32>,
    /// Use only the first N problems of each set.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) limit: Option<u32>,
    /// Prompt suffix: text appended to every question.
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt_suffix: Option<String>,
    /// Field of --data that holds the question. Default: question.
    #[arg(long, value_name = "NAME", requires = "data")]
    pub(crate) question_field: Option<String>,
    /// Field of --data that holds the reference answer. Default: answer.
    #[arg(long, value_name = "NAME", requires = "data")]
    pub(crate) answer_field: Option<String>,
    /// Where the built-in verifier looks for answers.
    #[arg(long, value_enum)]
    pub(crate) extraction: Option<ExtractionMode>,
    /// Seed of the sampling noise.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Number of rollout workers on this machine.
    #[arg(long, value_name = "N")]
    pub(crate) rollouts: Option<u32>,
    /// Number of verifiers on this machine.
    #[arg(long, value_name = "N")]
    pub(crate) verifiers: Option<u32>,
    /// Generate on the GPUs of this machine.
    #[arg(long)]
    pub(crate) cuda: bool,
    /// Folder of the evaluation. Default: runs/eval-<name of the job or model>.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) local: Local,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Preset {
    /// Settings of the PACS paper's evaluation.
    Paper,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs eval report runs/eval-demo
  pacs eval report runs/demo --step 40          a measurement of a training run")]
pub(crate) struct EvalReport {
    /// Folder of an evaluation or of a training run.
    pub(crate) folder: PathBuf,
    /// The evaluation after N training steps. Default: the newest.
    #[arg(long, value_name = "N")]
    pub(crate) step: Option<u64>,
    /// Print one JSON document for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs eval compare runs/eval-start runs/eval-trained --output comparison
  pacs eval compare runs/demo@0 runs/demo@40    two steps of one training run

The first is what the others are compared with. Only problems that all of them have are counted.")]
pub(crate) struct EvalCompare {
    /// Folders of evaluations or training runs; `FOLDER@STEP` is the evaluation after STEP training steps.
    #[arg(required = true, num_args = 2.., value_name = "FOLDER[@STEP]")]
    pub(crate) folders: Vec<String>,
    /// Compare on this set only; may be given several times.
    #[arg(long, value_name = "NAME")]
    pub(crate) set: Vec<String>,
    /// Write compare.md, compare.json and a plot for each set into this folder.
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Print one JSON document for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}
