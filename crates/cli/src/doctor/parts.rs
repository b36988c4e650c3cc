//! What a run is made of besides this machine: the worker program, GPUs, certificates, the coordinator.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pacs_runtime::launch::security;
use pacs_runtime::net::{PeerRole, Security};

use super::Finding;
use crate::run::find_worker;

/// How long the coordinator may take to answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// The worker program, asked for its version so that the system loads libtorch; and the GPUs, if the job wants them.
pub(super) fn worker(given: Option<&Path>, gpu: bool) -> Vec<Finding> {
    const CHECK: &str = "worker program";
    let finding = match find_worker(given) {
        Err(failure) => Finding::warning(CHECK, failure.to_string(), "only learners and rollout workers need it"),
        Ok(path) => match Command::new(&path).arg("--version").stdin(Stdio::null()).output() {
            Ok(output) if output.status.success() => {
                let version = String::from_utf8_lossy(&output.stdout);
                let (ours, theirs) = (env!("CARGO_PKG_VERSION"), version.trim().rsplit(' ').next().unwrap_or_default());
                match ours == theirs {
                    true => Finding::ok(CHECK, format!("{} {theirs}, with libtorch", path.display())),
                    false => Finding::failure(
                        CHECK,
                        format!("{} is {theirs}, and this program {ours}", path.display()),
                        "install the same version of both",
                    ),
                }
            }
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                let found = format!("{} does not start: {}", path.display(), said.trim());
                Finding::failure(CHECK, found, "libtorch 2.11 must be on LD_LIBRARY_PATH, or where it was at the build")
            }
            Err(error) => Finding::failure(CHECK, format!("{}: {error}", path.display()), "install it again"),
        },
    };
    let mut findings = vec![finding];
    if gpu {
        findings.push(gpus());
    }
    findings
}

/// What the driver says of its GPUs.
fn gpus() -> Finding {
    const CHECK: &str = "GPUs";
    let query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"];
    match Command::new("nvidia-smi").args(query).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            let text = String::from_utf8_lossy(&output.stdout);
            Finding::ok(CHECK, text.trim().lines().collect::<Vec<_>>().join("; "))
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            Finding::failure(
                CHECK,
                format!("nvidia-smi finds none: {}", said.trim()),
                "load the driver, or ask for a node with GPUs",
            )
        }
        Err(error) => Finding::failure(CHECK, format!("nvidia-smi does not start: {error}"), "install NVIDIA's driver"),
    }
}

/// The certificates of whatever roles are in the folder.
pub(super) fn certificates(folder: &Path) -> Finding {
    const CHECK: &str = "certificates";
    let (mut usable, mut problems) = (Vec::new(), Vec::new());
    for role in PeerRole::ALL {
        match security(folder, role) {
            Ok(_) => usable.push(role.name()),
            Err(error) => problems.push(error.to_string()),
        }
    }
    match problems.first() {
        _ if !usable.is_empty() => Finding::ok(CHECK, format!("for {}", usable.join(", "))),
        Some(problem) => Finding::failure(CHECK, problem, "`pacs certs DIR` makes them"),
        None => Finding::failure(CHECK, "there is none", "`pacs certs DIR` makes them"),
    }
}

/// Whether the coordinator can be reached, as an operator.
pub(super) async fn coordinator(address: &str, tls_dir: Option<&Path>) -> Finding {
    const CHECK: &str = "coordinator";
    let security = match tls_dir.map(|folder| security(folder, PeerRole::Operator)).transpose() {
        Ok(security) => security.unwrap_or(Security::Plain),
        Err(error) => return Finding::failure(CHECK, error.to_string(), "operators have certificates of their own"),
    };
    match pacs_runtime::connect(address, &security, DEADLINE).await {
        Ok(_) => Finding::ok(CHECK, format!("{address} answers")),
        Err(error) => Finding::failure(
            CHECK,
            error.to_string(),
            "is it running, is the address right, and does the network let this machine reach it?",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_folder_without_certificates_is_a_failure() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(certificates(dir.path()).level, Level::Failure);
    }

    #[test]
    fn a_worker_program_of_another_version_is_a_failure() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("pacs-worker");
        std::fs::write(&path, "#!/bin/sh\necho pacs-worker 0.0.1\n").expect("written");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("set");
        let findings = worker(Some(&path), false);
        assert_eq!(findings[0].level, Level::Failure, "{findings:?}");
        assert!(findings[0].found.contains("is 0.0.1"), "{findings:?}");
    }

    #[tokio::test]
    async fn a_coordinator_that_is_not_there_is_a_failure() {
        // A port that was just given back refuses connections.
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
        assert_eq!(coordinator(&port.to_string(), None).await.level, Level::Failure);
    }
}
