//! Arguments of roles that a launcher starts one by one, and of their supervisor, certificates and checks.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use pacs_runtime::launch::{SecurityArguments, WorkerArguments};
use pacs_runtime::net::PeerRole;
use pacs_verifier::Guarded;
use pacs_vllm::ApiKey;

#[derive(Debug, Args)]
#[command(after_help = "\
`pacs run` starts verifiers by itself; this is for verifiers on other machines.

Examples:
  pacs verifier --coordinator node-1:7700 --name verifier-3 --tls-dir certs --threads 8
  pacs verifier --coordinator 127.0.0.1:7700 --name verifier-3 --plaintext")]
pub(crate) struct Verifier {
    #[command(flatten)]
    pub(crate) worker: WorkerArguments,
    /// Answers graded concurrently; 0: one per core.
    #[arg(long, env = "PACS_THREADS", default_value_t = 0, value_parser = threads)]
    pub(crate) threads: usize,
    /// Write log lines as JSON.
    #[arg(long)]
    pub(crate) log_json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
For jobs with `rollout.engine` = \"vllm\" (docs/ENGINES.md); `pacs run` starts it by itself where the job names the servers. Each
server belongs to one worker of one run, because the worker changes its weights.

Examples:
  pacs rollout --coordinator node-1:7700 --name rollout-3 --tls-dir certs --endpoint http://node-2:8000
  pacs rollout --coordinator 127.0.0.1:7700 --name rollout-3 --plaintext --endpoint http://127.0.0.1:8000")]
pub(crate) struct Rollout {
    #[command(flatten)]
    pub(crate) worker: WorkerArguments,
    /// A vLLM server, as http://HOST:PORT; may be repeated. Default: $PACS_VLLM_ENDPOINTS, separated by commas, else
    /// `rollout.vllm.endpoints` of the job.
    #[arg(long = "endpoint", value_name = "URL", env = "PACS_VLLM_ENDPOINTS", value_delimiter = ',', value_parser = endpoint)]
    pub(crate) endpoints: Vec<String>,
    /// Folder for the weights of the servers, in place of `rollout.vllm.weights_dir` of the job.
    #[arg(long, value_name = "DIR", env = "PACS_VLLM_WEIGHTS_DIR")]
    pub(crate) weights_dir: Option<PathBuf>,
    /// Key that the servers ask for (`vllm serve --api-key`). Default: none.
    #[arg(long, env = "PACS_VLLM_API_KEY", hide_env_values = true, value_name = "KEY", value_parser = api_key)]
    pub(crate) api_key: Option<ApiKey>,
    /// Address of this machine at which other machines fetch weights. Default: $PACS_BIND, else the Slurm node's name,
    /// else the address from which the coordinator is reached.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) bind: Option<String>,
    /// Write log lines as JSON.
    #[arg(long)]
    pub(crate) log_json: bool,
}

fn endpoint(text: &str) -> Result<String, String> {
    match pacs_spec::endpoint_authority(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("expected http://HOST:PORT".to_owned()),
    }
}

fn api_key(text: &str) -> Result<ApiKey, String> {
    ApiKey::new(text).ok_or_else(|| "expected visible ASCII characters".to_owned())
}

/// Upper bound of durations, ten years: larger values overflow a process clock.
pub(super) const MOST_SECONDS: u64 = 10 * 365 * 24 * 3600;

/// Parses a number of threads or processes, within what a machine may have.
pub(super) fn threads(text: &str) -> Result<usize, String> {
    let threads = text.parse::<usize>().map_err(|error| error.to_string())?;
    if threads <= 65_536 { Ok(threads) } else { Err("expected at most 65536".to_owned()) }
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pacs exec-child '{\"part\": \"guard\", …}' -- python3 my_verifier.py")]
pub(crate) struct ExecChild {
    /// Limits, parent process and control group, which the verifier passes to the guard as JSON.
    pub(crate) guarded: Guarded,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pacs sandbox-init '{\"policy\": …}'")]
pub(crate) struct SandboxInit {
    /// Policy and layers of the sandbox, which the verifier passes on as JSON.
    pub(crate) order: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
`pacs run` is all that one machine needs; this is for workers on other machines, which launchers start.

Examples:
  pacs coordinator job.toml --listen node-1:7700 --tls-dir certs --run-dir /shared/runs/demo
  pacs coordinator job.toml --listen 127.0.0.1:7700 --plaintext

SIGTERM saves and leaves within --grace seconds, with exit code 75; so does SIGUSR1, without a limit (launchers send it
when the time of a job is nearly over). The same command resumes the run.
Exit codes: 0 done, 2 usage, 70 bug, 75 start again, 78 wrong job spec, model or data, or no progress over several starts.")]
pub(crate) struct Coordinator {
    /// The job spec.
    pub(crate) job: PathBuf,
    /// Folder of the run, which the learners must reach at the same path. Default: runs/<name of the job>. A run of this
    /// job in the folder is resumed.
    #[arg(long, value_name = "DIR", env = "PACS_RUN_DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Address to listen on. Default: $PACS_LISTEN, else this Slurm node's name at port 7700, else 127.0.0.1:7700.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<String>,
    /// How connections are protected.
    #[command(flatten)]
    pub(crate) security: SecurityArguments,
    /// Address for health probes (grpc.health.v1, in plain text). Default: off.
    #[arg(long, value_name = "HOST:PORT", env = "PACS_HEALTH_LISTEN")]
    pub(crate) health_listen: Option<String>,
    /// Address for Prometheus metrics, under /metrics, in plain text. Default: off.
    #[arg(long, value_name = "HOST:PORT", env = "PACS_METRICS_LISTEN")]
    pub(crate) metrics_listen: Option<String>,
    /// Address of the dashboard, loopback only; `pacs dashboard` prints its address with a token. Default: off.
    #[arg(long, value_name = "HOST:PORT", env = "PACS_DASHBOARD_LISTEN")]
    pub(crate) dashboard_listen: Option<String>,
    /// Seconds without a step, an evaluation or a checkpoint after which the health service `pacs.progress` fails.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    pub(crate) progress_timeout: u64,
    /// Seconds to save and leave after SIGTERM; a second SIGTERM leaves at once. Must be shorter than the launcher's grace
    /// before it kills.
    #[arg(long, value_name = "SECONDS", env = "PACS_GRACE", default_value_t = 25, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    pub(crate) grace: u64,
    /// Seconds to wait for the lock of the run folder: a scheduler may start a second coordinator while the first one is
    /// still alive.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    pub(crate) folder_timeout: u64,
    /// Seconds without any worker, once some have joined, after which the coordinator leaves with exit code 75: it may be on
    /// the wrong side of a network partition. 0: never.
    #[arg(long, value_name = "SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    pub(crate) alone_timeout: u64,
    /// Identifies this start of the job; workers of another start are refused. Launchers set it.
    #[arg(long, value_name = "ID", env = "PACS_ATTEMPT", default_value = "")]
    pub(crate) attempt: String,
    /// Run id, as `pacs run-id` prints it: a new folder takes this id, and a folder with another id is refused. Launchers set
    /// it. Default: the id of the folder; a new folder gets a random id.
    #[arg(long, value_name = "ID", env = "PACS_RUN_ID", default_value = "")]
    pub(crate) run_id: String,
    /// Starts in a row without progress after which the run ends; 0: no limit.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) starts_without_progress: usize,
    /// Keep answering status calls after the run is finished, until SIGTERM; for launchers that restart whatever ends.
    #[arg(long)]
    pub(crate) linger: bool,
    /// Print progress as JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write log lines as JSON.
    #[arg(long)]
    pub(crate) log_json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
For jobs with `rollout.vllm.server` (docs/ENGINES.md); `pacs run` starts the servers of one machine by itself, and the script of
`pacs launch slurm` calls this command.

Examples:
  pacs servers job.toml -- pacs rollout --coordinator node-1:7700 --name rollout-3 --tls-dir certs
  srun --ntasks=4 --gpus-per-task=2 pacs servers job.toml --logs /shared/runs/demo/logs -- pacs rollout

Each server listens on a free port of 127.0.0.1, with as many of the visible GPUs as it divides its model among. The worker is started
when all answer /health, and is told their addresses (PACS_VLLM_ENDPOINTS). Servers and worker are restarted when they die; six deaths
within ten minutes end the command, and so does the worker when it is done. The exit code is the worker's.")]
pub(crate) struct Servers {
    /// The job spec, with a table `rollout.vllm.server`.
    pub(crate) job: PathBuf,
    /// What the names of the servers begin with: they and their logs are NAME-0, NAME-1, …
    #[arg(long, default_value = crate::servers::SERVER, value_parser = server_name)]
    pub(crate) name: String,
    /// Folder for the logs of the servers.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) logs: PathBuf,
    /// Folder of the run, which remembers the commit that a model of the hub was taken from.
    #[arg(long, value_name = "DIR", env = "PACS_RUN_DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// The rollout worker and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// A name that is part of a file's.
fn server_name(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let holds =
        text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.chars().all(is_plain) && text.len() <= 128;
    if holds { Ok(text.to_owned()) } else { Err("expected letters, digits, `-`, `_` and `.`".to_owned()) }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  export PACS_RUN_ID=$(pacs run-id /shared/runs/demo)     before the processes of the run are started

The coordinator and all workers of a run must have the same id; strangers are refused.")]
pub(crate) struct RunId {
    /// Folder of the run; created if missing.
    pub(crate) run_dir: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  srun --ntasks=4 pacs supervise -- pacs-worker rollout

A worker that ends with exit code 0 (done), 2, 75 (the run has stopped) or 78 is not started again, nor is one that died six
times within ten minutes. SIGTERM, SIGINT and SIGUSR1 are passed on. The exit code is the worker's.")]
pub(crate) struct Supervise {
    /// Restart only after a crash: a signal, or an exit code that is not one of PACS's own. For coordinators, which end with
    /// 70 when a run has failed.
    #[arg(long)]
    pub(crate) crashes_only: bool,
    /// The worker and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs certs certs                  certs/ca (keep its key away from the run), certs/learner, certs/rollout, …
  pacs certs certs --days 30        again: the same authority, new certificates; running processes take them up
  pacs certs certs --join rollout --hours 12 --output join.pem
                                    one file for `pacs-worker rollout --tls-dir join.pem`, of no use after 12 hours

One authority is one run, or a set of runs that trust each other: whoever has one of its certificates may play that role in
all of them.")]
pub(crate) struct Certs {
    /// Folder to write to. An authority in it signs; otherwise one is made.
    pub(crate) folder: PathBuf,
    /// Days that the certificates of the roles are valid; the authority's is valid for ten years.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
    /// Write nothing when all certificates exist and are valid for another three days.
    #[arg(long)]
    pub(crate) if_missing: bool,
    /// Do not keep the authority's key, so that no reader of the folder can sign other certificates. A key that an earlier call
    /// kept is removed. The next call makes a new authority, which processes that use the folder switch to by themselves.
    #[arg(long)]
    pub(crate) forget_authority: bool,
    /// Write one file with which processes of this role can join for a few hours, for a machine that must not have the whole
    /// folder. It goes to --output, and the process takes it as --tls-dir FILE.
    #[arg(long, value_name = "ROLE", requires = "output", conflicts_with_all = ["days", "if_missing", "forget_authority"])]
    pub(crate) join: Option<PeerRole>,
    /// Validity of the file of --join, in hours.
    #[arg(long, value_name = "N", default_value_t = 24, requires = "join", value_parser = clap::value_parser!(u32).range(1..=8760))]
    pub(crate) hours: u32,
    /// Path of the file of --join.
    #[arg(long, value_name = "FILE", requires = "join")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs doctor                                   this machine
  pacs doctor job.toml --bandwidth              also the ring between its GPUs
  pacs doctor job.toml --run-dir /shared/runs/demo --tls-dir certs --coordinator node-1:7700
  srun --ntasks-per-node=1 pacs doctor job.toml --json

Exit code 78 when a run would not work; what is only slow or risky is a warning.")]
pub(crate) struct Doctor {
    /// A job spec, against whose needs the machine is checked.
    pub(crate) job: Option<PathBuf>,
    /// Folder of the run. Default: runs/<name of the job>, when there is a job.
    #[arg(long, value_name = "DIR", env = "PACS_RUN_DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Folder with certificates to check.
    #[arg(long, value_name = "DIR", env = "PACS_TLS_DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Coordinator that must be reachable, host:port or the absolute path of its run folder; clocks are compared, too.
    #[arg(long, value_name = "HOST:PORT|DIR", env = "PACS_COORDINATOR")]
    pub(crate) coordinator: Option<String>,
    /// Measure the all-reduce between this machine's GPUs, or between two processes when the job computes on CPUs; takes a
    /// few seconds. Between machines: `pacs-worker bench collective --rank … --world … --address …`.
    #[arg(long)]
    pub(crate) bandwidth: bool,
    /// The `pacs-worker` program. Default: next to this program, else on PATH.
    #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
    pub(crate) worker_binary: Option<PathBuf>,
    /// Print one JSON document for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}
