//! A verifier that is a service: one of `proto/pacs/v1/custom_verifier.proto` in the same process.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pacs_protocol::v1;
use pacs_protocol::v1::custom_verifier_service_server::{CustomVerifierService, CustomVerifierServiceServer};
use pacs_spec::{JudgeKind, JudgeSpec};
use pacs_types::{Outcome, Verdict};
use pacs_verifier::{Judge, Judgement, Task};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Does what the response says.
#[derive(Clone, Default)]
struct Custom {
    calls: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl CustomVerifierService for Custom {
    async fn verify(&self, request: Request<v1::VerifyRequest>) -> Result<Response<v1::VerifyResponse>, Status> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let v1::VerifyRequest { question, response, gold } = request.into_inner();
        assert_eq!((question.as_str(), gold.as_str()), ("1 + 1?", "2"));
        let outcome = match response.as_str() {
            "right" => v1::Outcome::Correct,
            "half right" => v1::Outcome::Wrong,
            "nothing" => v1::Outcome::Unspecified,
            "a bug" => return Err(Status::internal("division by zero")),
            "hang" => std::future::pending().await,
            "busy once" if call == 0 => return Err(Status::unavailable("starting")),
            "always busy" => return Err(Status::unavailable("overloaded")),
            _ => v1::Outcome::Correct,
        };
        let half = (response == "half right").then_some(0.5);
        Ok(Response::new(v1::VerifyResponse {
            outcome: outcome.into(),
            label: half,
            reward: half.map(|half| -half),
            extracted: Some(response),
            rule: format!("call {call}"),
            version: "custom 1".into(),
        }))
    }
}

async fn serve(custom: Custom) -> SocketAddr {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
    let address = incoming.local_addr().expect("bound");
    let server = tonic::transport::Server::builder().add_service(CustomVerifierServiceServer::new(custom));
    tokio::spawn(server.serve_with_incoming(incoming));
    address
}

fn judge(address: SocketAddr, timeout: Duration, cache_entries: usize) -> Judge {
    let by = JudgeKind::Grpc(address.to_string());
    Judge::new(&JudgeSpec { by, timeout }, 2, cache_entries).expect("a good address")
}

async fn verify(judge: &Judge, response: &str) -> Judgement {
    let task = Task { question: "1 + 1?".into(), response: response.into(), gold: "2".into() };
    tokio::time::timeout(Duration::from_secs(60), judge.verify(Arc::new(task))).await.expect("it ends")
}

const PATIENT: Duration = Duration::from_secs(30);

#[tokio::test]
async fn the_service_decides() {
    let judge = judge(serve(Custom::default()).await, PATIENT, 0);
    let Judgement { verdict, cached, .. } = verify(&judge, "right").await;
    let expected = |outcome, label, reward, text: &str, rule: &str| Verdict {
        outcome,
        label,
        reward,
        extracted: Some(text.into()),
        rule: rule.into(),
    };
    assert_eq!((verdict, cached), (expected(Outcome::Correct, 1.0, 1.0, "right", "call 0"), false));
    let verdict = verify(&judge, "half right").await.verdict;
    assert_eq!(verdict, expected(Outcome::Wrong, 0.5, -0.5, "half right", "call 1"));
}

#[tokio::test]
async fn verdicts_are_remembered_when_the_job_says_so() {
    let judge = judge(serve(Custom::default()).await, PATIENT, 100);
    let first = verify(&judge, "right").await;
    let again = verify(&judge, "right").await;
    assert_eq!((again.verdict, again.cached, again.elapsed), (first.verdict, true, Duration::ZERO));
    assert_eq!(verify(&judge, "other").await.verdict.rule, "call 1");
    // What failed is asked again.
    for call in 2..4 {
        assert_eq!(verify(&judge, "a bug").await.verdict.outcome, Outcome::Failed, "call {call}");
    }
    assert_eq!(verify(&judge, "another").await.verdict.rule, "call 4");
}

#[tokio::test]
async fn what_goes_wrong_is_a_failure_with_its_reason() {
    let address = serve(Custom::default()).await;
    let patient = judge(address, PATIENT, 0);
    let failed = async |judge: &Judge, response: &str, outcome: Outcome| {
        let verdict = verify(judge, response).await.verdict;
        assert_eq!((verdict.outcome, verdict.label, verdict.reward), (outcome, 0.0, 0.0), "{verdict:?}");
        verdict.rule
    };
    let bug = failed(&patient, "a bug", Outcome::Failed).await;
    assert_eq!(bug, format!("call {address}: Internal: division by zero"));
    let nothing = failed(&patient, "nothing", Outcome::Failed).await;
    assert_eq!(nothing, "the answer of the verifier is no verdict: field `outcome`: is not specified");
    let impatient = judge(address, Duration::from_millis(200), 0);
    assert_eq!(failed(&impatient, "hang", Outcome::TimedOut).await, "no verdict within 0.2 s");
    let busy = failed(&impatient, "always busy", Outcome::Failed).await;
    assert_eq!(busy, format!("call {address}: Unavailable: overloaded"));
}

#[tokio::test]
async fn an_outage_is_waited_for() {
    let custom = Custom::default();
    let judge = judge(serve(custom.clone()).await, PATIENT, 0);
    assert_eq!(verify(&judge, "busy once").await.verdict.rule, "call 1");

    // Nobody listens there yet.
    let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = port.local_addr().expect("bound");
    drop(port);
    let judge = self::judge(address, PATIENT, 0);
    let late = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let incoming = TcpIncoming::bind(address).expect("still free");
        let server = tonic::transport::Server::builder().add_service(CustomVerifierServiceServer::new(custom.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
    };
    let (judgement, ()) = tokio::join!(verify(&judge, "right"), late);
    assert_eq!(judgement.verdict.outcome, Outcome::Correct, "{judgement:?}");
}
