use pacs_protocol::v1;
use pacs_protocol::v1::operator_service_server::OperatorService;
use tonic::{Request, Response, Status};

use super::Services;

#[tonic::async_trait]
impl OperatorService for Services {
    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Result<Response<v1::GetStatusResponse>, Status> {
        Ok(Response::new(self.0.lock().status()))
    }

    async fn stop_run(&self, _: Request<v1::StopRunRequest>) -> Result<Response<v1::StopRunResponse>, Status> {
        self.0.lock().request_stop();
        Ok(Response::new(v1::StopRunResponse {}))
    }
}
