//! A verifier that is a service: one of `proto/pacs/v1/custom_verifier.proto` in the same process.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pacs_protocol::v1;
use pacs_protocol::v1::custom_verifier_service_server::{CustomVerifierService, CustomVerifierServiceServer};
use pacs_spec::{JudgeKind, JudgeSpec, ServiceAddress};
use pacs_types::{Outcome, Verdict};
use pacs_verifier::{Judge, Judgement, Task};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
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
    judge_of(ServiceAddress { address: address.to_string(), ..ServiceAddress::default() }, timeout, cache_entries)
}

fn judge_of(service: ServiceAddress, timeout: Duration, cache_entries: usize) -> Judge {
    let by = JudgeKind::Grpc(service);
    Judge::new(&JudgeSpec { by, timeout }, None, 2, cache_entries).expect("a good address")
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
async fn errors_are_failures_with_their_reason() {
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
    assert_eq!(nothing, "the answer of the verifier is not a verdict: field `outcome`: is not specified");
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

/// Answers by TLS in front of a service, as `name`; returns the port and the file with the authority.
async fn behind_tls(service: SocketAddr, name: &str, folder: &Path) -> (u16, String) {
    let (authority_key, key) = (KeyPair::generate().expect("a key"), KeyPair::generate().expect("a key"));
    let mut parameters = CertificateParams::new(Vec::new()).expect("no names");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = parameters.self_signed(&authority_key).expect("an authority");
    let issuer = Issuer::new(parameters, authority_key);
    let parameters = CertificateParams::new(vec![name.to_owned()]).expect("a name");
    let certificate = parameters.signed_by(&key, &issuer).expect("a certificate");
    let ca = folder.join("ca.crt");
    std::fs::write(&ca, authority.pem()).expect("room");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .expect("they belong together");
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut secured = acceptor.accept(stream).await?;
                let mut inner = TcpStream::connect(service).await?;
                tokio::io::copy_bidirectional(&mut secured, &mut inner).await
            });
        }
    });
    (port, ca.display().to_string())
}

#[tokio::test]
async fn a_service_with_a_certificate_is_spoken_to_by_tls_and_a_stranger_is_not() {
    let folder = tempfile::tempdir().expect("a folder");
    let service = serve(Custom::default()).await;
    let (port, ca) = behind_tls(service, "localhost", folder.path()).await;
    let at = |host: &str, ca: Option<&String>| ServiceAddress {
        address: format!("{host}:{port}"),
        ca: ca.cloned(),
        plain_text: false,
    };
    let judge = judge_of(at("localhost", Some(&ca)), PATIENT, 0);
    assert_eq!(verify(&judge, "right").await.verdict.outcome, Outcome::Correct);
    // A certificate for another host, one of another authority, and a client that speaks plain text.
    let other = folder.path().join("other");
    std::fs::create_dir(&other).expect("room");
    let (_, stranger) = behind_tls(service, "localhost", &other).await;
    for service in [at("127.0.0.1", Some(&ca)), at("localhost", Some(&stranger)), at("localhost", None)] {
        let judge = judge_of(service.clone(), Duration::from_millis(400), 0);
        let verdict = verify(&judge, "right").await.verdict;
        assert!(matches!(verdict.outcome, Outcome::Failed | Outcome::TimedOut), "{service:?}: {verdict:?}");
    }
    let by = JudgeKind::Grpc(at("localhost", Some(&"/nowhere.crt".to_owned())));
    let missing = Judge::new(&JudgeSpec { by, timeout: PATIENT }, None, 1, 0).map(|_| ()).expect_err("no such file");
    assert!(missing.to_string().contains("/nowhere.crt"), "{missing}");
}

#[tokio::test]
async fn plain_text_stays_on_the_machine_unless_it_is_allowed() {
    let service = |plain_text| ServiceAddress { address: "192.0.2.1:9".into(), ca: None, plain_text };
    let limit = Duration::from_millis(300);
    let refused = verify(&judge_of(service(false), limit, 0), "right").await.verdict;
    assert_eq!(refused.outcome, Outcome::Failed);
    assert!(refused.rule.contains("`verifier.ca`") && refused.rule.contains("192.0.2.1:9"), "{refused:?}");
    // Nobody is there, but that is all that is wrong.
    let tried = verify(&judge_of(service(true), limit, 0), "right").await.verdict;
    assert!(tried.outcome != Outcome::Correct && !tried.rule.contains("`verifier.ca`"), "{tried:?}");
}
