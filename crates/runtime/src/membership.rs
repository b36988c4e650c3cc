use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_types::{Role, WorkerId};
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::call::{Meaning, PATIENCE, Policy, Tries, meaning, waits_for_room};
use crate::log_level::apply_log_level;
use crate::net::{
    DialError, PeerRole, PlainText, RunChannel, RunIdentity, Security, dial, dial_any, of_run, run_of_refusal,
};
use crate::{Exit, Health, Shutdown, launch};

/// Deadline of one heartbeat.
const HEARTBEAT_DEADLINE: Duration = Duration::from_secs(5);

/// Deadline of one registration.
const REGISTER_DEADLINE: Duration = Duration::from_secs(10);

/// Longest wait after a heartbeat that got no answer, however long the interval is.
const MISSED_AGAIN: Duration = Duration::from_secs(1);

/// Share of the interval that a worker waits at least; the rest is random, so that workers which have joined together do
/// not send their heartbeats together.
const SHORTEST_SHARE: f64 = 0.8;

/// Silence of the coordinator that is logged.
const SILENCE_TOLD: Duration = Duration::from_secs(5);

/// Default for how long a dead process may hold a name: until a coordinator misses its heartbeats. Coordinators with
/// another timeout say so in the refusal.
const HOLDER_MISSED: Duration = Duration::from_secs(10);
/// Upper bound on the timeout that a coordinator may announce; longer ones are not believed.
const LONGEST_HOLD: Duration = Duration::from_secs(600);

/// Metadata key on the refusal of a held name: milliseconds without a heartbeat after which its holder is given up.
pub const HOLDER_MISSED_KEY: &str = "pacs-missed-after-ms";

/// Why a worker is not, or no longer, a member of the run.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The coordinator's address is malformed.
    #[error("coordinator address `{address}` is not host:port")]
    Address {
        /// The address as given.
        address: String,
    },
    /// No coordinator answered in time.
    #[error("no coordinator answered at {address} within {} s: {last}", waited.as_secs())]
    Unreachable {
        /// Address that was dialled.
        address: String,
        /// Time since the first try.
        waited: Duration,
        /// Error of the last try.
        last: String,
    },
    /// The coordinator at the address serves another run, or another start of the job.
    #[error("this worker's run was looked for at {address} for {} s, and another run is served there: {last}", waited.as_secs())]
    OtherRun {
        /// Address that was dialled.
        address: String,
        /// Time since the first try.
        waited: Duration,
        /// Last refusal of the other coordinator.
        last: String,
    },
    /// The connection would leave the machine in plain text.
    #[error(transparent)]
    PlainText(#[from] PlainText),
    /// A live process holds this worker's name.
    #[error("the name `{name}` is taken by a live process, after {} s of asking: {holder}", waited.as_secs())]
    NameTaken {
        /// The name that was asked for.
        name: String,
        /// Time since the first try.
        waited: Duration,
        /// Description of the holder, from the coordinator.
        holder: String,
    },
    /// The coordinator refused the worker for good.
    #[error("the coordinator refused the registration: {0}")]
    Refused(String),
}

impl JoinError {
    /// Exit code for this error.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Address { .. } | Self::PlainText(_) => Exit::Usage,
            Self::Unreachable { .. } | Self::OtherRun { .. } => Exit::Again,
            Self::NameTaken { .. } | Self::Refused(_) => Exit::Config,
        }
    }
}

/// How a worker reaches its coordinator and its peers.
#[derive(Clone, Debug)]
pub struct Link {
    /// Address of the coordinator, host:port, or the absolute path of its run folder.
    pub coordinator: String,
    /// Start of the job that this worker belongs to; empty: any.
    pub attempt: String,
    /// Run that the worker belongs to: from the environment, or else from the first registration,
    /// for the life of the process.
    pub run_id: RunIdentity,
    /// When the process was started, in microseconds since 1970, by a supervisor that had seen the end of every earlier
    /// process of this name; 0: not known.
    pub started: u64,
    /// How long to look for the coordinator, at the start and after a registration is lost.
    pub join_timeout: Duration,
    /// Protection of the connections to the coordinator and between workers.
    pub security: Security,
    /// Health for probes; ready while the worker is registered.
    pub health: Health,
}

impl Link {
    /// A link to a coordinator on this machine in plain text.
    #[must_use]
    pub fn local(coordinator: impl Into<String>, join_timeout: Duration) -> Self {
        Self {
            coordinator: coordinator.into(),
            attempt: String::new(),
            run_id: RunIdentity::default(),
            started: 0,
            join_timeout,
            security: Security::Plain,
            health: Health::default(),
        }
    }

    /// Connects once to the process of role `peer` at `address` (host:port), for calls of this worker's run.
    ///
    /// # Errors
    /// As [`dial`].
    pub async fn dial(&self, address: &str, peer: PeerRole) -> Result<RunChannel, DialError> {
        dial(address, peer, &self.security, &self.run_id).await
    }
}

/// Policy for finding a coordinator.
const LOOK: Policy =
    Policy::new("look for the coordinator", REGISTER_DEADLINE).waits(Duration::from_millis(50), LONGEST_WAIT);

/// Longest wait between two tries to find it.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Connects to the coordinator at `address` (see [`Link::coordinator`]), whatever run it serves, with retries until
/// `deadline` has passed. For operators.
///
/// # Errors
/// [`JoinError::Address`] and [`JoinError::PlainText`] at once, [`JoinError::Unreachable`] after the deadline.
pub async fn connect(address: &str, security: &Security, deadline: Duration) -> Result<Channel, JoinError> {
    let mut tries = LOOK.patience(deadline).tries();
    loop {
        let last = match find(address, security).await {
            Ok(channel) => return Ok(channel),
            Err(Failed::Passing(last)) => last,
            Err(failed) => return Err(failed.into_error(address, &tries)),
        };
        if !tries.again("look for the coordinator", &last).await {
            return Err(Failed::Passing(last).into_error(address, &tries));
        }
    }
}

/// Resolves and dials the coordinator once; it may have moved since the last time.
async fn find(address: &str, security: &Security) -> Result<Channel, Failed> {
    dial_any(address, PeerRole::Coordinator, security).await.map_err(|error| match error {
        DialError::Address(address) => Failed::Final(JoinError::Address { address }),
        DialError::PlainText(error) => Failed::Final(error.into()),
        DialError::Unreachable(problem) => Failed::Passing(problem),
    })
}

/// Why one try to join has failed.
enum Failed {
    /// Another try cannot help.
    Final(JoinError),
    /// There is no coordinator, or not yet.
    Passing(String),
    /// The coordinator's disk is full, and it accepts no registration meanwhile.
    NoRoom(String),
    /// A coordinator of another run, or of another start of the job, answered.
    OtherRun(String),
    /// A process of this name is a member; it is given up after `missed_after` without a heartbeat.
    NameTaken { name: String, holder: String, missed_after: Duration },
    /// The coordinator refused the worker for good.
    Refused(String),
}

impl Failed {
    /// The error to return when there is no other try.
    fn into_error(self, address: &str, tries: &Tries) -> JoinError {
        let (address, waited) = (address.to_owned(), tries.waited());
        match self {
            Self::Final(error) => error,
            Self::Passing(last) | Self::NoRoom(last) => JoinError::Unreachable { address, waited, last },
            Self::OtherRun(last) => JoinError::OtherRun { address, waited, last },
            Self::NameTaken { name, holder, .. } => JoinError::NameTaken { name, waited, holder },
            Self::Refused(message) => JoinError::Refused(message),
        }
    }
}

/// A worker's description of itself for registration.
#[derive(Clone, Debug)]
pub struct WorkerIdentity {
    /// Role that it works in.
    pub role: Role,
    /// Stable name of the process slot, for example `rollout-0`.
    pub name: String,
    /// Learners: address of its collective for the other ranks. Empty otherwise.
    pub collective_address: String,
}

/// Servers of one worker that a heartbeat describes.
const MOST_SERVERS: usize = 256;

/// Current activity for the status page, and whether the coordinator has accepted a result. Clones share the value.
#[derive(Clone, Debug)]
pub struct Activity {
    text: Arc<watch::Sender<String>>,
    servers: Arc<watch::Sender<Vec<v1::EngineServer>>>,
    served: Arc<AtomicBool>,
}

impl Activity {
    fn new() -> Self {
        let text = Arc::new(watch::Sender::new("starting".to_owned()));
        Self { text, servers: Arc::default(), served: Arc::default() }
    }

    /// Sets the activity, which the next heartbeat sends.
    pub fn set(&self, activity: impl Into<String>) {
        self.text.send_replace(activity.into());
    }

    /// Describes the servers that the worker drives, for the next heartbeat; at most 256 count.
    pub fn set_servers(&self, mut servers: Vec<v1::EngineServer>) {
        servers.truncate(MOST_SERVERS);
        self.servers.send_replace(servers);
    }

    /// Records that the coordinator has accepted a result under this registration, which makes it a fruitful one.
    pub fn served(&self) {
        self.served.store(true, Ordering::Relaxed);
    }

    /// Whether the coordinator has accepted a result under this registration.
    pub(crate) fn has_served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }
}

/// A registration with the coordinator. Heartbeats keep it alive until it ends or this is dropped.
#[derive(Debug)]
pub struct Membership {
    /// Id of this registration.
    pub worker: WorkerId,
    /// The resolved job spec, as TOML.
    pub job_spec: String,
    /// Path of the run folder on the coordinator's machine.
    pub run_dir: String,
    /// Id of the run.
    pub run_id: RunIdentity,
    /// Connection to the coordinator, for the services of the role.
    pub channel: RunChannel,
    /// What the worker does now, for its heartbeats.
    pub activity: Activity,
    ended: watch::Receiver<Option<End>>,
    /// Whether the process was asked to end, for its heartbeats.
    ending: watch::Sender<bool>,
    heartbeats: tokio::task::JoinHandle<()>,
    health: Health,
}

/// Why a membership ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    /// The coordinator told the worker to leave, with this exit code.
    Leave(Exit),
    /// The registration is unknown, the coordinator is unreachable, or it serves another run.
    Lost(String),
}

impl Membership {
    /// Connects, registers, and starts the heartbeats. If a heartbeat orders an immediate end, it
    /// is requested from `shutdown`.
    ///
    /// # Errors
    /// When no coordinator answers within the deadline for joining, or the one that does refuses this worker.
    pub async fn join(link: &Link, identity: &WorkerIdentity, shutdown: &Shutdown) -> Result<Self, JoinError> {
        Self::join_again(link, identity, shutdown, false).await
    }

    /// The same for a process that may have been a member before. If it `was_member`, a refusal is not final within the
    /// join timeout, because it may come from a coordinator that is just starting.
    pub(crate) async fn join_again(
        link: &Link,
        identity: &WorkerIdentity,
        shutdown: &Shutdown,
        was_member: bool,
    ) -> Result<Self, JoinError> {
        let request = v1::RegisterRequest {
            role: v1::Role::from(identity.role).into(),
            name: identity.name.clone(),
            host: nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            collective_address: identity.collective_address.clone(),
            attempt: link.attempt.clone(),
            run_id: link.run_id.get().unwrap_or_default().to_owned(),
            started: link.started,
        };
        let Registered { channel, client, answer } = register(link, request, was_member).await?;
        let activity = Activity::new();
        let (end, ended) = watch::channel(None);
        let worker = WorkerId(answer.worker_id);
        tracing::info!(%worker, coordinator = link.coordinator, "joined the run");
        let (ending, is_ending) = watch::channel(false);
        let heart = Heart {
            client,
            worker,
            name: identity.name.clone(),
            interval: interval(answer.heartbeat_interval_ms),
            activity: activity.clone(),
            ending: is_ending,
            shutdown: shutdown.clone(),
        };
        let heartbeats = tokio::spawn(async move {
            // The receiver is gone when the membership was dropped.
            if let Some(ended) = heart.beat().await {
                let _ = end.send(Some(ended));
            }
        });
        link.health.set_ready(true);
        Ok(Self {
            worker,
            job_spec: answer.job_spec,
            run_dir: answer.run_dir,
            run_id: link.run_id.clone(),
            channel,
            activity,
            ended,
            ending,
            heartbeats,
            health: link.health.clone(),
        })
    }

    /// Waits until the coordinator tells the worker to leave, or the registration is lost.
    async fn ended(&self) -> End {
        let mut ended = self.ended.clone();
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|end| end.clone());
        end.unwrap_or_else(|| End::Lost("the heartbeats have ended".to_owned()))
    }

    /// Runs `work` until it completes, the membership ends, or a requested shutdown is due.
    ///
    /// Returns which of these happened first.
    pub async fn run_until_ended<T>(&self, shutdown: &Shutdown, work: impl Future<Output = T>) -> Ended<T> {
        tokio::select! {
            result = work => Ended::Work(result),
            end = self.ended() => match end {
                End::Leave(exit) => Ended::Leave(exit),
                End::Lost(reason) => Ended::Lost(reason),
            },
            () = self.leaving(shutdown) => Ended::Leave(Exit::Again),
        }
    }

    /// Waits until a requested shutdown is due. The coordinator is told of the request at once, so that it can save
    /// what the worker holds within the grace period.
    async fn leaving(&self, shutdown: &Shutdown) {
        shutdown.requested().await;
        self.ending.send_replace(true);
        shutdown.leaving().await;
    }

    /// Deregisters, with the error that ends the worker if there is one. Best effort, with a deadline.
    pub async fn leave(self, error: Option<String>) {
        self.heartbeats.abort();
        let mut client = WorkerServiceClient::new(self.channel.clone());
        let request = v1::LeaveRequest { worker_id: self.worker.0, error: error.unwrap_or_default() };
        if let Ok(Err(status)) = tokio::time::timeout(HEARTBEAT_DEADLINE, client.leave(request)).await {
            tracing::debug!(%status, "deregistration failed");
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.heartbeats.abort();
        self.health.set_ready(false);
    }
}

/// A successful registration.
struct Registered {
    channel: RunChannel,
    client: WorkerServiceClient<RunChannel>,
    answer: v1::RegisterResponse,
}

/// Connects and registers, with retries until the join timeout while the coordinator is unreachable or serves another
/// run. Its address is resolved again for each try: it may have moved, and the last answer may have come from a process
/// that a lost node left.
async fn register(link: &Link, request: v1::RegisterRequest, was_member: bool) -> Result<Registered, JoinError> {
    let mut tries = LOOK.patience(link.join_timeout).tries();
    let mut told_stranger = false;
    // Since when the name has been held by a process that may turn out to be dead.
    let mut taken_since: Option<Instant> = None;
    loop {
        let failed = match register_once(link, request.clone()).await {
            Ok(registered) => return Ok(registered),
            Err(failed) => failed,
        };
        // A coordinator that was restarted meanwhile starts to count the holder's silence anew.
        taken_since = taken_since.filter(|_| matches!(failed, Failed::NameTaken { .. }));
        let problem = match &failed {
            Failed::Final(_) => return Err(failed.into_error(&link.coordinator, &tries)),
            Failed::Refused(_) if !was_member => return Err(failed.into_error(&link.coordinator, &tries)),
            Failed::NameTaken { name, holder, missed_after } => {
                // Half of the timeout on top, because the coordinator checks for silence only at intervals.
                let margin = *missed_after / 2;
                let hold = *missed_after + margin;
                if taken_since.is_none() {
                    tracing::warn!("the name `{name}` is held: {holder}; asking for {} s more", hold.as_secs());
                }
                let waited = taken_since.get_or_insert_with(Instant::now).elapsed();
                if waited >= hold {
                    return Err(failed.into_error(&link.coordinator, &tries));
                }
                // Extends the join timeout until it is known whether the holder is alive.
                tries.extend(hold + margin + LONGEST_WAIT - waited);
                holder.clone()
            }
            Failed::OtherRun(problem) => {
                if !told_stranger {
                    told_stranger = true;
                    let left = tries.left().as_secs();
                    tracing::warn!("{problem}; looking for its own run for {left} s more");
                }
                problem.clone()
            }
            Failed::NoRoom(problem) => {
                // A full disk is fixed by people, so the join timeout does not run out meanwhile.
                tries.extend(link.join_timeout);
                problem.clone()
            }
            Failed::Passing(problem) | Failed::Refused(problem) => problem.clone(),
        };
        if !tries.again("register", &problem).await {
            return Err(failed.into_error(&link.coordinator, &tries));
        }
    }
}

async fn register_once(link: &Link, mut request: v1::RegisterRequest) -> Result<Registered, Failed> {
    if link.run_id.get().is_none()
        && let Some(id) = launch::run_id(&link.coordinator)
        && link.run_id.tell(&id).is_ok()
    {
        request.run_id = id;
    }
    let channel = of_run(find(&link.coordinator, &link.security).await?, link.run_id.clone());
    let client = WorkerServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let name = request.name.clone();
    let call = tokio::time::timeout(REGISTER_DEADLINE, client.clone().register(request)).await;
    let answer = match call {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return Err(refusal(link, &name, &status)),
        Err(_) => {
            let silent = format!("no answer to the registration within {} s", REGISTER_DEADLINE.as_secs());
            return Err(Failed::Passing(silent));
        }
    };
    let was_told = link.run_id.get().is_some();
    match link.run_id.tell(&answer.run_id) {
        Ok(true) => {
            // The first run is trusted, but logged for whoever started the process by hand.
            if !was_told {
                let (run, coordinator) = (&answer.run_id, &link.coordinator);
                tracing::info!(
                    "joined run {run} at {coordinator}, the first that has taken this worker, and keeps to it; --run-id or \
                     PACS_RUN_ID names another"
                );
            }
            Ok(Registered { channel, client, answer })
        }
        Ok(false) => Err(Failed::OtherRun(stranger(link, &answer.run_id))),
        Err(error) => Err(Failed::Refused(format!("its answer does not name a run: {error}"))),
    }
}

/// Classifies the refusal of a registration.
fn refusal(link: &Link, name: &str, status: &Status) -> Failed {
    let message = status.message().to_owned();
    if status.code() == Code::AlreadyExists {
        let said = status.metadata().get(HOLDER_MISSED_KEY).and_then(|said| said.to_str().ok()?.parse().ok());
        // Bounded, so that a wrong value does not make the worker ask for too long.
        let missed_after = said.map_or(HOLDER_MISSED, Duration::from_millis).min(LONGEST_HOLD);
        return Failed::NameTaken { name: name.to_owned(), holder: message, missed_after };
    }
    match meaning(status.code()) {
        Meaning::TryAgain if waits_for_room(status) => Failed::NoRoom(message),
        Meaning::TryAgain => Failed::Passing(message),
        Meaning::OtherRun => match run_of_refusal(status) {
            Some(theirs) => Failed::OtherRun(stranger(link, theirs)),
            // The refusal names no other run, so it comes from another start of the job.
            None => Failed::OtherRun(message),
        },
        Meaning::Gone | Meaning::Refused => Failed::Refused(message),
    }
}

/// The message for a coordinator that serves another run.
fn stranger(link: &Link, theirs: &str) -> String {
    let ours = link.run_id.get().unwrap_or_default();
    format!("the coordinator at {} serves run {theirs}, this worker belongs to run {ours}", link.coordinator)
}

/// What ended [`Membership::run_until_ended`].
#[derive(Debug)]
pub enum Ended<T> {
    /// The work completed, with this result.
    Work(T),
    /// The coordinator or a signal told the process to leave with this exit code, which is [`Exit::Done`] only when the
    /// job is over for good.
    Leave(Exit),
    /// The registration was lost: the coordinator does not know it, or cannot be reached.
    Lost(String),
}

/// The task that sends heartbeats.
struct Heart {
    client: WorkerServiceClient<RunChannel>,
    worker: WorkerId,
    name: String,
    /// Longest wait until the next heartbeat, as the coordinator has said last.
    interval: Duration,
    activity: Activity,
    ending: watch::Receiver<bool>,
    shutdown: Shutdown,
}

/// The interval that a coordinator names. One that asks for more than a hundred heartbeats a second is not obeyed.
fn interval(milliseconds: u32) -> Duration {
    Duration::from_millis(u64::from(milliseconds.max(10))).min(LONGEST_HOLD)
}

impl Heart {
    /// Sends heartbeats until the membership ends; `None` if it was dropped.
    async fn beat(mut self) -> Option<End> {
        let mut wait = Duration::ZERO;
        let mut silence = Silence { heard: Instant::now(), missed: 0, told: false };
        let mut log_level = v1::LogLevel::Unspecified;
        loop {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // The sender is dropped with the membership, which ends this task.
                changed = self.ending.changed() => if changed.is_err() { return None },
            }
            let request = v1::HeartbeatRequest {
                worker_id: self.worker.0,
                activity: self.activity.text.borrow().clone(),
                ending: *self.ending.borrow_and_update(),
                servers: self.activity.servers.borrow().clone(),
            };
            let sent = tokio::time::Instant::now();
            let reply = tokio::time::timeout(HEARTBEAT_DEADLINE, self.client.heartbeat(request)).await;
            // The interval is from one heartbeat to the next, not from an answer.
            let until = |interval: Duration| interval.mul_f64(share()).saturating_sub(sent.elapsed());
            let problem = match reply {
                Ok(Ok(reply)) => {
                    silence.is_over();
                    let reply = reply.into_inner();
                    if reply.heartbeat_interval_ms > 0 {
                        self.interval = interval(reply.heartbeat_interval_ms);
                    }
                    wait = until(self.interval);
                    if reply.log_level() != log_level {
                        log_level = reply.log_level();
                        apply_log_level(log_level);
                    }
                    match self.end(reply.directive()) {
                        Some(end) => return Some(end),
                        None => continue,
                    }
                }
                Ok(Err(status)) => match meaning(status.code()) {
                    Meaning::Gone => return Some(End::Lost("the coordinator does not know this worker".to_owned())),
                    Meaning::OtherRun => return Some(End::Lost(status.message().to_owned())),
                    // `Refused` is retried, because a certificate that is being replaced is refused for a moment.
                    Meaning::TryAgain | Meaning::Refused => status.message().to_owned(),
                },
                Err(_) => format!("no answer within {} s", HEARTBEAT_DEADLINE.as_secs()),
            };
            if let Some(lost) = silence.goes_on(&problem) {
                return Some(lost);
            }
            // Never at once: a coordinator that refuses heartbeats must not be asked without a pause.
            let again = self.interval.min(MISSED_AGAIN);
            wait = until(again).max(again / 2);
        }
    }

    /// The end that a directive of the coordinator causes, if any.
    fn end(&self, directive: v1::Directive) -> Option<End> {
        Some(match directive {
            v1::Directive::Unspecified | v1::Directive::Continue => return None,
            v1::Directive::Leave => End::Leave(Exit::Done),
            v1::Directive::LeaveForNow => End::Leave(Exit::Again),
            v1::Directive::Register => End::Lost("the coordinator does not know this worker".to_owned()),
            v1::Directive::Replaced => {
                tracing::error!(
                    worker = %self.worker,
                    "another process has taken the name `{}`, and this one ends; give every process a name of its own",
                    self.name
                );
                End::Leave(Exit::Config)
            }
            v1::Directive::Restart => {
                tracing::error!(
                    worker = %self.worker,
                    "the coordinator says that nothing comes of what this process does: it ends, to be started again"
                );
                // At once, because a stuck role would prevent an orderly end, and the coordinator
                // has reissued its work already.
                self.shutdown.end_at_once(Exit::Again);
                End::Leave(Exit::Again)
            }
        })
    }
}

/// A random share of the interval to wait for.
fn share() -> f64 {
    SHORTEST_SHARE + (1.0 - SHORTEST_SHARE) * fastrand::f64()
}

/// Tracks the silence of the coordinator.
struct Silence {
    heard: Instant,
    missed: u32,
    told: bool,
}

impl Silence {
    fn is_over(&mut self) {
        if self.told {
            tracing::info!(
                missed = self.missed,
                "the coordinator answers again after {} s",
                self.heard.elapsed().as_secs()
            );
        }
        *self = Self { heard: Instant::now(), missed: 0, told: false };
    }

    /// Counts an unanswered heartbeat; returns the end of the membership if patience is over.
    fn goes_on(&mut self, problem: &str) -> Option<End> {
        self.missed += 1;
        let silent = self.heard.elapsed();
        if silent >= PATIENCE {
            return Some(End::Lost(format!("the coordinator has been silent for {} s: {problem}", silent.as_secs())));
        }
        if silent >= SILENCE_TOLD && !self.told {
            self.told = true;
            let left = (PATIENCE - silent).as_secs();
            tracing::warn!("the coordinator has not answered for {} s, {left} s to go: {problem}", silent.as_secs());
        }
        None
    }
}
