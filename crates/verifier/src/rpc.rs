use std::time::Duration;

use pacs_runtime::Backoff;
use tonic::{Code, Response, Status};

use crate::VerifierError;

/// Why a call has no answer.
#[derive(Debug)]
pub(crate) enum Failed {
    /// The coordinator does not know this worker: it has to register again.
    Unregistered,
    /// Trying again cannot help.
    Refused(VerifierError),
}

/// Calls until there is an answer, each try with a deadline. An outage is logged when it begins and when it is over.
///
/// Tries without end: the caller gives up when the heartbeats do.
pub(crate) async fn call<T>(
    name: &'static str,
    deadline: Duration,
    mut attempt: impl AsyncFnMut() -> Result<Response<T>, Status>,
) -> Result<T, Failed> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    let mut tries = 1u32;
    loop {
        let status = match tokio::time::timeout(deadline, attempt()).await {
            Ok(Ok(response)) => {
                if tries > 1 {
                    tracing::info!(call = name, tries, "the coordinator answers again");
                }
                return Ok(response.into_inner());
            }
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs_f64())),
        };
        match status.code() {
            Code::NotFound => return Err(Failed::Unregistered),
            code if is_transient(code) => {}
            code => {
                let message = status.message().to_owned();
                return Err(Failed::Refused(VerifierError::Refused { call: name, code, message }));
            }
        }
        if tries == 1 {
            tracing::warn!(call = name, %status, "the coordinator does not answer, trying again");
        }
        tries = tries.saturating_add(1);
        tokio::time::sleep(backoff.wait()).await;
    }
}

fn is_transient(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Aborted
            | Code::ResourceExhausted
            | Code::Unknown
            | Code::Internal
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn transient_failures_and_silence_are_tried_again() {
        let mut tries = 0;
        let answer = call("Test", Duration::from_millis(50), async || {
            tries += 1;
            match tries {
                1 => Err(Status::unavailable("restarting")),
                2 => std::future::pending().await,
                _ => Ok(Response::new(tries)),
            }
        });
        assert_eq!(answer.await.expect("answered"), 3);
    }

    #[tokio::test]
    async fn refusals_end_the_call() {
        let refused = |status: Status| async move {
            call::<()>("Test", Duration::from_secs(1), async || Err(status.clone())).await.expect_err("refused")
        };
        assert!(matches!(refused(Status::not_found("who?")).await, Failed::Unregistered));
        let Failed::Refused(error) = refused(Status::invalid_argument("too many")).await else {
            panic!("an invalid argument is final")
        };
        assert_eq!(error.to_string(), "call Test of the coordinator: InvalidArgument: too many");
    }
}
