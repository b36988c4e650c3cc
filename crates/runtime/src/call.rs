//! The policy of all calls between processes of a run: every try has a deadline, tries are repeated with jittered
//! back-off until patience ends, and one table says which status codes are worth another try.
//!
//! A repeated call must be harmless, and all calls of `proto/pacs/v1` are: requests are numbered or name their lease,
//! and a result that is submitted twice counts once.

use std::time::Duration;

use tokio::time::Instant;
use tonic::{Code, Response, Status};

use crate::Backoff;
use crate::trace::{self, TraceContext};

/// How long calls are retried before the registration is given up. A coordinator that was killed has restarted by then,
/// and knows its workers and their leases.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Metadata key on the refusal of a call because the run's disk is full. People have to fix that, so patience does not
/// run out meanwhile.
pub const NO_ROOM_KEY: &str = "pacs-no-room";

/// Whether a call was refused because the run's disk is full.
pub(crate) fn waits_for_room(status: &Status) -> bool {
    status.metadata().contains_key(NO_ROOM_KEY)
}

/// Outage that is logged while it lasts; shorter ones are logged when they are over.
const QUIET: Duration = Duration::from_secs(10);

/// How long before its limit the last call to a foreign service is made.
const LAST_TRY_BEFORE_LIMIT: Duration = Duration::from_millis(100);

/// Consequence of a failed call for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// Another try may succeed.
    TryAgain,
    /// The worker is not a member and has to register again.
    Gone,
    /// Another run, or another start of the job, answers at the address; the caller has to look for its own.
    OtherRun,
    /// Another try would get the same answer.
    Refused,
}

/// Maps each status code to its consequence.
#[must_use]
pub fn meaning(code: Code) -> Meaning {
    match code {
        // The connection is down, or the server is starting or ending.
        Code::Unavailable
        // No answer in time, by our own clock or that of a proxy.
        | Code::DeadlineExceeded
        // The stream was reset before the answer was complete.
        | Code::Cancelled
        // tonic's code for a connection that broke while the answer was read.
        | Code::Unknown
        // tonic's code for an HTTP/2 error. A bug in the server uses up the patience, too.
        | Code::Internal
        // The server is overloaded. A message that is too large is OUT_OF_RANGE.
        | Code::ResourceExhausted => Meaning::TryAgain,
        // The coordinator does not know the worker: its membership lapsed, or the journal is lost.
        Code::NotFound => Meaning::Gone,
        // Sent only by guards and by registration.
        Code::Aborted => Meaning::OtherRun,
        // The request itself is wrong: malformed, stale, of the wrong role, too large, or unknown to this version.
        Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::DataLoss
        // Not a failure; a server that sends it as one is broken.
        | Code::Ok => Meaning::Refused,
    }
}

fn meaning_of_service(code: Code) -> Meaning {
    if code == Code::Unavailable { Meaning::TryAgain } else { Meaning::Refused }
}

/// Why a call got no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The worker is not a member and has to register again.
    #[error("call {call}: the coordinator does not know this worker")]
    Gone {
        /// Name of the call.
        call: &'static str,
    },
    /// The address belongs to another run, so the worker has to look for its own.
    #[error("call {call}: {message}")]
    OtherRun {
        /// Name of the call.
        call: &'static str,
        /// Message of the refusal.
        message: String,
    },
    /// The server refused the call for good.
    #[error("call {call}: {code:?}: {message}")]
    Refused {
        /// Name of the call.
        call: &'static str,
        /// Status code of the refusal.
        code: Code,
        /// Message of the refusal.
        message: String,
    },
    /// Patience ended without an answer.
    #[error("call {call}: no answer in {} s and {tries} tries: {last}", waited.as_secs())]
    OutOfPatience {
        /// Name of the call.
        call: &'static str,
        /// Time since the first try.
        waited: Duration,
        /// Number of tries.
        tries: u32,
        /// Error of the last try.
        last: String,
    },
}

/// Deadline, back-off and patience of a call.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    call: &'static str,
    deadline: Duration,
    patience: Duration,
    first_wait: Duration,
    longest_wait: Duration,
    meaning: fn(Code) -> Meaning,
}

impl Policy {
    /// The policy of `call`, with `deadline` for each try, including the time that the server waits for work.
    #[must_use]
    pub const fn new(call: &'static str, deadline: Duration) -> Self {
        let (first_wait, longest_wait) = (Duration::from_millis(100), Duration::from_secs(5));
        Self { call, deadline, patience: PATIENCE, first_wait, longest_wait, meaning }
    }

    /// The policy of a call to a service outside of this project, with `limit` for all tries together. Only UNAVAILABLE
    /// is retried: any other code is the service's answer, and a second call may not be harmless.
    #[must_use]
    pub const fn of_service(call: &'static str, limit: Duration) -> Self {
        // The last try is made shortly before the limit, because its error says more than a timeout.
        let policy = Self::new(call, limit).patience(limit.saturating_sub(LAST_TRY_BEFORE_LIMIT));
        Self { meaning: meaning_of_service, ..policy }
    }

    /// Sets the patience: no try begins later than this after the first.
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Sets the waits between tries, from `first` at the beginning to `longest`.
    #[must_use]
    pub const fn waits(mut self, first: Duration, longest: Duration) -> Self {
        (self.first_wait, self.longest_wait) = (first, longest);
        self
    }

    /// Calls until there is an answer, or no further try is worthwhile.
    ///
    /// # Errors
    /// [`CallError::OutOfPatience`] after this policy's patience; the others end the tries at once.
    pub async fn run<T, F>(self, attempt: impl FnMut() -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        // All tries of a call share one span, in the trace of the running task or else in one of its own.
        let (context, span) = match trace::current() {
            Some(outer) => (outer.child(), tracing::info_span!("rpc", call = self.call)),
            None => {
                let own = TraceContext::random();
                (own, tracing::info_span!("rpc", call = self.call, trace_id = %own.trace_id()))
            }
        };
        trace::within(context, span, self.run_within(attempt)).await
    }

    async fn run_within<T, F>(self, mut attempt: impl FnMut() -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let call = self.call;
        let mut tries = self.tries();
        loop {
            let status = match tokio::time::timeout(self.deadline, attempt()).await {
                Ok(Ok(response)) => {
                    tries.succeeded(call);
                    return Ok(response.into_inner());
                }
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {} s", self.deadline.as_secs_f64())),
            };
            match (self.meaning)(status.code()) {
                Meaning::TryAgain => {}
                Meaning::Gone => return Err(CallError::Gone { call }),
                Meaning::OtherRun => return Err(CallError::OtherRun { call, message: status.message().to_owned() }),
                Meaning::Refused => {
                    let (code, message) = (status.code(), status.message().to_owned());
                    return Err(CallError::Refused { call, code, message });
                }
            }
            if waits_for_room(&status) {
                tries.extend(self.patience);
            }
            if !tries.again(call, &status).await {
                let (waited, tries) = (tries.waited(), tries.made());
                let last = status.message().to_owned();
                return Err(CallError::OutOfPatience { call, waited, tries, last });
            }
        }
    }

    /// Returns a retry loop with this policy, for operations of more than one call.
    #[must_use]
    pub fn tries(&self) -> Tries {
        Tries {
            started: Instant::now(),
            patience: self.patience,
            backoff: Backoff::new(self.first_wait, self.longest_wait),
            made: 1,
            warned: false,
        }
    }
}

/// A retry loop: counts tries, waits between them, and ends with the patience.
#[derive(Debug)]
pub struct Tries {
    started: Instant,
    patience: Duration,
    backoff: Backoff,
    made: u32,
    warned: bool,
}

impl Tries {
    /// Waits after a failed try. Returns whether to try again; the last try is made when patience ends.
    pub async fn again(&mut self, what: &str, problem: &(dyn std::fmt::Display + Sync)) -> bool {
        let waited = self.waited();
        if waited >= self.patience {
            return false;
        }
        let wait = self.backoff.wait().min(self.patience - waited);
        tracing::debug!(what, tries = self.made, "failed, retrying: {problem}");
        if waited >= QUIET && !self.warned {
            self.warned = true;
            let left = (self.patience - waited).as_secs();
            tracing::warn!(what, tries = self.made, "no success for {} s, {left} s to go: {problem}", waited.as_secs());
        }
        self.made = self.made.saturating_add(1);
        tokio::time::sleep(wait).await;
        true
    }

    /// Extends the patience to at least `longer` from now.
    pub fn extend(&mut self, longer: Duration) {
        self.patience = self.patience.max(self.waited() + longer);
    }

    /// Time since the first try began.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.started.elapsed()
    }

    /// Time until the patience ends.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.patience.saturating_sub(self.waited())
    }

    /// Number of tries so far, including the current one.
    #[must_use]
    pub fn made(&self) -> u32 {
        self.made
    }

    fn succeeded(&self, what: &str) {
        if self.warned {
            tracing::info!(what, tries = self.made, "success after {} s", self.waited().as_secs());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAITS: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(8)];
    const POLICY: Policy = Policy::new("Test", Duration::from_millis(50)).waits(WAITS[0], WAITS[1]);

    #[test]
    fn the_table_says_which_failures_are_retried() {
        use Code::*;
        for (expected, codes) in [
            (Meaning::TryAgain, &[Unavailable, DeadlineExceeded, Cancelled, Unknown, Internal, ResourceExhausted][..]),
            (Meaning::Gone, &[NotFound]),
            (Meaning::OtherRun, &[Aborted]),
            (
                Meaning::Refused,
                &[
                    InvalidArgument,
                    FailedPrecondition,
                    OutOfRange,
                    AlreadyExists,
                    PermissionDenied,
                    Unauthenticated,
                    Unimplemented,
                    DataLoss,
                    Ok,
                ],
            ),
        ] {
            codes.iter().for_each(|code| assert_eq!(meaning(*code), expected, "{code:?}"));
        }
    }

    #[tokio::test]
    async fn transient_failures_and_timeouts_are_retried() {
        let mut tries = 0;
        let answer = POLICY.run(|| {
            tries += 1;
            let now = tries;
            async move {
                match now {
                    1 => Err(Status::unavailable("restarting")),
                    2 => std::future::pending().await,
                    _ => Ok(Response::new(now)),
                }
            }
        });
        assert_eq!(answer.await.expect("answered"), 3);
    }

    #[tokio::test]
    async fn retries_are_bounded_and_the_error_counts_them() {
        let mut made = 0;
        let error = POLICY.patience(Duration::from_millis(100)).run(|| {
            made += 1;
            std::future::ready(Err::<Response<()>, _>(Status::unavailable("gone fishing")))
        });
        let error = error.await.expect_err("it ends");
        let CallError::OutOfPatience { tries, ref last, .. } = error else { panic!("{error}") };
        assert_eq!((tries, last.as_str()), (made, "gone fishing"));
        assert!(made > 1 && error.to_string().contains(&format!("{made} tries")), "{error}");
        let impatient = POLICY.patience(Duration::ZERO);
        let error = impatient.run(|| std::future::ready(Err::<Response<()>, _>(Status::unavailable("no")))).await;
        assert!(matches!(error, Err(CallError::OutOfPatience { tries: 1, .. })), "{error:?}");
    }

    #[tokio::test]
    async fn refusals_end_the_call() {
        let refused = |status: Status| async move {
            POLICY.run(|| async { Err::<Response<()>, _>(status.clone()) }).await.expect_err("refused")
        };
        assert!(matches!(refused(Status::not_found("who?")).await, CallError::Gone { .. }));
        assert!(matches!(refused(Status::aborted("run b")).await, CallError::OtherRun { .. }));
        let error = refused(Status::invalid_argument("too many")).await;
        assert_eq!(error.to_string(), "call Test: InvalidArgument: too many");
    }

    #[tokio::test]
    async fn answers_of_a_foreign_service_are_final_unless_it_is_unavailable() {
        for code in [Code::NotFound, Code::Internal, Code::Aborted, Code::DeadlineExceeded] {
            let policy = Policy::of_service("Verify", Duration::from_secs(9)).waits(WAITS[0], WAITS[1]);
            let error = policy.run(|| async { Err::<Response<()>, _>(Status::new(code, "no")) }).await;
            assert!(matches!(error, Err(CallError::Refused { code: found, .. }) if found == code), "{error:?}");
        }
        let mut tries = 0;
        let policy = Policy::of_service("Verify", Duration::from_secs(9)).waits(WAITS[0], WAITS[1]);
        let answer = policy.run(|| {
            tries += 1;
            std::future::ready(if tries == 1 { Err(Status::unavailable("")) } else { Ok(Response::new(tries)) })
        });
        assert_eq!(answer.await.expect("it is back"), 2);
    }
}
