use std::path::Path;
use std::time::{Duration, Instant};

use pacs_runtime::{Backoff, Ended, Exit, JoinError, Link, Membership, Shutdown, WorkerIdentity};
use pacs_types::Role;

use crate::VerifierError;
use crate::grading::Grading;
use crate::rpc::Failed;
use crate::session::Session;

/// How long a coordinator that accepted the connection may take to answer a registration.
const REGISTER_DEADLINE: Duration = Duration::from_secs(10);

/// A membership that lasted this long was a good one: after its loss the waiting times start small again.
const SETTLED: Duration = Duration::from_secs(30);

/// What a verifier worker has to know.
#[derive(Clone, Debug)]
pub struct VerifierOptions {
    /// How the coordinator is reached.
    pub link: Link,
    /// Stable name of the process slot, for example `verifier-0`.
    pub name: String,
    /// Verifications of each verifier that run at once: threads, child processes or calls; 0 counts as 1.
    pub threads: usize,
}

/// Works until the coordinator dismisses the worker or shutdown is requested.
///
/// # Errors
/// See [`VerifierError`]; a lost registration is no error unless the coordinator stays away.
pub async fn run(options: VerifierOptions, shutdown: Shutdown) -> Result<Exit, VerifierError> {
    let mut backoff = rejoin_backoff();
    let mut is_rejoin = false;
    let mut kept = None;
    loop {
        let joined = tokio::select! {
            joined = join(&options, is_rejoin) => joined?,
            () = shutdown.requested() => return Ok(Exit::Again),
        };
        let since = Instant::now();
        match serve(joined, &options, &shutdown, &mut kept).await? {
            Served::Over(exit) => return Ok(exit),
            Served::Lost => is_rejoin = true,
        }
        if since.elapsed() >= SETTLED {
            backoff = rejoin_backoff();
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.wait()) => {}
            () = shutdown.requested() => return Ok(Exit::Again),
        }
    }
}

fn rejoin_backoff() -> Backoff {
    Backoff::new(Duration::from_millis(100), Duration::from_secs(5))
}

/// Registers within the join timeout. A refusal is final at the start; later it may come from a coordinator that is
/// just starting again, so the registration is tried until the time is over.
async fn join(options: &VerifierOptions, is_rejoin: bool) -> Result<Membership, JoinError> {
    let identity =
        WorkerIdentity { role: Role::Verifier, name: options.name.clone(), collective_address: String::new() };
    let started = Instant::now();
    let mut backoff = rejoin_backoff();
    loop {
        let left = options.link.join_timeout.saturating_sub(started.elapsed());
        let link = Link { join_timeout: left, ..options.link.clone() };
        let joining = Membership::join(&link, &identity);
        let error = match tokio::time::timeout(left + REGISTER_DEADLINE, joining).await {
            Ok(Ok(membership)) => {
                tracing::info!(worker = %membership.worker, coordinator = options.link.coordinator, "joined the run");
                return Ok(membership);
            }
            Ok(Err(error)) => error,
            Err(_) => JoinError::Unreachable {
                address: options.link.coordinator.clone(),
                waited: started.elapsed(),
                last: "it accepted the connection but does not answer".to_owned(),
            },
        };
        let may_pass = is_rejoin && matches!(error, JoinError::Refused(_));
        if !may_pass || started.elapsed() >= options.link.join_timeout {
            return Err(error);
        }
        tokio::time::sleep(backoff.wait()).await;
    }
}

/// How a membership ended, when not by an error.
enum Served {
    /// The worker is to leave, and how.
    Over(Exit),
    /// The registration is gone, but the job is not.
    Lost,
}

/// The grading of a job spec: what it remembers and its child processes outlive a lost registration.
struct Kept {
    job_spec: String,
    grading: Grading,
}

async fn serve(
    membership: Membership,
    options: &VerifierOptions,
    shutdown: &Shutdown,
    kept: &mut Option<Kept>,
) -> Result<Served, VerifierError> {
    let threads = options.threads.max(1);
    let grading = match kept.take().filter(|kept| kept.job_spec == membership.job_spec) {
        Some(kept) => kept.grading,
        None => match new_grading(&membership.job_spec, threads) {
            Ok(grading) => grading,
            Err(error) => return fail(membership, error).await,
        },
    };
    *kept = Some(Kept { job_spec: membership.job_spec.clone(), grading: grading.clone() });
    let session = Session::new(&membership, grading, threads);
    let ended = membership.run_until_ended(shutdown, session.work()).await;
    match ended {
        Ended::Work(Failed::Refused(error)) => fail(membership, error).await,
        Ended::Work(Failed::Unregistered) | Ended::Lost => {
            tracing::warn!(worker = %membership.worker, "the registration is lost, joining again");
            membership.leave(None).await;
            Ok(Served::Lost)
        }
        Ended::Leave(exit) => {
            membership.leave(None).await;
            Ok(Served::Over(exit))
        }
    }
}

fn new_grading(job_spec: &str, threads: usize) -> Result<Grading, VerifierError> {
    let spec = pacs_spec::parse(job_spec, Path::new("the coordinator's job spec"))?;
    Grading::new(&spec, threads)
}

async fn fail(membership: Membership, error: VerifierError) -> Result<Served, VerifierError> {
    membership.leave(Some(error.to_string())).await;
    Err(error)
}
