//! Calls into events, answers into messages: one file per service.

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

/// Implements the services: the run, which start of the job it is, its identifier, and which names were refused lately.
#[derive(Clone, Debug)]
pub(crate) struct Services(Shared, Arc<str>, Arc<str>, Refusals);

impl Services {
    /// The trace of a group, for the log lines that are about it.
    fn trace_id(&self, group: u64) -> TraceId {
        TraceContext::of_group(&self.2, group).trace_id()
    }

    /// Without a server.
    pub(crate) fn new(shared: &Shared, run_id: &str) -> Self {
        Self(shared.clone(), Arc::from(""), Arc::from(run_id), Refusals::default())
    }
}

/// All services of the run of `gate`; `attempt` is which start of the job it is, empty when that does not matter.
///
/// Workers name their run with every call; operators mean whatever runs at the address that they give.
pub(crate) fn router(shared: &Shared, observer: &Observer, attempt: &str, gate: &RunGate) -> Router<Called> {
    let attempt = Arc::<str>::from(attempt);
    let refusals = Refusals::default();
    let run_id = Arc::<str>::from(gate.run().get().unwrap_or_default());
    // A message in memory may take many times what it takes on the wire, so each service takes what its calls need. Those of
    // workers are texts and numbers, which do not grow; what is too long is refused by name.
    macro_rules! service {
        ($server:ident, $most_bytes:expr, $guard:expr) => {{
            let services = Services(shared.clone(), Arc::clone(&attempt), Arc::clone(&run_id), refusals.clone());
            let server = $server::new(services)
                .max_decoding_message_size($most_bytes)
                .max_encoding_message_size(MAX_MESSAGE_BYTES);
            InterceptedService::new(server, $guard)
        }};
    }
    // Room for more than a lease allows, so that what is too much can be named.
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

/// The machine answered with something that does not belong to the event.
fn wrong_answer() -> Status {
    Status::internal("the run's state machine gave an answer of another kind")
}

/// A field that must be there.
fn required<T>(field: &'static str, value: Option<T>) -> Result<T, Status> {
    value.ok_or_else(|| Status::invalid_argument(format!("field `{field}` is missing")))
}

/// Most bytes of an operator's call.
const SMALL_CALL_BYTES: usize = 64 << 10;
/// Most bytes of a name, a host or an address that a worker gives.
const MOST_NAME: usize = 256;
/// Most bytes of a sentence that a worker says; the rest is cut off.
const MOST_SENTENCE: usize = 4096;

/// Refuses a name that is too long, or that moves the cursor of a terminal: it is passed on to others, and kept in the journal.
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

/// What a worker says, as far as anybody would read it.
fn sentence(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MOST_SENTENCE));
    text
}
