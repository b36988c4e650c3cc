//! The life of a worker against scripted coordinators, with a role that does nothing.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pacs_protocol::v1;
use pacs_protocol::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use pacs_runtime::net::{Guard, PeerRole, RunGate, RunIdentity, Security, accept, server};
use pacs_runtime::{
    Exit, HOLDER_MISSED_KEY, JoinError, Link, Membership, Shutdown, Stop, Worker, WorkerIdentity, work,
};
use pacs_types::Role;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::service::interceptor::InterceptedService;
use tonic::{Request, Response, Status};

const OURS: &str = "0123456789abcdef0123456789abcdef";
const OTHER: &str = "ffffffffffffffffffffffffffffffff";
/// No test may take longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a coordinator answers, in order; after the end it takes every worker and has nothing against it.
struct Script {
    registers: VecDeque<Status>,
    /// Refuses every registration.
    never: Option<Status>,
    heartbeats: VecDeque<Result<v1::Directive, Status>>,
    /// Milliseconds until the first heartbeat, and until each other one.
    intervals: (u32, u32),
}

impl Default for Script {
    fn default() -> Self {
        Self { registers: VecDeque::new(), never: None, heartbeats: VecDeque::new(), intervals: (10, 0) }
    }
}

#[derive(Clone, Debug, Default)]
struct Heard {
    registrations: Vec<v1::RegisterRequest>,
    refused: usize,
    heartbeats: usize,
    goodbyes: Vec<String>,
}

#[derive(Clone)]
struct Coordinator {
    run: &'static str,
    script: Arc<Mutex<Script>>,
    heard: Arc<watch::Sender<Heard>>,
}

impl Coordinator {
    async fn start(run: &'static str, script: Script) -> (SocketAddr, Self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let coordinator = Self { run, script: Arc::new(Mutex::new(script)), heard: Arc::default() };
        let gate = RunGate::new(RunIdentity::told(run).unwrap());
        let guard = Guard::new("worker", &[PeerRole::Verifier]).of_run(&gate);
        let service = InterceptedService::new(WorkerServiceServer::new(coordinator.clone()), guard);
        tokio::spawn(server().add_service(service).serve_with_incoming(accept(listener, Security::Plain)));
        (address, coordinator)
    }

    async fn wait_for(&self, what: &str, wanted: impl FnMut(&Heard) -> bool) -> Heard {
        let mut heard = self.heard.subscribe();
        let waited = tokio::time::timeout(PATIENCE, heard.wait_for(wanted)).await;
        waited.unwrap_or_else(|_| panic!("waited in vain for {what}")).unwrap().clone()
    }

    fn say(&self, heartbeat: Result<v1::Directive, Status>) {
        self.script.lock().unwrap().heartbeats.push_back(heartbeat);
    }
}

#[tonic::async_trait]
impl WorkerService for Coordinator {
    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        let refusal = {
            let mut script = self.script.lock().unwrap();
            script.registers.pop_front().or_else(|| script.never.clone())
        };
        if let Some(refusal) = refusal {
            self.heard.send_modify(|heard| heard.refused += 1);
            return Err(refusal);
        }
        self.heard.send_modify(|heard| heard.registrations.push(request.into_inner()));
        Ok(Response::new(v1::RegisterResponse {
            worker_id: self.heard.borrow().registrations.len() as u64,
            heartbeat_interval_ms: self.script.lock().unwrap().intervals.0,
            run_id: self.run.into(),
            ..v1::RegisterResponse::default()
        }))
    }

    async fn heartbeat(&self, _: Request<v1::HeartbeatRequest>) -> Result<Response<v1::HeartbeatResponse>, Status> {
        self.heard.send_modify(|heard| heard.heartbeats += 1);
        let scripted = self.script.lock().unwrap().heartbeats.pop_front();
        let directive = scripted.unwrap_or(Ok(v1::Directive::Continue))?;
        let heartbeat_interval_ms = self.script.lock().unwrap().intervals.1;
        Ok(Response::new(v1::HeartbeatResponse { directive: directive.into(), log_level: 0, heartbeat_interval_ms }))
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        self.heard.send_modify(|heard| heard.goodbyes.push(request.into_inner().error));
        Ok(Response::new(v1::LeaveResponse {}))
    }
}

/// Serves until it is told otherwise.
#[derive(Default)]
struct Idle {
    /// What ends the next registrations.
    stops: VecDeque<Stop<JoinError>>,
    served: usize,
}

impl Worker for Idle {
    type Error = JoinError;

    async fn serve(&mut self, _: &Membership) -> Result<Infallible, Stop<JoinError>> {
        self.served += 1;
        match self.stops.pop_front() {
            Some(stop) => Err(stop),
            None => std::future::pending().await,
        }
    }
}

fn identity() -> WorkerIdentity {
    WorkerIdentity { role: Role::Verifier, name: "verifier-0".into(), collective_address: String::new() }
}

fn link(coordinator: impl ToString, run: &str) -> Link {
    let link = Link::local(coordinator.to_string(), Duration::from_secs(30));
    Link { run_id: RunIdentity::told(run).unwrap(), ..link }
}

async fn run(link: &Link, worker: &mut Idle, shutdown: &Shutdown) -> Result<Exit, JoinError> {
    let identity = identity();
    let working = work(link, &identity, shutdown, worker);
    tokio::time::timeout(PATIENCE, working).await.expect("the worker ends")
}

#[tokio::test]
async fn a_lost_registration_is_followed_by_another_and_a_dismissal_by_the_end() {
    let (address, coordinator) = Coordinator::start(OURS, Script::default()).await;
    let (link, mut role, shutdown) = (link(address, ""), Idle::default(), Shutdown::new());
    role.stops.push_back(Stop::Rejoin("the first try".into()));
    let (exit, ()) = tokio::join!(run(&link, &mut role, &shutdown), async {
        coordinator.wait_for("a second registration", |heard| heard.registrations.len() == 2).await;
        coordinator.say(Err(Status::not_found("who?")));
        coordinator.wait_for("a third registration", |heard| heard.registrations.len() == 3).await;
        coordinator.say(Ok(v1::Directive::Leave));
    });
    assert_eq!((exit.unwrap(), role.served), (Exit::Done, 3));
    let heard = coordinator.wait_for("goodbyes", |heard| heard.goodbyes.len() == 2).await;
    assert_eq!(heard.goodbyes, ["the first try", ""]);
    assert_eq!(heard.registrations[0].run_id, "", "nobody had said it");
    assert_eq!(heard.registrations[1].run_id, OURS, "the first registration did");
    assert_eq!(link.run_id.get(), Some(OURS));
}

#[tokio::test]
async fn each_answer_says_how_long_the_next_heartbeat_may_take() {
    // Without the answers' interval, the second heartbeat would come after minutes.
    let (address, coordinator) =
        Coordinator::start(OURS, Script { intervals: (600_000, 10), ..Script::default() }).await;
    let (link, mut role, shutdown) = (link(address, OURS), Idle::default(), Shutdown::new());
    let (exit, ()) = tokio::join!(run(&link, &mut role, &shutdown), async {
        coordinator.wait_for("heartbeats", |heard| heard.heartbeats > 3).await;
        coordinator.say(Ok(v1::Directive::Leave));
    });
    assert_eq!((exit.unwrap(), role.served), (Exit::Done, 1));
}

#[tokio::test]
async fn a_heartbeat_that_was_lost_is_sent_again_soon() {
    let script = Script { intervals: (600_000, 0), ..Script::default() };
    let (address, coordinator) = Coordinator::start(OURS, script).await;
    (0..2).for_each(|_| coordinator.say(Err(Status::unavailable("not now"))));
    coordinator.say(Ok(v1::Directive::Leave));
    let (link, mut role, shutdown) = (link(address, OURS), Idle::default(), Shutdown::new());
    assert_eq!(run(&link, &mut role, &shutdown).await.unwrap(), Exit::Done);
}

#[tokio::test]
async fn a_worker_waits_for_its_own_run_and_does_nothing_for_another() {
    let folder = tempfile::tempdir().unwrap();
    let point_to = |address: SocketAddr| {
        let record = format!(r#"{{"address": "{address}"}}"#);
        std::fs::write(folder.path().join("part"), record).unwrap();
        std::fs::rename(folder.path().join("part"), folder.path().join("coordinator.json")).unwrap();
    };
    let (stranger, strange) = Coordinator::start(OTHER, Script::default()).await;
    let (own, ours) = Coordinator::start(OURS, Script::default()).await;
    point_to(stranger);
    let (link, mut role, shutdown) = (link(folder.path().display(), OURS), Idle::default(), Shutdown::new());
    let (exit, ()) = tokio::join!(run(&link, &mut role, &shutdown), async {
        // The guard refuses what the service therefore never hears; this is time to ask.
        tokio::time::sleep(Duration::from_millis(300)).await;
        point_to(own);
        ours.wait_for("heartbeats", |heard| heard.heartbeats > 0).await;
        ours.say(Ok(v1::Directive::LeaveForNow));
    });
    assert_eq!((exit.unwrap(), role.served), (Exit::Again, 1));
    assert!(strange.heard.borrow().registrations.is_empty());
}

#[tokio::test]
async fn a_worker_whose_run_does_not_return_ends_for_a_restart() {
    let (address, _) = Coordinator::start(OTHER, Script::default()).await;
    let link = Link { join_timeout: Duration::from_millis(300), ..link(address, OURS) };
    let error = run(&link, &mut Idle::default(), &Shutdown::new()).await.unwrap_err();
    assert!(matches!(error, JoinError::OtherRun { .. }) && error.exit() == Exit::Again, "{error}");
    assert!(error.to_string().contains(&format!("serves run {OTHER}, this worker belongs to run {OURS}")), "{error}");
}

#[tokio::test]
async fn a_member_of_a_run_that_gave_way_to_another_looks_for_its_own() {
    let (address, coordinator) = Coordinator::start(OURS, Script::default()).await;
    let (link, mut role, shutdown) = (link(address, ""), Idle::default(), Shutdown::new());
    let (exit, ()) = tokio::join!(run(&link, &mut role, &shutdown), async {
        coordinator.wait_for("a heartbeat", |heard| heard.heartbeats > 0).await;
        coordinator.say(Err(Status::aborted("this is run b")));
        coordinator.wait_for("another registration", |heard| heard.registrations.len() == 2).await;
        coordinator.say(Ok(v1::Directive::Leave));
    });
    assert_eq!((exit.unwrap(), role.served), (Exit::Done, 2));
}

fn taken(missed_after: &str) -> Status {
    let mut status = Status::already_exists("process 7 on node-2 has it");
    status.metadata_mut().insert(HOLDER_MISSED_KEY, missed_after.parse().unwrap());
    status
}

#[tokio::test]
async fn a_name_is_asked_for_until_its_holder_is_given_up() {
    let script = Script { registers: [taken("20000"), taken("20000")].into(), ..Script::default() };
    let (address, coordinator) = Coordinator::start(OURS, script).await;
    // Shorter than the holder may be silent: it must be known whether it lives.
    let link = Link { join_timeout: Duration::from_millis(1), ..link(address, "") };
    let (mut role, shutdown) = (Idle::default(), Shutdown::new());
    let (exit, ()) = tokio::join!(run(&link, &mut role, &shutdown), async {
        coordinator.wait_for("a registration", |heard| heard.refused == 2 && heard.heartbeats > 0).await;
        coordinator.say(Ok(v1::Directive::Leave));
    });
    assert_eq!(exit.unwrap(), Exit::Done);
}

#[tokio::test]
async fn two_processes_with_one_name_end_in_one_clear_error() {
    let script = Script { never: Some(taken("100")), ..Script::default() };
    let (address, coordinator) = Coordinator::start(OURS, script).await;
    let mut role = Idle::default();
    let error = run(&link(address, ""), &mut role, &Shutdown::new()).await.unwrap_err();
    assert_eq!((error.exit(), role.served), (Exit::Config, 0));
    let said = error.to_string();
    assert!(said.contains("`verifier-0`") && said.contains("process 7 on node-2 has it"), "{said}");
    assert!(coordinator.heard.borrow().refused > 1);
    // And the one that was pushed out all the same does not push back.
    let (address, coordinator) = Coordinator::start(OURS, Script::default()).await;
    coordinator.say(Ok(v1::Directive::Replaced));
    assert_eq!(run(&link(address, ""), &mut role, &Shutdown::new()).await.unwrap(), Exit::Config);
}

#[tokio::test]
async fn a_shutdown_request_is_honoured_anywhere_in_the_loop() {
    // While nobody is there.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let shutdown = Shutdown::new();
    shutdown.request();
    assert_eq!(run(&link(nobody, ""), &mut Idle::default(), &shutdown).await.unwrap(), Exit::Again);
    // While it serves.
    let (address, coordinator) = Coordinator::start(OURS, Script::default()).await;
    let (own, mut role, shutdown) = (link(address, ""), Idle::default(), Shutdown::new());
    let (exit, ()) = tokio::join!(run(&own, &mut role, &shutdown), async {
        coordinator.wait_for("a heartbeat", |heard| heard.heartbeats > 0).await;
        shutdown.request();
    });
    assert_eq!(exit.unwrap(), Exit::Again);
    // While it waits to join again, within a grace that has begun.
    let (address, coordinator) = Coordinator::start(OURS, Script::default()).await;
    let shutdown = Shutdown::new().with_grace(Duration::from_secs(3600));
    let (own, mut role) = (link(address, ""), Idle::default());
    let (exit, ()) = tokio::join!(run(&own, &mut role, &shutdown), async {
        coordinator.wait_for("a heartbeat", |heard| heard.heartbeats > 0).await;
        shutdown.request();
        coordinator.say(Ok(v1::Directive::Register));
    });
    assert_eq!(exit.unwrap(), Exit::Again);
}

#[tokio::test]
async fn a_process_that_must_restart_ends_at_once() {
    let (address, coordinator) = Coordinator::start(OURS, Script::default()).await;
    coordinator.say(Ok(v1::Directive::Restart));
    let (own, mut role, shutdown) = (link(address, ""), Idle::default(), Shutdown::new());
    let at_once = tokio::time::timeout(PATIENCE, shutdown.at_once());
    // The loop may be stuck: who ends the process hears of it on another way.
    let (exit, at_once) = tokio::join!(run(&own, &mut role, &shutdown), at_once);
    assert_eq!((exit.unwrap(), at_once.unwrap()), (Exit::Again, Exit::Again));
}
