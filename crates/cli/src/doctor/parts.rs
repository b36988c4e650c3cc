//! Checks of a run's parts: the worker program, GPUs, certificates.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use pacs_runtime::launch::security;
use pacs_runtime::net::{PeerRole, TlsError};
use serde_json::Value;

use super::Finding;
use crate::run::find_worker;

/// Checks the worker program by asking for its version, which loads libtorch, and the GPUs if the job uses them.
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
        findings.extend([gpus(), peers()]);
        if let Ok(path) = find_worker(given) {
            findings.push(cuda_half(&path));
        }
    }
    findings
}

/// Whether the worker program finds libtorch's CUDA half, and what compiles its kernels.
fn cuda_half(worker: &Path) -> Finding {
    const CHECK: &str = "GPU libraries";
    const HINT: &str = "`cargo xtask setup --cuda` installs them; on a machine without Rust, `pip install torch==2.11.0` and its \
                        torch/lib on LD_LIBRARY_PATH";
    let output = match Command::new(worker).args(["devices", "--json"]).stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => return Finding::failure(CHECK, format!("{}: {error}", worker.display()), "install it again"),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(report) = text.lines().next_back().and_then(|line| serde_json::from_str::<Value>(line).ok()) else {
        let said = String::from_utf8_lossy(&output.stderr);
        return Finding::failure(CHECK, format!("`pacs-worker devices` does not say: {}", said.trim()), HINT);
    };
    read_parts(&report, HINT)
}

fn read_parts(report: &Value, hint: &str) -> Finding {
    const CHECK: &str = "GPU libraries";
    let problems = ["problem", "kernels_problem", "graphs_problem"].map(|part| report[part].as_str());
    match (problems.into_iter().flatten().next(), report["libtorch_cuda"].as_str()) {
        (Some(problem), _) => Finding::failure(CHECK, problem, hint),
        (None, Some(library)) => Finding::ok(CHECK, format!("{library}, with kernels and graphs")),
        (None, None) => Finding::failure(CHECK, "`pacs-worker devices` names no library", hint),
    }
}

/// Reports the GPUs that the driver lists.
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

/// Checks that the GPUs of this machine have peer access to each other's memory.
fn peers() -> Finding {
    const CHECK: &str = "GPU peer access";
    match Command::new("nvidia-smi").args(["topo", "-p2p", "r"]).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => {
            let without = without_access(&String::from_utf8_lossy(&output.stdout));
            match without.as_slice() {
                [] => Finding::ok(CHECK, "every GPU reads the memory of every other"),
                _ => Finding::warning(
                    CHECK,
                    format!("not between {}", without.join(", ")),
                    "gradients go through the processor's memory: choose a node with NVLink, or see `nvidia-smi topo -m`",
                ),
            }
        }
        Ok(_) | Err(_) => Finding::warning(CHECK, "nvidia-smi does not say", "see `nvidia-smi topo -p2p r`"),
    }
}

/// Returns the pairs of GPUs without peer access, from the matrix that `nvidia-smi topo -p2p r` prints.
fn without_access(matrix: &str) -> Vec<String> {
    let rows = matrix.lines().filter_map(|line| {
        let mut cells = line.split_whitespace();
        let name = cells.next().filter(|name| name.starts_with("GPU"))?;
        // The header line names GPUs in place of states, and yields no states.
        let states: Vec<&str> = cells.take_while(|cell| !cell.starts_with("GPU")).collect();
        (!states.is_empty()).then_some((name, states))
    });
    let mut pairs = Vec::new();
    for (row, (name, states)) in rows.enumerate() {
        for (column, state) in states.iter().enumerate().skip(row + 1) {
            if *state != "OK" {
                pairs.push(format!("{name} and GPU{column} ({state})"));
            }
        }
    }
    pairs
}

/// Checks the certificates of all roles that the folder has.
pub(super) fn certificates(folder: &Path) -> Finding {
    const CHECK: &str = "certificates";
    let (mut usable, mut problems, mut missing) = (Vec::new(), Vec::new(), Vec::new());
    let mut shortest = Duration::MAX;
    for role in PeerRole::ALL {
        match security(folder, role) {
            Ok(security) => {
                usable.push(role.name());
                shortest = shortest.min(security.valid_for().unwrap_or(Duration::MAX));
            }
            Err(error @ (TlsError::File { .. } | TlsError::Role { .. })) => missing.push(error.to_string()),
            Err(error) => problems.push(error.to_string()),
        }
    }
    if let Some(problem) = problems.first().or_else(|| missing.first().filter(|_| usable.is_empty())) {
        return Finding::failure(CHECK, problem, "`pacs certs DIR` makes new ones, which running processes take up");
    }
    let found = format!("for {}; the first expires in {}", usable.join(", "), rough(shortest));
    match shortest < SHORT {
        true => Finding::warning(CHECK, found, "`pacs certs DIR` makes new ones, which running processes take up"),
        false => Finding::ok(CHECK, found),
    }
}

/// Remaining validity below which certificates are a warning; longer than most runs.
const SHORT: Duration = Duration::from_secs(14 * DAY);
const DAY: u64 = 24 * 3600;

/// Formats a time in whole days, or in hours when it is short.
fn rough(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 3 * DAY { format!("{} h", seconds / 3600) } else { format!("{} days", seconds / DAY) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Certs;
    use crate::doctor::Level;

    #[test]
    fn a_folder_without_certificates_is_a_failure() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        assert_eq!(certificates(dir.path()).level, Level::Failure);
    }

    #[test]
    fn certificates_that_expire_soon_are_a_warning() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (all, join) = (dir.path().join("all"), dir.path().join("join.pem"));
        let make = |join, output| Certs {
            folder: all.clone(),
            days: 30,
            if_missing: false,
            forget_authority: false,
            join,
            hours: 13,
            output,
        };
        crate::certs::run(&make(None, None)).expect("made");
        let finding = certificates(&all);
        assert_eq!(finding.level, Level::Ok, "{finding:?}");
        assert!(finding.found.contains("operator; the first expires in"), "{finding:?}");
        crate::certs::run(&make(Some(PeerRole::Rollout), Some(join.clone()))).expect("made");
        let finding = certificates(&join);
        assert_eq!(finding.level, Level::Warning, "{finding:?}");
        assert!(finding.found.contains("rollout; the first expires in 1"), "{finding:?}");
    }

    #[test]
    fn libraries_of_a_gpu_that_are_missing_are_a_failure() {
        let read = |text: &str| read_parts(&serde_json::from_str(text).expect("JSON"), "install them");
        let whole = read(r#"{"libtorch_cuda": "/t/libtorch_cuda.so", "problem": null, "kernels_problem": null}"#);
        assert_eq!((whole.level, whole.found.as_str()), (Level::Ok, "/t/libtorch_cuda.so, with kernels and graphs"));
        let broken = read(r#"{"libtorch_cuda": "/t/libtorch_cuda.so", "kernels_problem": "NVRTC cannot be opened"}"#);
        assert_eq!((broken.level, broken.found.as_str()), (Level::Failure, "NVRTC cannot be opened"));
        assert_eq!(read("{}").level, Level::Failure);
    }

    #[test]
    fn times_are_rough() {
        assert_eq!(rough(Duration::from_secs(59 * 60)), "0 h");
        assert_eq!(rough(Duration::from_secs(3 * DAY - 1)), "71 h");
        assert_eq!(rough(Duration::from_secs(30 * DAY - 1)), "29 days");
    }

    #[test]
    fn pairs_of_gpus_without_access_are_named() {
        let matrix = " \tGPU0\tGPU1\tGPU2\t\n GPU0\tX\tOK\tCNS\t\n GPU1\tOK\tX\tOK\t\n GPU2\tCNS\tOK\tX\t\n\n\
                      Legend:\n\n  X    = Self\n  OK   = Status Ok\n  CNS  = Chipset not supported\n";
        assert_eq!(without_access(matrix), ["GPU0 and GPU2 (CNS)"]);
        assert_eq!(without_access(" \tGPU0\t\n GPU0\tX\t\n"), [""; 0]);
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
}
