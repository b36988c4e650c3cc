use std::path::Path;
use std::time::Duration;

use pacs_protocol::v1::custom_verifier_service_client::CustomVerifierServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_runtime::net::{Trust, service_channel};
use pacs_runtime::{CallError, Policy};
use pacs_spec::ServiceAddress;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::Channel;

use crate::fault::Fault;
use crate::judge::Answer;
use crate::opinion::Opinion;
use crate::{Task, VerifierError};

/// Waits between two tries: a verification has little time.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// A service of the user's own.
pub(crate) struct Service {
    client: CustomVerifierServiceClient<Channel>,
    address: String,
    limit: Duration,
    calls: Semaphore,
}

impl Service {
    pub(crate) fn new(service: &ServiceAddress, limit: Duration, concurrency: usize) -> Result<Self, VerifierError> {
        let ServiceAddress { address, ca, plain_text } = service;
        let refused = |problem: String| VerifierError::Address { address: address.clone(), problem };
        let trust = match (ca, plain_text) {
            (Some(ca), _) => Trust::in_file(Path::new(ca)).map_err(|error| refused(error.to_string()))?,
            (None, true) => Trust::PlainText,
            (None, false) => Trust::Loopback(not_in_plain_text),
        };
        let channel = service_channel(address, &trust).map_err(|error| refused(error.to_string()))?;
        let client = CustomVerifierServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { client, address: address.clone(), limit, calls: Semaphore::new(concurrency) })
    }

    /// Asks the service; an outage is waited for as long as the verification may take.
    pub(crate) async fn verify(&self, task: &Task) -> (Result<Answer, Fault>, Duration) {
        let _permit = self.calls.acquire().await.expect("the semaphore is never closed");
        let started = Instant::now();
        let fault = |code, message| Fault::Service { address: self.address.clone(), code, message };
        let answer = match tokio::time::timeout(self.limit, self.call(task)).await {
            Ok(Ok(response)) => read(response),
            Ok(Err(CallError::Refused { code: Code::DeadlineExceeded, .. })) | Err(_) => Err(Fault::Late(self.limit)),
            Ok(Err(CallError::Refused { code, message, .. })) => Err(fault(code, message)),
            // The last refusal says more than that time ran out.
            Ok(Err(CallError::OutOfPatience { last, .. })) => Err(fault(Code::Unavailable, last)),
            Ok(Err(error @ (CallError::Gone { .. } | CallError::OtherRun { .. }))) => {
                Err(fault(Code::Unknown, error.to_string()))
            }
        };
        (answer, started.elapsed())
    }

    async fn call(&self, task: &Task) -> Result<v1::VerifyResponse, CallError> {
        let Task { question, response, gold } = task.clone();
        let request = v1::VerifyRequest { question, response, gold };
        let policy = Policy::of_service("Verify", self.limit).waits(FIRST_WAIT, LONGEST_WAIT);
        let call = || {
            let mut client = self.client.clone();
            let request = request.clone();
            async move { client.verify(request).await }
        };
        policy.run(call).await
    }
}

fn not_in_plain_text(address: String) -> String {
    format!(
        "{address} is not on this machine: give `verifier.ca` (--ca), the authorities of its certificate, or allow plain text with \
         `verifier.plain_text = true` (--plain-text)"
    )
}

fn read(response: v1::VerifyResponse) -> Result<Answer, Fault> {
    let garbage = |problem: String| Fault::Garbage { problem };
    let outcome =
        response.outcome().try_into().map_err(|error: pacs_protocol::WireError| garbage(error.to_string()))?;
    let v1::VerifyResponse { label, reward, extracted, rule, version, .. } = response;
    let opinion = Opinion { outcome, label, reward, extracted, rule: Some(rule) };
    Ok(Answer { verdict: opinion.verdict("grpc")?, version: version.into() })
}
