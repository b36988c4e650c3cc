//! A verifier that is a program of the user's own: a pool of children that read and write JSON lines.
//!
//! `child` is one process, from its start to its end; here is who gets which, and how often they are started. `guard` is what stands
//! between them and us, and `environment` what they know of us.

mod child;
mod environment;
mod guard;
mod stderr;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pacs_runtime::Backoff;
use pacs_spec::ExecSpec;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use self::child::Child;
pub use self::guard::{Entry, Guarded, run_guarded};
use self::stderr::LineBudget;
use crate::Task;
use crate::fault::Fault;
use crate::judge::Answer;

/// Waiting times between starts that fail.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// A pool of children of one command, started when they are needed.
pub(crate) struct Exec {
    spec: ExecSpec,
    guard: Option<Entry>,
    limit: Duration,
    children: Semaphore,
    /// Those that wait for work; at most as many as there are permits.
    idle: Mutex<Vec<Child>>,
    starts: Mutex<Starts>,
    log: Arc<LineBudget>,
}

/// When the next child may be started.
struct Starts {
    backoff: Backoff,
    not_before: Option<Instant>,
}

impl Starts {
    fn new() -> Self {
        Self { backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT), not_before: None }
    }
}

impl Exec {
    pub(crate) fn new(spec: ExecSpec, guard: Option<Entry>, limit: Duration, concurrency: usize) -> Self {
        Self {
            spec,
            guard,
            limit,
            children: Semaphore::new(concurrency),
            idle: Mutex::default(),
            starts: Mutex::new(Starts::new()),
            log: Arc::default(),
        }
    }

    /// Asks a child. One that is late, garbles or dies is killed with all that it has started, and the next task gets
    /// another one.
    pub(crate) async fn verify(&self, task: &Task) -> (Result<Answer, Fault>, Duration) {
        // Taken for the whole verification, so that no more children exist than verifications that may run.
        let _permit = self.children.acquire().await.expect("the semaphore is never closed");
        let mut child = match self.child().await {
            Ok(child) => child,
            Err(fault) => return (Err(fault), Duration::ZERO),
        };
        let started = Instant::now();
        let verdict = match tokio::time::timeout(self.limit, child.ask(task)).await {
            Ok(Ok(verdict)) => {
                let answer = Answer { verdict, version: child.version() };
                self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(child);
                return (Ok(answer), started.elapsed());
            }
            Ok(Err(fault)) if fault.leaves_child_usable() => {
                self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(child);
                Err(fault)
            }
            Ok(Err(fault)) => Err(child.end(fault).await),
            // Dropped, and killed thereby.
            Err(_) => Err(Fault::Late(self.limit)),
        };
        (verdict, started.elapsed())
    }

    /// One that waits for work, or a new one.
    async fn child(&self) -> Result<Child, Fault> {
        loop {
            let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut child) = idle else { break };
            if !child.has_ended() {
                return Ok(child);
            }
            tracing::warn!(program = self.spec.command[0], "a verifier process ended while it had nothing to do");
        }
        // One wait for the pool and not per child: a command that cannot start would otherwise be tried by all threads at once.
        let not_before = self.starts.lock().unwrap_or_else(PoisonError::into_inner).not_before;
        if let Some(at) = not_before {
            tokio::time::sleep_until(at).await;
        }
        let started = Child::start(&self.spec, self.guard.as_ref(), &self.log).await;
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        match &started {
            Ok(_) => *starts = Starts::new(),
            Err(_) => starts.not_before = Some(Instant::now() + starts.backoff.wait()),
        }
        started
    }
}

impl Fault {
    /// Whether the child kept to the protocol although there is no verdict.
    fn leaves_child_usable(&self) -> bool {
        matches!(self, Self::Reported(_))
    }
}

#[cfg(test)]
mod tests;
