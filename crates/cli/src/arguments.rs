mod cluster;
mod eval;
mod launch;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pacs_spec::ObjectiveKind;

use crate::look::compare::Compare;
use crate::look::logs::Logs;
use crate::look::runs::Runs;
use crate::look::samples::Samples;
use crate::look::top::Top;
use crate::operate::{DrainWorker, OnRun, SetValue, Stop};
use crate::run::StopBefore;

pub(crate) use self::cluster::{Certs, Coordinator, Doctor, ExecChild, RunId, SandboxInit, Supervise, Verifier};
pub(crate) use self::eval::{Eval, EvalCommand, EvalCompare, EvalReport, Measure, Preset};
pub(crate) use self::launch::{LaunchCommand, LaunchKubernetes, LaunchSlurm, Only};

/// Trains language models with PACS on problems whose answers can be checked.
#[derive(Debug, Parser)]
#[command(name = "pacs", version, max_term_width = 100)]
#[command(after_help = "\
Examples:
  pacs job init my-job.toml             write a commented job spec
  pacs job check my-job.toml            say what it would do
  pacs run my-job.toml                  train on this machine
  pacs eval my-job.toml                 measure a model on the job's held-out problems
  pacs status                           look at the run on this machine
  pacs samples                          read what it answers
  pacs data check my-job.toml           look for rows that cannot be used
  pacs verify math --input rows.jsonl   grade answers")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a job: coordinator here, its workers as processes of this machine.
    Run(Run),
    /// Measures a model on held-out problems: pass@k, maj@k, intervals, a report.
    Eval(Eval),
    /// Prints what a cluster needs to run a job.
    #[command(
        after_help = "Examples:\n  pacs launch slurm job.toml --nodes 4 | sbatch\n  pacs launch slurm job.toml --submit"
    )]
    Launch {
        #[command(subcommand)]
        command: LaunchCommand,
    },
    /// Runs the coordinator of a job whose workers are started on their own.
    Coordinator(Coordinator),
    /// Grades answers for a coordinator.
    Verifier(Verifier),
    /// Guards a program that judges answers: verifiers start it.
    #[command(hide = true)]
    ExecChild(ExecChild),
    /// Isolates itself and keeps a warm interpreter for programs that nobody trusts: verifiers start it.
    #[command(hide = true)]
    SandboxInit(SandboxInit),
    /// Prints the id of the run in a folder, and makes it when the folder has none.
    RunId(RunId),
    /// Runs a worker, and starts it again when it dies.
    Supervise(Supervise),
    /// Makes certificates for mutual TLS: an authority, and one for each role.
    Certs(Certs),
    /// Looks whether this machine can do its part in a run, and says what to do where it cannot.
    Doctor(Doctor),
    /// Shows what a run does and what it waits for.
    Status(Status),
    /// Shows a live run on one screen.
    Top(Top),
    /// Shows what a model has answered, and how it was judged.
    Samples(Samples),
    /// Shows the numbers of runs next to each other.
    Compare(Compare),
    /// Shows the logs of all processes of a run.
    Logs(Logs),
    /// Lists the runs of this user, those that are over, too.
    Runs(Runs),
    /// Asks a run to write a checkpoint and end.
    Stop(Stop),
    /// Lets a run give out no new work.
    Pause(OnRun),
    /// Lets a paused run go on.
    Resume(OnRun),
    /// Lets a run write a checkpoint now.
    Checkpoint(OnRun),
    /// Takes a rollout worker or verifier out of a run.
    Drain(DrainWorker),
    /// Changes a setting of a running job.
    Set(SetValue),
    /// Grades the answers of a file, as a run would.
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
    /// Compares methods by many runs, and reports with intervals.
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
    /// Looks at problems to train on and to evaluate with.
    #[command(
        after_help = "Examples:\n  pacs data check my-job.toml\n  pacs data check train.jsonl --evaluation test.jsonl"
    )]
    Data {
        #[command(subcommand)]
        command: DataCommand,
    },
    /// Looks at model folders.
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
    /// With the built-in verifier of mathematical answers.
    Math(VerifyMath),
    /// Texts: the last box, or else the last line, has to equal the reference.
    #[command(after_help = "Example:\n  pacs verify exact --input rows.jsonl > verdicts.jsonl")]
    Exact(VerifyText),
    /// Expressions that make a target of given numbers; `gold` reads `44 from all of 3, 5, 19`.
    #[command(after_help = "\
Example:
  echo '{\"gold\": \"44 from 19, 5, 5\", \"pred\": \"5 * 5 + 19\"}' | pacs verify countdown --input -

The last box, or else the last line, is one expression of whole numbers, + - * / and brackets, after which `= 44` may stand. With
`from` no number is used more often than it is listed, with `from all of` each exactly so often.")]
    Countdown(VerifyText),
    /// Programs, which are run on the cases of their problem in a sandbox.
    #[command(after_help = "\
Examples:
  pacs verify code --input rows.jsonl > verdicts.jsonl
  pacs verify code --input rows.jsonl --allow-missing cgroup --count

`gold` holds the cases, a list or an object as in docs/VERIFIERS.md, such as [{\"input\": \"1 2\", \"output\": \"3\"}] or [\"assert f(1) == 2\"];
`pred` is a response whose last block of code is the program. `pacs doctor` shows which layers of the sandbox hold on this machine.")]
    Code(VerifyCode),
    /// With a program of your own that reads and writes JSON lines (docs/VERIFIERS.md).
    Exec(VerifyExec),
    /// With a service of your own, of proto/pacs/v1/custom_verifier.proto.
    Grpc(VerifyGrpc),
}

#[derive(Debug, Args)]
pub(crate) struct VerifyInput {
    /// Rows to grade (JSON lines); `-` reads standard input.
    #[arg(long, value_name = "FILE")]
    pub(crate) input: PathBuf,
    /// Seconds that one verification may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub(crate) timeout: f64,
    /// Answers that are graded at once; 0: one a core.
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
    /// Where the answer may stand.
    #[arg(long, value_enum, default_value_t = ExtractionMode::Lenient)]
    pub(crate) extraction: ExtractionMode,
    /// How far it has to be worked out.
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
    /// As far as the reference: no arithmetic left between explicit numbers.
    Evaluated,
    /// Not at all: whatever has the value of the reference.
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
  pacs verify exec --input rows.jsonl --threads 4 -- venv/bin/python deploy/verifiers/math_verify_exec.py")]
pub(crate) struct VerifyExec {
    #[command(flatten)]
    pub(crate) input: VerifyInput,
    /// A variable of this environment that the program is told besides the usual ones, as `verifier.environment` of a job; may be
    /// given several times.
    #[arg(long, value_name = "NAME")]
    pub(crate) pass_env: Vec<String>,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pacs verify grpc --input rows.jsonl --address 127.0.0.1:9000 --threads 16")]
pub(crate) struct VerifyGrpc {
    #[command(flatten)]
    pub(crate) input: VerifyInput,
    /// Where the service listens.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) address: String,
    /// PEM file with the authorities that sign the service's certificate; the connection is TLS then.
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
}

#[derive(Debug, Subcommand)]
pub(crate) enum StudyCommand {
    /// Lists the runs, and says which are finished.
    #[command(after_help = "Example: pacs study plan deploy/studies/first.toml")]
    Plan {
        #[command(flatten)]
        file: StudyFile,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Makes the runs on this machine, several at once, and writes the report.
    ///
    /// Finished runs are kept and others resumed, whenever and however the command ended. Exit code 75 after Ctrl-C: the same command
    /// resumes; 78 when runs failed.
    #[command(after_help = "Example: pacs study run deploy/studies/first.toml --parallel 2")]
    Run {
        #[command(flatten)]
        file: StudyFile,
        /// Runs at once. Default: one a core.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
        parallel: Option<u16>,
        /// The `pacs-worker` program. Default: beside this program, else on PATH.
        #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
        worker_binary: Option<PathBuf>,
    },
    /// Hands each run that is not finished to a launcher, a job each: tries first, then, when they are finished, the rest.
    ///
    /// `report` collects what the jobs have finished.
    #[command(after_help = "Example: pacs study launch deploy/studies/main.toml slurm -- --submit --time 1:00:00")]
    Launch {
        #[command(flatten)]
        file: StudyFile,
        /// The launcher.
        #[arg(value_parser = ["slurm", "kubernetes"])]
        launcher: String,
        /// Options of `pacs launch` with this launcher.
        #[arg(last = true)]
        options: Vec<String>,
    },
    /// Writes the report of what is finished.
    #[command(after_help = "Example: pacs study report deploy/studies/first.toml")]
    Report {
        #[command(flatten)]
        file: StudyFile,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Says what is understood of a Hugging Face folder, and what was assumed where no file says it.
    Check(ModelCheck),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs model check models/qwen3-0.6b
  pacs model check models/qwen3-0.6b --json | jq .end_tokens

Exit code 78 when a file cannot be used, no file names a token that ends an answer, or the chat template ends answers with
another one. docs/MODELS.md says what is read from which file.")]
pub(crate) struct ModelCheck {
    /// The folder; its weights may be missing.
    pub(crate) folder: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Names the rows that a run could not use, and those that it should not.
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
    /// A job spec (.toml), or a file of problems (.jsonl, .json, .csv, .tsv or .parquet; see docs/DATA.md).
    pub(crate) target: PathBuf,
    /// Held-out problems that must not be among them.
    #[arg(long, value_name = "FILE")]
    pub(crate) evaluation: Option<PathBuf>,
    /// Count the prompts' tokens with this model. A job brings its own.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Field that holds the question. Default: question.
    #[arg(long, value_name = "NAME")]
    pub(crate) question_field: Option<String>,
    /// Field that holds the reference answer. Default: answer.
    #[arg(long, value_name = "NAME")]
    pub(crate) answer_field: Option<String>,
    /// The reference answers are for a verifier of your own: do not read them as mathematics.
    #[arg(long)]
    pub(crate) any_answer: bool,
    /// The reference answers are cases of programs; reference solutions are run on them.
    #[arg(long, conflicts_with = "any_answer")]
    pub(crate) code: bool,
    /// With `--code`: a layer of the sandbox that may be missing, by its name; may be given several times.
    #[arg(long, value_name = "LAYER", value_parser = layer, requires = "code")]
    pub(crate) allow_missing: Vec<String>,
    /// Print JSON.
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
the same command then goes on where the run was. When the command is killed its workers wait, and the same command takes them over.
Exit codes: 0 done, 2 usage, 70 bug, 75 start again, 78 wrong job spec, model or data.")]
pub(crate) struct Run {
    /// The job spec.
    pub(crate) job: PathBuf,
    /// Folder of the run: checkpoints, metrics, samples, logs. Default: runs/<name of the job>. A folder that holds a
    /// run of this job goes on.
    #[arg(long, value_name = "DIR")]
    pub(crate) run_dir: Option<PathBuf>,
    /// Where the coordinator listens. Default: 127.0.0.1:7700, or another port when that one is in use; a run that is started
    /// again prefers its port of before.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Folder with the certificates of all roles, as `pacs certs` writes it, so that workers of other machines can join. Default:
    /// the run makes its own, in its folder, and removes them when it ends.
    #[arg(long, value_name = "DIR", env = "PACS_TLS_DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Speak plain text with the workers, over the loopback interface: every user of this machine can then read and command the
    /// run.
    #[arg(long, conflicts_with = "tls_dir")]
    pub(crate) plaintext: bool,
    /// The `pacs-worker` program. Default: beside this program, else on PATH.
    #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
    pub(crate) worker_binary: Option<PathBuf>,
    /// Train this model, with its own chat template, instead of the spec's.
    #[arg(long, value_name = "DIR")]
    pub(crate) model: Option<PathBuf>,
    /// Train on this file (.jsonl, .json, .csv, .tsv or .parquet; see docs/DATA.md) instead of the spec's problems. Without
    /// --eval-dataset its last rows, a tenth and at most 200, are held out for evaluation.
    #[arg(long, value_name = "FILE")]
    pub(crate) dataset: Option<PathBuf>,
    /// Evaluate with this file instead of the spec's held-out problems.
    #[arg(long, value_name = "FILE")]
    pub(crate) eval_dataset: Option<PathBuf>,
    /// Make so many training steps.
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<u64>,
    /// Let answers have so many tokens.
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<u32>,
    /// Seed of data order and sampling noise.
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Train by this objective (pacs, grpo, rloo, ppo, …) with its published settings, instead of the spec's [objective].
    #[arg(long, value_name = "KIND", value_parser = objective)]
    pub(crate) objective: Option<ObjectiveKind>,
    /// Write a checkpoint and end before then: after a duration (90s, 45m, 3h, 2d) or at a time of UTC
    /// (2026-03-01T18:30:00Z). Steps and checkpoints that were measured say how long before.
    #[arg(long, value_name = "WHEN")]
    pub(crate) stop_before: Option<StopBefore>,
    /// Serve metrics for Prometheus there, at /metrics. Default: nowhere.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) metrics_listen: Option<SocketAddr>,
    /// How log lines look: errors on standard error, everything in logs/coordinator.log of the run folder.
    #[arg(long, value_enum, default_value_t = LogFormat::Human)]
    pub(crate) log_format: LogFormat,
    /// Print progress as JSON, one object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

fn objective(name: &str) -> Result<ObjectiveKind, String> {
    let known = ObjectiveKind::ALL.into_iter().find(|kind| kind.name() == name);
    known.ok_or_else(|| format!("expected one of {}", ObjectiveKind::ALL.map(ObjectiveKind::name).join(", ")))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// One readable line an event.
    Human,
    /// One JSON object an event.
    Json,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs status                           the run on this machine
  pacs status 10.0.0.5:7700             the run of that coordinator
  pacs status runs/demo --json          the run in that folder, for scripts")]
pub(crate) struct Status {
    /// The run: its folder, coordinator (host:port), job, or the first digits of its id. Default: the one that lives on this
    /// machine; if there are several they are listed, and the exit code is 2.
    pub(crate) target: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs job check deploy/jobs/demo.toml
  pacs job check job.toml --preflight           also load, grade and train a little, before a large job is paid for

Model and data are looked at when they are there; a spec can be checked without them.")]
pub(crate) struct Check {
    /// The job spec.
    pub(crate) job: PathBuf,
    /// Also try it on a small scale on this machine: load the data, grade sample answers with the job's own verifiers, take
    /// one tiny step with the job's model, programs and devices. Each failure says how far a run would have come.
    #[arg(long)]
    pub(crate) preflight: bool,
    /// Seconds that the tiny step may take, start and end included.
    #[arg(long, value_name = "SECONDS", default_value_t = 900, requires = "preflight", value_parser = clap::value_parser!(u64).range(..=cluster::MOST_SECONDS))]
    pub(crate) preflight_timeout: u64,
    /// The `pacs-worker` program for the tiny step. Default: beside this program, else on PATH.
    #[arg(long, value_name = "PATH", env = "PACS_WORKER_BINARY")]
    pub(crate) worker_binary: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  pacs job init my-job.toml\n  pacs job init > my-job.toml")]
pub(crate) struct Init {
    /// File to write, which must not exist. Default: standard output.
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

    /// Numbers that no clock, queue or machine takes are refused by name, and never reach a sum.
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
