//! The gRPC services: they turn calls into events and answers into messages, one file per service.

mod learner;
mod observe;
mod operator;
mod refusals;
mod rollout;
mod verifier;
mod worker;

use std::sync::Arc;

use pacs_protocol::v1::learner_service_server::LearnerServiceServer;
use pacs_protocol::v1::observe_service_server::ObserveServiceServer;
use pacs_protocol::v1::operator_service_server::OperatorServiceServer;
use pacs_protocol::v1::rollout_service_server::RolloutServiceServer;
use pacs_protocol::v1::verifier_service_server::VerifierServiceServer;
use pacs_protocol::v1::worker_service_server::WorkerServiceServer;
use pacs_protocol::{ANSWER_BYTES, DESCRIPTORS, MAX_MESSAGE_BYTES, MAX_VERDICTS_BYTES};
use pacs_runtime::net::PeerRole::{Learner, Operator, Rollout, Verifier};
use pacs_runtime::net::{Called, Guard, RunGate, server};
use pacs_runtime::trace::{TraceContext, TraceId};
use tonic::Status;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::Router;

pub(crate) use self::learner::keep_result;
use self::refusals::Refusals;
use crate::driver::Shared;
use crate::observe::Observer;

/// Implements the services. Fields: the run, its start number, its id, and recently refused names.
#[derive(Clone, Debug)]
pub(crate) struct Services(Shared, Arc<str>, Arc<str>, Refusals);

impl Services {
    /// Trace id of a group, for log lines about it.
    fn trace_id(&self, group: u64) -> TraceId {
        TraceContext::of_group(&self.2, group).trace_id()
    }

    /// The services without a server.
    pub(crate) fn new(shared: &Shared, run_id: &str) -> Self {
        Self(shared.clone(), Arc::from(""), Arc::from(run_id), Refusals::default())
    }
}

/// All services of the run of `gate`. `attempt` is the start of the job; empty if it is not checked.
///
/// Workers name their run in every call; operators mean whichever run serves at the address.
pub(crate) fn router(shared: &Shared, observer: &Observer, attempt: &str, gate: &RunGate) -> Router<Called> {
    let attempt = Arc::<str>::from(attempt);
    let refusals = Refusals::default();
    let run_id = Arc::<str>::from(gate.run().get().unwrap_or_default());
    // A decoded message can take many times its encoded size, so each service has a limit of its own. Worker calls
    // consist of texts and numbers of bounded size; what exceeds a bound is refused by name.
    macro_rules! service {
        ($server:ident, $most_bytes:expr, $guard:expr) => {{
            let services = Services(shared.clone(), Arc::clone(&attempt), Arc::clone(&run_id), refusals.clone());
            let server = $server::new(services)
                .max_decoding_message_size($most_bytes)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            InterceptedService::new(server, $guard)
        }};
    }
    // More than a lease allows, so that an oversized sample can be refused by name.
    let samples = shared.door().sample_bytes().max(ANSWER_BYTES);
    let member = |service, allowed| Guard::new(service, allowed).of_run(gate);
    let observe = ObserveServiceServer::new(observer.clone())
        .max_decoding_message_size(SMALL_CALL_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .build_v1()
        .expect("the descriptors come from the compiler of these very messages")
        .max_decoding_message_size(SMALL_CALL_BYTES);
    server()
        .initial_stream_window_size(Some(4 << 20))
        .initial_connection_window_size(Some(16 << 20))
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(std::time::Duration::from_secs(20)))
        .add_service(service!(WorkerServiceServer, MAX_MESSAGE_BYTES, member("worker", &[Learner, Rollout, Verifier])))
        .add_service(service!(RolloutServiceServer, samples, member("rollout", &[Rollout])))
        .add_service(service!(VerifierServiceServer, MAX_VERDICTS_BYTES, member("verifier", &[Verifier])))
        .add_service(service!(LearnerServiceServer, ANSWER_BYTES, member("learner", &[Learner])))
        .add_service(service!(OperatorServiceServer, SMALL_CALL_BYTES, Guard::new("operator", &[Operator])))
        .add_service(InterceptedService::new(observe, Guard::new("observe", &[Operator])))
        .add_service(InterceptedService::new(reflection, Guard::new("reflection", &[Operator])))
}

/// The error for an answer of the machine that does not fit the event.
fn wrong_answer() -> Status {
    Status::internal("the run's state machine gave an answer of another kind")
}

/// The value of a mandatory field.
fn required<T>(field: &'static str, value: Option<T>) -> Result<T, Status> {
    value.ok_or_else(|| Status::invalid_argument(format!("field `{field}` is missing")))
}

/// Largest call of an operator, in bytes.
const SMALL_CALL_BYTES: usize = 64 << 10;
/// Longest name, host or address of a worker, in bytes.
const MOST_NAME: usize = 256;
/// Bytes of a worker's sentence that are kept.
const MOST_SENTENCE: usize = 4096;

/// Refuses a name that is too long or contains control characters, because names are shown in
/// terminals and kept in the journal.
fn check_name(field: &'static str, name: &str) -> Result<(), Status> {
    match name.len() {
        0..=MOST_NAME if name.chars().any(char::is_control) => {
            Err(Status::invalid_argument(format!("field `{field}` holds a control character")))
        }
        0..=MOST_NAME => Ok(()),
        bytes => {
            let problem = format!("field `{field}` has {bytes} bytes, expected at most {MOST_NAME}");
            Err(Status::invalid_argument(problem))
        }
    }
}

/// A worker's sentence, cut to its bound.
fn sentence(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MOST_SENTENCE));
    text
}
