mod cluster;
mod demo;
mod eval;
mod hub;
mod launch;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pacs_spec::ObjectiveKind;

use crate::look::compare::Compare;
use crate::look::dashboard::Dashboard;
use crate::look::logs::Logs;
use crate::look::report::Report;
use crate::look::runs::Runs;
use crate::look::samples::Samples;
use crate::look::top::Top;
use crate::look::watch::Watch;
use crate::operate::{DrainWorker, OnRun, SetValue, Stop};
use crate::run::StopBefore;

pub(crate) use self::cluster::{
    Certs, Coordinator, Doctor, ExecChild, Rollout, RunId, SandboxInit, Servers, Supervise, Verifier,
};
pub(crate) use self::demo::Demo;
pub(crate) use self::eval::{Eval, EvalCommand, EvalCompare, EvalReport, Measure, Preset};
pub(crate) use self::hub::{Fetch, Push};
pub(crate) use self::launch::{LaunchCommand, LaunchKubernetes, LaunchSlurm, Only};

/// Trains language models on problems whose answers can be verified (RLVR), with PACS, GRPO and other objectives.
#[derive(Debug, Parser)]
#[command(name = "pacs", version, max_term_width = 100)]
#[command(after_help = "\
Examples:
  pacs demo                             train a small model, to see that it works
  pacs job init my-job.toml             write a commented job spec
  pacs job check my-job.toml            say what it would do
  pacs run my-job.toml                  train on this machine
  pacs eval my-job.toml                 measure a model on the job's held-out problems
  pacs status                           look at the run on this machine
  pacs samples                          read what it answers
  pacs data check my-job.toml           look for rows that cannot be used
  pacs fetch Qwen/Qwen3-0.6B            bring a model of the Hugging Face hub
  pacs verify math --input rows.jsonl   grade answers")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fetches a small model and trains it to add numbers.
    Demo(Demo),
    /// Runs a job on this machine: the coordinator in this process, its workers as child processes.
    Run(Run),
    /// Evaluates a model on held-out problems: pass@k, maj@k, intervals, a report.
    Eval(Eval),
    /// Prints what a cluster needs to run a job.
    #[command(
        after_help = "Examples:\n  pacs launch slurm job.toml --nodes 4 | sbatch\n  pacs launch slurm job.toml --submit"
    )]
    Launch {
        #[command(subcommand)]
        command: LaunchCommand,
    },
    /// Runs the coordinator of a job whose workers are started separately.
    Coordinator(Coordinator),
    /// Grades answers for a coordinator.
    Verifier(Verifier),
    /// Has vLLM servers generate samples for a coordinator.
    Rollout(Rollout),
    /// Starts vLLM servers, and a rollout worker next to them.
    Servers(Servers),
    /// Guards a verifier program (internal; verifiers start it).
    #[command(hide = true)]
    ExecChild(ExecChild),
    /// Isolates itself and keeps a warm interpreter for untrusted programs: verifiers start it.
    #[command(hide = true)]
    SandboxInit(SandboxInit),
    /// Prints the id of the run in a folder; a folder without one gets a new id.
    RunId(RunId),
    /// Runs a worker, and restarts it when it dies.
    Supervise(Supervise),
    /// Makes certificates for mutual TLS: an authority, and a certificate for each role.
    Certs(Certs),
    /// Checks whether this machine can take part in a run, and says what to fix.
    Doctor(Doctor),
    /// Shows what a run does, and what it waits for.
    Status(Status),
    /// Shows a live run on one screen.
    Top(Top),
    /// Shows runs in a browser: curves, a timeline, workers, samples.
    Dashboard(Dashboard),
    /// Writes a run as one HTML file.
    Report(Report),
    /// Prints what a run measures, from its beginning on, for another program.
    Watch(Watch),
    /// Shows sampled answers and their verdicts.
    Samples(Samples),
    /// Compares the metrics of several runs.
    Compare(Compare),
    /// Shows the logs of all processes of a run.
    Logs(Logs),
    /// Lists the runs of this user, live and past.
    Runs(Runs),
    /// Asks a run to write a checkpoint and end.
    Stop(Stop),
    /// Pauses a run: no new work is leased.
    Pause(OnRun),
    /// Resumes a paused run.
    Resume(OnRun),
    /// Asks a run to write a checkpoint now.
    Checkpoint(OnRun),
    /// Drains a worker: it finishes its work and leaves the run.
    Drain(DrainWorker),
    /// Changes a setting of a running job.
    Set(SetValue),
    /// Grades the answers of a file as a run would.
    #[command(after_help = "\
Examples:
  pacs verify math --input rows.jsonl
  pacs verify exec --input rows.jsonl -- python3 my_verifier.py
  pacs verify grpc --input rows.jsonl --address 127.0.0.1:9000

Each row of the input is a JSON object: `gold` is the reference answer, `pred` a whole response, `question` and `id`
may be left out (the id is the line number then). Each row of the output, in the order of the input, is
  {\"id\", \"outcome\", \"label\", \"reward\", \"extracted\", \"rule\", \"elapsed_us\"}
with the outcome correct, wrong, unparsable, failed or timed_out. The last two say nothing about the answer: label and
reward are null. A row that cannot be read ends the command with its line number and exit code 78.")]
    Verify {
        #[command(subcommand)]
        command: VerifyCommand,
    },
    /// Compares methods over many runs, and reports with intervals.
    #[command(after_help = "\
Examples:
  pacs study plan deploy/studies/first.toml                  every run, and whether it is finished
  pacs study run deploy/studies/first.toml                   make them on this machine; the same command resumes
  pacs study launch deploy/studies/main.toml slurm -- --submit --time 1:00:00
  pacs study report deploy/studies/first.toml                write the report anew

docs/STUDIES.md says what a study file holds and how to read a report.")]
    Study {
        #[command(subcommand)]
        command: StudyCommand,
    },
    /// Fetches models and data sets of the Hugging Face hub to this machine.
    Fetch(Fetch),
    /// Uploads a trained model to the Hugging Face hub.
    Push(Push),
    /// Checks problems for training and evaluation.
    #[command(
        after_help = "Examples:\n  pacs data check my-job.toml\n  pacs data check train.jsonl --evaluation test.jsonl"
    )]
    Data {
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Checks model folders.
    #[command(
        after_help = "Examples:\n  pacs model check models/qwen3-0.6b\n  pacs model check models/qwen3-0.6b --json"
    )]
    Model {
        #[command(subcommand)]
        command: ModelCommand,
    },
    /// Writes and checks job specs.
    #[command(after_help = "Examples:\n  pacs job init my-job.toml\n  pacs job check my-job.toml")]
    Job {
        #[command(subcommand)]
        command: JobCommand,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VerifyCommand {
    /// Uses the built-in verifier of mathematical answers.
    Math(VerifyMath),
    /// Compares texts: the last box, or else the last line, must equal the reference.
    #[command(after_help = "Example:\n  pacs verify exact --input rows.jsonl > verdicts.jsonl")]
    Exact(VerifyText),
    /// Evaluates expressions that make a target of given numbers; `gold` reads `44 from all of 3, 5, 19`.
    #[command(after_help = "\
Example:
  echo '{\"gold\": \"44 from 19, 5, 5\", \"pred\": \"5 * 5 + 19\"}' | pacs verify countdown --input -

The last box, or else the last line, is one expression of whole numbers, + - * / and brackets, after which `= 44` may stand. With
`from` no number is used more often than it is listed, with `from all of` each exactly so often.")]
    Countdown(VerifyText),
    /// Grades programs, which are run on the cases of their problem in a sandbox.
    #[command(after_help = "\
Examples:
  pacs verify code --input rows.jsonl > verdicts.jsonl
  pacs verify code --input rows.jsonl --allow-missing cgroup --count

`gold` holds the cases, a list or an object as in docs/VERIFIERS.md, such as [{\"input\": \"1 2\", \"output\": \"3\"}] or [\"assert f(1) == 2\"];
`pred` is a response whose last block of code is the program. `pacs doctor` shows which layers of the sandbox hold on this machine.")]
    Code(VerifyCode),
    /// Uses a program of your own that reads and writes JSON lines (docs/VERIFIERS.md).
    Exec(VerifyExec),
    /// Uses a service of your own that implements proto/pacs/v1/custom_verifier.proto.
    Grpc(VerifyGrpc),
}

#[derive(Debug, Args)]
pub(crate) struct VerifyInput {
    /// Rows to grade (JSON lines); `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// Timeout of one verification, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub(crate) timeout: f64,
    /// Answers graded concurrently; 0: one per core.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = cluster::threads)]
    pub(crate) threads: usize,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs verify math --input rows.jsonl > verdicts.jsonl
  cat rows.jsonl | pacs verify math --input - --extraction strict --form any")]
pub(crate) struct VerifyMath {
    #[command(flatten)]
    pub(crate) input: VerifyInput,
    /// Where in the response the answer may stand.
    #[arg(long, value_enum, default_value_t = ExtractionMode::Lenient)]
    pub(crate) extraction: ExtractionMode,
    /// How far the answer must be worked out.
    #[arg(long, value_enum, default_value_t = AnswerForm::Evaluated)]
    pub(crate) form: AnswerForm,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyText {
    #[command(flatten)]
    pub(crate) input: VerifyInput,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyCode {
    #[command(flatten)]
    pub(crate) input: VerifyInput,
    /// The Python interpreter.
    #[arg(long, value_name = "PROGRAM", default_value = "python3")]
    pub(crate) python: PathBuf,
    /// Seconds that one case may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0)]
    pub(crate) case_seconds: f64,
    /// Address space of a program, in MiB.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u64).range(64..=1_048_576))]
    pub(crate) memory_mib: u64,
    /// Run all cases and count those that pass, in place of stopping at the first that fails.
    #[arg(long)]
    pub(crate) count: bool,
    /// A layer of the sandbox that may be missing, by its name; may be given several times.
    #[arg(long, value_name = "LAYER", value_parser = layer)]
    pub(crate) allow_missing: Vec<String>,
}

fn layer(name: &str) -> Result<String, String> {
    let names: Vec<&str> = pacs_sandbox::Layer::ALL.iter().map(|layer| layer.name()).collect();
    match names.contains(&name) {
        true => Ok(name.to_owned()),
        false => Err(format!("there is no such layer; expected one of {}", names.join(", "))),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum AnswerForm {
    /// Worked out as far as the reference: no arithmetic left between explicit numbers.
    Evaluated,
    /// Any expression that has the value of the reference.
    Any,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExtractionMode {
    /// A box, a final-answer phrase, else the last expression.
    Lenient,
    /// A box or a final-answer phrase.
    Strict,
    /// A box, else the last number; a plain number either way.
    Number,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs verify exec --input rows.jsonl -- python3 my_verifier.py
  pacs verify exec --input rows.jsonl --threads 4 -- venv/bin/python deploy/verifiers/math_verify_exec.py
  pacs verify exec --input rows.jsonl --sandbox -- python3 my_verifier.py")]
pub(crate) struct VerifyExec {
    #[command(flatten)]
    pub(crate) input: VerifyInput,
    /// An environment variable to pass on to the program besides the usual ones, as `verifier.environment` of a job does; may be
    /// given several times.
    #[arg(long, value_name = "NAME")]
    pub(crate) pass_env: Vec<String>,
    /// Run the program in the sandbox, as `verifier.sandbox` of a job does: no network, no file of this machine but its own.
    #[arg(long)]
    pub(crate) sandbox: bool,
    /// A further file or folder that the program may read in the sandbox; may be given several times.
    #[arg(long, value_name = "PATH", requires = "sandbox")]
    pub(crate) sandbox_path: Vec<PathBuf>,
    /// A layer of the sandbox that may be missing, by its name; may be given several times.
    #[arg(long, value_name = "LAYER", value_parser = layer, requires = "sandbox")]
    pub(crate) allow_missing: Vec<String>,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pacs verify grpc --input rows.jsonl --address 127.0.0.1:9000 --threads 16")]
pub(crate) struct VerifyGrpc {
    #[command(flatten)]
    pub(crate) input: VerifyInput,
    /// Address of the service.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) address: String,
    /// PEM file with the authorities that sign the service's certificate; turns TLS on.
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Option<String>,
    /// Speak plain text to a service on another machine.
    #[arg(long, conflicts_with = "ca")]
    pub(crate) plain_text: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StudyFile {
    /// The study file.
    pub(crate) study: PathBuf,
    /// Folder of the study. Default: studies/<name of the study>.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Only runs on this task; may be given several times. The report holds all that is finished. Default: all tasks.
    #[arg(long = "task", value_name = "NAME")]
    pub(crate) tasks: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum StudyCommand {
    /// Lists the runs of the study and which of them are finished.
    #[command(after_help = "Example: pacs study plan deploy/studies/first.toml")]
    Plan {
        #[command(flatten)]
        file: StudyFile,
        /// Print one JSON document for scripts.
        #[arg(long)]
        json: bool,
    },
    /// Executes the runs on this machine, several at once, and writes the report.
    ///
    /// Finished runs are kept and others resumed, however the command ended before. Exit code 75 after Ctrl-C: the same command
    /// resumes; 78 when runs failed.
    #[command(after_help = "Example: pacs study run deploy/studies/first.toml --parallel 2")]
    Run {
        #[command(flatten)]
        file: StudyFile,
        /// Number of concurrent runs. Default: one per core.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
        parallel: Option<u16>,
        /// The `pacs-worker` program. Default: next to this program, else on PATH.
        #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
        worker_binary: Option<PathBuf>,
    },
    /// Submits each unfinished run to a launcher as a job of its own: the tuning runs first, and the rest once those are finished.
    ///
    /// `report` collects what the jobs have finished.
    #[command(after_help = "Example: pacs study launch deploy/studies/main.toml slurm -- --submit --time 1:00:00")]
    Launch {
        #[command(flatten)]
        file: StudyFile,
        /// The launcher to submit to.
        #[arg(value_parser = ["slurm", "kubernetes"])]
        launcher: String,
        /// Options passed on to `pacs launch` with this launcher.
        #[arg(last = true)]
        options: Vec<String>,
    },
    /// Writes the report of the finished runs.
    #[command(after_help = "Example: pacs study report deploy/studies/first.toml")]
    Report {
        #[command(flatten)]
        file: StudyFile,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Shows what is understood of a Hugging Face folder, and which defaults were assumed.
    Check(ModelCheck),
    /// Writes a model with tied embeddings as one with an output head of its own, for vLLM servers on CPUs.
    Untie(ModelUntie),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs model check models/qwen3-0.6b
  pacs model check models/qwen3-0.6b --json | jq .end_tokens

Exit code 78 when a file cannot be used, no file names a token that ends an answer, or the chat template ends answers with
another one. docs/MODELS.md says what is read from which file.")]
pub(crate) struct ModelCheck {
    /// The folder, or OWNER/NAME of the hub; its weights may be missing, and are not fetched.
    pub(crate) folder: PathBuf,
    /// Print one JSON document for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  pacs model untie models/smollm2-135m models/smollm2-135m-untied
  vllm serve models/smollm2-135m-untied …      # and `rollout.vllm.untied_head = true` in the job

The job's own `model.path` stays the first folder. docs/ENGINES.md says which servers need this, and why.")]
pub(crate) struct ModelUntie {
    /// The folder, or OWNER/NAME of the hub.
    pub(crate) folder: PathBuf,
    /// Folder to write; it must not exist.
    pub(crate) out: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Names rows that a run could not use, and rows that it should not.
    Check(DataCheck),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs data check my-job.toml
  pacs data check train.jsonl --evaluation test.jsonl --model models/qwen3-0.6b
  pacs data check train.parquet --question-field problem --answer-field solution --json

Exit code 78 when rows cannot be read, the verifier cannot read their reference answer, or questions are both trained on
and evaluated with; repeated questions and long prompts are reported, and no error.")]
pub(crate) struct DataCheck {
    /// A job spec (.toml), or a file of problems (.jsonl, .json, .csv, .tsv or .parquet, or hf://datasets/… of the hub; see
    /// docs/DATA.md).
    pub(crate) target: PathBuf,
    /// Held-out problems that must not be among the training problems.
    #[arg(long, value_name = "FILE")]
    pub(crate) evaluation: Option<PathBuf>,
    /// Count prompt tokens with this model's tokenizer. A job names its own.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Field that holds the question. Default: question.
    #[arg(long, value_name = "NAME")]
    pub(crate) question_field: Option<String>,
    /// Field that holds the reference answer. Default: answer.
    #[arg(long, value_name = "NAME")]
    pub(crate) answer_field: Option<String>,
    /// Do not parse reference answers as mathematics: they are for a verifier of your own.
    #[arg(long)]
    pub(crate) any_answer: bool,
    /// The reference answers are cases of programs; reference solutions are run on them.
    #[arg(long, conflicts_with = "any_answer")]
    pub(crate) code: bool,
    /// With `--code`: a layer of the sandbox that may be missing, by its name; may be given several times.
    #[arg(long, value_name = "LAYER", value_parser = layer, requires = "code")]
    pub(crate) allow_missing: Vec<String>,
    /// Print one JSON document for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum JobCommand {
    /// Checks a job spec and prints the plan that it resolves to.
    Check(Check),
    /// Writes a job spec with every key, its meaning and its default.
    Init(Init),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs run deploy/jobs/demo.toml
  pacs run job.toml --model models/qwen3-0.6b --dataset problems.jsonl --steps 100
  pacs run job.toml --run-dir runs/second-try --seed 2

Ctrl-C, SIGTERM or SIGUSR1 (by which launchers say that the time is nearly over) writes a checkpoint and ends with exit code 75;
the same command then resumes the run. When the command is killed its workers wait, and the same command adopts them.
Exit codes: 0 done, 2 usage, 70 bug, 75 start again, 78 wrong job spec, model or data.")]
pub(crate) struct Run {
    /// The job spec.
    pub(crate) job: PathBuf,
    /// Folder of the run: checkpoints, metrics, samples, logs. Default: runs/<name of the job>. A run of this job in the
    /// folder is resumed.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) local: Local,
    /// Train this model (a folder, or OWNER/NAME of the hub), with its own chat template, instead of the spec's.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Train on this file (.jsonl, .json, .csv, .tsv or .parquet, or hf://datasets/… of the hub; see docs/DATA.md) instead of the
    /// spec's problems. Without --eval-dataset its last rows, a tenth and at most 200, are held out for evaluation.
    #[arg(long, value_name = "FILE")]
    pub(crate) dataset: Option<PathBuf>,
    /// Evaluate with this file instead of the spec's held-out problems.
    #[arg(long, value_name = "FILE")]
    pub(crate) eval_dataset: Option<PathBuf>,
    /// Number of training steps.
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<u64>,
    /// Limit of an answer, in tokens. With --dataset and a job of generated problems the default is 256, or the job's if it is larger.
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<u32>,
    /// Seed of data order and sampling noise.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Train adapters (LoRA) of this rank in place of the model, with the settings of [model.lora] beside it. Where the job has no
    /// [model.lora], the learning rate is ten times that of the job.
    #[arg(long, value_name = "RANK")]
    pub(crate) lora: Option<u32>,
    /// Train with this objective (pacs, grpo, rloo, ppo, …) and its published settings, instead of the spec's [objective].
    #[arg(long, value_name = "KIND", value_parser = objective)]
    pub(crate) objective: Option<ObjectiveKind>,
    /// Write a checkpoint and end before this limit: a duration (90s, 45m, 3h, 2d) or a time in UTC (2026-03-01T18:30:00Z).
    /// The margin comes from measured steps and checkpoints.
    #[arg(long, value_name = "WHEN")]
    pub(crate) stop_before: Option<StopBefore>,
    /// Serve Prometheus metrics at this address, under /metrics. Default: off.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics_listen: Option<SocketAddr>,
    /// Serve the dashboard at this loopback address. Default: 127.0.0.1:7780, or another port when that one is in use.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) dashboard_listen: Option<SocketAddr>,
    /// Serve no dashboard.
    #[arg(long, conflicts_with = "dashboard_listen")]
    pub(crate) no_dashboard: bool,
}

/// The processes that a command starts on this machine, and what it says of them.
#[derive(Clone, Debug, Args)]
pub(crate) struct Local {
    /// Address on which the coordinator listens. Default: 127.0.0.1:7700, or another port when that one is in use; a restarted
    /// run prefers its earlier port.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Folder with the certificates of all roles, as `pacs certs` writes it, so that workers of other machines can join. Default:
    /// the run makes its own, in its folder, and removes them when it ends.
    #[arg(long, value_name = "DIR", env = "PACS_TLS_DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Disable TLS with the workers. Loopback only; every user of this machine can then read and command the run.
    #[arg(long, conflicts_with = "tls_dir")]
    pub(crate) plaintext: bool,
    /// The `pacs-worker` program. Default: next to this program, else on PATH.
    #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
    pub(crate) worker_binary: Option<PathBuf>,
    /// Format of log lines. Errors go to standard error, everything to logs/coordinator.log of the run folder.
    #[arg(long, value_enum, default_value_t = LogFormat::Human)]
    pub(crate) log_format: LogFormat,
    /// Print progress as JSON, one object per line.
    #[arg(long)]
    pub(crate) json: bool,
}

fn objective(name: &str) -> Result<ObjectiveKind, String> {
    let known = ObjectiveKind::ALL.into_iter().find(|kind| kind.name() == name);
    known.ok_or_else(|| format!("expected one of {}", ObjectiveKind::ALL.map(ObjectiveKind::name).join(", ")))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// One readable line per event.
    Human,
    /// One JSON object per event.
    Json,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs status                           the run on this machine
  pacs status 10.0.0.5:7700             the run of that coordinator
  pacs status runs/demo --json          the run in that folder, for scripts")]
pub(crate) struct Status {
    /// The run: its folder, coordinator (host:port), job, or the first digits of its id. Default: the live run of this
    /// machine; if there are several, they are listed and the exit code is 2.
    pub(crate) target: Option<String>,
    /// Print one JSON document for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs job check deploy/jobs/demo.toml
  pacs job check job.toml --preflight           also load, grade and train a little, before a large job is paid for

Model and data are checked when they exist; a spec can be checked without them.")]
pub(crate) struct Check {
    /// The job spec.
    pub(crate) job: PathBuf,
    /// Also rehearse the job on this machine: load the data, grade sample answers with the job's own verifiers, take one
    /// tiny step with the job's model, programs and devices. Each failure says how far a run would have come.
    #[arg(long)]
    pub(crate) preflight: bool,
    /// Timeout of the tiny step in seconds, startup and shutdown included.
    #[arg(long, value_name = "SECONDS", default_value_t = 900, requires = "preflight", value_parser = clap::value_parser!(u64).range(..=cluster::MOST_SECONDS))]
    pub(crate) preflight_timeout: u64,
    /// The `pacs-worker` program for the tiny step. Default: next to this program, else on PATH.
    #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
    pub(crate) worker_binary: Option<PathBuf>,
    /// Print one JSON document for scripts.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pacs job init my-job.toml\n  pacs job init > my-job.toml")]
pub(crate) struct Init {
    /// File to create; it must not exist. Default: standard output.
    pub(crate) file: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    /// Out-of-range numbers are refused with the option's name, before any arithmetic uses them.
    #[test]
    fn numbers_have_bounds() {
        let kubernetes = "launch kubernetes j --image i --worker-image w";
        for (line, options) in [
            ("verifier", &["--join-timeout", "--threads"][..]),
            ("coordinator j", &["--progress-timeout", "--grace", "--folder-timeout", "--alone-timeout"]),
            ("job check j --preflight", &["--preflight-timeout"]),
            ("certs d", &["--days"]),
            ("certs d --join rollout --output f", &["--hours"]),
            ("verify math --input f", &["--threads"]),
            ("launch slurm j", &["--nodes", "--gpus-per-node", "--cpus-per-task", "--warning"]),
            (kubernetes, &["--cpu", "--grace-period"]),
        ] {
            for option in options {
                let takes = |value: &str| {
                    let words = ["pacs"].into_iter().chain(line.split(' ')).chain([*option, value]);
                    Arguments::try_parse_from(words).is_ok()
                };
                assert!(takes("60"), "{line} {option}");
                for huge in ["18446744073709551615", "9223372036854775807", "9999999999999999999", "4294967295", "-1"] {
                    assert!(!takes(huge), "{line} {option} {huge}");
                }
            }
        }
        for huge in ["9999999999999999999d", "1e300d", "inf", "nans", "-1h", "1e20s"] {
            assert!(huge.parse::<StopBefore>().is_err(), "{huge}");
        }
    }

    #[test]
    fn every_command_has_an_example() {
        fn check(command: &clap::Command) {
            let help = command.clone().render_help().to_string();
            assert!(help.contains("Example"), "`{}` has no example", command.get_name());
            command.get_subcommands().filter(|c| c.get_name() != "help").for_each(check);
        }
        check(&Arguments::command());
    }
}
