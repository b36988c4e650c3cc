use std::sync::Arc;
use std::time::{Duration, Instant};

use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_types::{Role, WorkerId};
use tokio::sync::watch;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::{Backoff, Shutdown};

/// How long one heartbeat may take before it counts as missed.
const HEARTBEAT_DEADLINE: Duration = Duration::from_secs(5);

/// How long one registration may take.
const REGISTER_DEADLINE: Duration = Duration::from_secs(10);

/// Why a worker is not, or no longer, a member of the run.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The address cannot be used.
    #[error("coordinator address `{address}` is not host:port")]
    Address {
        /// As given.
        address: String,
    },
    /// Nobody answered in time.
    #[error("no coordinator answered at {address} within {} s: {last}", waited.as_secs())]
    Unreachable {
        /// Where.
        address: String,
        /// For how long it was tried.
        waited: Duration,
        /// The last failure.
        last: String,
    },
    /// The coordinator does not want this worker.
    #[error("the coordinator refused the registration: {0}")]
    Refused(String),
}

/// Connects to the coordinator at `address` (host:port), trying again with back-off until `deadline` has passed.
///
/// # Errors
/// [`JoinError::Address`] at once, [`JoinError::Unreachable`] when the deadline has passed.
pub async fn connect(address: &str, deadline: Duration) -> Result<Channel, JoinError> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| JoinError::Address { address: address.to_owned() })?
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(20))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(Some(4 << 20))
        .initial_connection_window_size(Some(16 << 20));
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        match endpoint.connect().await {
            Ok(channel) => return Ok(channel),
            Err(error) if started.elapsed() >= deadline => {
                let last = error_chain(&error);
                return Err(JoinError::Unreachable { address: address.to_owned(), waited: started.elapsed(), last });
            }
            Err(_) => tokio::time::sleep(backoff.wait()).await,
        }
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// What a worker says of itself when it registers.
#[derive(Clone, Debug)]
pub struct WorkerIdentity {
    /// What it does.
    pub role: Role,
    /// Stable name of the process slot, for example `rollout-0`.
    pub name: String,
    /// Learners: where other ranks reach its collective. Empty otherwise.
    pub collective_address: String,
}

/// What the worker is doing, for the status page. Clones share the value.
#[derive(Clone, Debug)]
pub struct Activity(Arc<watch::Sender<String>>);

impl Activity {
    fn new() -> Self {
        Self(Arc::new(watch::Sender::new("starting".to_owned())))
    }

    /// Replaces the value; sent with the next heartbeat.
    pub fn set(&self, activity: impl Into<String>) {
        self.0.send_replace(activity.into());
    }
}

/// Registration with the coordinator, kept alive by heartbeats until it is dropped or ends.
#[derive(Debug)]
pub struct Membership {
    /// The identifier of this registration.
    pub worker: WorkerId,
    /// The resolved job spec (TOML).
    pub job_spec: String,
    /// The run folder on the coordinator's machine.
    pub run_dir: String,
    /// The connection, for the services of the role.
    pub channel: Channel,
    /// What the worker does now.
    pub activity: Activity,
    ended: watch::Receiver<Option<End>>,
    heartbeats: tokio::task::JoinHandle<()>,
}

/// Why a membership ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The coordinator said: leave.
    Leave,
    /// The registration is unknown or the coordinator cannot be reached.
    Lost,
}

impl Membership {
    /// Connects, registers, and starts the heartbeats.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub async fn join(address: &str, identity: &WorkerIdentity, deadline: Duration) -> Result<Self, JoinError> {
        let started = Instant::now();
        let channel = connect(address, deadline).await?;
        let client = WorkerServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let request = v1::RegisterRequest {
            role: v1::Role::from(identity.role).into(),
            name: identity.name.clone(),
            host: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            collective_address: identity.collective_address.clone(),
        };
        let registered = register(&client, request, address, started, deadline).await?;
        let activity = Activity::new();
        let (end, ended) = watch::channel(None);
        let interval = Duration::from_millis(u64::from(registered.heartbeat_interval_ms.max(10)));
        let worker = WorkerId(registered.worker_id);
        let heartbeats = tokio::spawn(beat(client, worker, interval, activity.clone(), end));
        Ok(Self {
            worker,
            job_spec: registered.job_spec,
            run_dir: registered.run_dir,
            channel,
            activity,
            ended,
            heartbeats,
        })
    }

    /// Waits until the coordinator has told the worker to leave (true) or the registration is lost (false).
    pub async fn ended(&self) -> bool {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(end) => *end == Some(End::Leave),
            Err(_) => false,
        }
    }

    /// Runs `work` until it is done, the membership ends, or shutdown is requested.
    ///
    /// Returns what ended it: the result of the work, or which of the other two.
    pub async fn run_until_ended<T>(&self, shutdown: &Shutdown, work: impl Future<Output = T>) -> Ended<T> {
        tokio::select! {
            result = work => Ended::Work(result),
            leave = self.ended() => if leave { Ended::Dismissed } else { Ended::Lost },
            () = shutdown.requested() => Ended::Shutdown,
        }
    }

    /// Says goodbye, with the error that ends the worker if there is one. Best effort, bounded by a deadline.
    pub async fn leave(self, error: Option<String>) {
        self.heartbeats.abort();
        let mut client = WorkerServiceClient::new(self.channel.clone());
        let request = v1::LeaveRequest { worker_id: self.worker.0, error: error.unwrap_or_default() };
        if let Ok(Err(status)) = tokio::time::timeout(HEARTBEAT_DEADLINE, client.leave(request)).await {
            tracing::debug!(%status, "goodbye was not heard");
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.heartbeats.abort();
    }
}

/// Registers, trying again while the coordinator cannot be reached and `deadline` has not passed since `started`.
async fn register(
    client: &WorkerServiceClient<Channel>,
    request: v1::RegisterRequest,
    address: &str,
    started: Instant,
    deadline: Duration,
) -> Result<v1::RegisterResponse, JoinError> {
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let call = tokio::time::timeout(REGISTER_DEADLINE, client.clone().register(request.clone())).await;
        let last = match call {
            Ok(Ok(registered)) => return Ok(registered.into_inner()),
            Ok(Err(status)) if matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled) => {
                status.message().to_owned()
            }
            Ok(Err(status)) => return Err(JoinError::Refused(status.message().to_owned())),
            Err(_) => format!("no answer to the registration within {} s", REGISTER_DEADLINE.as_secs()),
        };
        if started.elapsed() >= deadline {
            return Err(JoinError::Unreachable { address: address.to_owned(), waited: started.elapsed(), last });
        }
        tokio::time::sleep(backoff.wait()).await;
    }
}

/// What ended [`Membership::run_until_ended`].
#[derive(Debug)]
pub enum Ended<T> {
    /// The work itself.
    Work(T),
    /// The coordinator: the job is over.
    Dismissed,
    /// The registration: it is unknown to the coordinator, or the coordinator cannot be reached.
    Lost,
    /// The operator.
    Shutdown,
}

/// How long a coordinator may be silent before the worker gives its registration up: one that was killed is back by then,
/// and knows the worker and its leases.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

async fn beat(
    mut client: WorkerServiceClient<Channel>,
    worker: WorkerId,
    interval: Duration,
    activity: Activity,
    end: watch::Sender<Option<End>>,
) {
    let mut ticker = tokio::time::interval(interval);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        ticker.tick().await;
        let request = v1::HeartbeatRequest { worker_id: worker.0, activity: activity.0.borrow().clone() };
        let reply = tokio::time::timeout(HEARTBEAT_DEADLINE, client.heartbeat(request)).await;
        let directive = match reply {
            Ok(Ok(reply)) => {
                heard = Instant::now();
                reply.into_inner().directive()
            }
            Ok(Err(status)) if status.code() == Code::NotFound => v1::Directive::Register,
            Ok(Err(_)) | Err(_) if heard.elapsed() < SILENCE_LIMIT => continue,
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(%worker, "the coordinator has been silent for {} s", SILENCE_LIMIT.as_secs());
                v1::Directive::Register
            }
        };
        let ended = match directive {
            v1::Directive::Leave => End::Leave,
            v1::Directive::Register => End::Lost,
            v1::Directive::Unspecified | v1::Directive::Continue => continue,
        };
        // Nobody waits for the end any more when the membership was dropped.
        let _ = end.send(Some(ended));
        return;
    }
}
