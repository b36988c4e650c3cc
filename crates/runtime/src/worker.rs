//! The main loop of a worker: join the run, serve it, join again when the registration is lost, leave when told to.

use std::convert::Infallible;
use std::fmt::Display;
use std::time::Duration;

use tokio::time::Instant;
use tracing::Instrument;

use crate::membership::{Ended, JoinError, Link, Membership, WorkerIdentity};
use crate::{Backoff, CallError, Exit, Shutdown, trace};

/// A role's work as a member of a run. State that outlives a registration is kept in the implementing type.
pub trait Worker: Send {
    /// Error that ends the process.
    type Error: From<JoinError> + Display + Send;

    /// Works under one registration until it fails. The future is dropped when the registration ends.
    fn serve(&mut self, membership: &Membership) -> impl Future<Output = Result<Infallible, Stop<Self::Error>>> + Send;
}

/// Why serving under one registration stopped.
#[derive(Debug)]
pub enum Stop<E> {
    /// The process cannot continue.
    Fatal(E),
    /// This registration cannot continue, but a new one may.
    Rejoin(String),
}

impl<E> From<CallError> for Stop<E> {
    fn from(error: CallError) -> Self {
        Self::Rejoin(error.to_string())
    }
}

/// Consecutive fruitless registrations after which the process ends to be restarted, because the
/// fault may be in the process.
const MOST_FRUITLESS: u32 = 20;

/// Duration after which a registration counts as good even if there was no work.
const SETTLED: Duration = Duration::from_secs(30);

/// Waits between a lost registration and the next, from the first to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Joins, serves and joins again until the coordinator dismisses the worker, or shutdown is requested.
///
/// # Errors
/// When the run cannot be joined (again), or the role fails for good.
pub async fn work<W: Worker>(
    link: &Link,
    identity: &WorkerIdentity,
    shutdown: &Shutdown,
    worker: &mut W,
) -> Result<Exit, W::Error> {
    let mut prospects = Prospects::new();
    let mut is_rejoin = false;
    loop {
        let membership = tokio::select! {
            joined = Membership::join_again(link, identity, shutdown, is_rejoin) => joined?,
            () = shutdown.requested() => return Ok(Exit::Again),
        };
        is_rejoin = true;
        let joined = Instant::now();
        let span = tracing::info_span!("member", run = trace::short(&membership.run_id), worker = %membership.worker);
        let served = membership.run_until_ended(shutdown, worker.serve(&membership));
        let ended = served.instrument(span).await;
        let was_good = membership.activity.has_served() || joined.elapsed() >= SETTLED;
        let reason = match ended {
            Ended::Work(Ok(never)) => match never {},
            Ended::Work(Err(Stop::Fatal(error))) => {
                membership.leave(Some(error.to_string())).await;
                return Err(error);
            }
            Ended::Leave(exit) => {
                membership.leave(None).await;
                return Ok(exit);
            }
            Ended::Work(Err(Stop::Rejoin(reason))) => {
                membership.leave(Some(reason.clone())).await;
                reason
            }
            Ended::Lost(reason) => reason,
        };
        let Some(wait) = prospects.after(was_good) else {
            tracing::error!(
                "{MOST_FRUITLESS} registrations in a row failed: the process exits to be restarted; the last: \
                 {reason}"
            );
            return Ok(Exit::Again);
        };
        tracing::warn!("joining again: {reason}");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = shutdown.requested() => return Ok(Exit::Again),
        }
    }
}

/// Decides whether to register again.
struct Prospects {
    /// Number of consecutive fruitless registrations.
    fruitless: u32,
    backoff: Backoff,
}

impl Prospects {
    fn new() -> Self {
        Self { fruitless: 0, backoff: Backoff::new(FIRST_WAIT, LONGEST_WAIT) }
    }

    /// Time to wait after a registration; `None` when there were too many fruitless ones.
    fn after(&mut self, was_good: bool) -> Option<Duration> {
        if was_good {
            *self = Self::new();
        } else {
            self.fruitless += 1;
        }
        (self.fruitless < MOST_FRUITLESS).then(|| self.backoff.wait())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registrations_that_come_to_nothing_end_and_a_good_one_begins_anew() {
        let mut prospects = Prospects::new();
        let mut fruitless = |times: u32| (0..times).map(|_| prospects.after(false)).collect::<Vec<_>>();
        assert!(fruitless(MOST_FRUITLESS - 1).iter().all(|wait| wait.is_some_and(|wait| wait <= LONGEST_WAIT)));
        assert!(prospects.after(true).is_some_and(|wait| wait <= FIRST_WAIT), "it was good");
        let mut fruitless = |times: u32| (0..times).map(|_| prospects.after(false)).collect::<Vec<_>>();
        let waits = fruitless(MOST_FRUITLESS);
        assert_eq!(waits.iter().position(Option::is_none), Some(MOST_FRUITLESS as usize - 1));
    }
}
