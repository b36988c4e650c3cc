//! The life of a worker process: join the run, serve it, join again when the registration is lost, leave when told to.

use std::convert::Infallible;
use std::fmt::Display;
use std::time::Duration;

use tokio::time::Instant;
use tracing::Instrument;

use crate::membership::{Ended, JoinError, Link, Membership, WorkerIdentity};
use crate::{Backoff, CallError, Exit, Shutdown, trace};

/// What a role does as a member of a run. What it keeps from one registration to the next, it keeps in itself.
pub trait Worker: Send {
    /// Why the role cannot go on.
    type Error: From<JoinError> + Display + Send;

    /// Works under one registration until that cannot go on. Dropped when the registration ends before.
    fn serve(&mut self, membership: &Membership) -> impl Future<Output = Result<Infallible, Stop<Self::Error>>> + Send;
}

/// Why serving under one registration stopped.
#[derive(Debug)]
pub enum Stop<E> {
    /// The process cannot go on at all.
    Fatal(E),
    /// This registration cannot go on: another one starts afresh.
    Rejoin(String),
}

impl<E> From<CallError> for Stop<E> {
    fn from(error: CallError) -> Self {
        Self::Rejoin(error.to_string())
    }
}

/// Registrations in a row that came to nothing, before the process ends to be started again: what is wrong may be wrong
/// with the process.
const MOST_FRUITLESS: u32 = 20;

/// A registration that lasted this long was good, even if there was nothing to do.
const SETTLED: Duration = Duration::from_secs(30);

/// Waits between a lost registration and the next.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Joins, serves and joins again until the coordinator dismisses the worker, or shutdown is requested.
///
/// # Errors
/// When the run cannot be joined (again), or the role cannot go on.
pub async fn work<W: Worker>(
    link: &Link,
    identity: &WorkerIdentity,
    shutdown: &Shutdown,
    worker: &mut W,
) -> Result<Exit, W::Error> {
    let (mut fruitless, mut backoff) = (0, Backoff::new(FIRST_WAIT, LONGEST_WAIT));
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
        if was_good {
            (fruitless, backoff) = (0, Backoff::new(FIRST_WAIT, LONGEST_WAIT));
        } else {
            fruitless += 1;
        }
        if fruitless >= MOST_FRUITLESS {
            tracing::error!(
                "{fruitless} registrations in a row came to nothing: the process ends, to be started again; the last: {reason}"
            );
            return Ok(Exit::Again);
        }
        tracing::warn!("joining again: {reason}");
        tokio::select! {
            () = tokio::time::sleep(backoff.wait()) => {}
            () = shutdown.requested() => return Ok(Exit::Again),
        }
    }
}
