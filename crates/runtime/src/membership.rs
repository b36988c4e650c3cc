use std::sync::Arc;
use std::time::{Duration, Instant};

use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_types::{Role, WorkerId};
use tokio::sync::watch;
use tonic::Code;
use tonic::transport::Channel;

use crate::net::{DialError, PeerRole, PlainText, Security, dial};
use crate::{Backoff, Exit, Health, Shutdown, launch, set_log_level};

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
    /// The connection would be in plain text.
    #[error(transparent)]
    PlainText(#[from] PlainText),
    /// The coordinator does not want this worker.
    #[error("the coordinator refused the registration: {0}")]
    Refused(String),
}

impl JoinError {
    /// The exit code that fits.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Address { .. } | Self::PlainText(_) => Exit::Usage,
            Self::Unreachable { .. } => Exit::Again,
            Self::Refused(_) => Exit::Config,
        }
    }

    /// The same after it was tried for longer.
    fn after(self, waited: Duration) -> Self {
        match self {
            Self::Unreachable { address, last, .. } => Self::Unreachable { address, waited, last },
            other => other,
        }
    }
}

/// How a worker reaches its coordinator.
#[derive(Clone, Debug)]
pub struct Link {
    /// Where the coordinator listens, host:port; or the absolute path of its run folder, which says where.
    pub coordinator: String,
    /// Which start of the job this worker belongs to; empty: any.
    pub attempt: String,
    /// How long to look for it, at the start and again after a registration is lost.
    pub join_timeout: Duration,
    /// How connections are protected, to the coordinator and between workers.
    pub security: Security,
    /// What probes are told; ready while there is a registration.
    pub health: Health,
}

impl Link {
    /// A coordinator on this machine, spoken to in plain text.
    #[must_use]
    pub fn local(coordinator: impl Into<String>, join_timeout: Duration) -> Self {
        let (security, health) = (Security::Plain, Health::default());
        Self { coordinator: coordinator.into(), attempt: String::new(), join_timeout, security, health }
    }
}

/// Connects to the coordinator at `address` (see [`Link::coordinator`]), trying again with back-off until `deadline` has passed.
///
/// # Errors
/// [`JoinError::Address`] and [`JoinError::PlainText`] at once, [`JoinError::Unreachable`] when the deadline has passed.
pub async fn connect(address: &str, security: &Security, deadline: Duration) -> Result<Channel, JoinError> {
    let started = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let found = match launch::find(address) {
            Ok(found) => dial(&found, PeerRole::Coordinator, security).await,
            Err(error) => Err(DialError::Unreachable(error.to_string())),
        };
        let last = match found {
            Ok(channel) => return Ok(channel),
            Err(DialError::Address(address)) => return Err(JoinError::Address { address }),
            Err(DialError::PlainText(error)) => return Err(error.into()),
            Err(DialError::Unreachable(last)) => last,
        };
        if started.elapsed() >= deadline {
            return Err(JoinError::Unreachable { address: address.to_owned(), waited: started.elapsed(), last });
        }
        tokio::time::sleep(backoff.wait()).await;
    }
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
    /// Whether the process was asked to end, which the heartbeats say.
    ending: watch::Sender<bool>,
    heartbeats: tokio::task::JoinHandle<()>,
    health: Health,
}

/// Why a membership ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The coordinator said: leave, and how.
    Leave(Exit),
    /// The registration is unknown or the coordinator cannot be reached.
    Lost,
}

impl Membership {
    /// Connects, registers, and starts the heartbeats.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub async fn join(link: &Link, identity: &WorkerIdentity) -> Result<Self, JoinError> {
        let request = v1::RegisterRequest {
            role: v1::Role::from(identity.role).into(),
            name: identity.name.clone(),
            host: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            collective_address: identity.collective_address.clone(),
            attempt: link.attempt.clone(),
            run_id: String::new(),
            started: 0,
        };
        let (channel, client, registered) = register(link, request).await?;
        let activity = Activity::new();
        let (end, ended) = watch::channel(None);
        let interval = Duration::from_millis(u64::from(registered.heartbeat_interval_ms.max(10)));
        let worker = WorkerId(registered.worker_id);
        let (ending, is_ending) = watch::channel(false);
        let heartbeats = tokio::spawn(beat(client, worker, interval, activity.clone(), is_ending, end));
        link.health.set_ready(true);
        Ok(Self {
            worker,
            job_spec: registered.job_spec,
            run_dir: registered.run_dir,
            channel,
            activity,
            ended,
            ending,
            heartbeats,
            health: link.health.clone(),
        })
    }

    /// Waits until the coordinator has told the worker to leave (and with which exit code) or the registration is lost.
    async fn ended(&self) -> Option<Exit> {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(End::Leave(exit))) => Some(*exit),
            Ok(_) | Err(_) => None,
        }
    }

    /// Runs `work` until it is done, the membership ends, or it is time to leave after a request for shutdown.
    ///
    /// Returns what ended it: the result of the work, or which of the other two.
    pub async fn run_until_ended<T>(&self, shutdown: &Shutdown, work: impl Future<Output = T>) -> Ended<T> {
        tokio::select! {
            result = work => Ended::Work(result),
            leave = self.ended() => leave.map_or(Ended::Lost, Ended::Leave),
            () = self.leaving(shutdown) => Ended::Leave(Exit::Again),
        }
    }

    /// Waits until it is time to leave. The coordinator hears of the request at once, and may have what the worker holds
    /// saved before its grace is over.
    async fn leaving(&self, shutdown: &Shutdown) {
        shutdown.requested().await;
        self.ending.send_replace(true);
        shutdown.leaving().await;
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
        self.health.set_ready(false);
    }
}

/// Connects and registers, trying again until the join timeout while the coordinator cannot be reached. It is looked for
/// anew each time: it may have moved, and what answered last may be what a lost node has left behind.
async fn register(
    link: &Link,
    request: v1::RegisterRequest,
) -> Result<(Channel, WorkerServiceClient<Channel>, v1::RegisterResponse), JoinError> {
    let (started, deadline) = (Instant::now(), link.join_timeout);
    let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    loop {
        let left = deadline.saturating_sub(started.elapsed());
        let channel =
            connect(&link.coordinator, &link.security, left).await.map_err(|error| error.after(started.elapsed()))?;
        let client = WorkerServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let call = tokio::time::timeout(REGISTER_DEADLINE, client.clone().register(request.clone())).await;
        let last = match call {
            Ok(Ok(registered)) => return Ok((channel, client, registered.into_inner())),
            Ok(Err(status)) if may_pass(status.code()) => status.message().to_owned(),
            Ok(Err(status)) => return Err(JoinError::Refused(status.message().to_owned())),
            Err(_) => format!("no answer to the registration within {} s", REGISTER_DEADLINE.as_secs()),
        };
        if started.elapsed() >= deadline {
            let address = link.coordinator.clone();
            return Err(JoinError::Unreachable { address, waited: started.elapsed(), last });
        }
        tokio::time::sleep(backoff.wait()).await;
    }
}

/// A coordinator of another start of the job aborts the call: the right one may take its place.
fn may_pass(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Aborted)
}

/// What ended [`Membership::run_until_ended`].
#[derive(Debug)]
pub enum Ended<T> {
    /// The work itself.
    Work(T),
    /// The coordinator, or whoever sent the process a signal: it is to leave with this exit code, which is
    /// [`Exit::Done`] only when the job is over for good.
    Leave(Exit),
    /// The registration: it is unknown to the coordinator, or the coordinator cannot be reached.
    Lost,
}

/// How long a coordinator may be silent before the worker gives its registration up: one that was killed is back by then,
/// and knows the worker and its leases.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

async fn beat(
    mut client: WorkerServiceClient<Channel>,
    worker: WorkerId,
    interval: Duration,
    activity: Activity,
    mut ending: watch::Receiver<bool>,
    end: watch::Sender<Option<End>>,
) {
    let mut ticker = tokio::time::interval(interval);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    let mut log_level = v1::LogLevel::Unspecified;
    loop {
        tokio::select! {
            _ = ticker.tick() => {}
            // Without a sender the membership is over, and with it this task.
            changed = ending.changed() => if changed.is_err() { return },
        }
        let request = v1::HeartbeatRequest {
            worker_id: worker.0,
            activity: activity.0.borrow().clone(),
            ending: *ending.borrow_and_update(),
        };
        let reply = tokio::time::timeout(HEARTBEAT_DEADLINE, client.heartbeat(request)).await;
        let directive = match reply {
            Ok(Ok(reply)) => {
                heard = Instant::now();
                let reply = reply.into_inner();
                if reply.log_level() != log_level {
                    log_level = reply.log_level();
                    apply_log_level(log_level);
                }
                reply.directive()
            }
            Ok(Err(status)) if status.code() == Code::NotFound => v1::Directive::Register,
            Ok(Err(_)) | Err(_) if heard.elapsed() < SILENCE_LIMIT => continue,
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(%worker, "the coordinator has been silent for {} s", SILENCE_LIMIT.as_secs());
                v1::Directive::Register
            }
        };
        let ended = match directive {
            v1::Directive::Leave => End::Leave(Exit::Done),
            v1::Directive::LeaveForNow => End::Leave(Exit::Again),
            v1::Directive::Register => End::Lost,
            v1::Directive::Restart => restart(),
            v1::Directive::Replaced => End::Leave(Exit::Config),
            v1::Directive::Unspecified | v1::Directive::Continue => continue,
        };
        // Nobody waits for the end any more when the membership was dropped.
        let _ = end.send(Some(ended));
        return;
    }
}

/// Ends the process at once. Whatever it is stuck in would keep an orderly end from happening, and the coordinator has
/// given its work to others already.
fn restart() -> ! {
    tracing::error!("the coordinator says that nothing comes of what this process does: it ends, to be started again");
    std::process::exit(i32::from(Exit::Again.code()))
}

fn apply_log_level(level: v1::LogLevel) {
    let level = match level {
        v1::LogLevel::Unspecified => return,
        v1::LogLevel::Error => tracing::Level::ERROR,
        v1::LogLevel::Warn => tracing::Level::WARN,
        v1::LogLevel::Info => tracing::Level::INFO,
        v1::LogLevel::Debug => tracing::Level::DEBUG,
        v1::LogLevel::Trace => tracing::Level::TRACE,
    };
    tracing::info!(%level, "an operator has set the log level");
    set_log_level(level);
}
