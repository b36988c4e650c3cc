//! The worker: membership, leases in, samples out. The engine has a thread of its own.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_runtime::net::RunChannel;
use pacs_runtime::trace::TraceContext;
use pacs_runtime::{Activity, Exit, JoinError, Link, Membership, Policy, Shutdown, Stop, Worker, WorkerIdentity, work};
use pacs_spec::JobSpec;
use pacs_types::{GroupId, NoiseKey, Role, SampleId};
use tokio::sync::{mpsc, watch};

use crate::submit::{Held, Submitting};
use crate::thread::{Command, EngineThread, Setup};
use crate::weights;
use crate::{GroupJob, SamplingOptions};

/// How long one lease call waits for work.
const LEASE_WAIT: Duration = Duration::from_secs(5);
/// How long any call may take beyond its own waiting time.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(20);

const LEASE_GROUPS: Policy = Policy::new("LeaseGroups", LEASE_WAIT.saturating_add(CALL_DEADLINE));

/// How to run a rollout worker.
#[derive(Clone, Debug)]
pub struct RolloutOptions {
    /// How the coordinator is reached.
    pub link: Link,
    /// Stable name of the process slot, for example `rollout-0`.
    pub name: String,
    /// Compute on CUDA instead of the CPU.
    pub cuda: bool,
    /// Threads of libtorch; 0 for one a core.
    pub threads: usize,
}

/// Why a rollout worker ended badly.
#[derive(Debug, thiserror::Error)]
pub enum RolloutError {
    /// It could not become a member of the run.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The job spec or what it names cannot be used.
    #[error("{0}")]
    Config(String),
    /// Generation failed.
    #[error("{0}")]
    Engine(String),
}

impl RolloutError {
    /// The exit code that fits.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Join(error) => error.exit(),
            Self::Config(_) => Exit::Config,
            Self::Engine(_) => Exit::Bug,
        }
    }
}

/// Works until the coordinator says that the job is over, or shutdown is requested.
///
/// A lost registration (a restarted coordinator, a network cut) is followed by a new one; the work in hand is dropped,
/// as the coordinator gives it to somebody else.
///
/// # Errors
/// See [`RolloutError`].
pub async fn run(options: RolloutOptions, shutdown: Shutdown) -> Result<Exit, RolloutError> {
    let identity =
        WorkerIdentity { role: Role::Rollout, name: options.name.clone(), collective_address: String::new() };
    let link = options.link.clone();
    work(&link, &identity, &shutdown, &mut Rollout { options }).await
}

/// What outlives a registration.
struct Rollout {
    options: RolloutOptions,
}

impl Worker for Rollout {
    type Error = RolloutError;

    async fn serve(&mut self, membership: &Membership) -> Result<Infallible, ServeError> {
        serve(&self.options, membership).await
    }
}

/// Why serving under one registration stopped.
pub(crate) type ServeError = Stop<RolloutError>;

async fn serve(options: &RolloutOptions, membership: &Membership) -> Result<Infallible, ServeError> {
    let config = |problem: String| ServeError::Fatal(RolloutError::Config(problem));
    let spec: JobSpec = toml::from_str(&membership.job_spec).map_err(|error| config(format!("job spec: {error}")))?;
    let setup = Setup::read(&spec, options.cuda, options.threads).map_err(|error| config(error.to_string()))?;
    let scratch = Scratch::create().map_err(|error| config(format!("create scratch folder: {error}")))?;
    let rows = setup.options.rows;
    let (thread, outputs) = EngineThread::start(setup);
    let (in_flight_sender, in_flight) = watch::channel(0usize);
    let client = RolloutServiceClient::new(membership.channel.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let (leases_sender, leases) = mpsc::channel(rows.max(1));
    let leasing = Leasing {
        client: client.clone(),
        worker: membership.worker.0,
        rows,
        in_flight: in_flight_sender.clone(),
        changed: in_flight,
        leases: leases_sender,
        commands: thread.commands.clone(),
        scratch: scratch.path.clone(),
        link: options.link.clone(),
        activity: membership.activity.clone(),
    };
    let activity = membership.activity.clone();
    let submit = move |request| {
        let (mut client, activity) = (client.clone(), activity.clone());
        async move { client.submit_sample(request).await.map(|_| activity.served()) }
    };
    let activity = membership.activity.clone();
    let progress = move |in_flight| activity.set(format!("generating {in_flight} samples"));
    let submitting = Submitting::new(
        submit,
        membership.worker.0,
        &membership.run_id,
        in_flight_sender,
        leases,
        thread.commands.clone(),
        progress,
    );
    tokio::select! {
        result = leasing.run() => result,
        result = submitting.run(outputs) => result,
    }
}

/// Asks for groups whenever there is room.
struct Leasing {
    client: RolloutServiceClient<RunChannel>,
    worker: u64,
    rows: usize,
    /// Samples on lease that were not handed in yet.
    in_flight: watch::Sender<usize>,
    changed: watch::Receiver<usize>,
    /// Full when the submitting side has not taken note of the leases yet: waits.
    leases: mpsc::Sender<Held>,
    commands: std::sync::mpsc::Sender<Command>,
    scratch: PathBuf,
    /// How weights are fetched from a learner elsewhere.
    link: Link,
    activity: Activity,
}

impl Leasing {
    async fn run(mut self) -> Result<Infallible, ServeError> {
        // The same number until there is an answer, so that leases whose answer was lost are given again.
        let mut number = 1;
        loop {
            let rows = self.rows;
            let in_flight = *self
                .changed
                .wait_for(|in_flight| *in_flight < rows)
                .await
                .map_err(|_| ServeError::Rejoin("the submitting side ended".into()))?;
            if in_flight == 0 {
                self.activity.set("waiting for groups");
            }
            let request = v1::LeaseGroupsRequest {
                worker_id: self.worker,
                free_samples: (rows - in_flight) as u32,
                wait_ms: LEASE_WAIT.as_millis() as u32,
                request: number,
            };
            let call = || {
                let mut client = self.client.clone();
                async move { client.lease_groups(request).await }
            };
            let reply = LEASE_GROUPS.run(call).await?;
            number += 1;
            for lease in reply.groups {
                self.start(lease).await?;
            }
        }
    }

    async fn start(&mut self, lease: v1::GroupLease) -> Result<(), ServeError> {
        let bad = |problem: &str| ServeError::Rejoin(format!("lease {} is malformed: {problem}", lease.lease_id));
        let sampling = lease.sampling.clone().ok_or_else(|| bad("no sampling options"))?;
        let reference = lease.weights.clone().ok_or_else(|| bad("no weights"))?;
        let path = weights::ensure_local(&reference, &self.scratch, &self.link)
            .await
            .map_err(|error| ServeError::Rejoin(error.to_string()))?;
        let key = |wanted: &v1::WantedSample| {
            let sample = SampleId { group: GroupId(lease.group_id), index: wanted.index };
            (wanted.index, NoiseKey::new(sampling.seed, sampling.stream, sample).attempt(wanted.attempt))
        };
        let job = GroupJob {
            ticket: lease.lease_id,
            prompt: lease.prompt_tokens,
            samples: lease.samples.iter().map(key).collect(),
            options: SamplingOptions {
                temperature: f64::from(sampling.temperature),
                top_p: f64::from(sampling.top_p),
                top_k: sampling.top_k,
                min_p: f64::from(sampling.min_p),
                max_new_tokens: sampling.max_new_tokens,
                stop: sampling.stop,
            },
        };
        let samples = job.samples.len();
        let trace_id = TraceContext::of_group(self.link.run_id.get().unwrap_or_default(), lease.group_id).trace_id();
        tracing::debug!(%trace_id, group = lease.group_id, lease = lease.lease_id, samples, "group leased");
        self.in_flight.send_modify(|in_flight| *in_flight += samples);
        let held = Held { lease: lease.lease_id, group: lease.group_id, samples_left: samples };
        let gone = |_| ServeError::Rejoin("the submitting side ended".into());
        self.leases.send(held).await.map_err(gone)?;
        self.commands
            .send(Command::Generate { job, weights: Arc::new((reference, path)) })
            .map_err(|_| ServeError::Rejoin("the engine ended".into()))
    }
}

/// A folder for fetched weights, removed with the registration.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn create() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("pacs-rollout-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: what is left is a file in the temporary folder.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
