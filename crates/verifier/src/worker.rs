use std::convert::Infallible;
use std::path::Path;

use pacs_runtime::{CallError, Exit, Link, Membership, Shutdown, Stop, Worker, WorkerIdentity, work};
use pacs_types::Role;

use crate::VerifierError;
use crate::exec::Entry;
use crate::grading::Grading;
use crate::session::Session;

/// What a verifier worker has to know.
#[derive(Clone, Debug)]
pub struct VerifierOptions {
    /// How the coordinator is reached.
    pub link: Link,
    /// Stable name of the process slot, for example `verifier-0`.
    pub name: String,
    /// Verifications of each verifier that run at once: threads, child processes or calls; 0 counts as 1.
    pub threads: usize,
    /// How programs are guarded that judge (`kind = "exec"`).
    pub guard: Option<Entry>,
}

/// Works until the coordinator dismisses the worker or shutdown is requested.
///
/// # Errors
/// See [`VerifierError`]; a lost registration is no error unless the coordinator stays away.
pub async fn run(options: VerifierOptions, shutdown: Shutdown) -> Result<Exit, VerifierError> {
    let VerifierOptions { link, name, threads, guard } = options;
    let identity = WorkerIdentity { role: Role::Verifier, name, collective_address: String::new() };
    work(&link, &identity, &shutdown, &mut Verifier { threads: threads.max(1), guard, kept: None }).await
}

/// What outlives a lost registration.
struct Verifier {
    threads: usize,
    guard: Option<Entry>,
    kept: Option<Kept>,
}

/// The grading of a job spec: what it remembers, and its child processes.
struct Kept {
    job_spec: String,
    grading: Grading,
}

impl Worker for Verifier {
    type Error = VerifierError;

    async fn serve(&mut self, membership: &Membership) -> Result<Infallible, Stop<VerifierError>> {
        let grading = self.grading(&membership.job_spec).await.map_err(Stop::Fatal)?;
        Err(match Session::new(membership, grading, self.threads).work().await {
            // Another process would be refused alike.
            CallError::Refused { call, code, message } => Stop::Fatal(VerifierError::Refused { call, code, message }),
            error => error.into(),
        })
    }
}

impl Verifier {
    async fn grading(&mut self, job_spec: &str) -> Result<Grading, VerifierError> {
        if let Some(kept) = self.kept.as_ref().filter(|kept| kept.job_spec == job_spec) {
            return Ok(kept.grading.clone());
        }
        // The child processes of another spec end first.
        self.kept = None;
        let spec = pacs_spec::parse(job_spec, Path::new("the coordinator's job spec"))?;
        let grading = Grading::new(&spec, self.guard.as_ref(), self.threads)?;
        grading.prepare().await?;
        self.kept = Some(Kept { job_spec: job_spec.to_owned(), grading: grading.clone() });
        Ok(grading)
    }
}
