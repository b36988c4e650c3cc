//! A run to inspect as the source of a dashboard.

use std::sync::Arc;
use std::time::Duration;

use pacs_coordinator::{ObserveError, Recorded};
use pacs_dashboard::{Answer, Source as DashboardSource, SourceError};
use pacs_protocol::v1::observe_service_client::ObserveServiceClient;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::watch_response::Event;
use pacs_protocol::v1::{self, GetStatusRequest};
use pacs_runtime::Exit;
use tonic::transport::Channel;

use super::{Looked, Source};
use crate::client::in_time;
use crate::failure::Failure;

/// Time for the past events of a run, which come at once.
const EVENTS_DEADLINE: Duration = Duration::from_secs(5);

impl Looked {
    /// Whether a coordinator serves the run.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.source, Source::Coordinator(..))
    }

    /// The run as the source of a dashboard.
    pub(crate) fn into_dashboard_source(self) -> Box<dyn DashboardSource> {
        match self.source {
            Source::Coordinator(observer, operator) => Box::new(Live { observer, operator }),
            Source::Folder(recorded) => Box::new(Past(Arc::new(recorded))),
        }
    }
}

/// A run whose coordinator is asked, with the operator's certificate.
struct Live {
    observer: ObserveServiceClient<Channel>,
    operator: OperatorServiceClient<Channel>,
}

/// A run of which files are read.
struct Past(Arc<Recorded>);

impl DashboardSource for Live {
    fn status(&self) -> Answer<'_, Option<Arc<v1::GetStatusResponse>>> {
        let mut client = self.operator.clone();
        Box::pin(async move {
            let status = in_time(client.get_status(GetStatusRequest {})).await.map_err(refused)?;
            Ok(Some(Arc::new(status)))
        })
    }

    fn metrics(&self, request: v1::GetMetricsRequest) -> Answer<'_, v1::GetMetricsResponse> {
        let mut client = self.observer.clone();
        Box::pin(async move { in_time(client.get_metrics(request)).await.map_err(refused) })
    }

    fn samples(&self, request: v1::ListSamplesRequest) -> Answer<'_, v1::ListSamplesResponse> {
        let mut client = self.observer.clone();
        Box::pin(async move { in_time(client.list_samples(request)).await.map_err(refused) })
    }

    fn sample(&self, request: v1::GetSampleRequest) -> Answer<'_, v1::GetSampleResponse> {
        let mut client = self.observer.clone();
        Box::pin(async move { in_time(client.get_sample(request)).await.map_err(refused) })
    }

    fn events(&self, past: u32) -> Answer<'_, Vec<Arc<v1::WatchResponse>>> {
        let mut client = self.observer.clone();
        Box::pin(async move {
            let mut stream = in_time(client.watch(v1::WatchRequest { past })).await.map_err(refused)?;
            let mut events = Vec::new();
            // Past events come first; the situation of now, or the end of the run, follows them.
            let read = async {
                while let Ok(Some(event)) = stream.message().await {
                    match event.event {
                        Some(Event::Situation(_)) => return,
                        _ => events.push(Arc::new(event)),
                    }
                }
            };
            let _ = tokio::time::timeout(EVENTS_DEADLINE, read).await;
            Ok(events)
        })
    }
}

impl DashboardSource for Past {
    fn status(&self) -> Answer<'_, Option<Arc<v1::GetStatusResponse>>> {
        Box::pin(async { Ok(None) })
    }

    fn metrics(&self, request: v1::GetMetricsRequest) -> Answer<'_, v1::GetMetricsResponse> {
        self.read(move |recorded| recorded.metrics(&request))
    }

    fn samples(&self, request: v1::ListSamplesRequest) -> Answer<'_, v1::ListSamplesResponse> {
        self.read(move |recorded| recorded.samples(request))
    }

    fn sample(&self, request: v1::GetSampleRequest) -> Answer<'_, v1::GetSampleResponse> {
        self.read(move |recorded| recorded.sample(&request))
    }

    fn events(&self, _: u32) -> Answer<'_, Vec<Arc<v1::WatchResponse>>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

impl Past {
    /// Reads files on a blocking thread.
    fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Recorded) -> Result<T, ObserveError> + Send + 'static,
    ) -> Answer<'_, T> {
        let recorded = Arc::clone(&self.0);
        Box::pin(async move {
            let read = tokio::task::spawn_blocking(move || read(&recorded)).await;
            let damaged = |_| SourceError::NotFound("what was asked for is damaged and cannot be read".into());
            read.map_err(damaged)?.map_err(|error| refused(super::unread(error)))
        })
    }
}

fn refused(failure: Failure) -> SourceError {
    let message = failure.reason();
    match failure.exit {
        Exit::Usage => SourceError::Invalid(message),
        _ => SourceError::Unavailable(message),
    }
}
