//! The one way in which processes of a run call each other: every try has a deadline, tries are repeated with jittered
//! back-off, one table says what is worth another try, and patience ends.
//!
//! A repeated call must be harmless, and all calls of `proto/pacs/v1` are: requests are numbered or name their lease,
//! and a second hand-in counts once.

use std::time::Duration;

use tokio::time::Instant;
use tonic::{Code, Response, Status};

use crate::Backoff;
use crate::trace::{self, TraceContext};

/// How long a coordinator may be away before the registration is given up: one that was killed is back by then, and knows
/// its workers and their leases.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Metadata key, on the refusal of a call because the run's disk is full: it is put right by people, so no patience ends
/// meanwhile.
pub const NO_ROOM_KEY: &str = "pacs-no-room";

/// Whether a call was refused for want of room.
pub(crate) fn waits_for_room(status: &Status) -> bool {
    status.metadata().contains_key(NO_ROOM_KEY)
}

/// A call that has failed for this long is worth a line in the log; shorter outages are a line when they are over.
const QUIET: Duration = Duration::from_secs(10);

/// How long before its limit a foreign service is called for the last time.
const LAST_TRY_BEFORE_LIMIT: Duration = Duration::from_millis(100);

/// What a failed call means for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// The next try may succeed.
    TryAgain,
    /// The worker is not a member: it has to register again.
    Gone,
    /// Another run, or another start of the job, listens there: the own one has to be looked for.
    OtherRun,
    /// The answer will be the same the next time.
    Refused,
}

/// The table: what each status code means.
#[must_use]
pub fn meaning(code: Code) -> Meaning {
    match code {
        // The connection is down, or the server is starting or ending.
        Code::Unavailable
        // No answer in time, by our own clock or by that of a proxy between.
        | Code::DeadlineExceeded
        // The stream was reset in the middle.
        | Code::Cancelled
        // What tonic makes of a connection that broke while the answer was read.
        | Code::Unknown
        // What tonic makes of an HTTP/2 error. A bug of the server ends with the patience, too.
        | Code::Internal
        // The server takes no more at the moment. A message that is too large is OUT_OF_RANGE.
        | Code::ResourceExhausted => Meaning::TryAgain,
        // The coordinator does not know the worker: it lapsed, or the journal is gone.
        Code::NotFound => Meaning::Gone,
        // Said by guards and by registration alone.
        Code::Aborted => Meaning::OtherRun,
        // The request itself is wrong: malformed, stale, of the wrong role, too large, or unknown to this program version.
        Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::Unimplemented
        | Code::DataLoss
        // No failure at all: a server that says so is broken.
        | Code::Ok => Meaning::Refused,
    }
}

fn meaning_of_service(code: Code) -> Meaning {
    if code == Code::Unavailable { Meaning::TryAgain } else { Meaning::Refused }
}

/// Why a call has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CallError {
    /// The worker has to register again.
    #[error("call {call}: the coordinator does not know this worker")]
    Gone {
        /// Name of the call.
        call: &'static str,
    },
    /// The worker has to look for its own run.
    #[error("call {call}: {message}")]
    OtherRun {
        /// Name of the call.
        call: &'static str,
        /// What was said instead of an answer.
        message: String,
    },
    /// Trying again cannot help.
    #[error("call {call}: {code:?}: {message}")]
    Refused {
        /// Name of the call.
        call: &'static str,
        /// Status code of the refusal.
        code: Code,
        /// What was said.
        message: String,
    },
    /// It was tried for long enough.
    #[error("call {call}: no answer in {} s and {tries} tries: {last}", waited.as_secs())]
    OutOfPatience {
        /// Name of the call.
        call: &'static str,
        /// For how long it was tried.
        waited: Duration,
        /// How often.
        tries: u32,
        /// The last failure.
        last: String,
    },
}

/// How a call is made.
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
    /// The policy of `call`, one try of which may take `deadline`, its own waiting included.
    #[must_use]
    pub const fn new(call: &'static str, deadline: Duration) -> Self {
        let (first_wait, longest_wait) = (Duration::from_millis(100), Duration::from_secs(5));
        Self { call, deadline, patience: PATIENCE, first_wait, longest_wait, meaning }
    }

    /// The policy of a call to a service that is none of the project's, which has `limit` for all tries together. Only
    /// UNAVAILABLE is tried again: any other code is the service's answer, and a second call may not be harmless.
    #[must_use]
    pub const fn of_service(call: &'static str, limit: Duration) -> Self {
        // The last try comes before the limit: its refusal says more than that time ran out.
        let policy = Self::new(call, limit).patience(limit.saturating_sub(LAST_TRY_BEFORE_LIMIT));
        Self { meaning: meaning_of_service, ..policy }
    }

    /// The same with another end: no try begins later than `patience` after the first.
    #[must_use]
    pub const fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The same with other waits between tries: `first` at the beginning, `longest` in the end.
    #[must_use]
    pub const fn waits(mut self, first: Duration, longest: Duration) -> Self {
        (self.first_wait, self.longest_wait) = (first, longest);
        self
    }

    /// Calls until there is an answer, or a reason to make no other try.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn run<T, F>(self, attempt: impl FnMut() -> F) -> Result<T, CallError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        // Tries of one call stand in one span of the trace that is worked for, or else in a trace of their own.
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

    /// The tries of something that is more than one call.
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

/// Tries of one thing, with waits between them and an end.
#[derive(Debug)]
pub struct Tries {
    started: Instant,
    patience: Duration,
    backoff: Backoff,
    made: u32,
    warned: bool,
}

impl Tries {
    /// Waits after a failed try. Returns whether there is another one; the last comes when patience is over.
    pub async fn again(&mut self, what: &str, problem: &(dyn std::fmt::Display + Sync)) -> bool {
        let waited = self.waited();
        if waited >= self.patience {
            return false;
        }
        let wait = self.backoff.wait().min(self.patience - waited);
        tracing::debug!(what, tries = self.made, "failed, and is tried again: {problem}");
        if waited >= QUIET && !self.warned {
            self.warned = true;
            let left = (self.patience - waited).as_secs();
            tracing::warn!(what, tries = self.made, "no success for {} s, {left} s to go: {problem}", waited.as_secs());
        }
        self.made = self.made.saturating_add(1);
        tokio::time::sleep(wait).await;
        true
    }

    /// Makes sure that there is patience for `longer` from now on.
    pub fn extend(&mut self, longer: Duration) {
        self.patience = self.patience.max(self.waited() + longer);
    }

    /// Time since the first try began.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.started.elapsed()
    }

    /// Time until patience is over.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.patience.saturating_sub(self.waited())
    }

    /// Tries so far, the one that runs included.
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
    fn the_table_says_what_is_worth_another_try() {
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
    async fn failures_that_may_pass_and_silence_are_tried_again() {
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
    async fn patience_ends_and_says_how_often_it_was_tried() {
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
    async fn what_a_foreign_service_answers_is_final_unless_it_is_away() {
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
