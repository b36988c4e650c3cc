//! Roles that are started on their own, and what launches them.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use pacs_runtime::launch::{SecurityArguments, WorkerArguments};
use pacs_runtime::net::PeerRole;
use pacs_verifier::Guarded;

#[derive(Debug, Args)]
#[command(after_help = "\
`pacs run` starts verifiers by itself; this is for verifiers on other machines.

Examples:
  pacs verifier --coordinator node-1:7700 --name verifier-3 --tls-dir certs --threads 8
  pacs verifier --coordinator 127.0.0.1:7700 --name verifier-3 --plaintext")]
pub(crate) struct Verifier {
    #[command(flatten)]
    pub(crate) worker: WorkerArguments,
    /// Answers that are graded at once; 0: one a core.
    #[arg(long, env = "PACS_THREADS", default_value_t = 0, value_parser = threads)]
    pub(crate) threads: usize,
    /// Write log lines as JSON.
    #[arg(long)]
    pub(crate) log_json: bool,
}

/// Ten years: further off no clock of a process goes.
pub(super) const MOST_SECONDS: u64 = 10 * 365 * 24 * 3600;

/// A number of threads or processes that a machine may have.
pub(super) fn threads(text: &str) -> Result<usize, String> {
    let threads = text.parse::<usize>().map_err(|error| error.to_string())?;
    if threads <= 65_536 { Ok(threads) } else { Err("expected at most 65536".to_owned()) }
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pacs exec-child '{\"part\": \"guard\", …}' -- python3 my_verifier.py")]
pub(crate) struct ExecChild {
    /// What verifiers pass on.
    pub(crate) guarded: Guarded,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct SandboxInit {
    /// What verifiers pass on.
    pub(crate) order: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
`pacs run` is all that one machine needs; this is for workers on other machines, which launchers start.

Examples:
  pacs coordinator job.toml --listen node-1:7700 --tls-dir certs --run-dir /shared/runs/demo
  pacs coordinator job.toml --listen 127.0.0.1:7700 --plaintext

SIGTERM saves and leaves within --grace seconds, with exit code 75; so does SIGUSR1, without a limit (launchers send it
when the time of a job is nearly over). The same command goes on where the run was.
Exit codes: 0 done, 2 usage, 70 bug, 75 start again, 78 wrong job spec, model or data, or no progress over several starts.")]
pub(crate) struct Coordinator {
    /// The job spec.
    pub(crate) job: PathBuf,
    /// Folder of the run, which the learners must reach at the same path. Default: runs/<name of the job>. A folder that
    /// holds a run of this job goes on.
    #[arg(long, value_name = "DIR", env = "PACS_RUN_DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Where to listen. Default: $PACS_LISTEN, else this Slurm node's name at port 7700, else 127.0.0.1:7700.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<String>,
    /// How connections are protected.
    #[command(flatten)]
    pub(crate) security: SecurityArguments,
    /// Where to answer health probes (grpc.health.v1, in plain text). Default: nowhere.
    #[arg(long, value_name = "HOST:PORT", env = "PACS_HEALTH_LISTEN")]
    pub(crate) health_listen: Option<String>,
    /// Where to serve metrics for Prometheus, at /metrics, in plain text. Default: nowhere.
    #[arg(long, value_name = "HOST:PORT", env = "PACS_METRICS_LISTEN")]
    pub(crate) metrics_listen: Option<String>,
    /// Seconds without a step, an evaluation or a checkpoint after which the health service `pacs.progress` fails.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    pub(crate) progress_timeout: u64,
    /// Seconds to save and leave after SIGTERM; a second SIGTERM leaves at once. Must be less than the launcher waits
    /// before it kills.
    #[arg(long, value_name = "SECONDS", env = "PACS_GRACE", default_value_t = 25, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    pub(crate) grace: u64,
    /// Seconds to wait while another coordinator works in the run folder: schedulers start a second one while the first
    /// still lives.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    pub(crate) folder_timeout: u64,
    /// Seconds without any worker, once there were some, after which the coordinator leaves with exit code 75: it may be on
    /// the wrong side of a cut network. 0: never.
    #[arg(long, value_name = "SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS))]
    pub(crate) alone_timeout: u64,
    /// Which start of the job this is: workers of another one are refused. Launchers set it.
    #[arg(long, value_name = "ID", env = "PACS_ATTEMPT", default_value = "")]
    pub(crate) attempt: String,
    /// Which run this is, as `pacs run-id` prints it: a new folder takes this id, and one with another id is refused. Launchers
    /// set it. Default: the id of the folder; a new one gets a random id.
    #[arg(long, value_name = "ID", env = "PACS_RUN_ID", default_value = "")]
    pub(crate) run_id: String,
    /// Starts in a row that find no checkpoint newer than the one before found, after which the run is given up; 0: no limit.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) starts_without_progress: usize,
    /// Stay when the run is finished, and answer status calls until SIGTERM; for launchers that start again whatever ends.
    #[arg(long)]
    pub(crate) linger: bool,
    /// Print progress as JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write log lines as JSON.
    #[arg(long)]
    pub(crate) log_json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  export PACS_RUN_ID=$(pacs run-id /shared/runs/demo)     before the processes of the run are started

The coordinator and all workers of a run must have the same id; strangers are refused.")]
pub(crate) struct RunId {
    /// Folder of the run; made when it is not there.
    pub(crate) run_dir: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  srun --ntasks=4 pacs supervise -- pacs-worker rollout

A worker that ends with exit code 0 (done), 2, 75 (the run has stopped) or 78 is not started again, nor is one that died six
times within ten minutes. SIGTERM, SIGINT and SIGUSR1 are passed on. The exit code is the worker's.")]
pub(crate) struct Supervise {
    /// Start it again only when it crashed: was killed by a signal, or ended with an exit code that is none of ours. For
    /// coordinators, which end with 70 when a run cannot go on.
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
    /// Folder to write to. When it holds an authority, that one signs.
    pub(crate) folder: PathBuf,
    /// Days that the certificates of the roles are valid; the authority's is valid for ten years.
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
    /// Write nothing when all of it is there already, and good for another three days.
    #[arg(long)]
    pub(crate) if_missing: bool,
    /// Do not keep the authority's key: it signs these certificates and is forgotten, so that nothing that reads the folder can make
    /// others. One that an earlier call has kept is removed. Made again, they have a new authority; processes that use the folder
    /// go over to it by themselves.
    #[arg(long)]
    pub(crate) forget_authority: bool,
    /// Write one file with which processes of this role can join for some hours, and no more: to be handed to a machine that
    /// shall not have the folder. It goes to --output, and is given to the process as --tls-dir FILE.
    #[arg(long, value_name = "ROLE", requires = "output", conflicts_with_all = ["days", "if_missing", "forget_authority"])]
    pub(crate) join: Option<PeerRole>,
    /// Hours for which the file of --join is good.
    #[arg(long, value_name = "N", default_value_t = 24, requires = "join", value_parser = clap::value_parser!(u32).range(1..=8760))]
    pub(crate) hours: u32,
    /// Where the file of --join goes.
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
    /// A job spec: sizes are compared with what its model needs.
    pub(crate) job: Option<PathBuf>,
    /// Folder of the run. Default: runs/<name of the job>, when there is a job.
    #[arg(long, value_name = "DIR", env = "PACS_RUN_DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Folder with certificates.
    #[arg(long, value_name = "DIR", env = "PACS_TLS_DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Coordinator that has to be reached, host:port or the absolute path of its run folder; clocks are compared, too.
    #[arg(long, value_name = "HOST:PORT|DIR", env = "PACS_COORDINATOR")]
    pub(crate) coordinator: Option<String>,
    /// Measure the all-reduce between this machine's GPUs, or between two processes when the job computes on CPUs. Takes
    /// some seconds. Between machines: `pacs-worker bench collective --rank … --world … --address …`.
    #[arg(long)]
    pub(crate) bandwidth: bool,
    /// The `pacs-worker` program. Default: beside this program, else on PATH.
    #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
    pub(crate) worker_binary: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}
