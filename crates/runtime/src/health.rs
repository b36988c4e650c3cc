//! Health probes: `grpc.health.v1` in plain text, on a separate port.
//!
//! It has three services. The empty name reports the process itself: its event loop turns. Anything more would let one
//! silent peer restart every process. [`Health::READY`] reports whether the process is a member of its run, and
//! [`Health::PROGRESS`] whether the run has made progress lately. The port serves nothing else and accepts no data.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health as HealthService, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::net::accept_probes;

/// Longest delay after which a watcher is told that progress has stopped.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Health state of this process; clones share it.
#[derive(Clone, Debug)]
pub struct Health(Arc<watch::Sender<HealthState>>);

#[derive(Clone, Copy, Debug)]
struct HealthState {
    ready: bool,
    /// Time of the last progress, and how long the next may take; `None`: this process does not track the run.
    progress: Option<(Instant, Duration)>,
}

impl Default for Health {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(HealthState { ready: false, progress: None })))
    }
}

impl Health {
    /// Service name for whether the process works in a run.
    pub const READY: &str = "pacs.ready";
    /// Service name for whether the run makes progress.
    pub const PROGRESS: &str = "pacs.progress";

    /// Sets whether the process works in a run.
    pub fn set_ready(&self, ready: bool) {
        self.0.send_modify(|state| state.ready = ready);
    }

    /// Records progress of the run; it counts as unhealthy if there is none within `limit`.
    pub fn progressed(&self, limit: Duration) {
        self.0.send_modify(|state| state.progress = Some((Instant::now(), limit)));
    }

    /// Answers probes at `address` for the life of the process.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn serve(&self, address: &str) -> std::io::Result<std::net::SocketAddr> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let server = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(20)))
            .http2_keepalive_timeout(Some(Duration::from_secs(20)))
            .concurrency_limit_per_connection(16)
            .timeout(Duration::from_secs(10))
            .add_service(HealthServer::new(Answers(self.clone())).max_decoding_message_size(4096));
        tokio::spawn(async move {
            if let Err(error) = server.serve_with_incoming(accept_probes(listener)).await {
                tracing::error!("the health service ended: {error}");
            }
        });
        Ok(address)
    }

    fn check(&self, service: &str) -> Option<ServingStatus> {
        let state = *self.0.borrow();
        let healthy = match service {
            "" => true,
            Self::READY => state.ready,
            Self::PROGRESS => state.progress.map(|(when, limit)| when.elapsed() < limit)?,
            _ => return None,
        };
        Some(if healthy { ServingStatus::Serving } else { ServingStatus::NotServing })
    }
}

/// The gRPC service over the shared state.
struct Answers(Health);

#[tonic::async_trait]
impl HealthService for Answers {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        let status = self.0.check(&service).ok_or_else(|| {
            Status::not_found(format!("there is no `{service}` here; ask for ``, `pacs.ready` or `pacs.progress`"))
        })?;
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let service = request.into_inner().service;
        let (health, mut changed) = (self.0.clone(), self.0.0.subscribe());
        // Full while the watcher does not read, which then gets fewer updates.
        let (sender, statuses) = mpsc::channel(1);
        // Ends with the watcher.
        tokio::spawn(async move {
            let mut told = None;
            loop {
                let status = health.check(&service).unwrap_or(ServingStatus::ServiceUnknown);
                if told != Some(status) {
                    told = Some(status);
                    if sender.send(Ok(HealthCheckResponse { status: status.into() })).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    // A stop of progress changes no state, so it is polled.
                    _ = tokio::time::timeout(WATCH_INTERVAL, changed.changed()) => {}
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(statuses))))
    }
}

#[cfg(test)]
mod tests {
    use tonic_health::pb::health_client::HealthClient;

    use super::*;
    use crate::net::{PeerRole, RunChannel, RunIdentity, Security, dial};

    async fn client(address: std::net::SocketAddr) -> HealthClient<RunChannel> {
        let run = RunIdentity::default();
        let channel = dial(&address.to_string(), PeerRole::Coordinator, &Security::Plain, &run).await;
        HealthClient::new(channel.expect("it listens"))
    }

    #[tokio::test]
    async fn liveness_readiness_and_progress_differ() {
        let health = Health::default();
        let address = health.serve("127.0.0.1:0").await.expect("a free port");
        let mut client = client(address).await;
        let mut check = async |service: &str| {
            let request = HealthCheckRequest { service: service.to_owned() };
            client.check(request).await.map(|response| response.into_inner().status()).map_err(|status| status.code())
        };
        assert_eq!(check("").await, Ok(ServingStatus::Serving));
        assert_eq!(check(Health::READY).await, Ok(ServingStatus::NotServing));
        assert_eq!(check(Health::PROGRESS).await, Err(tonic::Code::NotFound));
        assert_eq!(check("other").await, Err(tonic::Code::NotFound));
        health.set_ready(true);
        health.progressed(Duration::from_secs(3600));
        assert_eq!(check(Health::READY).await, Ok(ServingStatus::Serving));
        assert_eq!(check(Health::PROGRESS).await, Ok(ServingStatus::Serving));
        health.progressed(Duration::ZERO);
        assert_eq!(check(Health::PROGRESS).await, Ok(ServingStatus::NotServing));
        assert_eq!(check("").await, Ok(ServingStatus::Serving), "a stalled run is no reason to restart a process");
    }

    #[tokio::test]
    async fn watchers_are_told_of_changes() {
        let health = Health::default();
        let address = health.serve("127.0.0.1:0").await.expect("a free port");
        let mut client = client(address).await;
        let request = HealthCheckRequest { service: Health::READY.to_owned() };
        let mut stream = client.watch(request).await.expect("watched").into_inner();
        let first = stream.message().await.expect("an answer").expect("an answer");
        assert_eq!(first.status(), ServingStatus::NotServing);
        health.set_ready(true);
        let second = stream.message().await.expect("an answer").expect("an answer");
        assert_eq!(second.status(), ServingStatus::Serving);
    }
}
