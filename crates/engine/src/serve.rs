//! Serving under one registration: leasing, submitting and following the weights, side by side.

use std::convert::Infallible;
use std::sync::Arc;

use pacs_protocol::MAX_MESSAGE_BYTES;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_runtime::Membership;
use pacs_runtime::net::RunChannel;
use tokio::sync::{mpsc, watch};

use crate::leases::Leasing;
use crate::submit::Submitting;
use crate::{Output, RolloutEngine, ServeError};

/// Bounds of what one registration leases.
#[derive(Clone, Copy, Debug)]
pub struct LeaseTerms {
    /// Most samples on lease, whatever the engine has room for.
    pub most_samples: usize,
    /// Whether samples that are trained on record their experts. Those of evaluations do not, because they are not replayed.
    pub records_routes: bool,
}

/// The client of a registration's coordinator.
pub(crate) fn client(membership: &Membership) -> RolloutServiceClient<RunChannel> {
    RolloutServiceClient::new(membership.channel.clone())
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// Works for a coordinator until the registration or the engine fails. `outputs` are the engine's; `weights` brings it
/// published versions ([`crate::Following::run`]) or those of its own.
///
/// # Errors
/// Always; see [`ServeError`].
pub async fn serve<E: RolloutEngine + 'static>(
    membership: &Membership,
    engine: Arc<E>,
    outputs: mpsc::Receiver<Output>,
    terms: LeaseTerms,
    weights: impl Future<Output = Result<Infallible, ServeError>> + Send,
) -> Result<Infallible, ServeError> {
    let worker = membership.worker.0;
    let client = client(membership);
    let (in_flight_sender, in_flight) = watch::channel(0usize);
    let (leases_sender, leases) = mpsc::channel(terms.most_samples.max(1));
    let leasing = Leasing {
        client: client.clone(),
        worker,
        terms,
        capacity: engine.capacity(),
        in_flight: in_flight_sender.clone(),
        changed: in_flight,
        leases: leases_sender,
        serves: engine.serves(),
        engine: Arc::clone(&engine),
        run_id: membership.run_id.clone(),
        activity: membership.activity.clone(),
    };
    let activity = membership.activity.clone();
    let submit = move |request| {
        let (mut client, activity) = (client.clone(), activity.clone());
        async move { client.submit_sample(request).await.map(|_| activity.served()) }
    };
    let activity = membership.activity.clone();
    let progress = move |in_flight| activity.set(format!("generating {in_flight} samples"));
    let cancel = move |ticket| engine.cancel(ticket);
    let submitting = Submitting::new(submit, worker, &membership.run_id, in_flight_sender, leases, cancel, progress);
    tokio::select! {
        result = leasing.run() => result,
        result = weights => result,
        result = submitting.run(outputs) => result,
    }
}
