//! Roles that are started one by one: discovery, shutdown, authentication.

use std::fs;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use pacs_protocol::v1;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::observe_service_client::ObserveServiceClient;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_runtime::Health;
use pacs_runtime::net::{PeerRole, RunIdentity, Security, dial};
use pacs_tests::{Cluster, Job};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Many steps, so that a signal arrives before the last one on a fast machine, too.
const STEPS: usize = 40;

/// Two learners, because they also use TLS between each other.
const WORKERS: [&str; 4] = ["verifier-0", "rollout-0", "learner-0", "learner-1"];

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn cluster(steps: usize) -> Result<Cluster> {
    let job = Job::tiny()?.with("batch.steps", i64::try_from(steps)?).with("checkpoint.every_steps", 0);
    let job = job.with("resources.learners", 2);
    Cluster::new(job.with("evaluation.before", false).with("evaluation.after", false))
}

fn start_all(cluster: &mut Cluster, more: &[&str]) -> Result<()> {
    // Workers start first, when there is no coordinator to find.
    WORKERS.iter().try_for_each(|worker| cluster.start_worker(worker))?;
    cluster.start_coordinator(more)
}

fn ending(cluster: &Cluster) -> String {
    fs::read_to_string(cluster.job.run_path("ending")).unwrap_or_default()
}

#[test]
fn roles_find_each_other_leave_on_a_signal_and_resume() -> Result<()> {
    let mut cluster = cluster(STEPS)?;
    for (signal, word) in [(Signal::SIGTERM, "terminated\n"), (Signal::SIGUSR1, "warned\n")] {
        start_all(&mut cluster, &["--grace", "120"])?;
        let before = cluster.steps();
        cluster.wait_for("step", |cluster| cluster.steps() > before)?;
        cluster.signal("coordinator", signal)?;
        assert_eq!(cluster.code("coordinator")?, Some(75), "{}", cluster.said("coordinator"));
        for worker in WORKERS {
            assert_eq!(cluster.code(worker)?, Some(75), "{}", cluster.said(worker));
        }
        assert_eq!(ending(&cluster), word);
        ensure!(cluster.steps() > before, "what was made before the signal is saved");
    }
    start_all(&mut cluster, &[])?;
    for process in WORKERS.into_iter().chain(["coordinator"]) {
        assert_eq!(cluster.code(process)?, Some(0), "{}", cluster.said(process));
    }
    assert_eq!(ending(&cluster), "finished\n");
    assert_eq!(cluster.steps(), STEPS);
    assert_eq!(cluster.job.json_lines("starts.jsonl")?.len(), 3);
    Ok(())
}

/// Returns whether a call was refused because of the caller's role.
fn denied<T>(result: Result<T, tonic::Status>) -> bool {
    result.is_err_and(|status| status.code() == Code::PermissionDenied)
}

#[test]
fn every_role_may_call_its_own_service_and_no_other() -> Result<()> {
    use PeerRole::{Learner, Operator, Rollout, Verifier};
    let mut cluster = cluster(6)?;
    cluster.start_coordinator(&[])?;
    runtime()?.block_on(async {
        for role in PeerRole::ALL {
            let channel = cluster.channel(role).await?;
            let worker_id = 7;
            let heartbeat = v1::HeartbeatRequest { worker_id, ..Default::default() };
            let groups = v1::LeaseGroupsRequest { worker_id, free_samples: 1, wait_ms: 0, request: 1 };
            let samples = v1::LeaseSamplesRequest { worker_id, max_samples: 1, wait_ms: 0, request: 1 };
            let generation = v1::JoinGenerationRequest { worker_id, wait_ms: 0 };
            let may = [
                (
                    &[Learner, Rollout, Verifier][..],
                    WorkerServiceClient::new(channel.clone()).heartbeat(heartbeat).await.map(drop),
                ),
                (&[Rollout], RolloutServiceClient::new(channel.clone()).lease_groups(groups).await.map(drop)),
                (&[Verifier], VerifierServiceClient::new(channel.clone()).lease_samples(samples).await.map(drop)),
                (&[Learner], LearnerServiceClient::new(channel.clone()).join_generation(generation).await.map(drop)),
                (
                    &[Operator],
                    ObserveServiceClient::new(channel.clone())
                        .list_samples(v1::ListSamplesRequest::default())
                        .await
                        .map(drop),
                ),
                (
                    &[Operator],
                    ObserveServiceClient::new(channel.clone()).watch(v1::WatchRequest::default()).await.map(drop),
                ),
                (&[Operator], OperatorServiceClient::new(channel).get_status(v1::GetStatusRequest {}).await.map(drop)),
            ];
            for (service, (allowed, result)) in may.into_iter().enumerate() {
                let said = format!("{result:?}");
                assert_eq!(denied(result), !allowed.contains(&role), "{role} at service {service}: {said}");
            }
        }
        Ok(())
    })
}

fn registration(role: v1::Role, attempt: &str) -> v1::RegisterRequest {
    v1::RegisterRequest {
        role: role.into(),
        name: format!("{role:?}"),
        host: "here".into(),
        pid: 1,
        version: env!("CARGO_PKG_VERSION").into(),
        collective_address: String::new(),
        attempt: attempt.into(),
        run_id: String::new(),
        started: 0,
    }
}

#[test]
fn a_worker_speaks_for_its_own_role_and_start_only() -> Result<()> {
    let mut cluster = cluster(6)?;
    cluster.start_coordinator(&["--attempt", "17.1"])?;
    runtime()?.block_on(async {
        let mut learner = WorkerServiceClient::new(cluster.channel(PeerRole::Learner).await?);
        let mut verifier = WorkerServiceClient::new(cluster.channel(PeerRole::Verifier).await?);
        assert!(denied(verifier.register(registration(v1::Role::Learner, "17.1")).await));
        let worker_id = learner.register(registration(v1::Role::Learner, "17.1")).await?.into_inner().worker_id;
        let heartbeat = v1::HeartbeatRequest { worker_id, ..Default::default() };
        assert!(denied(verifier.heartbeat(heartbeat.clone()).await), "a verifier keeps no learner alive");
        assert!(
            denied(verifier.leave(v1::LeaveRequest { worker_id, error: String::new() }).await),
            "nor sends it away"
        );
        learner.heartbeat(heartbeat).await?;

        // A learner of an earlier start, left on a lost node, must not take a slot of this one.
        let stale = learner.register(registration(v1::Role::Learner, "17.0")).await.expect_err("given up");
        assert_eq!(stale.code(), Code::Aborted, "{stale}");
        verifier.register(registration(v1::Role::Verifier, "")).await?;
        Ok(())
    })
}

#[test]
fn strangers_and_plain_text_are_turned_away() -> Result<()> {
    let mut first = cluster(6)?;
    let second = cluster(6)?;
    first.start_coordinator(&[])?;
    runtime()?.block_on(async {
        let channel = first.channel(PeerRole::Operator).await?;
        OperatorServiceClient::new(channel).get_status(v1::GetStatusRequest {}).await?;
        let address = pacs_runtime::launch::find(&first.job.path("run").display().to_string())?;
        let stranger = pacs_runtime::launch::security(&second.certificates(), PeerRole::Operator)?;
        assert!(
            dial(&address, PeerRole::Coordinator, &stranger, &RunIdentity::default()).await.is_err(),
            "another authority's"
        );
        // The connection may stay open for a moment before the peer closes it.
        let plain = dial(&address, PeerRole::Coordinator, &Security::Plain, &RunIdentity::default()).await;
        if let Ok(channel) = plain {
            assert!(OperatorServiceClient::new(channel).get_status(v1::GetStatusRequest {}).await.is_err());
        }
        Ok(())
    })
}

#[test]
fn certificates_are_taken_up_while_the_coordinator_runs() -> Result<()> {
    let mut cluster = cluster(6)?;
    cluster.start_coordinator(&[])?;
    runtime()?.block_on(async {
        let status = async |cluster: &Cluster| -> Result<()> {
            let channel = cluster.channel(PeerRole::Operator).await?;
            OperatorServiceClient::new(channel).get_status(v1::GetStatusRequest {}).await?;
            Ok(())
        };
        status(&cluster).await?;
        // A new authority: a coordinator that had cached its files would refuse the new certificates.
        fs::rename(cluster.certificates(), cluster.job.path("old"))?;
        cluster.make_certificates()?;
        status(&cluster).await
    })
}

#[test]
fn two_processes_of_one_name_end_in_one_clear_error() -> Result<()> {
    let mut cluster = cluster(6)?;
    cluster.start_coordinator(&[])?;
    let verifier = ["verifier", "--name", "verifier-0", "--threads", "1"];
    cluster.start("first", "pacs", &verifier)?;
    cluster.wait_for("registration", |cluster| cluster.said("first").contains("joined the run"))?;
    cluster.start("second", "pacs", &verifier)?;
    assert_eq!(cluster.code("second")?, Some(78), "{}", cluster.said("second"));
    let said = cluster.said("second");
    ensure!(said.contains("error: ") && said.contains("the name `verifier-0` is taken by a live process"), "{said}");
    ensure!(!cluster.said("first").contains("joining again"), "{}", cluster.said("first"));
    let registered = cluster.said("coordinator").matches("worker registered").count();
    ensure!(registered == 1, "{registered} registrations:\n{}", cluster.said("coordinator"));
    Ok(())
}

#[test]
fn plain_text_does_not_leave_the_machine() -> Result<()> {
    let mut cluster = cluster(6)?;
    let spec = cluster.job.path("job.toml").display().to_string();
    // Run outside the cluster's environment, which names certificates: without them the program must refuse.
    let output = std::process::Command::new(pacs_tests::program("pacs")?)
        .args(["coordinator", &spec, "--listen", "0.0.0.0:0", "--plaintext", "--run-dir"])
        .arg(cluster.job.path("run"))
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(78), "{said}");
    assert!(said.contains("plain text never leaves the machine"), "{said}");
    cluster.start("none", "pacs", &["verifier", "--name", "v", "--coordinator", "127.0.0.1:1", "--plaintext"])?;
    assert_eq!(cluster.code("none")?, Some(2), "both protections at once: {}", cluster.said("none"));
    Ok(())
}

#[test]
fn probes_are_answered_in_plain_text() -> Result<()> {
    let mut cluster = cluster(6)?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    cluster.start_coordinator(&["--health-listen", &port.to_string()])?;
    runtime()?.block_on(async {
        cluster.channel(PeerRole::Operator).await?;
        let channel = dial(&port.to_string(), PeerRole::Coordinator, &Security::Plain, &RunIdentity::default()).await?;
        let mut client = HealthClient::new(channel);
        for service in ["", Health::READY, Health::PROGRESS] {
            let request = HealthCheckRequest { service: service.into() };
            assert_eq!(client.check(request).await?.into_inner().status(), ServingStatus::Serving, "`{service}`");
        }
        Ok(())
    })
}
