//! The restart policy of worker processes.

use std::collections::VecDeque;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use pacs_runtime::{Backoff, Exit};

/// Restarts allowed within [`WINDOW`] while the run does not advance; a worker that needs more will not recover by itself.
const MOST_RESTARTS: usize = 5;
const WINDOW: Duration = Duration::from_secs(600);

/// Lifetime after which a worker counts as healthy and its back-off is reset.
const WELL: Duration = Duration::from_secs(60);

/// Restart history of one worker. Times are relative to the start of supervision.
#[derive(Debug)]
pub(crate) struct Restarts {
    recent: VecDeque<Duration>,
    backoff: Backoff,
}

/// Decision after the end of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Restart the worker after this wait.
    Restart(Duration),
    /// Do not restart it; the run ends with this exit code.
    GiveUp(Exit),
}

impl Restarts {
    pub(crate) fn new() -> Self {
        Self { recent: VecDeque::new(), backoff: fresh_backoff() }
    }

    /// Clears the history, because the run advanced and so the worker has done its part.
    pub(crate) fn forgive(&mut self) {
        *self = Self::new();
    }

    /// Decides what follows when the worker ends with `status` at `now`, after a lifetime of `lived`.
    pub(crate) fn after(&mut self, status: ExitStatus, now: Duration, lived: Duration) -> Next {
        let code = status.code();
        // The same job would fail in the same way, however often it is started.
        if code == Some(i32::from(Exit::Config.code())) {
            return Next::GiveUp(Exit::Config);
        }
        while self.recent.front().is_some_and(|restart| now.saturating_sub(*restart) > WINDOW) {
            self.recent.pop_front();
        }
        if self.recent.len() >= MOST_RESTARTS {
            // A worker that keeps asking for a restart (75) met something outside; one that keeps crashing has a fault.
            let bug = code.is_some_and(|code| code != i32::from(Exit::Again.code()));
            return Next::GiveUp(if bug { Exit::Bug } else { Exit::Again });
        }
        // Only the backoff: the restarts still count within the window, else a worker that dies every minute would never be given up.
        if lived >= WELL {
            self.backoff = fresh_backoff();
        }
        self.recent.push_back(now);
        Next::Restart(self.backoff.wait())
    }
}

fn fresh_backoff() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(30))
}

/// Describes the end of a process for people.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(9)) => "was killed (signal 9; the system does that when memory runs out)".to_owned(),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_wrong_configuration_is_final() {
        assert_eq!(Restarts::new().after(exit(78), at(0), at(0)), Next::GiveUp(Exit::Config));
    }

    #[test]
    fn restarts_back_off_and_run_out() {
        let mut restarts = Restarts::new();
        let waits: Vec<Next> = (0..5).map(|n| restarts.after(exit(70), at(n), at(1))).collect();
        // Jitter draws each wait from the upper half of its slot: 0.5, 1, 2, 4, 8 s.
        for (next, turn) in waits.iter().zip([500, 1000, 2000, 4000, 8000].map(Duration::from_millis)) {
            let Next::Restart(wait) = next else { panic!("{next:?}") };
            assert!(turn / 2 <= *wait && *wait <= turn, "{wait:?} of a turn of {turn:?}");
        }
        assert_eq!(restarts.after(exit(70), at(30), at(1)), Next::GiveUp(Exit::Bug));
        assert_eq!(restarts.after(ExitStatus::from_raw(9), at(30), at(1)), Next::GiveUp(Exit::Again));
    }

    #[test]
    fn a_worker_that_lived_long_resets_its_backoff() {
        let mut restarts = Restarts::new();
        for n in 0..20 {
            let next = restarts.after(ExitStatus::from_raw(9), at(n * 200), at(199));
            let starts_over = matches!(next, Next::Restart(wait) if wait <= Duration::from_millis(500));
            assert!(starts_over, "restart {n}: {next:?}");
        }
    }

    #[test]
    fn restarts_are_forgiven_when_the_run_advances() {
        let mut restarts = Restarts::new();
        for n in 0..20 {
            let next = restarts.after(ExitStatus::from_raw(9), at(n), at(1));
            assert!(matches!(next, Next::Restart(_)), "restart {n}");
            if n % 5 == 4 {
                restarts.forgive();
            }
        }
    }

    #[test]
    fn ends_are_described() {
        assert_eq!(describe(exit(70)), "ended with exit code 70");
        assert_eq!(describe(ExitStatus::from_raw(15)), "was killed by signal 15");
    }
}
