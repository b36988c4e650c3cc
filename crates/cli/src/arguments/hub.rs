//! What goes to and comes from the Hugging Face hub.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs fetch Qwen/Qwen3-0.6B hf://datasets/openai/gsm8k/main/train
  pacs fetch job.toml                   all that a job names, for nodes without a network
  HF_HUB_OFFLINE=1 pacs fetch job.toml  look whether all of it is here

Files go into the hub's cache (HF_HOME), which other programs of the hub share; a download that broke off is continued. Prints
the path of each. HF_TOKEN is sent where access takes one; HF_ENDPOINT names a mirror. docs/MODELS.md says which files are taken.
Exit codes: 0 done, 2 usage, 75 the network or disk fails, 78 it cannot be had.")]
pub(crate) struct Fetch {
    /// A model (OWNER/NAME, with @REVISION), a data set (hf://datasets/OWNER/NAME/FILE), or a job spec (.toml).
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
    /// Print a JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs push runs/demo/checkpoints/step-000040 me/my-model --private
  pacs push runs/demo/checkpoints/step-000040/model me/my-model --revision step-40 --dry-run

Makes the repository and the branch where they are not there, uploads what the hub lacks, and commits all files at once.
The token of HF_TOKEN, or of the file that `hf auth login` writes, has to be one that may write.
Exit codes: 0 done, 2 usage, 75 the network fails, 78 refused.")]
pub(crate) struct Push {
    /// Folder of an exported model, or of a checkpoint that has one.
    pub(crate) folder: PathBuf,
    /// Where to: OWNER/NAME.
    pub(crate) repo: String,
    /// The branch. Default: main.
    #[arg(long, value_name = "BRANCH")]
    pub(crate) revision: Option<String>,
    /// Make the repository private, if it has to be made.
    #[arg(long)]
    pub(crate) private: bool,
    /// What the commit says. Default: Upload <name of the checkpoint>.
    #[arg(long, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    /// Send nothing; list what would be pushed.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print one JSON document for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}
