//! Checks of the network: ports, the coordinator and its clock, the ring between learner ranks.

use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pacs_protocol::v1;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_runtime::launch::security;
use pacs_runtime::net::{PeerRole, Security};
use serde_json::Value;

use super::Finding;
use crate::run::find_worker;

/// Deadline of the coordinator's answer.
const DEADLINE: Duration = Duration::from_secs(5);

/// Default ports of the coordinator: calls and health probes.
const PORTS: [u16; 2] = [7700, 7701];

/// Tolerated clock skew in seconds; beyond it, logs of several machines mislead and certificates may be refused.
const SKEW: f64 = 1.0;

/// Ring bandwidth within one machine, in GB/s, below which something is wrong.
const SLOW: f64 = 0.5;

/// Checks that a coordinator could listen on the default ports.
pub(super) fn ports() -> Finding {
    const CHECK: &str = "ports";
    let taken: Vec<String> = PORTS
        .iter()
        .filter_map(|port| match TcpListener::bind(("0.0.0.0", *port)) {
            Ok(_) => None,
            Err(error) if error.kind() == ErrorKind::AddrInUse => Some(format!("{port} is in use")),
            Err(error) => Some(format!("{port}: {error}")),
        })
        .collect();
    match taken.is_empty() {
        true => Finding::ok(CHECK, "7700 (coordinator) and 7701 (probes) are free"),
        false => {
            Finding::warning(CHECK, taken.join("; "), "start the coordinator with another --listen, --health-listen")
        }
    }
}

/// Checks that the coordinator accepts this machine as an operator, and that clocks agree.
pub(super) async fn coordinator(address: &str, tls_dir: Option<&Path>) -> Vec<Finding> {
    const CHECK: &str = "coordinator";
    let security = match tls_dir.map(|folder| security(folder, PeerRole::Operator)).transpose() {
        Ok(security) => security.unwrap_or(Security::Plain),
        Err(error) => {
            return vec![Finding::failure(CHECK, error.to_string(), "operators have certificates of their own")];
        }
    };
    let channel = match pacs_runtime::connect(address, &security, DEADLINE).await {
        Ok(channel) => channel,
        Err(error) => {
            let advice = "is it running, is the address right, and does the network let this machine reach it?";
            return vec![Finding::failure(CHECK, error.to_string(), advice)];
        }
    };
    let asked = now();
    let mut client = OperatorServiceClient::new(channel);
    match tokio::time::timeout(DEADLINE, client.get_status(v1::GetStatusRequest {})).await {
        Ok(Ok(status)) => {
            let answered = now();
            let found = format!("{address} answers in {:.1} ms", (answered - asked) * 1e3);
            let skew = status.into_inner().clock - (asked + answered) / 2.0;
            vec![Finding::ok(CHECK, found), clocks(skew, answered - asked)]
        }
        Ok(Err(status)) => vec![Finding::failure(CHECK, status.message(), "ask it with an operator's certificate")],
        Err(_) => {
            let found = format!("{address} takes connections and no calls for {} s", DEADLINE.as_secs());
            vec![Finding::failure(CHECK, found, "look at its log and at the load of its machine")]
        }
    }
}

/// Judges `skew`, the seconds by which the coordinator's clock is ahead of ours, known to within half of `round_trip`.
fn clocks(skew: f64, round_trip: f64) -> Finding {
    const CHECK: &str = "clock skew";
    let found = format!("{:+.3} s against the coordinator (within {:.3} s)", skew, round_trip / 2.0);
    match skew.abs() - round_trip / 2.0 < SKEW {
        true => Finding::ok(CHECK, found),
        false => {
            Finding::warning(CHECK, found, "set the clocks by NTP (chrony): logs mislead, certificates may be refused")
        }
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Measures the ring between two ranks of this machine, or between all of its GPUs.
pub(super) fn bandwidth(worker: Option<&Path>, gpu: bool) -> Finding {
    const CHECK: &str = "bandwidth";
    let worker = match find_worker(worker) {
        Ok(path) => path,
        Err(failure) => return Finding::warning(CHECK, failure.to_string(), "only learners need it"),
    };
    let (backend, ranks) = if gpu { ("nccl", gpu_count().max(1)) } else { ("host", 2) };
    let mut command = Command::new(&worker);
    command.args(["bench", "collective", "--backend", backend, "--sizes", "67108864", "--ranks", &ranks.to_string()]);
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => return Finding::failure(CHECK, format!("{}: {error}", worker.display()), "install it again"),
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Finding::failure(CHECK, said.trim().to_owned(), "`pacs-worker bench collective` says more");
    }
    judge(&String::from_utf8_lossy(&output.stdout), backend, ranks)
}

/// Turns the benchmark's JSON lines into a finding.
fn judge(lines: &str, backend: &str, ranks: usize) -> Finding {
    const CHECK: &str = "bandwidth";
    let rows: Vec<Value> = lines.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let speed = |row: &Value| (row["operation"] == "all_reduce_sum").then(|| row["bus_gigabytes_per_second"].as_f64());
    let Some(speed) = rows.iter().find_map(|row| speed(row).flatten()) else {
        return Finding::failure(
            CHECK,
            "the benchmark prints no all-reduce",
            "install the same version of both programs",
        );
    };
    let found = format!("{speed:.1} GB/s all-reduce between {ranks} ranks ({backend})");
    let slow = rows.iter().filter_map(|row| row["slow"].as_array()).flatten();
    let slow: Vec<String> = slow
        .map(|one| {
            format!(
                "{} of ranks {} ({:.1} times the median)",
                text(&one["kind"]),
                one["ranks"],
                one["times_median"].as_f64().unwrap_or(0.0)
            )
        })
        .collect();
    match (slow.is_empty(), speed >= SLOW || ranks == 1) {
        (true, true) => Finding::ok(CHECK, found),
        (false, _) => {
            Finding::warning(CHECK, format!("{found}; slow: {}", slow.join(", ")), "see what else runs there")
        }
        (true, false) => Finding::warning(CHECK, found, "see what else runs on this machine"),
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("something")
}

/// Counts the GPUs that the driver lists.
fn gpu_count() -> usize {
    let listed = Command::new("nvidia-smi").arg("--list-gpus").stdin(Stdio::null()).output();
    listed.map_or(0, |output| String::from_utf8_lossy(&output.stdout).lines().count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[tokio::test]
    async fn an_unreachable_coordinator_is_a_failure() {
        // A port that was just released refuses connections.
        let port = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound");
        let findings = coordinator(&port.to_string(), None).await;
        assert_eq!(findings.iter().map(|finding| finding.level).collect::<Vec<_>>(), [Level::Failure]);
    }

    #[test]
    fn clocks_differ_by_more_than_the_answer_took() {
        assert_eq!(clocks(0.2, 0.01).level, Level::Ok);
        assert_eq!(clocks(-3.0, 0.01).level, Level::Warning);
        // The skew is smaller than its uncertainty, so it is no finding.
        assert_eq!(clocks(2.0, 4.0).level, Level::Ok);
    }

    #[test]
    fn slow_ranks_are_named() {
        let line = |speed: f64| format!(r#"{{"operation":"all_reduce_sum","bus_gigabytes_per_second":{speed}}}"#);
        assert_eq!(judge(&line(2.0), "host", 2).level, Level::Ok);
        assert_eq!(judge(&line(0.1), "host", 2).level, Level::Warning);
        let slow = r#"{"slow":[{"kind":"memory","ranks":[1],"times_median":2.917}]}"#;
        let finding = judge(&format!("{}\n{slow}", line(2.0)), "host", 2);
        let named = finding.found.ends_with("slow: memory of ranks [1] (2.9 times the median)");
        assert!(finding.level == Level::Warning && named, "{finding}");
        assert_eq!(judge("", "host", 2).level, Level::Failure);
    }
}
