//! Supervises the worker processes of this machine: starts them, restarts them when they die, and ends them with the run. vLLM servers
//! are supervised in the same way; they have to answer within a deadline after each start, and no coordinator dismisses them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pacs_runtime::{Exit, Shutdown};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::adopt::Living;
use super::gpus::VISIBLE;
use super::restarts::{Next, Restarts, describe};
use crate::servers::Gate;

/// Wait for the end of the run after a worker left with exit code 0, which means that the coordinator dismissed it.
const DISMISSAL: Duration = Duration::from_secs(20);

/// The same wait after exit code 75, as in a stopped run. Short, because this process alone may have been ended, and then the
/// run waits for the restarted worker.
const STOP: Duration = Duration::from_secs(3);

/// Grace of workers after SIGTERM, before SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// Polling interval for adopted processes, which are no children and cannot be waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Bytes read from the end of a log for the lines that explain a failure.
const TAIL_BYTES: u64 = 8192;
const TAIL_LINES: usize = 8;

/// Environment variable that tells a process which run it belongs to.
pub(super) const RUN_ID: &str = "PACS_RUN_ID";

/// Environment variable with the start time of a worker. It orders the processes of one name, so that the coordinator gives the
/// name to the latest one at once, without waiting until a dead one misses its heartbeats.
pub(crate) const STARTED: &str = "PACS_STARTED";

/// Option that names the run folder or the address of a worker's coordinator.
pub(super) const COORDINATOR: &str = "--coordinator";

/// Returns the Unix time in microseconds, strictly increasing per process, because clocks may be set back.
pub(crate) fn started() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_micros() as u64);
    let later = |last: u64| Some(now.max(last + 1));
    let last = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later).unwrap_or_else(|last| last);
    now.max(last + 1)
}

/// Command line and identity of one worker process.
#[derive(Clone, Debug)]
pub(crate) struct WorkerCommand {
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    /// Id of the run that the worker belongs to.
    pub(crate) run_id: String,
    /// The GPUs that it sees, if it computes on any.
    pub(crate) gpu: Option<String>,
    /// Further environment variables.
    pub(crate) environment: Vec<(String, String)>,
    /// The answer that a server has to give after its start; `None` for a worker.
    pub(crate) gate: Option<Gate>,
    /// An adopted process that does this work already; it is watched, and restarted like any other when it ends.
    pub(crate) living: Option<Living>,
}

impl WorkerCommand {
    /// Returns where the worker looks for its coordinator.
    pub(super) fn coordinator(&self) -> Option<&str> {
        let mut words = self.arguments.iter().skip_while(|word| *word != COORDINATOR);
        words.nth(1).map(String::as_str)
    }
}

/// News about a worker process, for the run loop.
#[derive(Debug)]
pub(crate) enum WorkerNews {
    /// It died (`how`) and is restarted after `wait`.
    Restarting { name: String, how: String, wait: Duration },
    /// It failed permanently.
    GivenUp(GivenUp),
}

/// A worker that failed permanently, which ends the run.
#[derive(Debug)]
pub(crate) struct GivenUp {
    pub(crate) name: String,
    pub(crate) how: String,
    pub(crate) exit: Exit,
    pub(crate) log: PathBuf,
    /// Last lines of its log.
    pub(crate) tail: Vec<String>,
}

/// Order to all supervised workers; variants are in the sequence of escalation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Order {
    Run,
    /// The run is over: the coordinator dismisses the workers, and none is restarted.
    Leave,
    Terminate,
    Kill,
}

/// Supervisor of all worker processes of a run. Dropping it kills them.
pub(crate) struct Supervisor {
    order: watch::Sender<Order>,
    news: mpsc::Receiver<WorkerNews>,
    tasks: JoinSet<()>,
    /// Number of steps, evaluations and narrowed searches of the run; a change clears the restart histories.
    advances: Arc<AtomicU64>,
    /// Names of drained workers, which are not restarted when they end.
    retired: Arc<Mutex<BTreeSet<String>>>,
}

impl Supervisor {
    /// Starts the workers, with their output in `<name>.log` in the folder `logs`.
    pub(crate) fn start(commands: Vec<WorkerCommand>, logs: &Path) -> Self {
        let (order, _) = watch::channel(Order::Run);
        // A small bound is enough: a full channel only delays a restart.
        let (sender, news) = mpsc::channel(64);
        let mut tasks = JoinSet::new();
        let advances = Arc::new(AtomicU64::new(0));
        let retired = Arc::new(Mutex::new(BTreeSet::new()));
        for command in commands {
            let log = logs.join(format!("{}.log", command.name));
            let about = About { advances: Arc::clone(&advances), retired: Arc::clone(&retired) };
            tasks.spawn(supervise(command, log, order.subscribe(), sender.clone(), about));
        }
        Self { order, news, tasks, advances, retired }
    }

    /// Notes that the run advanced, so earlier deaths of workers did not block it.
    pub(crate) fn advanced(&self) {
        self.advances.fetch_add(1, Ordering::Relaxed);
    }

    /// Marks a worker as drained by an operator, so that it is not restarted when it ends.
    pub(crate) fn retire(&self, name: &str) {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    /// Waits for the next news about a worker.
    pub(crate) async fn news(&mut self) -> WorkerNews {
        match self.news.recv().await {
            Some(news) => news,
            // All workers have ended in order, so there will be no more news.
            None => std::future::pending().await,
        }
    }

    /// Waits until the dismissed workers have left, for `grace` at most or until the operator hurries, then ends the rest.
    pub(crate) async fn finish(mut self, grace: Duration, shutdown: &Shutdown) {
        for (order, patience) in [(Order::Leave, grace), (Order::Terminate, TERM_GRACE), (Order::Kill, TERM_GRACE)] {
            self.order.send_replace(order);
            let all_gone = async { while self.tasks.join_next().await.is_some() {} };
            tokio::select! {
                () = all_gone => return,
                () = sleep(patience) => {}
                () = shutdown.hurried(), if order == Order::Leave => {}
            }
        }
    }
}

/// Facts that the run shares with the supervision tasks.
struct About {
    advances: Arc<AtomicU64>,
    retired: Arc<Mutex<BTreeSet<String>>>,
}

impl About {
    fn is_retired(&self, name: &str) -> bool {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }
}

async fn supervise(
    mut command: WorkerCommand,
    log: PathBuf,
    mut order: watch::Receiver<Order>,
    news: mpsc::Sender<WorkerNews>,
    about: About,
) {
    if let Some(living) = command.living.take() {
        watch_living(living, &mut order, command.gate.is_some()).await;
        if *order.borrow() != Order::Run || about.is_retired(&command.name) {
            return;
        }
    }
    let began = Instant::now();
    let mut restarts = Restarts::new();
    let mut seen = 0;
    loop {
        let started = Instant::now();
        let log_start = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        let ended = match spawn(&command, &log) {
            Ok(mut child) => {
                let leader = child.id();
                let ended = watch_child(&mut child, &mut order, command.gate.as_ref()).await;
                // What a server has started outlives it by seconds, and holds its GPUs.
                if let Some(leader) = leader.filter(|_| command.gate.is_some()) {
                    signal_group(leader, Signal::SIGKILL);
                }
                ended
            }
            Err(error) => Err(error),
        };
        if *order.borrow() != Order::Run || about.is_retired(&command.name) {
            return;
        }
        let advanced = about.advances.load(Ordering::Relaxed);
        if advanced > seen {
            seen = advanced;
            restarts.forgive();
        }
        let (how, next) = match ended {
            Ok(End { status, .. }) if changed_within(&mut order, dismissal(status)).await => return,
            Ok(End { status, missed }) => {
                let how = missed.unwrap_or_else(|| describe(status));
                (how, restarts.after(status, began.elapsed(), started.elapsed()))
            }
            Err(error) => {
                (format!("cannot be started with `{}`: {error}", command.program.display()), Next::GiveUp(Exit::Config))
            }
        };
        let name = command.name.clone();
        let (message, wait) = match next {
            Next::Restart(wait) => (WorkerNews::Restarting { name, how, wait }, Some(wait)),
            Next::GiveUp(exit) => {
                let tail = tail(&log, log_start).unwrap_or_default();
                (WorkerNews::GivenUp(GivenUp { name, how, exit, log: log.clone(), tail }), None)
            }
        };
        // The receiver is dropped when the run is over; the order tells this task the same.
        let _ = news.send(message).await;
        match wait {
            Some(wait) if !changed_within(&mut order, wait).await => {}
            _ => return,
        }
    }
}

/// Returns how long to wait for the end of the run after a worker exited with `status`, before restarting it.
fn dismissal(status: ExitStatus) -> Duration {
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(code) if code == Exit::Done.code() => DISMISSAL,
        Some(code) if code == Exit::Again.code() => STOP,
        _ => Duration::ZERO,
    }
}

fn spawn(command: &WorkerCommand, log: &Path) -> io::Result<Child> {
    let output = File::options().create(true).append(true).open(log)?;
    let gpu = command.gpu.iter().map(|gpu| (VISIBLE, gpu));
    Command::new(&command.program)
        .args(&command.arguments)
        .envs(gpu)
        .envs(command.environment.iter().map(|(name, value)| (name, value)))
        .env(RUN_ID, &command.run_id)
        .env(STARTED, started().to_string())
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        // A process group of its own, so that Ctrl-C reaches only `pacs`, which ends the workers in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

/// How a process ended.
struct End {
    status: ExitStatus,
    /// Why it was killed for missing its gate.
    missed: Option<String>,
}

/// Waits for a child process to end, and forwards orders as signals. One that misses its gate is killed.
async fn watch_child(child: &mut Child, order: &mut watch::Receiver<Order>, gate: Option<&Gate>) -> io::Result<End> {
    let watched = async {
        match gate {
            Some(gate) => gate.missed().await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(watched);
    let mut missed = None;
    loop {
        tokio::select! {
            status = child.wait() => return Ok(End { status: status?, missed }),
            changed = order.changed() => if changed.is_err() { return Ok(End { status: child.wait().await?, missed }) },
            how = &mut watched, if missed.is_none() => {
                missed = Some(how);
                signal(child, Signal::SIGKILL);
                continue;
            }
        }
        match *order.borrow_and_update() {
            // The coordinator dismisses workers. Servers have no work left when a run is over.
            Order::Leave if gate.is_some() => signal(child, Signal::SIGTERM),
            Order::Run | Order::Leave => {}
            Order::Terminate => signal(child, Signal::SIGTERM),
            Order::Kill => signal(child, Signal::SIGKILL),
        }
    }
}

/// Waits for an adopted process to end, and forwards orders as signals. What a server has started ends with it.
async fn watch_living(living: Living, order: &mut watch::Receiver<Order>, is_server: bool) {
    while living.is_alive() {
        tokio::select! {
            changed = order.changed() => if changed.is_err() { return },
            () = sleep(LOOK_AGAIN) => continue,
        }
        match *order.borrow_and_update() {
            Order::Leave if is_server => living.signal(Signal::SIGTERM),
            Order::Run | Order::Leave => {}
            Order::Terminate => living.signal(Signal::SIGTERM),
            Order::Kill => living.signal(Signal::SIGKILL),
        }
    }
    if is_server {
        living.sweep();
    }
}

fn signal(child: &Child, signal: Signal) {
    if let Some(pid) = child.id() {
        signal_group(pid, signal);
    }
}

/// Sends the signal to the process group that the process leads.
pub(super) fn signal_group(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        // The process may have ended at this moment, so a failure is ignored.
        let _ = killpg(Pid::from_raw(pid), signal);
    }
}

/// Returns whether the order changes from [`Order::Run`] within `wait`.
async fn changed_within(order: &mut watch::Receiver<Order>, wait: Duration) -> bool {
    tokio::select! {
        _ = order.wait_for(|order| *order != Order::Run) => true,
        () = sleep(wait) => false,
    }
}

/// Returns the last lines written to `log` after offset `start`.
fn tail(log: &Path, start: u64) -> io::Result<Vec<String>> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    let from = length.saturating_sub(TAIL_BYTES).max(start.min(length));
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    Ok(lines[lines.len().saturating_sub(TAIL_LINES)..].iter().map(|line| (*line).to_owned()).collect())
}

#[cfg(test)]
mod tests;
