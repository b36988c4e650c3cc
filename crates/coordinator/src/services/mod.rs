//! Calls into events, answers into messages: one file per service.

mod learner;
mod operator;
mod rollout;
mod verifier;
mod worker;

use pacs_protocol::MAX_MESSAGE_BYTES;
use pacs_protocol::v1::learner_service_server::LearnerServiceServer;
use pacs_protocol::v1::operator_service_server::OperatorServiceServer;
use pacs_protocol::v1::rollout_service_server::RolloutServiceServer;
use pacs_protocol::v1::verifier_service_server::VerifierServiceServer;
use pacs_protocol::v1::worker_service_server::WorkerServiceServer;
use tonic::Status;
use tonic::transport::Server;
use tonic::transport::server::Router;

pub(crate) use self::learner::keep_result;
use crate::driver::Shared;

/// Implements the services.
#[derive(Clone, Debug)]
pub(crate) struct Services(Shared);

impl Services {
    /// Without a server.
    pub(crate) fn new(shared: &Shared) -> Self {
        Self(shared.clone())
    }

    /// Samples that the run holds.
    pub(crate) fn samples_in_flight(&self) -> usize {
        self.0.lock().machine.present().count()
    }

    /// Writes what is left of the journal and takes nothing more.
    pub(crate) fn forget(&self) {
        self.0.lock().journal.close();
    }
}

/// All services of a run.
pub(crate) fn router(shared: &Shared) -> Router {
    macro_rules! service {
        ($server:ident) => {
            $server::new(Services(shared.clone()))
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES)
        };
    }
    Server::builder()
        .initial_stream_window_size(Some(4 << 20))
        .initial_connection_window_size(Some(16 << 20))
        .http2_keepalive_interval(Some(std::time::Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(std::time::Duration::from_secs(20)))
        .add_service(service!(WorkerServiceServer))
        .add_service(service!(RolloutServiceServer))
        .add_service(service!(VerifierServiceServer))
        .add_service(service!(LearnerServiceServer))
        .add_service(service!(OperatorServiceServer))
}

/// The machine answered with something that does not belong to the event.
fn wrong_answer() -> Status {
    Status::internal("the run's state machine gave an answer of another kind")
}

/// A field that must be there.
fn required<T>(field: &'static str, value: Option<T>) -> Result<T, Status> {
    value.ok_or_else(|| Status::invalid_argument(format!("field `{field}` is missing")))
}
