//! The worker against a scripted coordinator in the same process.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pacs_protocol::v1;
use pacs_protocol::v1::verifier_service_server::{VerifierService, VerifierServiceServer};
use pacs_protocol::v1::worker_service_server::{WorkerService, WorkerServiceServer};
use pacs_runtime::{Exit, JoinError, Link, Shutdown};
use pacs_verifier::{VerifierError, VerifierOptions, run};
use tokio::sync::watch;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

const RUN: &str = "0123456789abcdef0123456789abcdef";
const SPEC: &str = r#"
name = "test"
[model]
path = "models/tiny"
[data.train.generator]
task = "addition"
[evaluation]
every_steps = 0
before = false
after = false
"#;

/// What the coordinator was told, in order.
#[derive(Clone, Debug, Default)]
struct Heard {
    registrations: Vec<v1::RegisterRequest>,
    activities: Vec<String>,
    verdicts: Vec<(u64, v1::TaskVerdict)>,
    goodbyes: Vec<v1::LeaveRequest>,
    leases: usize,
}

/// What the coordinator answers, in order; after the end it has no work and nothing against the worker.
#[derive(Default)]
struct Script {
    job_spec: Option<&'static str>,
    heartbeats: VecDeque<Result<v1::Directive, Status>>,
    leases: VecDeque<Result<Vec<v1::VerifyTask>, Status>>,
    submits: VecDeque<Status>,
    registers: VecDeque<Status>,
}

#[derive(Clone)]
struct Coordinator {
    script: Arc<Mutex<Script>>,
    heard: Arc<watch::Sender<Heard>>,
}

impl Coordinator {
    /// Serves the script; gives the address and a handle.
    async fn start(script: Script) -> (String, Self) {
        let coordinator =
            Self { script: Arc::new(Mutex::new(script)), heard: Arc::new(watch::Sender::new(Heard::default())) };
        let incoming = TcpIncoming::bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
        let address = incoming.local_addr().expect("bound").to_string();
        let server = tonic::transport::Server::builder()
            .add_service(WorkerServiceServer::new(coordinator.clone()))
            .add_service(VerifierServiceServer::new(coordinator.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        (address, coordinator)
    }

    fn script<T>(&self, change: impl FnOnce(&mut Script) -> T) -> T {
        change(&mut self.script.lock().expect("no test panics while it holds the script"))
    }

    fn hear(&self, change: impl FnOnce(&mut Heard)) {
        self.heard.send_modify(change);
    }

    async fn wait_for(&self, what: &str, wanted: impl FnMut(&Heard) -> bool) -> Heard {
        let mut heard = self.heard.subscribe();
        let waited = tokio::time::timeout(Duration::from_secs(20), heard.wait_for(wanted)).await;
        waited.unwrap_or_else(|_| panic!("waited in vain for {what}")).expect("the sender lives").clone()
    }
}

#[tonic::async_trait]
impl WorkerService for Coordinator {
    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        if let Some(status) = self.script(|script| script.registers.pop_front()) {
            return Err(status);
        }
        self.hear(|heard| heard.registrations.push(request.into_inner()));
        Ok(Response::new(v1::RegisterResponse {
            worker_id: self.heard.borrow().registrations.len() as u64,
            job_spec: self.script(|script| script.job_spec).unwrap_or(SPEC).to_owned(),
            run_dir: "/runs/test".into(),
            heartbeat_interval_ms: 10,
            run_id: RUN.into(),
        }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        self.hear(|heard| heard.activities.push(request.into_inner().activity));
        let directive = self.script(|script| script.heartbeats.pop_front()).unwrap_or(Ok(v1::Directive::Continue))?;
        Ok(Response::new(v1::HeartbeatResponse { directive: directive.into(), ..Default::default() }))
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        self.hear(|heard| heard.goodbyes.push(request.into_inner()));
        Ok(Response::new(v1::LeaveResponse {}))
    }
}

#[tonic::async_trait]
impl VerifierService for Coordinator {
    async fn lease_samples(
        &self,
        request: Request<v1::LeaseSamplesRequest>,
    ) -> Result<Response<v1::LeaseSamplesResponse>, Status> {
        self.hear(|heard| heard.leases += 1);
        match self.script(|script| script.leases.pop_front()) {
            Some(tasks) => Ok(Response::new(v1::LeaseSamplesResponse { tasks: tasks? })),
            None => {
                // The long poll of a coordinator without work.
                tokio::time::sleep(Duration::from_millis(request.into_inner().wait_ms.into())).await;
                Ok(Response::new(v1::LeaseSamplesResponse::default()))
            }
        }
    }

    async fn submit_verdicts(
        &self,
        request: Request<v1::SubmitVerdictsRequest>,
    ) -> Result<Response<v1::SubmitVerdictsResponse>, Status> {
        if let Some(status) = self.script(|script| script.submits.pop_front()) {
            return Err(status);
        }
        let request = request.into_inner();
        let verdicts = request.verdicts.into_iter().map(|verdict| (request.worker_id, verdict));
        self.hear(|heard| heard.verdicts.extend(verdicts));
        Ok(Response::new(v1::SubmitVerdictsResponse::default()))
    }
}

fn task(index: u32, response: &str, gold: &str) -> v1::VerifyTask {
    let (lease_id, group_id) = (100 + u64::from(index), 7);
    let (response, gold) = (response.into(), gold.into());
    v1::VerifyTask {
        lease_id,
        group_id,
        sample_index: index,
        response,
        gold,
        question: String::new(),
        answer_tokens: 9,
        verifier: String::new(),
    }
}

fn options(coordinator: &str) -> VerifierOptions {
    VerifierOptions {
        link: Link::local(coordinator, Duration::from_secs(10)),
        name: "verifier-0".into(),
        threads: 2,
        guard: None,
    }
}

/// Runs the worker while `test` runs, which has to see to it that the worker ends.
async fn with_worker(
    address: &str,
    shutdown: &Shutdown,
    test: impl Future<Output = ()>,
) -> Result<Exit, VerifierError> {
    let worker = tokio::time::timeout(Duration::from_secs(30), run(options(address), shutdown.clone()));
    let (ended, ()) = tokio::join!(worker, test);
    ended.expect("the worker ends")
}

#[tokio::test]
async fn grades_what_it_leases_and_leaves_when_dismissed() {
    let samples: Vec<_> = (0..12).map(|i| task(i, &format!("so \\boxed{{{i}}}"), "3")).collect();
    let others = vec![task(12, "I give up.", "3"), task(13, "\\boxed{3}", "(1, 2")];
    let script = Script { leases: [Ok(samples), Ok(vec![]), Ok(others)].into(), ..Script::default() };
    let (address, coordinator) = Coordinator::start(script).await;
    let exit = with_worker(&address, &Shutdown::new(), async {
        let heard = coordinator.wait_for("all verdicts", |heard| heard.verdicts.len() == 14).await;
        for (worker, graded) in &heard.verdicts {
            let verdict = graded.verdict.as_ref().expect("every task has a verdict");
            let expected = match graded.sample_index {
                3 => v1::Outcome::Correct,
                12 => v1::Outcome::Unparsable,
                13 => v1::Outcome::Failed,
                _ => v1::Outcome::Wrong,
            };
            assert_eq!(verdict.outcome(), expected, "{graded:?}");
            assert_eq!((*worker, graded.group_id, graded.lease_id), (1, 7, 100 + u64::from(graded.sample_index)));
        }
        coordinator
            .wait_for("an idle worker", |heard| heard.activities.last().is_some_and(|last| last == "idle"))
            .await;
        coordinator.script(|script| script.heartbeats.push_back(Ok(v1::Directive::Leave)));
    })
    .await;
    assert_eq!(exit.expect("no error"), Exit::Done);
    let heard = coordinator.wait_for("a goodbye", |heard| !heard.goodbyes.is_empty()).await;
    assert_eq!(heard.goodbyes[0].error, "");
    let [registration] = &heard.registrations[..] else { panic!("one registration: {:?}", heard.registrations) };
    assert_eq!((registration.role(), registration.name.as_str()), (v1::Role::Verifier, "verifier-0"));
}

#[tokio::test]
async fn registers_again_when_its_registration_lapsed() {
    let (address, coordinator) = Coordinator::start(Script::default()).await;
    let shutdown = Shutdown::new();
    let exit = with_worker(&address, &shutdown, async {
        coordinator.wait_for("a heartbeat", |heard| !heard.activities.is_empty()).await;
        coordinator.script(|script| {
            script.heartbeats.push_back(Err(Status::not_found("who are you?")));
            // The first try to register again meets a coordinator that is not ready.
            script.registers.push_back(Status::unavailable("restoring the journal"));
        });
        coordinator.wait_for("a second registration", |heard| heard.registrations.len() == 2).await;
        coordinator.wait_for("a lease of the second", |heard| heard.leases >= 2).await;
        // The directive says the same as an unknown heartbeat.
        coordinator.script(|script| script.heartbeats.push_back(Ok(v1::Directive::Register)));
        coordinator.script(|script| script.leases.push_back(Ok(vec![task(0, "\\boxed{5}", "5")])));
        let heard = coordinator.wait_for("a verdict", |heard| !heard.verdicts.is_empty()).await;
        assert_eq!(heard.verdicts[0].0, 3, "handed in by the third registration");
        shutdown.request();
    })
    .await;
    assert_eq!(exit.expect("no error"), Exit::Again);
}

#[tokio::test]
async fn registers_again_when_a_lease_is_refused_as_unknown() {
    let leases = [Err(Status::not_found("unknown worker")), Ok(vec![task(0, "\\boxed{5}", "5")])].into();
    let (address, coordinator) = Coordinator::start(Script { leases, ..Script::default() }).await;
    let shutdown = Shutdown::new();
    let exit = with_worker(&address, &shutdown, async {
        let heard = coordinator.wait_for("a verdict", |heard| !heard.verdicts.is_empty()).await;
        assert_eq!((heard.registrations.len(), heard.verdicts[0].0), (2, 2));
        shutdown.request();
    })
    .await;
    assert_eq!(exit.expect("no error"), Exit::Again);
}

#[tokio::test]
async fn transient_errors_are_retried_with_the_same_registration() {
    let leases = [Err(Status::unavailable("busy")), Ok(vec![task(0, "\\boxed{5}", "5")])].into();
    let submits = [Status::internal("disk"), Status::deadline_exceeded("slow")].into();
    let (address, coordinator) = Coordinator::start(Script { leases, submits, ..Script::default() }).await;
    let shutdown = Shutdown::new();
    let exit = with_worker(&address, &shutdown, async {
        let heard = coordinator.wait_for("a verdict", |heard| !heard.verdicts.is_empty()).await;
        assert_eq!((heard.registrations.len(), heard.verdicts.len()), (1, 1));
        shutdown.request();
    })
    .await;
    assert_eq!(exit.expect("no error"), Exit::Again);
}

#[tokio::test]
async fn a_final_refusal_ends_the_worker_with_its_reason() {
    let leases = [Err(Status::permission_denied("not a verifier"))].into();
    let (address, coordinator) = Coordinator::start(Script { leases, ..Script::default() }).await;
    let error = with_worker(&address, &Shutdown::new(), async {}).await.expect_err("refused");
    assert_eq!(error.to_string(), "call LeaseSamples of the coordinator: PermissionDenied: not a verifier");
    let heard = coordinator.wait_for("a goodbye", |heard| !heard.goodbyes.is_empty()).await;
    assert_eq!(heard.goodbyes[0].error, error.to_string());
}

#[tokio::test]
async fn a_spec_that_it_cannot_read_ends_the_worker() {
    let script = Script { job_spec: Some("name = 3"), ..Script::default() };
    let (address, coordinator) = Coordinator::start(script).await;
    let error = with_worker(&address, &Shutdown::new(), async {}).await.expect_err("unreadable");
    assert!(matches!(error, VerifierError::Spec(_)), "{error}");
    let heard = coordinator.wait_for("a goodbye", |heard| !heard.goodbyes.is_empty()).await;
    assert_eq!(heard.goodbyes[0].error, error.to_string());
}

#[tokio::test]
async fn an_unreachable_coordinator_is_an_error_after_the_join_timeout() {
    // A port that was just given back refuses connections.
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let join_timeout = Duration::from_millis(300);
    let started = Instant::now();
    let options = VerifierOptions { link: Link::local(port.to_string(), join_timeout), ..options(&port.to_string()) };
    let error = tokio::time::timeout(Duration::from_secs(20), run(options, Shutdown::new())).await;
    let error = error.expect("ends").expect_err("nobody is there");
    assert!(started.elapsed() >= join_timeout);
    assert!(matches!(error, VerifierError::Join(JoinError::Unreachable { .. })), "{error}");
    // The address is in the cause, which whoever prints the error adds.
    let said = pacs_runtime::chain(&error);
    assert!(said.contains(&port.to_string()), "{said}");
}

#[tokio::test]
async fn shutdown_ends_a_worker_that_still_looks_for_its_coordinator() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
    let shutdown = Shutdown::new();
    shutdown.request();
    assert_eq!(run(options(&port.to_string()), shutdown).await.expect("no error"), Exit::Again);
}
