//! `pacs run`: runs a whole job on this machine.
//!
//! The coordinator lives in this process. Workers are processes of their own, which [`supervisor`] starts, restarts and ends.
//! One loop receives everything that happens as an [`Occurrence`].

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
use pacs_dashboard::Server;
use pacs_hub::{Part, Pins};
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
use self::console::{BeforeAfter, Commands, finish_lines};
use self::gpus::Gpus;
use self::supervisor::{GivenUp, Supervisor, WorkerNews};
pub(crate) use self::wall_time::StopBefore;
use self::wall_time::WallTime;
pub(crate) use self::workers::find_worker;
use crate::arguments::{Local, Run};
use crate::ending::{self, Ending};
use crate::failure::Failure;
use crate::format::{count, plural};
use crate::hub;
use crate::live;
use crate::look::dashboard;
use crate::model_folder::{self, ModelFolder};
use crate::servers;
use crate::traces;

/// Grace for workers after the coordinator, which waits for them itself, has ended.
const LEAVE_GRACE: Duration = Duration::from_secs(3);

/// Deadline for the coordinator's last checkpoint after a worker has failed permanently.
const LAST_SAVE: Duration = Duration::from_secs(30);

/// Deadline for the exit of the worker that made the run fail; its last log lines go into the error.
const CAUSE_DEADLINE: Duration = Duration::from_secs(2);

/// Where a run serves its dashboard.
#[derive(Clone, Copy, Debug)]
enum DashboardAt {
    Nowhere,
    /// At the usual port of loopback, or at a free one.
    Usual,
    Address(SocketAddr),
}

/// How a job is run, besides what its spec says.
pub(crate) struct Launch<'a> {
    run_dir: PathBuf,
    local: &'a Local,
    /// Where metrics are served, if anywhere.
    metrics_listen: Option<SocketAddr>,
    dashboard: DashboardAt,
    stop_before: Option<StopBefore>,
    /// What the user called; none where the job only evaluates.
    commands: Option<Commands>,
    /// The commits that names of the hub stand for.
    pins: Pins,
}

impl<'a> Launch<'a> {
    /// In this folder, with these processes and files of the hub, and nothing else that is unusual.
    pub(crate) fn new(run_dir: PathBuf, local: &'a Local, pins: Pins) -> Self {
        Self {
            run_dir,
            local,
            metrics_listen: None,
            dashboard: DashboardAt::Nowhere,
            stop_before: None,
            commands: None,
            pins,
        }
    }
}

pub(crate) fn run(arguments: &Run) -> Result<Exit, Failure> {
    let mut spec = pacs_spec::read(&arguments.job).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    let run_dir = overrides::run_dir(&spec, arguments);
    let ((), pins) = hub::session(Some(&run_dir), |hub| {
        overrides::apply(&mut spec, arguments, &mut |path| hub.data(path))?;
        hub.job(&mut spec, Part::Whole)
    })?;
    let launch = Launch {
        metrics_listen: arguments.metrics_listen,
        dashboard: match arguments.dashboard_listen {
            Some(address) => DashboardAt::Address(address),
            None if arguments.no_dashboard => DashboardAt::Nowhere,
            None => DashboardAt::Usual,
        },
        stop_before: arguments.stop_before,
        commands: Some(overrides::commands(arguments, &program())),
        ..Launch::new(run_dir, &arguments.local, pins)
    };
    run_spec(spec, launch)
}

/// Runs a job whose spec is complete, with all names of the hub resolved.
pub(crate) fn run_spec(spec: JobSpec, launch: Launch<'_>) -> Result<Exit, Failure> {
    let model = inspect_model(&spec.model.path)?;
    let served = spec.own_servers().map(|server| servers::model(&spec, server, &spec.model.path)).transpose()?;
    let job = Job { model, launch, served, only: spec.evaluation.only };
    let worker = match spec.computing_rollouts() + spec.learners() {
        0 => PathBuf::new(),
        _ => workers::find_worker(job.launch.local.worker_binary.as_deref())?,
    };
    let gpus = Gpus::of(&spec);
    check_gpus(gpus.as_ref())?;
    let run_dir = &job.launch.run_dir;
    let logs = run_dir.join("logs");
    create_folders(run_dir, &logs)
        .with_context(|| format!("create folder `{}`", logs.display()))
        .map_err(Failure::config)?;
    job.launch.pins.write(run_dir).map_err(Failure::config)?;
    logs::init(&logs.join("coordinator.log"), job.launch.local.log_format).map_err(Failure::config)?;
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

/// Creates a new run folder with mode 0700, because weights, samples and keys go into it. An existing folder keeps its mode.
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
        let hint = "give a Hugging Face folder, or a name of the hub (OWNER/NAME), with --model; `pacs-worker import` makes a \
                    folder of a GGUF file, and `pacs demo` fetches the demo's";
        if path.exists() { failure } else { failure.hint(hint) }
    })
}

/// What stays fixed while the job runs.
struct Job<'a> {
    launch: Launch<'a>,
    model: ModelFolder,
    /// Folder that vLLM servers are started from, where the run starts them.
    served: Option<PathBuf>,
    /// The job only evaluates (`evaluation.only`).
    only: bool,
}

/// An event of the run loop.
enum Occurrence {
    /// The coordinator reports progress.
    Progress(Progress),
    /// A worker process died and is restarted, or has failed permanently.
    Worker(WorkerNews),
    /// The operator asked for a stop (Ctrl-C or SIGTERM).
    Stop,
    /// The time limit is near; holds who says so (`--stop-before` or SIGUSR1).
    TimeUp(&'static str),
    /// The operator asked a second time and does not wait for the save.
    Hurry,
    /// The coordinator has ended.
    End(RunEnd),
}

/// Why the run loop returned.
enum Outcome {
    /// The coordinator has ended.
    Ended(RunEnd),
    /// The operator did not wait for the save.
    Hurried,
    /// A worker has failed permanently.
    Lost(GivenUp),
}

impl Outcome {
    /// What is kept of it in the run folder.
    fn ending(&self) -> Ending {
        match self {
            Self::Ended(end) => Ending::of(end),
            Self::Hurried => Ending::Stopped,
            Self::Lost(_) => Ending::Failed,
        }
    }
}

impl Job<'_> {
    async fn run(&self, spec: JobSpec, worker: &Path, gpus: Option<&Gpus>, logs: &Path) -> Result<Exit, Failure> {
        let (shutdown, warned) = (Shutdown::new(), Shutdown::new());
        let installed = shutdown.on_signals().and_then(|()| warned.on_warning());
        installed.context("install signal handlers").map_err(Failure::bug)?;
        let mut console = Console::new(self.launch.local.json);
        let text = format!("loading problems, and looking for checkpoints in {}", self.launch.run_dir.display());
        console.say("loading", &text, json!({}));
        let listen = self.launch.local.listen.unwrap_or((Ipv4Addr::LOCALHOST, DEFAULT_PORT).into());
        let certificates = self.certificates()?;
        let tls_dir = certificates.as_ref().map(Certificates::folder).or(self.launch.local.tls_dir.as_deref());
        let options = CoordinatorOptions {
            security: security(tls_dir)?,
            // Only the default port may be replaced by a free one; an explicit `--listen` that is taken is an error.
            any_port: self.launch.local.listen.is_none(),
            ..CoordinatorOptions::local(spec.clone(), self.launch.run_dir.clone(), listen)
        };
        let coordinator = Coordinator::start(options).await.map_err(start_failure)?;
        let _listed = live::list(&coordinator, &self.launch.run_dir);
        ending::forget(&self.launch.run_dir);
        let metrics = self.serve_metrics(&coordinator).await?;
        traces::export(&coordinator)?;
        let dashboard = match self.launch.dashboard {
            DashboardAt::Nowhere => None,
            DashboardAt::Usual => dashboard::of_coordinator(&coordinator, &spec, None).await?,
            DashboardAt::Address(address) => dashboard::of_coordinator(&coordinator, &spec, Some(address)).await?,
        };
        let (address, events) = (workers::local(coordinator.address()), coordinator.events());
        self.announce(&console, &spec, (address, metrics, dashboard.as_ref()), coordinator.run_id());
        let run = (self.launch.run_dir.as_path(), coordinator.run_id());
        let mut commands = workers::commands(&spec, worker, run, tls_dir, gpus, self.served.as_deref())?;
        // Workers outlive a killed `pacs run`; this one takes them over instead of starting others.
        adopt::adopt(&mut commands, &coordinator.known_workers(), run);
        for command in commands.iter().filter(|command| command.living.is_some()) {
            console.say("adopted", &format!("worker {} is still alive and continues", command.name), json!({}));
        }
        let mut supervisor = Supervisor::start(commands, logs);
        let renewing = certificates.clone().map(|certificates| tokio::spawn(certificates.keep_fresh()));
        let (stop, run_id) = (coordinator.stop_handle(), coordinator.run_id().to_owned());
        let mut end = pin!(coordinator.wait());
        let wall = WallTime::new(self.launch.stop_before);
        let ended = async {
            let outcome =
                watch(&mut console, end.as_mut(), events, &mut supervisor, &stop, (&shutdown, &warned), wall).await;
            ending::note(&self.launch.run_dir, outcome.ending());
            match outcome {
                Outcome::Ended(RunEnd::Failed { reason }) => {
                    // The failed worker's own log explains the failure better than the coordinator can.
                    let cause = timeout(CAUSE_DEADLINE, given_up(&mut supervisor)).await.ok();
                    supervisor.finish(LEAVE_GRACE, &shutdown).await;
                    Err(failed_run(&reason, cause, logs))
                }
                Outcome::Ended(RunEnd::Panicked { reason }) => {
                    supervisor.finish(LEAVE_GRACE, &shutdown).await;
                    Err(Failure::bug(anyhow!("{reason}")).doing("continue the run"))
                }
                Outcome::Ended(RunEnd::Interrupted { reason }) => {
                    supervisor.finish(LEAVE_GRACE, &shutdown).await;
                    let hint = "nothing that was acknowledged is lost; the same command resumes";
                    Err(Failure::again(anyhow!("{}", harmless(&reason))).doing("continue the run").hint(hint))
                }
                Outcome::Ended(end) => {
                    supervisor.finish(LEAVE_GRACE, &shutdown).await;
                    Ok(self.conclude(&console, &end))
                }
                Outcome::Hurried => {
                    supervisor.finish(Duration::ZERO, &shutdown).await;
                    console.say("end", "ended at once; the same command resumes from the last checkpoint", json!({}));
                    Ok(Exit::Again)
                }
                Outcome::Lost(worker) => {
                    if worker.exit != Exit::Config {
                        stop.request_stop();
                        // Best effort: without this save the steps since the last checkpoint are lost.
                        let _ = timeout(LAST_SAVE, end).await;
                    }
                    supervisor.finish(Duration::ZERO, &shutdown).await;
                    Err(lost_worker(&worker))
                }
            }
        };
        let ended = ended.await;
        // However the run ended, none of its processes is alive here, so its certificates can go.
        renewing.inspect(JoinHandle::abort);
        certificates.inspect(Certificates::remove);
        remove_weights(&run_id);
        ended
    }

    /// Serves Prometheus metrics if `--metrics-listen` is given, and returns the bound address.
    async fn serve_metrics(&self, coordinator: &Coordinator) -> Result<Option<SocketAddr>, Failure> {
        let Some(listen) = self.launch.metrics_listen else { return Ok(None) };
        let serving = coordinator.observer().serve_metrics(listen).await;
        serving.map(Some).map_err(|error| Failure::config(error).doing(format!("listen on {listen} for metrics")))
    }

    /// Makes or loads the run's own certificates; `None` with `--tls-dir` or `--plaintext`.
    fn certificates(&self) -> Result<Option<Certificates>, Failure> {
        if self.launch.local.plaintext || self.launch.local.tls_dir.is_some() {
            return Ok(None);
        }
        Certificates::of_run(&self.launch.run_dir).map(Some).map_err(|error| {
            let hint = "keys need a folder that others cannot read; --tls-dir DIR uses certificates elsewhere, and --plaintext none";
            Failure::config(error).doing("protect the connections of the run").hint(hint)
        })
    }

    /// Prints what is run and where its files are.
    fn announce(
        &self,
        console: &Console,
        spec: &JobSpec,
        (address, metrics, dashboard): (SocketAddr, Option<SocketAddr>, Option<&Server>),
        run_id: &str,
    ) {
        let (batch, rollout, resources) = (&spec.batch, &spec.rollout, &spec.resources);
        let mut workers = vec![
            plural(u64::from(resources.rollouts), "rollout worker", "rollout workers"),
            plural(u64::from(spec.learners()), "learner", "learners"),
            plural(u64::from(resources.verifiers), "verifier", "verifiers"),
        ];
        let servers = spec.own_servers().map(|server| resources.rollouts * server.count);
        workers.extend(servers.map(|count| plural(u64::from(count), "vLLM server", "vLLM servers")));
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
        let model = format!("{} ({}, {parameters} parameters)", hub::shown(&spec.model.path), self.model.kind);
        let run_dir = self.launch.run_dir.display().to_string();
        let mut fields = json!({"job": spec.name, "run_dir": run_dir, "coordinator": address, "steps": batch.steps,
                            "run_id": run_id});
        let moved = match self.launch.local.listen {
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
        if let Some(server) = dashboard {
            lines.insert(0, ("dashboard", dashboard::shown(server)));
            fields["dashboard"] = json!(format!("http://{}", server.address()));
        }
        if let Some(metrics) = metrics {
            lines.push(("metrics", format!("http://{metrics}/metrics")));
            fields["metrics"] = json!(metrics);
        }
        if !spec.logging.tracking.is_empty() {
            let run_dir = self.launch.run_dir.display();
            let trackers = spec.logging.tracking.join(", ");
            let how =
                format!("`python3 deploy/trackers/follow.py {run_dir}`, started next to the run, writes to {trackers}");
            lines.push(("tracking", how));
            fields["tracking"] = json!(spec.logging.tracking);
        }
        console.block("start", &lines, &fields);
    }

    fn conclude(&self, console: &Console, end: &RunEnd) -> Exit {
        match end {
            RunEnd::Finished { .. } if self.only => {
                let run_dir = self.launch.run_dir.display();
                let text = format!("measured; `{} eval report {run_dir}` prints the report again", program());
                console.say("end", &text, json!({"run_dir": self.launch.run_dir}));
                Exit::Done
            }
            RunEnd::Stopped { .. } if self.only => {
                let text = "stopped; the same command continues with every sample that there is";
                console.say("end", text, json!({"run_dir": self.launch.run_dir}));
                Exit::Again
            }
            RunEnd::Finished { step, checkpoint, model } => {
                let measured = BeforeAfter::read(&self.launch.run_dir);
                let run_dir = &self.launch.run_dir;
                let lines = match &self.launch.commands {
                    Some(commands) => finish_lines(*step, &shown(model), run_dir, commands, measured),
                    None => Vec::new(),
                };
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
                let text = format!(
                    "stopped after {}, {saved}; run the same command to resume",
                    plural(*step, "step", "steps")
                );
                console.say("end", &text, json!({"step": step, "checkpoint": checkpoint}));
                Exit::Again
            }
            RunEnd::Failed { reason } | RunEnd::Panicked { reason } | RunEnd::Interrupted { reason } => {
                unreachable!("failures are reported as such: {reason}")
            }
        }
    }
}

/// Returns mutual TLS with the certificates in this folder; without a folder plain text, which is allowed on loopback only.
fn security(tls_dir: Option<&Path>) -> Result<Security, Failure> {
    let Some(folder) = tls_dir else { return Ok(Security::Plain) };
    launch::security(folder, PeerRole::Coordinator)
        .map_err(|error| Failure::config(error).doing("use the certificates"))
}

/// Follows the run until it ends, the operator hurries it, or a worker fails permanently.
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
            // Biased, so that the last progress events are printed before the end of the run.
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
                // A narrowed search for a bad group is progress, too: the learner that died for it is not to blame.
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

/// Returns the next progress event; skips events that a slow terminal missed.
pub(crate) async fn next(events: &mut broadcast::Receiver<Progress>) -> Progress {
    loop {
        match events.recv().await {
            Ok(progress) => return progress,
            Err(RecvError::Lagged(missed)) => tracing::warn!("{missed} events were too many for the terminal"),
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// Removes published weights that the run's workers left in shared memory. The last worker to leave does so itself, unless it
/// was killed.
fn remove_weights(run_id: &str) {
    // Opening and dropping is enough: a store removes its folder on drop when no other process holds it.
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
            "`pacs status {address}` says whether a run is live there; --listen HOST:PORT chooses another port, and without \
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

/// Returns the name by which the user called this program, for commands that are printed.
fn program() -> String {
    let called = std::env::args_os().next().unwrap_or_else(|| "pacs".into());
    shown(Path::new(&called)).display().to_string()
}

/// Shortens a path to be relative when it is below the working directory.
fn shown(path: &Path) -> PathBuf {
    let here = std::env::current_dir().and_then(|here| here.canonicalize());
    here.ok().and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path).to_owned()
}
