use std::io::Write;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pacs_machine::{Event, Machine, StopMode};
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_runtime::net::{Security, accept};
use pacs_shape::{Flops, ModelConfig};
use pacs_spec::{DataSpec, JobSpec};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, oneshot, watch};
use tokio::task::JoinHandle;

use crate::driver::{Driver, Parts, Shared, Wait};
use crate::journal::{Journal, Recovered};
use crate::machine_options::machine_options;
use crate::progress::{Progress, RunEnd};
use crate::records::{
    Archive, Checkpoints, CoordinatorRecord, Lines, Manifest, RunLock, starts_so_far, write_atomically,
};
use crate::{StartError, services};

/// Events that a slow watcher may be behind; older ones are dropped for it.
const PROGRESS_QUEUE: usize = 1024;
/// Changes of these, and of what is below them, make a job another job, but for [`DataSpec::FREE`].
const FIXED: [&str; 6] = ["name", "seed", "model", "data", "rollout.samples_per_prompt", "objective"];

/// How to run a coordinator.
#[derive(Clone, Debug)]
pub struct CoordinatorOptions {
    /// The job.
    pub spec: JobSpec,
    /// Folder of the run; made when it is not there.
    pub run_dir: PathBuf,
    /// Where to listen; port 0 takes any free one.
    pub listen: SocketAddr,
    /// How connections are protected; plain text is for the loopback interface only.
    pub security: Security,
    /// The host that others reach this one by, written into the run folder; `None`: the address listened on.
    pub host: Option<String>,
    /// Which start of the job this is; workers of another one are refused. Empty: any.
    pub attempt: String,
}

impl CoordinatorOptions {
    /// A coordinator that speaks plain text, within this machine.
    #[must_use]
    pub fn local(spec: JobSpec, run_dir: PathBuf, listen: SocketAddr) -> Self {
        Self { spec, run_dir, listen, security: Security::Plain, host: None, attempt: String::new() }
    }
}

/// How patient a coordinator is. The default suits real runs.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Time between two heartbeats of a worker.
    pub heartbeat_interval: Duration,
    /// Silence after which a worker is given up.
    pub heartbeat_timeout: Duration,
    /// Time between two looks at the clock.
    pub tick: Duration,
    /// How long workers are waited for after the end.
    pub goodbye: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_secs(1),
            heartbeat_timeout: Duration::from_secs(10),
            tick: Duration::from_millis(200),
            goodbye: Duration::from_secs(5),
        }
    }
}

/// A run in progress. Dropping it ends the service without a goodbye.
#[derive(Debug)]
pub struct Coordinator {
    shared: Shared,
    address: SocketAddr,
    first_events: Mutex<Option<broadcast::Receiver<Progress>>>,
    progress: broadcast::Sender<Progress>,
    end: watch::Receiver<Option<RunEnd>>,
    timing: Timing,
    /// Dropped with the coordinator, and the server ends.
    _serving: oneshot::Sender<()>,
    ticker: JoinHandle<()>,
    _lock: RunLock,
}

impl Coordinator {
    /// Takes the run folder, loads the problems, resumes from the newest checkpoint if there is one, and serves.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(options: CoordinatorOptions) -> Result<Self, StartError> {
        Self::start_with(options, Timing::default()).await
    }

    /// Like [`start`](Self::start), with another patience.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start_with(options: CoordinatorOptions, timing: Timing) -> Result<Self, StartError> {
        let CoordinatorOptions { spec, run_dir, listen, security, host, attempt } = options;
        security.check_listen(listen)?;
        std::fs::create_dir_all(&run_dir).map_err(StartError::file("create folder", &run_dir))?;
        // Workers get this path, and their working directory may be another one.
        let run_dir = run_dir.canonicalize().map_err(StartError::file("resolve", &run_dir))?;
        let lock = RunLock::take(&run_dir)?;
        let listener = bind(listen, &run_dir).await.map_err(|error| StartError::Listen { address: listen, error })?;
        let address = listener.local_addr().map_err(|error| StartError::Listen { address: listen, error })?;

        let (progress, first_events) = broadcast::channel(PROGRESS_QUEUE);
        let opened = {
            let (spec, run_dir, progress) = (spec.clone(), run_dir.clone(), progress.clone());
            // Reads checkpoints and data files: seconds to minutes.
            tokio::task::spawn_blocking(move || open(spec, run_dir, timing, progress)).await
        };
        let driver = opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        announce(&spec, &run_dir, address, host)?;

        let end = driver.end.subscribe();
        let shared = Shared::new(driver);
        shared.lock().go_on();
        let incoming = accept(listener, security);
        let (serving, dropped) = oneshot::channel::<()>();
        let router = services::router(&shared, &attempt);
        // Ends when the coordinator is dropped, after the calls that wait.
        tokio::spawn(async move {
            if let Err(error) = router.serve_with_incoming_shutdown(incoming, async { drop(dropped.await) }).await {
                tracing::error!("the server ended: {error}");
            }
        });
        let ticker = tokio::spawn(tick(shared.clone(), timing.tick));
        tracing::info!(%address, run_dir = %run_dir.display(), "serving");
        let first_events = Mutex::new(Some(first_events));
        Ok(Self { shared, address, first_events, progress, end, timing, _serving: serving, ticker, _lock: lock })
    }

    /// Where the services are.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What happens from now on; the first caller also gets what has happened since the start.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Progress> {
        let first = self.first_events.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.unwrap_or_else(|| self.progress.subscribe())
    }

    /// The services, to be called without a network, by benchmarks and by whoever has workers in this process.
    #[must_use]
    pub fn services(
        &self,
    ) -> impl WorkerService + RolloutService + VerifierService + LearnerService + Clone + std::fmt::Debug + use<> {
        services::Services::new(&self.shared)
    }

    pub(crate) fn own_services(&self) -> services::Services {
        services::Services::new(&self.shared)
    }

    /// Asks the run to save and end at the next safe point.
    pub fn request_stop(&self) {
        self.shared.lock().request_stop(StopMode::Save);
    }

    /// Worker processes that an earlier coordinator of this folder has left, and that may still live: name, host, process.
    #[must_use]
    pub fn known_workers(&self) -> Vec<(String, String, u32)> {
        let driver = self.shared.lock();
        let known = driver.machine.members();
        known.map(|(name, host, pid)| (name.to_owned(), host.to_owned(), pid)).collect()
    }

    /// Asks the same from elsewhere, while somebody [waits](Self::wait) for the end.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.shared.clone())
    }

    /// Waits for the end of the run, and goes on serving: the status stays there, and workers are told to leave.
    pub async fn ended(&self) -> RunEnd {
        let mut ended = self.end.clone();
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        end.unwrap_or_else(|| RunEnd::Failed { reason: "the coordinator's state is gone".to_owned() })
    }

    /// Waits for the end of the run, dismisses the workers, and closes the records.
    pub async fn wait(self) -> RunEnd {
        let end = self.ended().await;
        self.dismiss_workers().await;
        let archive = self.shared.lock().archive.take();
        if let Some(mut archive) = archive
            && tokio::task::spawn_blocking(move || archive.close()).await.is_err()
        {
            tracing::warn!("the archive was not closed");
        }
        let shared = self.shared.clone();
        // The last records say that the run is over.
        if tokio::task::spawn_blocking(move || shared.lock().journal.close()).await.is_err() {
            tracing::warn!("the journal was not closed");
        }
        end
    }

    /// Serves until every worker has heard that the run is over and left, but not for ever.
    async fn dismiss_workers(&self) {
        let goodbye = u32::try_from(self.timing.goodbye.as_millis()).unwrap_or(u32::MAX);
        let is_alone = |driver: &mut Driver| Ok(driver.has_no_workers().then_some(()));
        let gone = self.shared.poll(Wait::Goodbye, goodbye, is_alone);
        if !matches!(gone.await, Ok(Some(()))) {
            tracing::info!("some workers have not said goodbye");
        }
    }
}

/// See [`Coordinator::stop_handle`].
#[derive(Clone, Debug)]
pub struct StopHandle(Shared);

impl StopHandle {
    /// Whether any worker is a member of the run.
    #[must_use]
    pub fn has_workers(&self) -> bool {
        !self.0.lock().has_no_workers()
    }

    /// Asks the run to save and end at the next safe point.
    pub fn request_stop(&self) {
        self.0.lock().request_stop(StopMode::Save);
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.ticker.abort();
    }
}

/// Listens; where any port will do, at the one of the coordinator before, for its workers dial that.
async fn bind(listen: SocketAddr, run_dir: &Path) -> std::io::Result<TcpListener> {
    if listen.port() == 0
        && let Ok(record) = CoordinatorRecord::read(run_dir)
        && let Ok(earlier) = record.address.parse::<SocketAddr>()
        && let Ok(listener) = TcpListener::bind((listen.ip(), earlier.port())).await
    {
        return Ok(listener);
    }
    TcpListener::bind(listen).await
}

async fn tick(shared: Shared, every: Duration) {
    let mut ticker = tokio::time::interval(every);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticker.tick().await;
        shared.lock().tick();
    }
}

/// Opens the run folder and makes the driver of the run that is found there.
fn open(
    spec: JobSpec,
    run_dir: PathBuf,
    timing: Timing,
    progress: broadcast::Sender<Progress>,
) -> Result<Driver, StartError> {
    let checkpoints = Checkpoints::open(&run_dir)?;
    let resumed = resume(&checkpoints, &spec)?;
    let problems = pacs_data::load(&spec)?;
    let mut notes = vec![problems.report.to_string()];
    let cost = match ModelConfig::read(&spec.model.path) {
        Ok(config) => Flops::new(&config, config.vocab_size),
        Err(error) => {
            notes.push(format!("batches are shared among learners by their tokens alone: {error}"));
            Flops::of_any_model()
        }
    };

    let metrics = Lines::new(run_dir.join("metrics.jsonl"));
    let evaluations = Lines::new(run_dir.join("evaluations.jsonl"));
    let archive = match spec.logging.samples {
        true => Some(Archive::open(&run_dir).map_err(StartError::file("open archive", &run_dir.join("samples")))?),
        false => None,
    };
    let toml = spec.resolved_toml();
    let (mut journal, mut recovered, journal_notes) = Journal::open(&run_dir, &toml)?;
    notes.extend(journal_notes);
    if let Some(problem) = recovered.as_ref().and_then(|found| misfit(found, resumed.as_ref())) {
        notes.push(format!("the journal was put aside, and the run goes on from its newest checkpoint: {problem}"));
        journal = journal.discard(&run_dir, &toml)?;
        recovered = None;
    }
    let machine = match &recovered {
        Some(recovered) => recovered.machine.clone(),
        None => {
            let last_step = resumed.as_ref().map(|manifest| manifest.step);
            truncate(&run_dir, [&metrics, &evaluations], archive.as_ref(), last_step)?;
            let steps = evaluations.steps().map_err(StartError::file("read", &run_dir.join("evaluations.jsonl")))?;
            if let Some(manifest) = &resumed {
                notes.push(format!("resumed from step {} of {}", manifest.step, spec.batch.steps));
            }
            let starts = starts_so_far(&run_dir);
            let options =
                machine_options(&spec, &problems, timing, resumed.clone(), steps.into_iter().collect(), starts);
            Machine::new(options, Duration::ZERO)
        }
    };
    let mut driver = Driver::new(Parts {
        machine,
        spec,
        run_dir: run_dir.clone(),
        heartbeat_interval: timing.heartbeat_interval,
        problems,
        cost,
        checkpoints,
        metrics: metrics.clone(),
        evaluations: evaluations.clone(),
        archive,
        progress,
        started: Instant::now(),
        journal,
    });
    notes.into_iter().for_each(|text| driver.note(text));
    if let Some(recovered) = recovered {
        driver.recover(recovered);
        // A line that was written before its record was durable speaks of what never was: a later step, or an
        // evaluation that will be made again.
        let step = Some(driver.machine.position().step);
        truncate(&run_dir, [&metrics, &evaluations], driver.archive.as_ref(), step)?;
        evaluations
            .retain(|step| driver.machine.has_evaluated(step))
            .map_err(StartError::file("truncate records in", &run_dir))?;
    }
    driver.begin();
    Ok(driver)
}

/// Removes what was written about later steps; about all steps when there is none.
fn truncate(
    run_dir: &Path,
    lines: [&Lines; 2],
    archive: Option<&Archive>,
    last_step: Option<u64>,
) -> Result<(), StartError> {
    for lines in lines {
        lines.truncate(last_step).map_err(StartError::file("truncate records in", run_dir))?;
    }
    if let Some(archive) = archive {
        archive.truncate(last_step);
    }
    Ok(())
}

/// Why a journal and the newest checkpoint do not belong together.
fn misfit(recovered: &Recovered, resumed: Option<&Manifest>) -> Option<String> {
    let on_disk = resumed.map(|manifest| manifest.step);
    let last = recovered.records.iter().rev().find_map(|(record, _)| match record.event {
        Event::CheckpointCommitted { step } => Some(step),
        _ => None,
    });
    let known = last.or(recovered.machine.newest_checkpoint());
    // One that is being committed may be on disk before the record that says so.
    let expected = |step: u64| known == Some(step) || recovered.may_commit(step);
    match (on_disk, known) {
        (None, None) => None,
        (Some(step), _) if expected(step) => None,
        (Some(step), _) => {
            Some(format!("the newest whole checkpoint is that of step {step}, of which it does not know"))
        }
        (None, Some(step)) => Some(format!("its checkpoint of step {step} is gone")),
    }
}

/// The checkpoint to go on from, if there is one.
fn resume(checkpoints: &Checkpoints, spec: &JobSpec) -> Result<Option<Manifest>, StartError> {
    let (newest, damages) = checkpoints.newest_valid()?;
    for damage in &damages {
        tracing::error!("a checkpoint was put aside: {damage}");
    }
    let Some(manifest) = newest else {
        if damages.is_empty() {
            return Ok(None);
        }
        let damages = damages.iter().map(ToString::to_string).collect();
        return Err(StartError::NoValidCheckpoint { folder: checkpoints.folder().to_owned(), damages });
    };
    let checkpoint = checkpoints.path(manifest.step);
    let old = pacs_spec::parse(&manifest.spec, &checkpoint.join("manifest.json")).map_err(|errors| {
        StartError::SpecChanged { checkpoint: checkpoint.clone(), changes: vec![errors.to_string()] }
    })?;
    let (fixed, free): (Vec<_>, Vec<_>) =
        pacs_spec::differences(&old, spec).into_iter().partition(|difference| is_fixed(&difference.path));
    if !fixed.is_empty() {
        let changes = fixed.iter().map(ToString::to_string).collect();
        return Err(StartError::SpecChanged { checkpoint, changes });
    }
    for difference in free {
        tracing::info!("the job spec has changed: {difference}");
    }
    Ok(Some(manifest))
}

fn is_fixed(path: &str) -> bool {
    let is_free = DataSpec::FREE.contains(&path);
    !is_free
        && FIXED
            .iter()
            .any(|fixed| path.strip_prefix(fixed).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

/// Writes down the job and where it is served.
fn announce(spec: &JobSpec, run_dir: &Path, address: SocketAddr, name: Option<String>) -> Result<(), StartError> {
    let path = run_dir.join("job.toml");
    write_atomically(&path, |file| file.write_all(spec.resolved_toml().as_bytes()))
        .map_err(StartError::file("write", &path))?;
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let record = CoordinatorRecord {
        address: match name {
            Some(name) if name.contains(':') => format!("[{name}]:{}", address.port()),
            Some(name) => format!("{name}:{}", address.port()),
            None => reachable(address).to_string(),
        },
        host,
        pid: std::process::id(),
        job: spec.name.clone(),
        starts: starts_so_far(run_dir) + 1,
    };
    record.write(run_dir)
}

/// An address that can be dialled, for one that stands for all of the machine's.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(address) if address.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, address.port()).into(),
        SocketAddr::V6(address) if address.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, address.port()).into(),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_paths_are_whole_names() {
        for (path, fixed) in [
            ("name", true),
            ("model.path", true),
            ("data.shuffle", true),
            ("data.retire_after", false),
            ("data.difficulty_floor", false),
            ("objective.beta", true),
            ("rollout.samples_per_prompt", true),
            ("rollout.temperature", false),
            ("batch.steps", false),
            ("optimizer.learning_rate", false),
            ("names", false),
            ("resources.learners", false),
        ] {
            assert_eq!(is_fixed(path), fixed, "{path}");
        }
    }
}
