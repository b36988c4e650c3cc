use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle as ThreadHandle;
use std::time::Duration;

use pacs_machine::StopMode;
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::operator_service_server::OperatorService;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_runtime::net::{PeerRole, RunGate, RunIdentity, Security, accept};
use pacs_spec::JobSpec;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{broadcast, oneshot, watch};
use tokio::task::JoinHandle;

use crate::driver::{Driver, Shared, Wait, follow};
use crate::observe::{DashboardRecord, Observer};
use crate::open::open;
use crate::progress::{Progress, RunEnd};
use crate::records::{CoordinatorRecord, RunLock, identify, write_atomically};
use crate::{StartError, Timing, services};

/// How many events a slow watcher may lag; it loses older ones.
const PROGRESS_QUEUE: usize = 1024;
/// Configuration of a coordinator.
#[derive(Clone, Debug)]
pub struct CoordinatorOptions {
    /// The job to run.
    pub spec: JobSpec,
    /// Folder of the run; created if it does not exist.
    pub run_dir: PathBuf,
    /// Address to listen on; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Whether to take another port when that of `listen` is in use. Workers find it through the run folder.
    pub any_port: bool,
    /// Protection of connections; plain text is allowed on the loopback interface only.
    pub security: Security,
    /// Host name that others reach this one by, for the run folder; `None`: the address listened on.
    pub host: Option<String>,
    /// Start of the job that this process belongs to; workers of other starts are refused. Empty: no check.
    pub attempt: String,
    /// Expected id of the run (see [`run_id`](crate::run_id)), which a new folder gets. Empty: that of
    /// the folder, or a random one.
    pub run_id: String,
}

impl CoordinatorOptions {
    /// Options for a coordinator without TLS, reachable from this machine only.
    #[must_use]
    pub fn local(spec: JobSpec, run_dir: PathBuf, listen: SocketAddr) -> Self {
        Self {
            spec,
            run_dir,
            listen,
            any_port: false,
            security: Security::Plain,
            host: None,
            attempt: String::new(),
            run_id: String::new(),
        }
    }
}

/// A coordinator that serves a run. Dropping it stops the server without dismissing the workers.
#[derive(Debug)]
pub struct Coordinator {
    shared: Shared,
    address: SocketAddr,
    run_id: String,
    first_events: Mutex<Option<broadcast::Receiver<Progress>>>,
    progress: broadcast::Sender<Progress>,
    end: watch::Receiver<Option<RunEnd>>,
    timing: Timing,
    observer: Observer,
    /// Shuts the server down when the coordinator is dropped.
    _serving: oneshot::Sender<()>,
    ticker: JoinHandle<()>,
    _lock: RunLock,
}

impl Coordinator {
    /// Locks the run folder, loads the problems, resumes from journal or checkpoint if
    /// there is one, and starts serving.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(options: CoordinatorOptions) -> Result<Self, StartError> {
        Self::start_with(options, Timing::default()).await
    }

    /// Like [`start`](Self::start), with other timeouts.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start_with(options: CoordinatorOptions, timing: Timing) -> Result<Self, StartError> {
        let CoordinatorOptions { spec, run_dir, listen, any_port, security, host, attempt, run_id } = options;
        security.check_listen(listen)?;
        for advice in spec.advice() {
            tracing::warn!("{advice}");
        }
        std::fs::create_dir_all(&run_dir).map_err(StartError::file("create folder", &run_dir))?;
        // Workers are given this path, and may have another working directory.
        let run_dir = run_dir.canonicalize().map_err(StartError::file("resolve", &run_dir))?;
        let lock = RunLock::take(&run_dir)?;
        let run_id = identify(&run_dir, &run_id)?;
        let failed = |error| StartError::Listen { address: listen, error };
        // Bound before the folder is opened, so that an address in use fails at once and not after minutes of loading.
        let listener = bind(listen, any_port, &run_dir).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;

        let (progress, first_events) = broadcast::channel(PROGRESS_QUEUE);
        let opened = {
            let (spec, run_dir, progress) = (spec.clone(), run_dir.clone(), progress.clone());
            // The threads of journal and run folder inherit this span.
            let span = tracing::info_span!("coordinator", run = run_id);
            // Blocking: reading checkpoints and data files takes seconds to minutes.
            tokio::task::spawn_blocking(move || span.in_scope(|| open(spec, run_dir, timing, progress))).await
        };
        let (driver, done, starts) = opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        DashboardRecord::forget(&run_dir);
        announce(&spec, &run_dir, (address, host), (&run_id, starts), tls_dir(&security, &run_dir))?;

        let end = driver.end.subscribe();
        let shared = Shared::new(driver);
        shared.lock().expect("nobody else has it yet").go_on();
        follow(&shared, done);
        let run = RunIdentity::told(&run_id).expect("what the run folder holds was checked");
        let gate = RunGate::new(run);
        let (serving, dropped) = oneshot::channel::<()>();
        let watched = (progress.subscribe(), end.clone());
        let observer = Observer::start(&shared, (&run_dir, &run_id), security.clone(), watched);
        let incoming = accept(listener, security);
        let router = services::router(&shared, &observer, &attempt, &gate);
        // Ends when the coordinator is dropped, once the pending calls are answered.
        tokio::spawn(async move {
            if let Err(error) = router.serve_with_incoming_shutdown(incoming, async { drop(dropped.await) }).await {
                tracing::error!("the server ended: {error}");
            }
        });
        let ticker = tokio::spawn(tick(shared.clone(), timing.tick));
        tracing::info!(%address, %run_id, run_dir = %run_dir.display(), "serving");
        let first_events = Mutex::new(Some(first_events));
        Ok(Self {
            shared,
            address,
            run_id,
            first_events,
            progress,
            end,
            timing,
            observer,
            _serving: serving,
            ticker,
            _lock: lock,
        })
    }

    /// Address that the services listen on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Id of the run (see [`run_id`](crate::run_id)).
    #[must_use]
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// The read-only view of the run, for this process or to be served separately.
    #[must_use]
    pub fn observer(&self) -> &Observer {
        &self.observer
    }

    /// Subscribes to events from now on; the first caller also gets those since the start.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Progress> {
        let first = self.first_events.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.unwrap_or_else(|| self.progress.subscribe())
    }

    /// The gRPC services for calls without a network, by benchmarks and workers in this process.
    #[must_use]
    pub fn services(
        &self,
    ) -> impl WorkerService
    + RolloutService
    + VerifierService
    + LearnerService
    + OperatorService
    + Clone
    + std::fmt::Debug
    + use<> {
        self.all_services()
    }

    pub(crate) fn all_services(&self) -> services::Services {
        services::Services::new(&self.shared, self.run_id())
    }

    /// Asks the run to save and end at the next point between two tasks.
    pub fn request_stop(&self) {
        request_stop(&self.shared);
    }

    /// Worker processes of an earlier coordinator that may still be alive: name, host and process id.
    #[must_use]
    pub fn known_workers(&self) -> Vec<(String, String, u32)> {
        let Ok(driver) = self.shared.lock() else { return Vec::new() };
        let known = driver.machine.members();
        known.map(|(name, host, pid)| (name.to_owned(), host.to_owned(), pid)).collect()
    }

    /// A handle that can request a stop while somebody [waits](Self::wait) for the end.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(self.shared.clone())
    }

    /// Waits for the end of the run, without ending the service: the status stays available,
    /// and workers are told to leave.
    pub async fn ended(&self) -> RunEnd {
        let mut ended = self.end.clone();
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        end.unwrap_or_else(|| RunEnd::Failed { reason: "the coordinator's state is gone".to_owned() })
    }

    /// Waits for the end of the run, dismisses the workers, and closes journal and run folder.
    pub async fn wait(self) -> RunEnd {
        let end = self.ended().await;
        if matches!(end, RunEnd::Panicked { .. }) {
            // Workers wait for the next coordinator. Pending writes are dropped, because they
            // come from an untrusted state.
            return end;
        }
        self.dismiss_workers().await;
        // The run folder is closed first, because its last jobs hand snapshots to the journal.
        let folder = self.shared.lock_to_close().run_folder.close();
        ended(folder, "the run folder").await;
        let journal = self.shared.lock_to_close().journal.close();
        ended(journal, "the journal").await;
        end
    }

    /// Serves until every worker has heard of the end and left, but at most for `timing.goodbye`.
    async fn dismiss_workers(&self) {
        let goodbye = u32::try_from(self.timing.goodbye.as_millis()).unwrap_or(u32::MAX);
        let is_alone = |driver: &mut Driver| Ok(driver.has_no_workers().then_some(()));
        let gone = self.shared.poll(Wait::Goodbye, goodbye, is_alone);
        if !matches!(gone.await, Ok(Some(()))) {
            tracing::info!("some workers have not deregistered");
        }
    }
}

/// Requests a stop of a run; see [`Coordinator::stop_handle`].
#[derive(Clone, Debug)]
pub struct StopHandle(Shared);

impl StopHandle {
    /// Whether the run has members.
    #[must_use]
    pub fn has_workers(&self) -> bool {
        self.0.lock().is_ok_and(|driver| !driver.has_no_workers())
    }

    /// Asks the run to save and end at the next point between two tasks.
    pub fn request_stop(&self) {
        request_stop(&self.0);
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.ticker.abort();
        // The server shuts down only after its streams have ended.
        self.observer.close();
        let threads = {
            let mut driver = self.shared.lock_to_close();
            [driver.run_folder.abandon(), driver.journal.close()]
        };
        // Joined here, because another coordinator may lock the folder as soon as this one is gone.
        for thread in threads.into_iter().flatten() {
            if thread.join().is_err() {
                tracing::error!("a thread that writes to the run folder panicked");
            }
        }
    }
}

/// Joins a thread without blocking the runtime.
async fn ended(thread: Option<ThreadHandle<()>>, what: &str) {
    let Some(thread) = thread else { return };
    if !matches!(tokio::task::spawn_blocking(move || thread.join()).await, Ok(Ok(()))) {
        tracing::warn!("{what} was not closed");
    }
}

/// Listens. If any port will do, tries that of the previous coordinator first, because its workers dial it.
fn bind(listen: SocketAddr, any_port: bool, run_dir: &Path) -> std::io::Result<TcpListener> {
    if (any_port || listen.port() == 0)
        && let Ok(record) = CoordinatorRecord::read(run_dir)
        && let Ok(earlier) = record.address.parse::<SocketAddr>()
        && let Ok(listener) = listener(SocketAddr::new(listen.ip(), earlier.port()))
    {
        return Ok(listener);
    }
    match listener(listen) {
        Err(error) if any_port && error.kind() == ErrorKind::AddrInUse => listener(SocketAddr::new(listen.ip(), 0)),
        bound => bound,
    }
}

/// Connections that the system keeps until they are accepted. It takes less where its own limit is lower (`net.core.somaxconn`).
///
/// The standard library's 128 are full when a few hundred workers look for their run at once. The system drops what comes
/// then, and those workers dial again after one, three and seven seconds.
const BACKLOG: u32 = 4096;

/// Listens at an address. Must be called within a runtime.
fn listener(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // As the standard library does: a coordinator that starts again takes the port of the one before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn tick(shared: Shared, every: Duration) {
    let mut ticker = tokio::time::interval(every);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticker.tick().await;
        // A panic here would end only this task. The next turn finds the driver poisoned and ends the run.
        let turn = std::panic::catch_unwind(AssertUnwindSafe(|| shared.lock().map(|mut driver| driver.tick())));
        if matches!(turn, Ok(Err(_))) {
            return;
        }
    }
}

/// Asks the run to save and end at the next point between two tasks; does nothing after a panic.
fn request_stop(shared: &Shared) {
    if let Ok(mut driver) = shared.lock() {
        driver.request_stop(StopMode::Save);
    }
}

/// Writes the job spec and the service's address into the run folder.
fn announce(
    spec: &JobSpec,
    run_dir: &Path,
    (address, name): (SocketAddr, Option<String>),
    (run_id, starts): (&str, u64),
    tls_dir: Option<PathBuf>,
) -> Result<(), StartError> {
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
        run_id: run_id.to_owned(),
        tls_dir,
        starts,
    };
    record.write(run_dir)
}

/// The folder with the certificates of all roles, for operators; relative to `run_dir` if it lies inside.
fn tls_dir(security: &Security, run_dir: &Path) -> Option<PathBuf> {
    let folder = security.folder()?;
    let folder = folder.canonicalize().unwrap_or(folder);
    let is_of_role = folder.file_name().is_some_and(|name| name == PeerRole::Coordinator.name());
    let all = folder.parent().filter(|_| is_of_role).unwrap_or(&folder);
    Some(all.strip_prefix(run_dir).unwrap_or(all).to_owned())
}

/// An address to dial, in place of one that stands for all interfaces.
fn reachable(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(address) if address.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, address.port()).into(),
        SocketAddr::V6(address) if address.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, address.port()).into(),
        address => address,
    }
}
