//! Which coordinator a command means.

use std::path::Path;
use std::time::Duration;

use anyhow::anyhow;
use pacs_coordinator::CoordinatorRecord;
use pacs_protocol::MAX_MESSAGE_BYTES;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_runtime::net::{PeerRole, Security};
use tonic::transport::Channel;

use crate::failure::Failure;

/// Where `pacs run` listens when nothing else is said.
const DEFAULT_ADDRESS: &str = "127.0.0.1:7700";

/// How long the connection may take: a coordinator that runs answers at once.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// How long an answer may take.
pub(crate) const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// The address that `target` stands for: itself, or that of the coordinator of a run folder.
pub(crate) fn address(target: Option<&str>) -> Result<String, Failure> {
    let Some(target) = target else { return Ok(DEFAULT_ADDRESS.to_owned()) };
    let folder = Path::new(target);
    if folder.is_dir() {
        return CoordinatorRecord::read(folder).map(|record| record.address).map_err(|error| {
            let doing = format!("read `{}`", folder.join(CoordinatorRecord::FILE).display());
            Failure::config(error)
                .doing(doing)
                .hint("the folder of a run is runs/<name of the job>, or what --run-dir said")
        });
    }
    if target.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok()) {
        return Ok(target.to_owned());
    }
    let error = anyhow!("it is neither host:port nor the folder of a run");
    Err(Failure::config(error).doing(format!("find the coordinator `{target}`")))
}

/// Connects to the coordinator at `address`.
pub(crate) async fn connect(address: &str) -> Result<OperatorServiceClient<Channel>, Failure> {
    let channel = pacs_runtime::connect(address, &security()?, CONNECT_DEADLINE).await.map_err(|error| {
        Failure::again(error)
            .doing("reach the coordinator")
            .hint("is a run going on there? `pacs run JOB.toml` starts one")
    })?;
    Ok(OperatorServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// The operator's certificate, if `PACS_TLS_DIR` says where it is; else plain text, which stays within this machine.
fn security() -> Result<Security, Failure> {
    let Some(folder) = std::env::var_os("PACS_TLS_DIR").filter(|folder| !folder.is_empty()) else {
        return Ok(Security::Plain);
    };
    pacs_runtime::launch::security(Path::new(&folder), PeerRole::Operator)
        .map_err(|error| Failure::config(error).doing("use the certificates that PACS_TLS_DIR names"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_addresses_or_folders() {
        assert_eq!(address(None).expect("the default"), DEFAULT_ADDRESS);
        assert_eq!(address(Some("node-3:7700")).expect("an address"), "node-3:7700");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = dir.path().display().to_string();
        assert!(address(Some(&folder)).expect_err("no run").to_string().contains("coordinator.json"));
        let record = r#"{"address": "10.0.0.1:9", "host": "h", "pid": 1, "job": "j", "starts": 1}"#;
        std::fs::write(dir.path().join(CoordinatorRecord::FILE), record).expect("written");
        assert_eq!(address(Some(&folder)).expect("a run"), "10.0.0.1:9");
        assert!(address(Some("runs/no-such")).expect_err("neither").to_string().contains("neither host:port"));
    }
}
