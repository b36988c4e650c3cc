use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::Exit;

/// Time that a process may take to deregister and exit.
const GOODBYE: Duration = Duration::from_secs(6);

/// Signals of one kind within this time count as one.
const SAME_SIGNAL: Duration = Duration::from_millis(300);

/// A shutdown request that every task of a process can wait for.
#[derive(Clone, Debug)]
pub struct Shutdown {
    requested: Arc<watch::Sender<Requests>>,
    grace: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Requests {
    count: u32,
    /// Time of the first request.
    first: Option<Instant>,
    /// Exit code of an immediate end, if one is required.
    at_once: Option<Exit>,
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

impl Shutdown {
    /// A handle on which nothing is requested yet.
    #[must_use]
    pub fn new() -> Self {
        Self { requested: Arc::default(), grace: Duration::ZERO }
    }

    /// Lets the process continue its work for `grace` after the request (see [`Self::leaving`]).
    #[must_use]
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Requests shutdown on SIGTERM and SIGINT; must be called within a runtime. SIGUSR1, which launchers send to every
    /// process of a job shortly before its time limit, is ignored unless enabled (see [`Self::on_warning`]).
    ///
    /// # Errors
    /// When the signal handlers cannot be installed.
    pub fn on_signals(&self) -> io::Result<()> {
        self.on(SignalKind::terminate())?;
        self.on(SignalKind::interrupt())?;
        // An installed handler keeps the process alive; the default action would end it.
        signal(SignalKind::user_defined1()).map(drop)
    }

    /// Requests shutdown on SIGUSR1, which launchers send shortly before the time limit of a job.
    ///
    /// # Errors
    /// When the signal handler cannot be installed.
    pub fn on_warning(&self) -> io::Result<()> {
        self.on(SignalKind::user_defined1())
    }

    fn on(&self, kind: SignalKind) -> io::Result<()> {
        let mut signals = signal(kind)?;
        let shutdown = self.clone();
        // Lives as long as the process; it owns nothing that has to be released.
        tokio::spawn(async move {
            let mut last: Option<Instant> = None;
            while signals.recv().await.is_some() {
                // A launcher that signals a whole job step reaches a worker twice: directly and through its supervisor.
                if last.replace(Instant::now()).is_none_or(|last| last.elapsed() > SAME_SIGNAL) {
                    shutdown.request();
                }
            }
        });
        Ok(())
    }

    /// Requests shutdown; a second request cuts the grace short (see [`Self::hurried`]).
    pub fn request(&self) {
        self.requested.send_modify(|requests| {
            requests.count += 1;
            requests.first.get_or_insert_with(Instant::now);
        });
    }

    /// Whether shutdown was requested.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        self.requested.borrow().count > 0
    }

    /// Waits for the request.
    pub async fn requested(&self) {
        self.at_least(1).await;
    }

    /// Waits for a second request: the operator does not want to wait for a graceful end.
    pub async fn hurried(&self) {
        self.at_least(2).await;
    }

    /// Waits until it is time to leave: after the request, when its grace is over or a second request has cut it short.
    pub async fn leaving(&self) {
        self.requested().await;
        let passed = self.requested.borrow().first.map_or(Duration::ZERO, |first| first.elapsed());
        tokio::select! {
            () = tokio::time::sleep(self.grace.saturating_sub(passed)) => {}
            () = self.hurried() => {}
        }
    }

    /// Waits until the process should have left, including time to deregister; it may then be ended in any state.
    pub async fn given_up(&self) {
        self.leaving().await;
        tokio::time::sleep(GOODBYE).await;
    }

    /// Orders an immediate end, because the process is stuck and its work was reissued.
    pub fn end_at_once(&self, exit: Exit) {
        self.requested.send_modify(|requests| requests.at_once = Some(exit));
    }

    /// Waits for the order to end immediately; returns its exit code.
    pub async fn at_once(&self) -> Exit {
        let mut receiver = self.requested.subscribe();
        let ended = receiver.wait_for(|requests| requests.at_once.is_some()).await;
        ended.ok().and_then(|requests| requests.at_once).unwrap_or(Exit::Again)
    }

    async fn at_least(&self, wanted: u32) {
        let mut receiver = self.requested.subscribe();
        // The sender lives in `self`, so the channel cannot close during this wait.
        let _ = receiver.wait_for(|requests| requests.count >= wanted).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn grace_is_cut_short_by_a_second_request() {
        let shutdown = Shutdown::new().with_grace(Duration::from_secs(3600));
        shutdown.request();
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, shutdown.leaving()).await.is_err(), "there is time left");
        shutdown.request();
        tokio::time::timeout(Duration::from_secs(10), shutdown.leaving()).await.expect("no time is left");
    }

    #[tokio::test]
    async fn without_a_grace_period_the_request_suffices() {
        let shutdown = Shutdown::new();
        shutdown.request();
        tokio::time::timeout(Duration::from_secs(10), shutdown.leaving()).await.expect("no time is given");
    }
}
