use std::path::Path;
use std::time::Duration;

use pacs_protocol::v1::custom_verifier_service_client::CustomVerifierServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_runtime::Backoff;
use pacs_runtime::net::{Trust, service_channel};
use pacs_spec::ServiceAddress;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::fault::Fault;
use crate::judge::Answer;
use crate::opinion::Opinion;
use crate::{Task, VerifierError};

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
        let answer = match tokio::time::timeout(self.limit, self.call(task, started + self.limit)).await {
            Ok(Ok(response)) => read(response),
            Ok(Err(status)) if status.code() == Code::DeadlineExceeded => Err(Fault::Late(self.limit)),
            Ok(Err(status)) => Err(Fault::Service {
                address: self.address.clone(),
                code: status.code(),
                message: status.message().to_owned(),
            }),
            Err(_) => Err(Fault::Late(self.limit)),
        };
        (answer, started.elapsed())
    }

    async fn call(&self, task: &Task, deadline: Instant) -> Result<v1::VerifyResponse, Status> {
        let Task { question, response, gold } = task.clone();
        let request = v1::VerifyRequest { question, response, gold };
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(1));
        loop {
            let status = match self.client.clone().verify(request.clone()).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            let wait = backoff.wait();
            // The last refusal says more than that time ran out.
            if status.code() != Code::Unavailable || Instant::now() + wait >= deadline {
                return Err(status);
            }
            tokio::time::sleep(wait).await;
        }
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
