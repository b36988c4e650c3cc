use std::pin::Pin;

use pacs_protocol::v1;
use pacs_protocol::v1::observe_service_server::ObserveService;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use crate::observe::{ObserveError, Observer};

#[tonic::async_trait]
impl ObserveService for Observer {
    async fn get_metrics(
        &self,
        request: Request<v1::GetMetricsRequest>,
    ) -> Result<Response<v1::GetMetricsResponse>, Status> {
        self.metrics(request.into_inner()).await.map(Response::new).map_err(refused)
    }

    async fn list_samples(
        &self,
        request: Request<v1::ListSamplesRequest>,
    ) -> Result<Response<v1::ListSamplesResponse>, Status> {
        self.samples(request.into_inner()).await.map(Response::new).map_err(refused)
    }

    async fn get_sample(
        &self,
        request: Request<v1::GetSampleRequest>,
    ) -> Result<Response<v1::GetSampleResponse>, Status> {
        self.sample(request.into_inner()).await.map(Response::new).map_err(refused)
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let events = Observer::watch(self, &request.into_inner()).map_err(refused)?;
        let stream = ReceiverStream::new(events).map(|event| Ok(event.as_ref().clone()));
        Ok(Response::new(Box::pin(stream)))
    }
}

fn refused(error: ObserveError) -> Status {
    let message = error.to_string();
    match error {
        ObserveError::Invalid { .. } => Status::invalid_argument(message),
        ObserveError::NotFound(_) => Status::not_found(message),
        ObserveError::File(_) => Status::unavailable(message),
        ObserveError::Ending(_) => Status::unavailable(message),
        ObserveError::Busy(_) => Status::resource_exhausted(message),
    }
}
