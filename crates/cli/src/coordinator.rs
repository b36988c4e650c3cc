//! `pacs coordinator`: serves a run whose workers are started by a cluster's launcher.

use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use pacs_coordinator::{Coordinator, CoordinatorOptions, Progress, RunEnd, StartError, StopHandle};
use pacs_dashboard::Server;
use pacs_hub::{Part, Pins};
use pacs_runtime::launch::Launch;
use pacs_runtime::net::PeerRole;
use pacs_runtime::{Exit, Health, LogFormat, Shutdown, harmless, init_logging};
use pacs_spec::JobSpec;
use serde_json::json;
use tokio::time::sleep;

use crate::arguments::Coordinator as Arguments;
use crate::attempts::{self, AttemptError};
use crate::ending::{self, Ending};
use crate::failure::Failure;
use crate::hub;
use crate::live;
use crate::look::dashboard;
use crate::plan::default_run_dir;
use crate::run::{Console, create_folders, inspect_model, next, start_failure};
use crate::traces;
use crate::verifier::misplaced;

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    init_logging(if arguments.log_json { LogFormat::Json } else { LogFormat::Human });
    let mut spec = pacs_spec::read(&arguments.job).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    let run_dir = arguments.run_dir.clone().unwrap_or_else(|| default_run_dir(&spec));
    let ((), pins) = hub::session(Some(&run_dir), |hub| hub.job(&mut spec, Part::Whole))?;
    inspect_model(&spec.model.path)?;
    if pins != Pins::default() {
        create_folders(&run_dir, &run_dir.join("logs"))
            .with_context(|| format!("create folder `{}`", run_dir.display()))
            .map_err(Failure::config)?;
        pins.write(&run_dir).map_err(Failure::config)?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    let result = runtime.block_on(Run { arguments, run_dir: &run_dir }.serve(spec));
    runtime.shutdown_background();
    result
}

/// What stays fixed while the coordinator runs.
#[derive(Clone, Copy)]
struct Run<'a> {
    arguments: &'a Arguments,
    run_dir: &'a Path,
}

/// Interval for polling state that has no notification.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Signals that ask the run to end.
struct Wishes {
    /// SIGTERM or Ctrl-C: save and leave within the grace period.
    leave: Shutdown,
    /// SIGUSR1: the job's time limit is near; save and leave without a deadline.
    warned: Shutdown,
}

impl Run<'_> {
    async fn serve(self, spec: JobSpec) -> Result<Exit, Failure> {
        let wishes = Wishes {
            leave: Shutdown::new().with_grace(Duration::from_secs(self.arguments.grace)),
            warned: Shutdown::new(),
        };
        let installed = wishes.leave.on_signals().and_then(|()| wishes.warned.on_warning());
        installed.context("install signal handlers").map_err(Failure::bug)?;
        let served = spec.clone();
        let options = self.options(spec).await?;
        let health = self.health().await?;
        attempts::check(self.run_dir, self.arguments.starts_without_progress).map_err(attempt_failure)?;
        let Some(coordinator) = self.start(options, &wishes).await? else { return Ok(Exit::Again) };
        let _listed = live::list(&coordinator, self.run_dir);
        self.serve_metrics(&coordinator).await?;
        traces::export(&coordinator)?;
        let _dashboard = self.serve_dashboard(&coordinator, &served).await?;
        attempts::note(self.run_dir, &launch_name()).map_err(attempt_failure)?;
        ending::forget(self.run_dir);
        let mut console = Console::new(self.arguments.json);
        let address = coordinator.address();
        let fields = json!({"coordinator": address, "run_dir": self.run_dir});
        let grace = self.arguments.grace;
        let text = format!(
            "serving {} at {address}; SIGTERM saves and leaves within {grace} s, SIGUSR1 without a limit",
            self.run_dir.display()
        );
        console.say("start", &text, fields);
        health.set_ready(true);
        let end = self.follow(coordinator, &mut console, &wishes, &health).await;
        health.set_ready(false);
        ending::note(self.run_dir, wishes.why(end.as_ref()));
        conclude(&console, end)
    }

    /// Starts the coordinator and waits for the lock of the run folder as long as the arguments allow; `None` when asked to leave
    /// meanwhile.
    async fn start(self, options: CoordinatorOptions, wishes: &Wishes) -> Result<Option<Coordinator>, Failure> {
        let (began, patience) = (Instant::now(), Duration::from_secs(self.arguments.folder_timeout));
        loop {
            match Coordinator::start(options.clone()).await {
                Ok(coordinator) => return Ok(Some(coordinator)),
                Err(error @ StartError::Busy { .. }) if began.elapsed() < patience => {
                    tracing::warn!("{error}; waiting")
                }
                Err(error) => return Err(start_failure(error)),
            }
            tokio::select! {
                () = sleep(LOOK_AGAIN) => {}
                () = asked(wishes) => return Ok(None),
            }
        }
    }

    async fn options(self, spec: JobSpec) -> Result<CoordinatorOptions, Failure> {
        let security = self.arguments.security.security(PeerRole::Coordinator).map_err(misplaced)?;
        let listen = Launch::of_process().listen(self.arguments.listen.as_deref()).logged("the address to listen on");
        let address = resolve(&listen.value).await?;
        // Advertise the host name when listening on all interfaces: other machines cannot dial `0.0.0.0`.
        let host = match address.ip().is_unspecified() {
            true => nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()),
            false => listen.value.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']']).to_owned()),
        };
        Ok(CoordinatorOptions {
            security,
            host,
            attempt: self.arguments.attempt.clone(),
            run_id: self.arguments.run_id.clone(),
            ..CoordinatorOptions::local(spec, self.run_dir.to_owned(), address)
        })
    }

    async fn health(self) -> Result<Health, Failure> {
        let health = Health::default();
        // An empty environment variable counts as unset.
        if let Some(address) = self.arguments.health_listen.as_ref().filter(|address| !address.is_empty()) {
            let serving = health.serve(address).await;
            serving.map_err(|error| Failure::again(error).doing(format!("listen on {address} for health probes")))?;
        }
        health.progressed(self.progress_timeout());
        Ok(health)
    }

    async fn serve_metrics(self, coordinator: &Coordinator) -> Result<(), Failure> {
        // An empty environment variable counts as unset.
        let Some(listen) = self.arguments.metrics_listen.as_ref().filter(|listen| !listen.is_empty()) else {
            return Ok(());
        };
        let address = resolve(listen).await?;
        let serving = coordinator.observer().serve_metrics(address).await;
        let address =
            serving.map_err(|error| Failure::again(error).doing(format!("listen on {listen} for metrics")))?;
        tracing::info!(%address, "serving metrics at /metrics");
        Ok(())
    }

    async fn serve_dashboard(self, coordinator: &Coordinator, spec: &JobSpec) -> Result<Option<Server>, Failure> {
        // An empty environment variable counts as unset.
        let Some(listen) = self.arguments.dashboard_listen.as_ref().filter(|listen| !listen.is_empty()) else {
            return Ok(None);
        };
        let server = dashboard::of_coordinator(coordinator, spec, Some(resolve(listen).await?)).await?;
        server.iter().for_each(|server| tracing::info!(address = %server.address(), "serving the dashboard"));
        Ok(server)
    }

    fn progress_timeout(self) -> Duration {
        Duration::from_secs(self.arguments.progress_timeout)
    }

    /// Follows the run to its end; `None` when the process has to leave earlier.
    async fn follow(
        self,
        coordinator: Coordinator,
        console: &mut Console,
        wishes: &Wishes,
        health: &Health,
    ) -> Option<RunEnd> {
        let (mut events, stop) = (coordinator.events(), coordinator.stop_handle());
        let workers = stop.clone();
        let mut alone = pin!(self.alone(workers));
        let mut end = pin!(self.end(coordinator, wishes));
        let mut stopping = false;
        loop {
            tokio::select! {
                // Biased, so that the last progress events are printed before the end of the run.
                biased;
                () = wishes.leave.leaving() => return None,
                () = alone.as_mut() => {
                    tracing::error!("no worker was registered for {} s: exiting", self.arguments.alone_timeout);
                    return None;
                }
                () = asked(wishes), if !stopping => {
                    stopping = true;
                    ask_to_stop(console, &stop);
                }
                progress = next(&mut events) => {
                    if is_progress(&progress) {
                        health.progressed(self.progress_timeout());
                    }
                    console.progress(&progress);
                }
                end = end.as_mut() => {
                    while let Ok(progress) = events.try_recv() {
                        console.progress(&progress);
                    }
                    return Some(end);
                }
            }
        }
    }

    /// Resolves when all workers have been gone for `--alone-timeout`; never while none has ever joined.
    async fn alone(self, run: StopHandle) {
        let limit = Duration::from_secs(self.arguments.alone_timeout);
        let mut seen = None;
        loop {
            sleep(LOOK_AGAIN).await;
            if run.has_workers() {
                seen = Some(Instant::now());
            }
            if !limit.is_zero() && seen.is_some_and(|seen| seen.elapsed() >= limit) {
                return;
            }
        }
    }

    /// Waits until all workers are dismissed and returns how the run ended. With `--linger` a finished run is served until SIGTERM.
    async fn end(self, coordinator: Coordinator, wishes: &Wishes) -> RunEnd {
        if self.arguments.linger && matches!(coordinator.ended().await, RunEnd::Finished { .. }) {
            tracing::info!("the run is finished; its status is served until SIGTERM");
            wishes.leave.requested().await;
        }
        coordinator.wait().await
    }
}

impl Wishes {
    /// Returns the reason that is written to `ending`, from which launchers decide whether to restart.
    fn why(&self, end: Option<&RunEnd>) -> Ending {
        match end {
            // A signal stops the run, too.
            Some(RunEnd::Stopped { .. }) | None if self.warned.is_requested() => Ending::Warned,
            Some(RunEnd::Stopped { .. }) | None if self.leave.is_requested() => Ending::Terminated,
            Some(end) => Ending::of(end),
            None => Ending::Alone,
        }
    }
}

async fn asked(wishes: &Wishes) {
    tokio::select! {
        () = wishes.leave.requested() => {}
        () = wishes.warned.requested() => {}
    }
}

fn ask_to_stop(console: &Console, stop: &StopHandle) {
    console.say("stopping", "stopping: what is in work is finished and saved", json!({}));
    stop.request_stop();
}

/// Returns whether the event counts as progress for the health service `pacs.progress`: a step, an evaluation or a checkpoint.
fn is_progress(progress: &Progress) -> bool {
    matches!(progress, Progress::Step(_) | Progress::Evaluated(_) | Progress::Saved { .. } | Progress::Prepared { .. })
}

fn conclude(console: &Console, end: Option<RunEnd>) -> Result<Exit, Failure> {
    let exit = match end {
        Some(RunEnd::Finished { step, model, .. }) => {
            let text = format!("finished after {step} steps; the model is in {}", model.display());
            console.say("end", &text, json!({"step": step, "model": model}));
            Exit::Done
        }
        Some(RunEnd::Stopped { step, checkpoint }) => {
            let text = format!("stopped after {step} steps; the same command resumes");
            console.say("end", &text, json!({"step": step, "checkpoint": checkpoint}));
            Exit::Again
        }
        Some(RunEnd::Failed { reason }) => {
            return Err(Failure::bug(anyhow!("{}", harmless(&reason))).doing("finish the run"));
        }
        Some(RunEnd::Panicked { reason }) => return Err(Failure::bug(anyhow!("{reason}")).doing("continue the run")),
        Some(RunEnd::Interrupted { reason }) => {
            let hint = "nothing that was acknowledged is lost; the same command resumes";
            return Err(Failure::again(anyhow!("{}", harmless(&reason))).doing("continue the run").hint(hint));
        }
        None => {
            let text = "left before the run was saved; the same command resumes from the last checkpoint";
            console.say("end", text, json!({}));
            Exit::Again
        }
    };
    Ok(exit)
}

/// Resolves `HOST:PORT` to a socket address.
async fn resolve(listen: &str) -> Result<SocketAddr, Failure> {
    let doing = || format!("find the address `{listen}` to listen on");
    let mut found = tokio::net::lookup_host(listen).await.map_err(|error| Failure::config(error).doing(doing()))?;
    found.next().ok_or_else(|| Failure::config(anyhow!("the name has no address")).doing(doing()))
}

fn launch_name() -> String {
    attempts::launch(|name| std::env::var(name).ok())
}

fn attempt_failure(error: AttemptError) -> Failure {
    let exit = match &error {
        AttemptError::File { error, .. } => Exit::of_file(error),
        AttemptError::Fruitless { .. } => Exit::Config,
    };
    Failure::with_exit(exit, error).doing("start the run once more")
}
