//! The gRPC client of operator commands.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use pacs_protocol::MAX_MESSAGE_BYTES;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_runtime::launch::security as security_in;
use pacs_runtime::net::{PeerRole, Security};
use pacs_runtime::{Exit, harmless};
use tonic::transport::Channel;
use tonic::{Code, Response, Status as CallStatus};

use crate::failure::Failure;
use crate::target::Target;

/// Deadline for connecting; a live coordinator accepts at once.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Deadline for one call.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    runtime.block_on(work)
}

/// Connects to a coordinator in the operator role.
pub(crate) async fn connect(target: &Target) -> Result<OperatorServiceClient<Channel>, Failure> {
    Ok(OperatorServiceClient::new(channel(target).await?).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// Opens a connection without a service client, for callers of the other services.
pub(crate) async fn channel(target: &Target) -> Result<Channel, Failure> {
    pacs_runtime::connect(&target.address, &security(target)?, CONNECT_DEADLINE).await.map_err(|error| {
        Failure::again(error).doing("reach the coordinator").hint("is a run live there? `pacs run JOB.toml` starts one")
    })
}

/// Chooses how to authenticate: the certificates that the run folder names, else those in `PACS_TLS_DIR`, else plain text, which
/// is allowed on loopback only.
fn security(target: &Target) -> Result<Security, Failure> {
    let given = std::env::var_os("PACS_TLS_DIR").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    choose(target.tls_dir.as_deref(), given.as_deref())
}

fn choose(of_run: Option<&Path>, given: Option<&Path>) -> Result<Security, Failure> {
    let failed = |error, what: &str| Failure::config(error).doing(format!("use the certificates that {what} names"));
    match (of_run.map(|folder| security_in(folder, PeerRole::Operator)), given) {
        (Some(Ok(security)), _) => Ok(security),
        (_, Some(folder)) => security_in(folder, PeerRole::Operator).map_err(|error| failed(error, "PACS_TLS_DIR")),
        (Some(Err(error)), None) => Err(failed(error, "the run folder")
            .hint("a run removes its own certificates when it ends; those of others are named by PACS_TLS_DIR")),
        (None, None) => Ok(Security::Plain),
    }
}

pub(crate) async fn in_time<T>(call: impl Future<Output = Result<Response<T>, CallStatus>>) -> Result<T, Failure> {
    match tokio::time::timeout(CALL_DEADLINE, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(refused(&status)),
        Err(_) => Err(Failure::again(anyhow!("no answer within {} s", CALL_DEADLINE.as_secs()))),
    }
}

/// Maps a status to a failure: a refusal is final, an error of the server or the connection may be tried again.
fn refused(status: &CallStatus) -> Failure {
    let exit = match status.code() {
        Code::NotFound | Code::InvalidArgument => Exit::Usage,
        Code::PermissionDenied | Code::Unauthenticated => Exit::Config,
        _ => Exit::Again,
    };
    Failure::with_exit(exit, anyhow!("{}", harmless(status.message())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_not_retried() {
        let exit = |code| refused(&CallStatus::new(code, "no worker `rollout-9`")).exit;
        assert_eq!([Code::NotFound, Code::InvalidArgument].map(exit), [Exit::Usage; 2]);
        assert_eq!(exit(Code::PermissionDenied), Exit::Config);
        assert_eq!([Code::Unavailable, Code::FailedPrecondition].map(exit), [Exit::Again; 2]);
    }
}
