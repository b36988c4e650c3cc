use pacs_machine::{Command, LogLevel, StopMode};
use pacs_protocol::v1;
use pacs_protocol::v1::operate_request::Command as WireCommand;
use pacs_protocol::v1::operator_service_server::OperatorService;
use tonic::{Request, Response, Status};

use super::{Services, check_name, required};
use crate::driver::bounded;

#[tonic::async_trait]
impl OperatorService for Services {
    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Result<Response<v1::GetStatusResponse>, Status> {
        let status = self.0.lock()?.status();
        Ok(Response::new(bounded(status)))
    }

    async fn stop_run(&self, request: Request<v1::StopRunRequest>) -> Result<Response<v1::StopRunResponse>, Status> {
        let request = request.into_inner();
        check_name("operator", &request.operator)?;
        let mode = match request.mode() {
            v1::StopMode::Unspecified | v1::StopMode::Save => StopMode::Save,
            v1::StopMode::AfterStep => StopMode::AfterStep,
            v1::StopMode::Now => StopMode::Now,
        };
        self.0.call(|driver| driver.operate(&named(request.operator), Command::Stop(mode))).await?;
        Ok(Response::new(v1::StopRunResponse {}))
    }

    async fn operate(&self, request: Request<v1::OperateRequest>) -> Result<Response<v1::OperateResponse>, Status> {
        let v1::OperateRequest { operator, command } = request.into_inner();
        check_name("operator", &operator)?;
        let command = match required("command", command)? {
            WireCommand::Pause(_) => Command::Pause,
            WireCommand::Resume(_) => Command::Resume,
            WireCommand::Checkpoint(_) => Command::Checkpoint,
            WireCommand::Drain(v1::Drain { worker }) => {
                check_name("drain.worker", &worker)?;
                Command::Drain { worker }
            }
            WireCommand::Slots(slots) => Command::SetSlots(slots),
            WireCommand::LearningRate(rate) => Command::SetLearningRate(rate),
            WireCommand::LogLevel(level) => Command::SetLogLevel(log_level(level)?),
        };
        self.0.call(|driver| driver.operate(&named(operator), command)).await?;
        Ok(Response::new(v1::OperateResponse {}))
    }
}

fn named(operator: String) -> String {
    if operator.is_empty() { "somebody".to_owned() } else { operator }
}

fn log_level(wire: i32) -> Result<LogLevel, Status> {
    match v1::LogLevel::try_from(wire) {
        Ok(v1::LogLevel::Error) => Ok(LogLevel::Error),
        Ok(v1::LogLevel::Warn) => Ok(LogLevel::Warn),
        Ok(v1::LogLevel::Info) => Ok(LogLevel::Info),
        Ok(v1::LogLevel::Debug) => Ok(LogLevel::Debug),
        Ok(v1::LogLevel::Trace) => Ok(LogLevel::Trace),
        Ok(v1::LogLevel::Unspecified) | Err(_) => Err(Status::invalid_argument("field `log_level` is no log level")),
    }
}
