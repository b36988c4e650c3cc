//! The learner worker: membership, generations and tasks. The trainer runs on a thread of its own.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use pacs_collective::{AbortHandle, Credentials, HostListener};
use pacs_protocol::v1::FailureKind;
use pacs_protocol::v1::complete_task_request::Result as TaskResult;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_runtime::net::{PeerRole, RunChannel, Security, check_role};
use pacs_runtime::trace::{self, TraceContext};
use pacs_runtime::{Exit, JoinError, Link, Membership, PATIENCE, Policy, Shutdown, Stop, Worker, WorkerIdentity, work};
use pacs_spec::JobSpec;
use pacs_torch::tch::Device;
use pacs_types::Role;
use pacs_weights::GroupTransport;
use rustls::pki_types::ServerName;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::intake::{self, IntakeError};
use super::publish::Publisher;
use super::training_thread::{Backend, Done, Job, LearnerThread, ThreadSetup, written};
use crate::checkpoint::WriteOutcome;
use crate::update::TrainBatch;

/// How long one call waits at the coordinator for a generation or a task.
const CALL_WAIT: Duration = Duration::from_secs(5);
const WAIT_MS: u32 = CALL_WAIT.as_millis() as u32;
/// How long a call may take beyond the time it waits at the coordinator.
const CALL_DEADLINE: Duration = Duration::from_secs(60);

const JOIN_GENERATION: Policy = Policy::new("JoinGeneration", CALL_WAIT.saturating_add(CALL_DEADLINE));
const NEXT_TASK: Policy = Policy::new("NextTask", CALL_WAIT.saturating_add(CALL_DEADLINE));
const COMPLETE_TASK: Policy = Policy::new("CompleteTask", CALL_DEADLINE);

/// Options of a learner rank.
#[derive(Clone, Debug)]
pub struct LearnerOptions {
    /// How to reach the coordinator.
    pub link: Link,
    /// Stable name of the process slot, for example `learner-0`. Ranks follow the order of names.
    pub name: String,
    /// Address at which other ranks and rollout workers reach this process; the system chooses the ports.
    pub bind: String,
    /// Whether to compute on CUDA instead of the CPU.
    pub cuda: bool,
    /// Collective backend that carries gradients between ranks.
    pub backend: Backend,
    /// Threads of libtorch; 0 for one per core.
    pub threads: usize,
    /// Transport for broadcasting weights to rollout workers that ask for it; `None` only serves fetches.
    pub broadcast: Option<Arc<dyn GroupTransport>>,
}

/// Why a learner failed.
#[derive(Debug, thiserror::Error)]
pub enum LearnerError {
    /// The learner could not join the run.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The job spec, the device or an address cannot be used.
    #[error("{0}")]
    Config(String),
    /// The training thread did not return from an aborted job in time.
    #[error(
        "the training thread was still at `{activity}` {waited:?} after its learner group was dissolved; look at the disks and \
         the device of this machine"
    )]
    Stuck {
        /// What the thread was doing.
        activity: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A violated invariant of this program.
    #[error("{0}")]
    Bug(String),
}

impl LearnerError {
    /// Returns the process exit code for the error.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Join(error) => error.exit(),
            Self::Config(_) => Exit::Config,
            // Another process may find the device or the disk working again.
            Self::Stuck { .. } => Exit::Again,
            Self::Bug(_) => Exit::Bug,
        }
    }
}

/// Serves the run until the coordinator says that the job is over, or until shutdown is requested.
///
/// # Errors
/// See [`LearnerError`].
pub async fn run(options: LearnerOptions, shutdown: Shutdown) -> Result<Exit, LearnerError> {
    let device =
        pacs_torch::init(options.cuda, options.threads).map_err(|error| LearnerError::Config(error.to_string()))?;
    let listener = HostListener::bind(&format!("{}:0", options.bind))
        .map_err(|error| LearnerError::Config(format!("listen on {}: {error}", options.bind)))?;
    let listener = Arc::new(secured(listener, &options.link.security));
    let identity = WorkerIdentity {
        role: Role::Learner,
        name: options.name.clone(),
        collective_address: listener.address().to_string(),
    };
    let LearnerOptions { link, backend, bind, broadcast, .. } = options;
    let security = link.security.clone();
    let mut learner = Learner { device, backend, listener, bind, security, broadcast, publisher: None };
    work(&link, &identity, &shutdown, &mut learner).await
}

/// What outlives a registration.
struct Learner {
    device: Device,
    backend: Backend,
    listener: Arc<HostListener>,
    /// Address of this machine at which weights are served.
    bind: String,
    security: Security,
    broadcast: Option<Arc<dyn GroupTransport>>,
    /// Opened at the first registration, which names the run.
    publisher: Option<Arc<Publisher>>,
}

impl Worker for Learner {
    type Error = LearnerError;

    async fn serve(&mut self, membership: &Membership) -> Result<Infallible, ServeError> {
        let config = |problem: String| ServeError::Fatal(LearnerError::Config(problem));
        let mut spec: JobSpec =
            toml::from_str(&membership.job_spec).map_err(|error| config(format!("job spec: {error}")))?;
        // The coordinator names its own copy of a model of the hub; this machine may have one elsewhere.
        spec.model.path = pacs_hub::snapshot_here(&spec.model.path).map_err(|error| config(error.to_string()))?;
        let patience = Duration::from_secs(u64::from(spec.watchdog.task_seconds));
        let run_id = membership.run_id.get().unwrap_or_default().to_owned();
        let Self { device, backend, .. } = *self;
        let publisher = match &self.publisher {
            Some(publisher) => Arc::clone(publisher),
            None => {
                let opened = Publisher::new(&run_id, &self.bind, &self.security, self.broadcast.clone());
                let opened = opened.map_err(|error| config(error.to_string()))?;
                Arc::clone(self.publisher.insert(Arc::new(opened)))
            }
        };
        let listener = Arc::clone(&self.listener);
        let thread = LearnerThread::start(ThreadSetup { spec, run_id, device, backend, listener, publisher });
        let client = LearnerServiceClient::new(membership.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let mut rank = Rank { client, worker: membership.worker.0, thread, patience, membership };
        rank.run().await
    }
}

/// Adds mutual authentication to the ring, where processes have certificates: both sides must be learners.
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

impl Drop for Learner {
    fn drop(&mut self) {
        // The training thread may still hold the publisher, so its own drop could come too late.
        if let Some(publisher) = &self.publisher {
            publisher.leave();
        }
    }
}

/// Why serving under a registration stopped.
type ServeError = Stop<LearnerError>;

struct Rank<'a> {
    client: LearnerServiceClient<RunChannel>,
    worker: u64,
    thread: LearnerThread,
    /// How long the thread may take to return from an aborted job: as long as a task may take.
    patience: Duration,
    membership: &'a Membership,
}

impl Rank<'_> {
    async fn run(&mut self) -> Result<Infallible, ServeError> {
        loop {
            let group = self.next_generation().await?;
            let generation = group.generation;
            let rank = group.rank;
            tracing::info!(generation, rank = group.rank, world_size = group.world_size, "learner group formed");
            let activity = "connecting to the other ranks";
            self.activity(activity);
            // Every early exit from this scope unblocks the thread.
            let abort = AbortOnDrop(AbortHandle::new());
            let joined = self.unless_dissolved(generation, &abort, Job::Join(group, abort.0.clone()), activity).await?;
            match joined {
                None => {}
                Some(Done::Joined) => self.serve_generation(generation, rank, &abort).await?,
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
            let reply = JOIN_GENERATION
                .run(|| {
                    let mut client = client.clone();
                    async move { client.join_generation(request).await }
                })
                .await?;
            // No group means "not yet"; the coordinator does the waiting.
            if let Some(group) = reply.group {
                return Ok(group);
            }
        }
    }

    /// Works on tasks until the generation ends.
    async fn serve_generation(&mut self, generation: u64, rank: u32, abort: &AbortOnDrop) -> Result<(), ServeError> {
        // A background write belongs to the generation: nobody asks for it afterwards.
        let mut _writing = None;
        loop {
            let next = self.next_task(generation, false).await?;
            let (job, activity) = match next.task {
                None => continue,
                Some(Task::Regroup(regroup)) => {
                    tracing::warn!(generation, reason = regroup.reason, "the learner group is dissolved");
                    return Ok(());
                }
                Some(Task::Prepare(_)) => (Ok(Job::Prepare), "loading the model".to_owned()),
                Some(Task::Train(task)) => {
                    let activity = format!("training step {}", task.step);
                    match self.receive(generation, next.task_id, rank, &task).await? {
                        Intake::Whole(batch) => (Ok(Job::Train(batch, task.learning_rate)), activity),
                        Intake::Failed(failure) => (Err(failure), activity),
                        Intake::Withdrawn => continue,
                        Intake::Dissolved => return Ok(()),
                    }
                }
                Some(Task::Save(task)) => {
                    let activity = format!("saving step {}", task.step);
                    (Ok(Job::Save(task)), activity)
                }
            };
            self.activity(&activity);
            let step = job.as_ref().ok().and_then(Job::step);
            let context = match step {
                Some(step) => TraceContext::of_step(self.membership.run_id.get().unwrap_or_default(), step),
                None => TraceContext::random(),
            };
            let trace_id = context.trace_id();
            let span = tracing::info_span!("task", %trace_id, generation, task = next.task_id, step);
            let done = match job {
                Ok(job) => {
                    let done = self.unless_dissolved(generation, abort, job, &activity);
                    trace::within(context, span.clone(), done).await?
                }
                Err(failure) => Some(Done::Task(TaskResult::Failed(failure))),
            };
            let (result, outcome) = match done {
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
            let reported = COMPLETE_TASK.run(|| {
                let mut client = client.clone();
                let request = request.clone();
                async move { client.complete_task(request).await }
            });
            trace::within(context, span.clone(), reported).await?;
            self.membership.activity.served();
            if let Some(outcome) = outcome {
                let request = v1::CompleteTaskRequest { result: None, ..request };
                let report = trace::within(context, span, report_written(self.client.clone(), request, outcome));
                _writing = Some(AbortTaskOnDrop(tokio::spawn(report)));
            }
        }
    }

    /// Receives the batch of a task, or stops when the generation is dissolved.
    async fn receive(
        &self,
        generation: u64,
        task_id: u64,
        rank: u32,
        task: &v1::TrainTask,
    ) -> Result<Intake, ServeError> {
        self.activity(&format!("receiving the batch of step {}", task.step));
        let request = v1::StreamBatchRequest { worker_id: self.worker, generation, task_id, ..Default::default() };
        let open = |request| {
            let mut client = self.client.clone();
            async move { client.stream_batch(request).await }
        };
        let received = tokio::select! {
            received = intake::receive(open, request, task, rank, PATIENCE) => received,
            reason = self.dissolved(generation) => {
                let reason = reason?;
                tracing::warn!(generation, reason, "the learner group is dissolved while it receives its batch");
                return Ok(Intake::Dissolved);
            }
        };
        match received {
            Ok(batch) => Ok(Intake::Whole(batch)),
            Err(IntakeError::Withdrawn { .. }) => Ok(Intake::Withdrawn),
            Err(error @ (IntakeError::Unknown | IntakeError::Silent { .. })) => {
                Err(ServeError::Rejoin(error.to_string()))
            }
            // Every rank that asks would receive the same batch.
            Err(error @ (IntakeError::Malformed(_) | IntakeError::TooLarge { .. })) => {
                let kind = FailureKind::Permanent.into();
                Ok(Intake::Failed(v1::TaskFailure { message: error.to_string(), kind }))
            }
        }
    }

    /// Runs a job on the thread. If the generation is dissolved meanwhile, aborts it and returns `None` once the
    /// thread is free.
    ///
    /// A rank whose peer was stopped or cut off does not notice, and waits in an exchange. The coordinator knows from
    /// the peer's heartbeats.
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
                return done.map(Some).ok_or_else(|| bug("the training thread ended without an error"));
            }
            reason = self.dissolved(generation) => reason?,
        };
        tracing::warn!(generation, reason, "the learner group is dissolved in the middle of a task");
        abort.0.abort(format!("the learner group was dissolved: {reason}"));
        // The job fails at its next exchange.
        within(self.patience, activity, running).await?;
        Ok(None)
    }

    /// Waits until the generation is dissolved and returns the reason.
    async fn dissolved(&self, generation: u64) -> Result<String, ServeError> {
        loop {
            if let Some(Task::Regroup(regroup)) = self.next_task(generation, true).await?.task {
                return Ok(regroup.reason);
            }
        }
    }

    /// Asks for the next task, which the coordinator holds back for up to [`CALL_WAIT`]. `busy`: this rank works on one, so only the end
    /// of the generation is of interest.
    async fn next_task(&self, generation: u64, busy: bool) -> Result<v1::NextTaskResponse, ServeError> {
        let request = v1::NextTaskRequest { worker_id: self.worker, generation, wait_ms: WAIT_MS, busy };
        let attempt = || {
            let mut client = self.client.clone();
            async move { client.next_task(request).await }
        };
        Ok(NEXT_TASK.run(attempt).await?)
    }

    fn activity(&self, activity: &str) {
        self.membership.activity.set(activity);
    }
}

/// WriteOutcome of receiving a batch.
enum Intake {
    Whole(TrainBatch),
    /// The batch cannot be trained on.
    Failed(v1::TaskFailure),
    /// The task was replaced meanwhile.
    Withdrawn,
    /// The generation has ended.
    Dissolved,
}

/// Completes `request` with the outcome of a background write, and sends it.
async fn report_written(
    client: LearnerServiceClient<RunChannel>,
    request: v1::CompleteTaskRequest,
    outcome: oneshot::Receiver<WriteOutcome>,
) {
    // The writer ended together with its generation.
    let Ok(outcome) = outcome.await else { return };
    let result = written(outcome);
    if let TaskResult::Failed(failure) = &result {
        tracing::error!(request.generation, kind = ?failure.kind(), "checkpoint not written: {}", failure.message);
    }
    let request = v1::CompleteTaskRequest { result: Some(result), ..request };
    let reported = COMPLETE_TASK
        .run(|| {
            let mut client = client.clone();
            let request = request.clone();
            async move { client.complete_task(request).await }
        })
        .await;
    if let Err(error) = reported {
        // The coordinator has given up the checkpoint, or will after its timeout.
        tracing::warn!("the written checkpoint could not be reported: {error}");
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

/// Waits at most `patience` for the thread to return from an aborted job.
async fn within(patience: Duration, activity: &str, running: impl Future) -> Result<(), ServeError> {
    let stuck = |_| LearnerError::Stuck { activity: activity.to_owned(), waited: patience };
    tokio::time::timeout(patience, running).await.map(drop).map_err(stuck).map_err(ServeError::Fatal)
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
    async fn a_hung_thread_ends_the_process_for_a_restart() {
        let never = within(Duration::from_millis(10), "training step 3", std::future::pending::<()>()).await;
        let Err(ServeError::Fatal(error)) = never else { panic!("it came back") };
        assert_eq!(error.exit(), Exit::Again);
        assert!(error.to_string().contains("still at `training step 3` 10ms after"), "{error}");
        assert!(within(Duration::from_secs(60), "training step 3", async {}).await.is_ok());
    }
}
