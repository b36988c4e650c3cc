//! Arguments of `pacs launch slurm` and `pacs launch kubernetes`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

#[derive(Debug, Subcommand)]
pub(crate) enum LaunchCommand {
    /// Prints an sbatch script for a job, or submits it.
    Slurm(LaunchSlurm),
    /// Prints Kubernetes manifests for a job.
    Kubernetes(LaunchKubernetes),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs launch kubernetes job.toml --image registry.example/pacs:0.1 --worker-image registry.example/pacs-worker:0.1
  pacs launch kubernetes job.toml --image … --worker-image … --data-claim models | kubectl apply -f -
  pacs launch kubernetes vllm.toml --image … --worker-image … --vllm-image vllm/vllm-openai:v0.32.0 | kubectl apply -f -

Paths in the spec are those of the pods: the data claim is mounted at /data. The TLS secrets <name>-tls-<role> must be there;
docs/KUBERNETES.md says how they are made.")]
pub(crate) struct LaunchKubernetes {
    /// The job spec. Its section [resources] sets the number of workers and their devices.
    pub(crate) job: PathBuf,
    /// Image with `pacs`, for the coordinator and the verifiers.
    #[arg(long)]
    pub(crate) image: String,
    /// Image with `pacs-worker`, for learners and rollout workers.
    #[arg(long)]
    pub(crate) worker_image: String,
    /// Image with `vllm`, for the servers of jobs with `rollout.vllm.server`.
    #[arg(long)]
    pub(crate) vllm_image: Option<String>,
    /// Namespace for the manifests. The run id is derived from it and the job's name.
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub(crate) namespace: String,
    /// Run id, 32 lower-case hexadecimal digits, instead of the derived one: for a new run under a name that was used before.
    #[arg(long, value_name = "ID", value_parser = run_id)]
    pub(crate) run_id: Option<String>,
    /// Volume claim with the model and the problems, mounted read-only at /data.
    #[arg(long, value_name = "NAME", default_value = "pacs-data")]
    pub(crate) data_claim: String,
    /// Size of the volume for checkpoints, metrics and samples.
    #[arg(long, value_name = "QUANTITY", default_value = "500Gi")]
    pub(crate) run_size: String,
    /// Cores per learner, rollout worker or vLLM server.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) cpu: u32,
    /// Memory per learner, rollout worker or vLLM server, shared memory included.
    #[arg(long, value_name = "QUANTITY", default_value = "64Gi")]
    pub(crate) memory: String,
    /// Shared memory per learner or rollout worker; needs three times the weights. As much again holds the weights of vLLM servers.
    #[arg(long, value_name = "QUANTITY", default_value = "16Gi")]
    pub(crate) shm: String,
    /// Grace period of the coordinator and learners in seconds; must cover the longest step and checkpoint.
    #[arg(long, value_name = "N", default_value_t = 600, value_parser = clap::value_parser!(u32).range(30..=86_400))]
    pub(crate) grace_period: u32,
}

fn run_id(text: &str) -> Result<String, String> {
    let is_id = pacs_runtime::net::is_run_id(text);
    is_id.then(|| text.to_owned()).ok_or_else(|| "expected 32 lower-case hexadecimal digits".to_owned())
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs launch slurm job.toml                                  look at the script
  pacs launch slurm job.toml --nodes 4 --time 12:00:00 --partition gpu --submit
  pacs launch slurm job.toml --nodes 2 --setup 'module load cuda' --sbatch=--account=lab > job.sbatch
  pacs launch slurm job.toml --only rollouts --submit         more rollout workers for the run of that job

The run folder must be on a file system that all nodes share. docs/SLURM.md says what the script does when it is preempted,
loses a node or runs out of time.")]
pub(crate) struct LaunchSlurm {
    /// The job spec. Its section [resources] sets the number of workers and their devices.
    pub(crate) job: PathBuf,
    /// Submit the script with sbatch instead of printing it.
    #[arg(long)]
    pub(crate) submit: bool,
    /// Launch only workers of this role, which join the run of a job that is already launched.
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) only: Option<Only>,
    /// Number of nodes. Default: enough for the GPUs of all learners and rollout workers; 1 without GPUs.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) nodes: Option<u32>,
    /// GPUs per node, when the job computes on GPUs; each learner and rollout worker gets one.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) gpus_per_node: u32,
    /// Cores per worker. Default: `resources.threads`, or 4 when that is 0.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) cpus_per_task: Option<u32>,
    /// Time limit, as sbatch takes it. A run that needs longer is saved before the limit and requeued.
    #[arg(long, default_value = "24:00:00")]
    pub(crate) time: String,
    /// Seconds before the time limit at which the run is saved; must cover a step and a checkpoint.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(10..=65_535))]
    pub(crate) warning: u32,
    /// Slurm partition to submit to.
    #[arg(long)]
    pub(crate) partition: Option<String>,
    /// Extra option for sbatch; may be given several times, as in --sbatch=--account=lab.
    #[arg(long, value_name = "OPTION", allow_hyphen_values = true)]
    pub(crate) sbatch: Vec<String>,
    /// Shell command to run first on the batch node, such as `module load cuda`; may be given several times.
    #[arg(long, value_name = "COMMAND")]
    pub(crate) setup: Vec<String>,
    /// Folder of the run, which all nodes reach at the same path. Default: runs/<name of the job> here.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Folder with the certificates of all roles. Default: tls in the run folder, created if missing.
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
}

/// Roles whose workers can join the run of a job that is already launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Only {
    /// `resources.rollouts` rollout workers.
    Rollouts,
    /// `resources.verifiers` verifiers.
    Verifiers,
}
