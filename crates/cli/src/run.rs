//! `pacs run`: a whole job on this machine.
//!
//! The coordinator lives in this process; the workers are processes of their own, which [`supervisor`] starts, starts
//! again and ends. Everything that happens comes into one loop as an [`Occurrence`].

mod adopt;
mod certificates;
mod console;
pub(crate) mod gpus;
mod logs;
mod overrides;
pub(crate) mod restarts;
pub(crate) mod supervisor;
mod wall_time;
mod workers;

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::time::Duration;

use anyhow::{Context, anyhow};
use pacs_coordinator::{Coordinator, CoordinatorOptions, Progress, RunEnd, StartError, StopHandle};
use pacs_runtime::launch::{self, DEFAULT_PORT};
use pacs_runtime::net::{PeerRole, Security};
use pacs_runtime::{Exit, Shutdown, harmless};
use pacs_spec::JobSpec;
use pacs_weights::HostStore;
use serde_json::json;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use self::certificates::Certificates;
pub(crate) use self::console::Console;
use self::console::{BeforeAfter, finish_lines};
use self::gpus::Gpus;
use self::supervisor::{GivenUp, Supervisor, WorkerNews};
pub(crate) use self::wall_time::StopBefore;
use self::wall_time::WallTime;
pub(crate) use self::workers::find_worker;
use crate::arguments::Run;
use crate::failure::Failure;
use crate::format::{count, plural};
use crate::live;
use crate::model_folder::{self, ModelFolder};

/// How long workers may still take to leave when the coordinator, which waits for them itself, has ended.
const LEAVE_GRACE: Duration = Duration::from_secs(3);

/// How long the coordinator may take to save and end when a worker cannot be had any more.
const LAST_SAVE: Duration = Duration::from_secs(30);

/// How long the worker that made a run fail may take to end.
const CAUSE_DEADLINE: Duration = Duration::from_secs(2);

pub(crate) fn run(arguments: &Run) -> Result<Exit, Failure> {
    let mut spec = pacs_spec::read(&arguments.job).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    overrides::apply(&mut spec, arguments)?;
    run_spec(spec, arguments)
}

/// Runs a job whose spec is complete.
pub(crate) fn run_spec(spec: JobSpec, arguments: &Run) -> Result<Exit, Failure> {
    let model = inspect_model(&spec.model.path)?;
    let job = Job { run_dir: overrides::run_dir(&spec, arguments), model, arguments, only: spec.evaluation.only };
    let worker = match spec.resources.rollouts + spec.learners() {
        0 => PathBuf::new(),
        _ => workers::find_worker(arguments.worker_binary.as_deref())?,
    };
    let gpus = Gpus::of(&spec);
    check_gpus(gpus.as_ref())?;
    let logs = job.run_dir.join("logs");
    create_folders(&job.run_dir, &logs)
        .with_context(|| format!("create folder `{}`", logs.display()))
        .map_err(Failure::config)?;
    logs::init(&logs.join("coordinator.log"), arguments.log_format).map_err(Failure::config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    let result = runtime.block_on(job.run(spec, &worker, gpus.as_ref(), &logs));
    runtime.shutdown_background();
    result
}

/// Refuses a job whose workers this machine has no GPUs for.
fn check_gpus(gpus: Option<&Gpus>) -> Result<(), Failure> {
    let Some(gpus) = gpus else { return Ok(()) };
    if let Some(problem) = gpus.problem() {
        return Err(Failure::config(anyhow!("{problem}")).doing("assign the GPUs of this machine"));
    }
    if gpus.are_there() {
        return Ok(());
    }
    let hint = "look at `nvidia-smi --list-gpus` and CUDA_VISIBLE_DEVICES, or set `resources.device = \"cpu\"`";
    let none = anyhow!("this machine shows no GPU");
    Err(Failure::config(none).doing("assign the GPUs of this machine").hint(hint))
}

/// A new run folder is for its owner only: weights, samples and keys are in it. One that is there stays as open as it is.
pub(crate) fn create_folders(run_dir: &Path, logs: &Path) -> std::io::Result<()> {
    if let Some(above) = run_dir.parent() {
        fs::create_dir_all(above)?;
    }
    match DirBuilder::new().mode(0o700).create(run_dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        Ok(()) | Err(_) => {}
    }
    fs::create_dir_all(logs)
}

pub(crate) fn inspect_model(path: &Path) -> Result<ModelFolder, Failure> {
    model_folder::inspect(path).map_err(|error| {
        let failure = Failure::config(error).doing(format!("read model `{}`", path.display()));
        let hint = "give a Hugging Face folder with --model DIR; `pacs-worker import` makes one of a GGUF file, and \
                    `cargo xtask demo` fetches the demo's";
        if path.exists() { failure } else { failure.hint(hint) }
    })
}

/// What does not change while the job runs.
struct Job<'a> {
    arguments: &'a Run,
    run_dir: PathBuf,
    model: ModelFolder,
    /// The job measures and trains nothing.
    only: bool,
}

/// What can happen while a run goes on.
enum Occurrence {
    /// The coordinator says something.
    Progress(Progress),
    /// A worker process died.
    Worker(WorkerNews),
    /// The operator wants the run to stop.
    Stop,
    /// The time that the run was given is nearly over, and who says so.
    TimeUp(&'static str),
    /// The operator does not want to wait for that.
    Hurry,
    /// The coordinator is done.
    End(RunEnd),
}

/// How following a run ends.
enum Outcome {
    /// The coordinator is done.
    Ended(RunEnd),
    /// The operator would not wait.
    Hurried,
    /// A worker cannot be had any more.
    Lost(GivenUp),
}

impl Job<'_> {
    async fn run(&self, spec: JobSpec, worker: &Path, gpus: Option<&Gpus>, logs: &Path) -> Result<Exit, Failure> {
        let (shutdown, warned) = (Shutdown::new(), Shutdown::new());
        let installed = shutdown.on_signals().and_then(|()| warned.on_warning());
        installed.context("install signal handlers").map_err(Failure::bug)?;
        let mut console = Console::new(self.arguments.json);
        let text = format!("loading problems, and looking for checkpoints in {}", self.run_dir.display());
        console.say("loading", &text, json!({}));
        let listen = self.arguments.listen.unwrap_or((Ipv4Addr::LOCALHOST, DEFAULT_PORT).into());
        let certificates = self.certificates()?;
        let tls_dir = certificates.as_ref().map(Certificates::folder).or(self.arguments.tls_dir.as_deref());
        let options = CoordinatorOptions {
            security: security(tls_dir)?,
            any_port: self.arguments.listen.is_none(),
            ..CoordinatorOptions::local(spec.clone(), self.run_dir.clone(), listen)
        };
        let coordinator = Coordinator::start(options).await.map_err(start_failure)?;
        let _listed = live::list(&coordinator, &self.run_dir);
        let metrics = self.serve_metrics(&coordinator).await?;
        let (address, events) = (workers::local(coordinator.address()), coordinator.events());
        self.announce(&console, &spec, (address, metrics), coordinator.run_id());
        let run = (self.run_dir.as_path(), coordinator.run_id());
        let mut commands = workers::commands(&spec, worker, run, tls_dir, gpus)?;
        // Workers of a run that was killed outlive it, and go on with this one.
        adopt::adopt(&mut commands, &coordinator.known_workers());
        for command in commands.iter().filter(|command| command.living.is_some()) {
            console.say("adopted", &format!("worker {} is still there and goes on", command.name), json!({}));
        }
        let mut supervisor = Supervisor::start(commands, logs);
        let renewing = certificates.clone().map(|certificates| tokio::spawn(certificates.keep_fresh()));
        let (stop, run_id) = (coordinator.stop_handle(), coordinator.run_id().to_owned());
        let mut end = pin!(coordinator.wait());
        let wall = WallTime::new(self.arguments.stop_before);
        let ended = async {
            match watch(&mut console, end.as_mut(), events, &mut supervisor, &stop, (&shutdown, &warned), wall).await {
                Outcome::Ended(RunEnd::Failed { reason }) => {
                    // The worker that failed says more than the coordinator can.
                    let cause = timeout(CAUSE_DEADLINE, given_up(&mut supervisor)).await.ok();
                    supervisor.finish(LEAVE_GRACE, &shutdown).await;
                    Err(failed_run(&reason, cause, logs))
                }
                Outcome::Ended(RunEnd::Panicked { reason }) => {
                    supervisor.finish(LEAVE_GRACE, &shutdown).await;
                    Err(Failure::bug(anyhow!("{reason}")).doing("go on with the run"))
                }
                Outcome::Ended(RunEnd::Interrupted { reason }) => {
                    supervisor.finish(LEAVE_GRACE, &shutdown).await;
                    let hint = "nothing that was acknowledged is lost; the same command goes on";
                    Err(Failure::again(anyhow!("{}", harmless(&reason))).doing("go on with the run").hint(hint))
                }
                Outcome::Ended(end) => {
                    supervisor.finish(LEAVE_GRACE, &shutdown).await;
                    Ok(self.conclude(&console, &end))
                }
                Outcome::Hurried => {
                    supervisor.finish(Duration::ZERO, &shutdown).await;
                    console.say("end", "ended at once; the same command goes on from the last checkpoint", json!({}));
                    Ok(Exit::Again)
                }
                Outcome::Lost(worker) => {
                    if worker.exit != Exit::Config {
                        stop.request_stop();
                        // Best effort: otherwise the steps since the last checkpoint are lost.
                        let _ = timeout(LAST_SAVE, end).await;
                    }
                    supervisor.finish(Duration::ZERO, &shutdown).await;
                    Err(lost_worker(&worker))
                }
            }
        };
        let ended = ended.await;
        // In whichever way it has ended, no process of the run lives any more.
        renewing.inspect(JoinHandle::abort);
        certificates.inspect(Certificates::remove);
        remove_weights(&run_id);
        ended
    }

    /// Serves metrics, if they are wanted; says where.
    async fn serve_metrics(&self, coordinator: &Coordinator) -> Result<Option<SocketAddr>, Failure> {
        let Some(listen) = self.arguments.metrics_listen else { return Ok(None) };
        let serving = coordinator.observer().serve_metrics(listen).await;
        serving.map(Some).map_err(|error| Failure::config(error).doing(format!("listen on {listen} for metrics")))
    }

    /// The run's own certificates, unless the user has given some, or wants none.
    fn certificates(&self) -> Result<Option<Certificates>, Failure> {
        if self.arguments.plaintext || self.arguments.tls_dir.is_some() {
            return Ok(None);
        }
        Certificates::of_run(&self.run_dir).map(Some).map_err(|error| {
            let hint = "keys need a folder that others cannot read; --tls-dir DIR uses certificates elsewhere, and --plaintext none";
            Failure::config(error).doing("protect the connections of the run").hint(hint)
        })
    }

    /// Says what is run, and where to look.
    fn announce(
        &self,
        console: &Console,
        spec: &JobSpec,
        (address, metrics): (SocketAddr, Option<SocketAddr>),
        run_id: &str,
    ) {
        let (batch, rollout, resources) = (&spec.batch, &spec.rollout, &spec.resources);
        let workers = [
            plural(u64::from(resources.rollouts), "rollout worker", "rollout workers"),
            plural(u64::from(spec.learners()), "learner", "learners"),
            plural(u64::from(resources.verifiers), "verifier", "verifiers"),
        ];
        let sets = spec.evaluation_sets();
        let samples = sets.iter().map(|set| format!("{} with {} samples a problem", set.label(), set.samples));
        let job = if spec.evaluation.only {
            format!("evaluation of {}", samples.collect::<Vec<_>>().join(", "))
        } else {
            format!(
                "{}: {} of {} prompts x {} samples, answers of up to {} tokens",
                spec.name,
                plural(batch.steps, "step", "steps"),
                batch.prompts_per_step,
                rollout.samples_per_prompt,
                rollout.max_new_tokens
            )
        };
        let parameters = count(self.model.parameters);
        let model = format!("{} ({}, {parameters} parameters)", spec.model.path.display(), self.model.kind);
        let run_dir = self.run_dir.display().to_string();
        let mut fields = json!({"job": spec.name, "run_dir": run_dir, "coordinator": address, "steps": batch.steps,
                            "run_id": run_id});
        let moved = match self.arguments.listen {
            None if address.port() != DEFAULT_PORT => format!("a free port, as {DEFAULT_PORT} was in use; "),
            _ => String::new(),
        };
        let mut lines = vec![
            ("job", job),
            ("model", model),
            ("workers", format!("{}; their logs are in {run_dir}/logs", workers.join(", "))),
            ("run folder", run_dir),
            ("run id", run_id.to_owned()),
            ("coordinator", format!("{address} ({moved}from another terminal: pacs status {address})")),
        ];
        if let Some(metrics) = metrics {
            lines.push(("metrics", format!("http://{metrics}/metrics")));
            fields["metrics"] = json!(metrics);
        }
        console.block("start", &lines, &fields);
    }

    fn conclude(&self, console: &Console, end: &RunEnd) -> Exit {
        match end {
            RunEnd::Finished { .. } if self.only => {
                let run_dir = self.run_dir.display();
                let text = format!("measured; `{} eval report {run_dir}` prints the report again", program());
                console.say("end", &text, json!({"run_dir": self.run_dir}));
                Exit::Done
            }
            RunEnd::Stopped { .. } if self.only => {
                let text = "stopped; the same command continues with every sample that there is";
                console.say("end", text, json!({"run_dir": self.run_dir}));
                Exit::Again
            }
            RunEnd::Finished { step, checkpoint, model } => {
                let measured = BeforeAfter::read(&self.run_dir);
                let commands = overrides::commands(self.arguments, &program());
                let lines = finish_lines(*step, &shown(model), &self.run_dir, &commands, measured);
                let fields = json!({"step": step, "model": model, "checkpoint": checkpoint,
                                    "before": measured.map(|m| m.before), "after": measured.map(|m| m.after)});
                console.block("end", &lines, &fields);
                Exit::Done
            }
            RunEnd::Stopped { step, checkpoint } => {
                let saved = match checkpoint {
                    Some(path) => format!("saved in {}", shown(path).display()),
                    None => "nothing to save".to_owned(),
                };
                let text =
                    format!("stopped after {}, {saved}; run the same command to go on", plural(*step, "step", "steps"));
                console.say("end", &text, json!({"step": step, "checkpoint": checkpoint}));
                Exit::Again
            }
            RunEnd::Failed { reason } | RunEnd::Panicked { reason } | RunEnd::Interrupted { reason } => {
                unreachable!("failures are reported as such: {reason}")
            }
        }
    }
}

/// Mutual TLS with the certificates of all roles in this folder; without one plain text, which stays within this machine.
fn security(tls_dir: Option<&Path>) -> Result<Security, Failure> {
    let Some(folder) = tls_dir else { return Ok(Security::Plain) };
    launch::security(folder, PeerRole::Coordinator)
        .map_err(|error| Failure::config(error).doing("use the certificates"))
}

/// Follows the run until it ends, the operator has enough, or a worker cannot be had any more.
async fn watch(
    console: &mut Console,
    mut end: Pin<&mut impl Future<Output = RunEnd>>,
    mut events: broadcast::Receiver<Progress>,
    supervisor: &mut Supervisor,
    stop: &StopHandle,
    (shutdown, warned): (&Shutdown, &Shutdown),
    mut wall: WallTime,
) -> Outcome {
    let mut stopping = false;
    loop {
        let occurrence = tokio::select! {
            // In this order, so that the last lines of a run are printed before its end.
            biased;
            () = shutdown.hurried() => Occurrence::Hurry,
            () = shutdown.requested(), if !stopping => Occurrence::Stop,
            () = wall.is_up(), if !stopping => Occurrence::TimeUp("the time of --stop-before is nearly over"),
            () = warned.requested(), if !stopping => Occurrence::TimeUp("SIGUSR1 says that the time is nearly over"),
            progress = next(&mut events) => Occurrence::Progress(progress),
            news = supervisor.news() => Occurrence::Worker(news),
            end = end.as_mut() => Occurrence::End(end),
        };
        match occurrence {
            Occurrence::Progress(progress) => {
                if matches!(progress, Progress::Step(_) | Progress::Evaluated(_) | Progress::Narrowed { .. }) {
                    supervisor.advanced();
                }
                wall.note(&progress);
                if let Progress::Drained { name } = &progress {
                    supervisor.retire(name);
                }
                console.progress(&progress);
            }
            Occurrence::Worker(news) => {
                console.worker(&news);
                if let WorkerNews::GivenUp(worker) = news {
                    return Outcome::Lost(worker);
                }
            }
            Occurrence::Stop => {
                stopping = true;
                let text = "stopping: what is in work is finished and saved (a second Ctrl-C ends at once)";
                console.say("stopping", text, json!({}));
                stop.request_stop();
            }
            Occurrence::TimeUp(why) => {
                stopping = true;
                let text = format!("stopping: {why}; what is in work is finished and saved");
                console.say("stopping", &text, json!({}));
                stop.request_stop();
            }
            Occurrence::Hurry => return Outcome::Hurried,
            Occurrence::End(end) => {
                while let Ok(progress) = events.try_recv() {
                    console.progress(&progress);
                }
                return Outcome::Ended(end);
            }
        }
    }
}

/// The next thing that the coordinator says; what a slow terminal has missed is left out.
pub(crate) async fn next(events: &mut broadcast::Receiver<Progress>) -> Progress {
    loop {
        match events.recv().await {
            Ok(progress) => return progress,
            Err(RecvError::Lagged(missed)) => tracing::warn!("{missed} events were too many for the terminal"),
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// Removes the weights that the run's workers have left on this host. The last one to leave does that by itself, unless it was
/// killed.
fn remove_weights(run_id: &str) {
    // A store removes its folder when it is dropped and no other process holds it.
    match HostStore::open(run_id) {
        Ok(store) => drop(store),
        Err(error) => tracing::warn!("weights that the workers may have left are not removed: {error}"),
    }
}

async fn given_up(supervisor: &mut Supervisor) -> GivenUp {
    loop {
        if let WorkerNews::GivenUp(worker) = supervisor.news().await {
            return worker;
        }
    }
}

pub(crate) fn start_failure(error: StartError) -> Failure {
    let listening = match &error {
        StartError::Listen { address, .. } => Some(*address),
        _ => None,
    };
    let failure = Failure::with_exit(error.exit(), error).doing("start the coordinator");
    match listening {
        Some(address) => failure.hint(format!(
            "`pacs status {address}` says whether a run is going on there; --listen HOST:PORT chooses another port, and without \
             --listen `pacs run` takes a free one"
        )),
        None => failure,
    }
}

fn lost_worker(worker: &GivenUp) -> Failure {
    let GivenUp { name, how, exit, log, tail } = worker;
    let lines: String = tail.iter().map(|line| format!("\n  | {}", harmless(line))).collect();
    let error = anyhow!("worker {name} {how}; the end of its log `{}`:{lines}", log.display());
    Failure::with_exit(*exit, error).doing("keep the workers running")
}

fn failed_run(reason: &str, cause: Option<GivenUp>, logs: &Path) -> Failure {
    match cause {
        Some(worker) => lost_worker(&worker).doing(format!("finish the run ({})", harmless(reason))),
        None => {
            let hint = format!("the logs in {} say more", logs.display());
            Failure::bug(anyhow!("{}", harmless(reason))).doing("finish the run").hint(hint)
        }
    }
}

/// This program as the user calls it.
fn program() -> String {
    let called = std::env::args_os().next().unwrap_or_else(|| "pacs".into());
    shown(Path::new(&called)).display().to_string()
}

/// A path as the user would write it: relative when it is below the working directory.
fn shown(path: &Path) -> PathBuf {
    let here = std::env::current_dir().and_then(|here| here.canonicalize());
    here.ok().and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path).to_owned()
}
