//! The worker: membership, generations, tasks. The trainer has a thread of its own.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use pacs_collective::{AbortHandle, Credentials, HostListener};
use pacs_protocol::v1::FailureKind;
use pacs_protocol::v1::complete_task_request::Result as TaskResult;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_runtime::net::{PeerRole, Security, check_role};
use pacs_runtime::{Backoff, Ended, Exit, JoinError, Link, Membership, Shutdown, WorkerIdentity};
use pacs_spec::JobSpec;
use pacs_torch::tch::Device;
use pacs_types::Role;
use pacs_weights::run_tag;
use rustls::pki_types::ServerName;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::publish::Publisher;
use crate::thread::{Backend, Done, Job, LearnerThread, ThreadSetup, written};
use crate::writer::Outcome;

/// How long one call waits for a generation or a task.
const CALL_WAIT: Duration = Duration::from_secs(5);
const WAIT_MS: u32 = CALL_WAIT.as_millis() as u32;
/// How long a call may take beyond its own waiting time (a batch of long answers is a large message).
const CALL_DEADLINE: Duration = Duration::from_secs(60);
/// How long the coordinator may fail to answer before the registration is given up.
const PATIENCE: Duration = Duration::from_secs(120);

/// How to run a learner rank.
#[derive(Clone, Debug)]
pub struct LearnerOptions {
    /// How the coordinator is reached.
    pub link: Link,
    /// Stable name of the process slot, for example `learner-0`; ranks are given in the order of names.
    pub name: String,
    /// Address that other ranks and rollout workers reach this process at; ports are chosen freely.
    pub bind: String,
    /// Compute on CUDA instead of the CPU.
    pub cuda: bool,
    /// What carries gradients between ranks.
    pub backend: Backend,
    /// Threads of libtorch; 0 for one a core.
    pub threads: usize,
}

/// Why a learner ended badly.
#[derive(Debug, thiserror::Error)]
pub enum LearnerError {
    /// It could not become a member of the run.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The job spec, the device or an address cannot be used.
    #[error("{0}")]
    Config(String),
    /// The training thread does not come back from what it was doing.
    #[error(
        "the training thread was still at `{activity}` {waited:?} after its learner group was dissolved; look at the disks and \
         the device of this machine"
    )]
    Stuck {
        /// What it was asked to do.
        activity: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// Something that nobody foresaw.
    #[error("{0}")]
    Bug(String),
}

impl LearnerError {
    /// The exit code that fits.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Join(error) => error.exit(),
            Self::Config(_) => Exit::Config,
            // Another process may find the device or the disk well again.
            Self::Stuck { .. } => Exit::Again,
            Self::Bug(_) => Exit::Bug,
        }
    }
}

/// Works until the coordinator says that the job is over, or shutdown is requested.
///
/// # Errors
/// See [`LearnerError`].
pub async fn run(options: LearnerOptions, shutdown: Shutdown) -> Result<Exit, LearnerError> {
    let device =
        pacs_torch::init(options.cuda, options.threads).map_err(|error| LearnerError::Config(error.to_string()))?;
    let listener = HostListener::bind(&format!("{}:0", options.bind))
        .map_err(|error| LearnerError::Config(format!("listen on {}: {error}", options.bind)))?;
    let listener = Arc::new(secured(listener, &options.link.security));
    // Made with the first registration, which says what run this is, and kept as long as the process lives.
    let mut publisher = LeaveOnDrop(None);
    let identity = WorkerIdentity {
        role: Role::Learner,
        name: options.name.clone(),
        collective_address: listener.address().to_string(),
    };
    loop {
        let membership = Membership::join(&options.link, &identity).await?;
        tracing::info!(worker = %membership.worker, "joined");
        let publisher = match &publisher.0 {
            Some(publisher) => Arc::clone(publisher),
            None => Arc::clone(publisher.0.insert(Arc::new(start_publisher(&options, &membership)?))),
        };
        let work = serve(device, options.backend, &listener, &publisher, &membership);
        match membership.run_until_ended(&shutdown, work).await {
            Ended::Work(Err(ServeError::Fatal(error))) => {
                membership.leave(Some(error.to_string())).await;
                return Err(error);
            }
            Ended::Work(Err(ServeError::Rejoin(reason))) => {
                tracing::warn!(reason, "joining again");
                membership.leave(Some(reason)).await;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Ended::Work(Ok(never)) => match never {},
            Ended::Lost => tracing::warn!("registration lost, joining again"),
            Ended::Leave(exit) => {
                membership.leave(None).await;
                return Ok(exit);
            }
        }
    }
}

/// Has ranks show each other that they are learners, where processes have certificates.
fn secured(listener: HostListener, security: &Security) -> HostListener {
    if matches!(security, Security::Plain) {
        return listener;
    }
    let security = security.clone();
    listener.with_credentials(Arc::new(move || {
        let (client, server) = security.rustls().expect("it is not plain");
        let name = ServerName::try_from(PeerRole::Learner.dns_name()).expect("the names of roles are DNS names");
        Credentials { client, server, name, judge: |certificate| check_role(certificate, PeerRole::Learner) }
    }))
}

/// Removes what was published, whatever the training thread still does that holds the publisher, too.
struct LeaveOnDrop(Option<Arc<Publisher>>);

impl Drop for LeaveOnDrop {
    fn drop(&mut self) {
        if let Some(publisher) = &self.0 {
            publisher.leave();
        }
    }
}

/// Opens the store of the run, and hands out what is published.
fn start_publisher(options: &LearnerOptions, membership: &Membership) -> Result<Publisher, LearnerError> {
    let run = run_tag(&std::env::var("PACS_RUN_ID").unwrap_or_default(), &membership.run_dir);
    Publisher::new(&run, &options.bind, &options.link.security).map_err(|error| LearnerError::Config(error.to_string()))
}

/// Why serving under one registration stopped.
enum ServeError {
    /// The worker cannot go on at all.
    Fatal(LearnerError),
    /// This registration cannot go on: another one starts afresh.
    Rejoin(String),
}

enum Never {}

async fn serve(
    device: Device,
    backend: Backend,
    listener: &Arc<HostListener>,
    publisher: &Arc<Publisher>,
    membership: &Membership,
) -> Result<Never, ServeError> {
    let config = |problem: String| ServeError::Fatal(LearnerError::Config(problem));
    let spec: JobSpec = toml::from_str(&membership.job_spec).map_err(|error| config(format!("job spec: {error}")))?;
    let patience = Duration::from_secs(u64::from(spec.watchdog.task_seconds));
    let (listener, publisher) = (Arc::clone(listener), Arc::clone(publisher));
    let thread = LearnerThread::start(ThreadSetup { spec, device, backend, listener, publisher });
    let client = LearnerServiceClient::new(membership.channel.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let mut rank = Rank { client, worker: membership.worker.0, thread, patience, membership };
    rank.run().await
}

struct Rank<'a> {
    client: LearnerServiceClient<Channel>,
    worker: u64,
    thread: LearnerThread,
    /// How long the thread may take to come back from a job that nobody wants any more: as long as a task may take.
    patience: Duration,
    membership: &'a Membership,
}

impl Rank<'_> {
    async fn run(&mut self) -> Result<Never, ServeError> {
        loop {
            let group = self.next_generation().await?;
            let generation = group.generation;
            tracing::info!(generation, rank = group.rank, world_size = group.world_size, "learner group formed");
            let activity = "connecting to the other ranks";
            self.activity(activity);
            // Whatever ends this scope early unblocks the thread.
            let abort = AbortOnDrop(AbortHandle::new());
            let joined = self.unless_dissolved(generation, &abort, Job::Join(group, abort.0.clone()), activity).await?;
            match joined {
                None => {}
                Some(Done::Joined) => self.serve_generation(generation, &abort).await?,
                Some(Done::Task(TaskResult::Failed(failure))) if failure.kind() == FailureKind::Permanent => {
                    return Err(ServeError::Fatal(LearnerError::Config(failure.message)));
                }
                Some(Done::Task(TaskResult::Failed(failure))) => return Err(ServeError::Rejoin(failure.message)),
                Some(Done::Task(_) | Done::Captured(_)) => return Err(bug("joining gave the result of a task")),
            }
        }
    }

    async fn next_generation(&mut self) -> Result<v1::LearnerGroup, ServeError> {
        self.activity("waiting for the learner group");
        loop {
            let request = v1::JoinGenerationRequest { worker_id: self.worker, wait_ms: WAIT_MS };
            let client = self.client.clone();
            let reply = patiently("asking for the learner group", || {
                let mut client = client.clone();
                async move { client.join_generation(request).await }
            })
            .await?;
            // No group means "not yet": the waiting happens at the coordinator.
            if let Some(group) = reply.group {
                return Ok(group);
            }
        }
    }

    /// Works on tasks until the generation is over.
    async fn serve_generation(&mut self, generation: u64, abort: &AbortOnDrop) -> Result<(), ServeError> {
        // What is written beside training belongs to the generation: nobody asks for it behind its end.
        let mut _writing = None;
        loop {
            let request = v1::NextTaskRequest { worker_id: self.worker, generation, wait_ms: WAIT_MS, busy: false };
            let client = self.client.clone();
            let next = patiently("asking for a task", || {
                let mut client = client.clone();
                async move { client.next_task(request).await }
            })
            .await?;
            let (job, activity) = match next.task {
                None => continue,
                Some(Task::Regroup(regroup)) => {
                    tracing::warn!(generation, reason = regroup.reason, "the learner group is dissolved");
                    return Ok(());
                }
                Some(Task::Prepare(_)) => (Job::Prepare, "loading the model".to_owned()),
                Some(Task::Train(task)) => {
                    let activity = format!("training step {}", task.step);
                    (Job::Train(task), activity)
                }
                Some(Task::Save(task)) => {
                    let activity = format!("saving step {}", task.step);
                    (Job::Save(task), activity)
                }
            };
            self.activity(&activity);
            let (result, outcome) = match self.unless_dissolved(generation, abort, job, &activity).await? {
                None => return Ok(()),
                Some(Done::Task(result)) => (result, None),
                Some(Done::Captured(outcome)) => (TaskResult::Captured(v1::CaptureResult {}), Some(outcome)),
                Some(Done::Joined) => return Err(bug("a task formed a communicator")),
            };
            if let TaskResult::Failed(failure) = &result {
                tracing::error!(generation, kind = ?failure.kind(), "task failed: {}", failure.message);
            }
            self.activity("waiting for samples");
            let request = v1::CompleteTaskRequest {
                worker_id: self.worker,
                generation,
                task_id: next.task_id,
                result: Some(result),
            };
            let client = self.client.clone();
            patiently("reporting a task", || {
                let (mut client, request) = (client.clone(), request.clone());
                async move { client.complete_task(request).await }
            })
            .await?;
            if let Some(outcome) = outcome {
                let request = v1::CompleteTaskRequest { result: None, ..request };
                _writing = Some(AbortTaskOnDrop(tokio::spawn(report_written(self.client.clone(), request, outcome))));
            }
        }
    }

    /// Does a job, unless the generation is dissolved meanwhile: then `None`, once the thread is free again.
    ///
    /// A rank that lost a peer without noticing (it was stopped, or its network is gone) waits in an exchange; the
    /// coordinator knows by the peer's heartbeats.
    async fn unless_dissolved(
        &self,
        generation: u64,
        abort: &AbortOnDrop,
        job: Job,
        activity: &str,
    ) -> Result<Option<Done>, ServeError> {
        let mut running = pin!(self.thread.run(job));
        let reason = tokio::select! {
            done = &mut running => {
                return done.map(Some).ok_or_else(|| bug("the training thread ended without a word"));
            }
            reason = self.dissolved(generation) => reason?,
        };
        tracing::warn!(generation, reason, "the learner group is dissolved in the middle of a task");
        abort.0.abort(format!("the learner group was dissolved: {reason}"));
        // It ends with its next exchange.
        within(self.patience, activity, running).await?;
        Ok(None)
    }

    /// Returns the reason when the generation is over.
    async fn dissolved(&self, generation: u64) -> Result<String, ServeError> {
        loop {
            let request = v1::NextTaskRequest { worker_id: self.worker, generation, wait_ms: WAIT_MS, busy: true };
            let client = self.client.clone();
            let next = patiently("asking for a task", || {
                let mut client = client.clone();
                async move { client.next_task(request).await }
            })
            .await?;
            if let Some(Task::Regroup(regroup)) = next.task {
                return Ok(regroup.reason);
            }
        }
    }

    fn activity(&self, activity: &str) {
        self.membership.activity.set(activity);
    }
}

/// Reports `request` with the outcome of a write, once there is one.
async fn report_written(
    client: LearnerServiceClient<Channel>,
    request: v1::CompleteTaskRequest,
    outcome: oneshot::Receiver<Outcome>,
) {
    // The writer is gone with the generation.
    let Ok(outcome) = outcome.await else { return };
    let result = written(outcome);
    if let TaskResult::Failed(failure) = &result {
        tracing::error!(request.generation, kind = ?failure.kind(), "checkpoint not written: {}", failure.message);
    }
    let request = v1::CompleteTaskRequest { result: Some(result), ..request };
    let reported = patiently("reporting a written checkpoint", || {
        let (mut client, request) = (client.clone(), request.clone());
        async move { client.complete_task(request).await }
    })
    .await;
    if let Err(ServeError::Rejoin(reason)) = reported {
        // The coordinator has given the checkpoint up, or will when it hears nothing.
        tracing::warn!(reason, "the written checkpoint could not be reported");
    }
}

struct AbortTaskOnDrop(JoinHandle<()>);

impl Drop for AbortTaskOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn bug(problem: &str) -> ServeError {
    ServeError::Fatal(LearnerError::Bug(problem.to_owned()))
}

/// Waits for the thread to come back from a job that was aborted, for no longer than `patience`.
async fn within(patience: Duration, activity: &str, running: impl Future) -> Result<(), ServeError> {
    let stuck = |_| LearnerError::Stuck { activity: activity.to_owned(), waited: patience };
    tokio::time::timeout(patience, running).await.map(drop).map_err(stuck).map_err(ServeError::Fatal)
}

/// Makes a call, again and again while the coordinator cannot be reached, for as long as [`PATIENCE`] lasts.
async fn patiently<T, F>(doing: &str, call: impl Fn() -> F) -> Result<T, ServeError>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let started = std::time::Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    loop {
        let problem = match tokio::time::timeout(CALL_WAIT + CALL_DEADLINE, call()).await {
            Ok(Ok(reply)) => return Ok(reply.into_inner()),
            Ok(Err(status)) => match status.code() {
                Code::NotFound => return Err(ServeError::Rejoin("the coordinator does not know this worker".into())),
                Code::FailedPrecondition | Code::InvalidArgument => {
                    return Err(ServeError::Rejoin(status.message().to_owned()));
                }
                _ => status.message().to_owned(),
            },
            Err(_) => format!("no answer within {} s", (CALL_WAIT + CALL_DEADLINE).as_secs()),
        };
        if started.elapsed() > PATIENCE {
            let waited = started.elapsed().as_secs();
            return Err(ServeError::Rejoin(format!(
                "{doing}: the coordinator has not answered for {waited} s: {problem}"
            )));
        }
        tokio::time::sleep(backoff.wait()).await;
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort("the registration or the generation ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_thread_that_does_not_come_back_ends_the_process_to_be_started_again() {
        let never = within(Duration::from_millis(10), "training step 3", std::future::pending::<()>()).await;
        let Err(ServeError::Fatal(error)) = never else { panic!("it came back") };
        assert_eq!(error.exit(), Exit::Again);
        assert!(error.to_string().contains("still at `training step 3` 10ms after"), "{error}");
        assert!(within(Duration::from_secs(60), "training step 3", async {}).await.is_ok());
    }
}
