//! A hostile client that speaks the real protocol to a real coordinator while honest workers do the run. Its calls are refused
//! with the limit that they exceed, and the run finishes.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pacs_protocol::MAX_MESSAGE_BYTES;
use pacs_protocol::v1;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_runtime::launch;
use pacs_runtime::net::{PeerRole, RunChannel};
use pacs_tests::{Cluster, Job};
use tokio::runtime::Runtime;
use tonic::{Code, Status};

const STEPS: i64 = 3;
/// Most tokens of an answer that a lease of the tiny job allows.
const MOST_TOKENS: usize = 12;
const HONEST: [&str; 3] = ["rollout-0", "verifier-0", "learner-0"];

fn runtime() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn cluster() -> Result<Cluster> {
    let job = Job::tiny()?.with("batch.steps", STEPS).with("checkpoint.every_steps", 1).with("checkpoint.keep", 1);
    Cluster::new(job.with("evaluation.before", false).with("evaluation.after", false))
}

/// Waits until the run of a cluster is over, and checks that it finished in order.
fn finishes(cluster: &mut Cluster, workers: &[&str]) -> Result<()> {
    ensure!(cluster.code("coordinator")? == Some(0), "{}", cluster.said("coordinator"));
    for worker in workers {
        ensure!(cluster.code(worker)? == Some(0), "{worker}: {}", cluster.said(worker));
        ensure!(!cluster.said(worker).contains("panicked at"), "{worker}: {}", cluster.said(worker));
    }
    ensure!(!cluster.said("coordinator").contains("panicked at"), "{}", cluster.said("coordinator"));
    cluster.job.check_every_step_once(STEPS as u64)
}

fn register(role: v1::Role, name: &str) -> v1::RegisterRequest {
    v1::RegisterRequest {
        role: role.into(),
        name: name.into(),
        host: "elsewhere".into(),
        pid: 4711,
        version: env!("CARGO_PKG_VERSION").into(),
        ..v1::RegisterRequest::default()
    }
}

async fn join(channel: &RunChannel, role: v1::Role, name: &str) -> Result<u64> {
    let registered = WorkerServiceClient::new(channel.clone()).register(register(role, name)).await?;
    Ok(registered.into_inner().worker_id)
}

async fn leave(channel: &RunChannel, worker_id: u64) -> Result<()> {
    let error = String::new();
    WorkerServiceClient::new(channel.clone()).leave(v1::LeaveRequest { worker_id, error }).await?;
    Ok(())
}

/// Checks that a call was refused as invalid, with a message that names the field and the limit.
fn refused<T>(what: &str, result: Result<T, Status>, parts: &[&str]) -> Result<()> {
    let Err(status) = result else { anyhow::bail!("{what} was accepted") };
    ensure!(status.code() == Code::InvalidArgument, "{what}: {status}");
    ensure!(parts.iter().all(|part| status.message().contains(part)), "{what}: {status}");
    Ok(())
}

fn honest_sample(version: u64) -> v1::Sample {
    v1::Sample {
        tokens: vec![7, 8],
        logprobs: vec![-0.5, -1.0],
        entropy_sum: 2.0,
        text: "7 8".into(),
        finish: v1::FinishReason::Stop.into(),
        version,
        ..v1::Sample::default()
    }
}

/// Samples that violate their lease in every way, each with what the refusal has to name.
fn bad_samples(version: u64) -> Vec<(&'static str, v1::Sample, Vec<&'static str>)> {
    let long =
        |tokens: usize| v1::Sample { tokens: vec![7; tokens], logprobs: vec![-0.5; tokens], ..honest_sample(version) };
    let with = |change: fn(&mut v1::Sample)| {
        let mut sample = honest_sample(version);
        change(&mut sample);
        sample
    };
    vec![
        (
            "a token outside the vocabulary",
            with(|s| s.tokens[0] = u32::MAX),
            vec!["tokens", "4294967295", "vocabulary has"],
        ),
        ("a token too many", long(MOST_TOKENS + 1), vec!["tokens", "allows 12", "rollout.max_new_tokens"]),
        ("100,000 tokens", long(100_000), vec!["tokens", "100000", "allows 12"]),
        ("no tokens", long(0), vec!["tokens"]),
        ("a log-prob of NaN", with(|s| s.logprobs[0] = f32::NAN), vec!["logprobs", "NaN", "-500"]),
        ("an infinite log-prob", with(|s| s.logprobs[1] = f32::NEG_INFINITY), vec!["logprobs", "-500"]),
        ("a log-prob of -3e38", with(|s| s.logprobs[0] = -3e38), vec!["logprobs", "-500"]),
        ("a log-prob of 3e38", with(|s| s.logprobs[0] = 3e38), vec!["logprobs", "0.01"]),
        (
            "a sampled log-prob of -3e38",
            with(|s| s.sampled_logprobs = vec![-3e38, -1.0]),
            vec!["sampled_logprobs", "-500"],
        ),
        ("an entropy of 1e308", with(|s| s.entropy_sum = 1e308), vec!["entropy_sum", "expected 0 to"]),
        ("an entropy of NaN", with(|s| s.entropy_sum = f64::NAN), vec!["entropy_sum"]),
        ("more text than tokens", with(|s| s.text = "x".repeat(20_000)), vec!["text", "4096"]),
        ("no finish", with(|s| s.finish = 0), vec!["finish"]),
        (
            "routes that were not asked for",
            with(|s| s.routes = vec![0; 4].into()),
            vec!["routes", "rollout.router_replay"],
        ),
        ("spans of other tokens", with(|s| s.spans = vec![v1::VersionSpan { version: 0, tokens: 9 }]), vec!["spans"]),
    ]
}

/// Leases a group, waiting until there are weights.
async fn lease(client: &mut RolloutServiceClient<RunChannel>, worker_id: u64) -> Result<v1::GroupLease> {
    let request = v1::LeaseGroupsRequest { worker_id, free_samples: 8, wait_ms: 5000, request: 0 };
    let began = Instant::now();
    loop {
        if let Some(lease) = client.lease_groups(request).await?.into_inner().groups.pop() {
            return Ok(lease);
        }
        // No other rollout worker competes for the lease.
        ensure!(began.elapsed() < Duration::from_secs(120), "no lease");
    }
}

#[test]
fn samples_and_verdicts_without_a_lease_are_refused_and_the_run_finishes() -> Result<()> {
    let mut cluster = cluster()?;
    cluster.start_worker("learner-0")?;
    cluster.start_coordinator(&[])?;
    runtime()?.block_on(async {
        let channel = cluster.channel(PeerRole::Rollout).await?;
        let worker_id = join(&channel, v1::Role::Rollout, "rollout-9").await?;
        let mut client = RolloutServiceClient::new(channel.clone());
        let lease = lease(&mut client, worker_id).await?;
        let request = |sample: v1::Sample, sample_index| v1::SubmitSampleRequest {
            worker_id,
            lease_id: lease.lease_id,
            group_id: lease.group_id,
            sample_index,
            sample: Some(sample),
        };
        for (what, sample, parts) in bad_samples(lease.min_version) {
            refused(what, client.submit_sample(request(sample, 0)).await, &parts)?;
        }
        // Larger messages are refused by the transport before they are parsed.
        let tokens = 1_000_000;
        let long = v1::Sample { tokens: vec![7; tokens], logprobs: vec![-0.5; tokens], ..honest_sample(0) };
        let status = client.submit_sample(request(long, 0)).await.err().context("a million tokens were accepted")?;
        ensure!(status.code() == Code::OutOfRange && status.message().contains("limit"), "{status}");
        // Unknown weights, an index outside the group, and another worker's lease.
        for (what, version, index, lease_id) in [
            ("weights of the future", 99, 0, lease.lease_id),
            ("a sample too many", 0, 99, lease.lease_id),
            ("a lease of nobody", 0, 0, 1),
        ] {
            let request = v1::SubmitSampleRequest { lease_id, ..request(honest_sample(version), index) };
            let status = client.submit_sample(request).await.err().with_context(|| format!("{what} was accepted"))?;
            ensure!(status.code() == Code::FailedPrecondition, "{what}: {status}");
        }
        // Claiming future weights revoked the lease, so take another one for samples that reach a verifier.
        let lease = self::lease(&mut client, worker_id).await?;
        for wanted in &lease.samples {
            let sample = v1::SubmitSampleRequest {
                lease_id: lease.lease_id,
                group_id: lease.group_id,
                ..request(honest_sample(lease.min_version), wanted.index)
            };
            client.submit_sample(sample).await?;
        }
        verdicts(&cluster).await?;
        leave(&channel, worker_id).await
    })?;
    cluster.start_worker("rollout-0")?;
    cluster.start_worker("verifier-0")?;
    finishes(&mut cluster, &HONEST)
}

/// Submits verdicts that no honest verifier of the job would give.
async fn verdicts(cluster: &Cluster) -> Result<()> {
    let channel = cluster.channel(PeerRole::Verifier).await?;
    let worker_id = join(&channel, v1::Role::Verifier, "verifier-9").await?;
    let mut client = VerifierServiceClient::new(channel.clone()).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let request = v1::LeaseSamplesRequest { worker_id, max_samples: 1, wait_ms: 10_000, request: 0 };
    let task = client.lease_samples(request).await?.into_inner().tasks.pop().context("a sample to judge")?;
    let honest = v1::Verdict { outcome: v1::Outcome::Wrong.into(), rule: "number".into(), ..v1::Verdict::default() };
    let asked = |verifier: &str, reward| v1::Verification {
        verifier: verifier.into(),
        outcome: v1::Outcome::Wrong.into(),
        reward,
        ..v1::Verification::default()
    };
    let call = |verdict: v1::Verdict, verifications: Vec<v1::Verification>| {
        let v1::VerifyTask { lease_id, group_id, sample_index, .. } = task;
        let verdict = v1::TaskVerdict { lease_id, group_id, sample_index, verdict: Some(verdict), verifications };
        v1::SubmitVerdictsRequest { worker_id, verdicts: vec![verdict] }
    };
    let correct = v1::Verdict { outcome: v1::Outcome::Correct.into(), ..honest.clone() };
    let text = "x".repeat(100_000);
    for (what, verdict, verifications, parts) in [
        ("CORRECT with label 0", correct.clone(), vec![], ["label", "0"]),
        ("CORRECT with label 0.5", v1::Verdict { label: 0.5, ..correct }, vec![], ["label", "0 or 1"]),
        ("WRONG with label 1", v1::Verdict { label: 1.0, ..honest.clone() }, vec![], ["label", "below 1"]),
        ("a label of NaN", v1::Verdict { label: f64::NAN, ..honest.clone() }, vec![], ["label", "0 to 1"]),
        ("a reward of 1e308", v1::Verdict { reward: 1e308, ..honest.clone() }, vec![], ["reward", "1e10"]),
        ("a reward of -1e9", v1::Verdict { reward: -1e9, ..honest.clone() }, vec![], ["reward", "[reward]"]),
        ("a reward of NaN", v1::Verdict { reward: f64::NAN, ..honest.clone() }, vec![], ["reward", "NaN"]),
        ("no outcome", v1::Verdict { outcome: 0, ..honest.clone() }, vec![], ["outcome", "not specified"]),
        ("a long rule", v1::Verdict { rule: text.clone(), ..honest.clone() }, vec![], ["rule", "16384"]),
        ("a long extract", v1::Verdict { extracted: Some(text), ..honest.clone() }, vec![], ["extracted", "16384"]),
        ("an invented verifier", honest.clone(), vec![asked("made-up-17", 0.0)], ["verifications.verifier", "label"]),
        ("a verifier twice", honest.clone(), vec![asked("label", 0.0); 2], ["verifications", "1 verifiers"]),
        ("its reward of 1e308", honest.clone(), vec![asked("label", 1e308)], ["verifications.reward", "-1 to 1"]),
    ] {
        refused(what, client.submit_verdicts(call(verdict, verifications)).await, &parts)?;
    }
    // Empty verdicts must be refused before they are parsed: 10 MB of them once grew to 57 times that in memory.
    let process = fs::read_to_string(cluster.job.run_path("coordinator.json"))?;
    let pid = serde_json::from_str::<serde_json::Value>(&process)?["pid"].as_u64().context("a process id")?;
    let before = resident_bytes(pid)?;
    for _ in 0..4 {
        let verdicts = vec![v1::TaskVerdict::default(); 5_000_000];
        let sent = client.submit_verdicts(v1::SubmitVerdictsRequest { worker_id, verdicts }).await;
        let status = sent.err().context("five million empty verdicts were accepted")?;
        ensure!(status.code() == Code::OutOfRange, "{status}");
    }
    let grown = resident_bytes(pid)?.saturating_sub(before);
    ensure!(grown < 100 << 20, "the coordinator has grown by {grown} bytes");
    let few = vec![v1::TaskVerdict::default(); 5000];
    let sent = client.submit_verdicts(v1::SubmitVerdictsRequest { worker_id, verdicts: few }).await;
    refused("5,000 empty verdicts", sent, &["verdicts", "5000", "4096"])?;
    leave(&channel, worker_id).await
}

/// Returns the resident memory of a process, in bytes.
fn resident_bytes(pid: u64) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

#[test]
fn names_are_short_and_those_of_other_roles_take_nothing() -> Result<()> {
    let mut cluster = cluster()?;
    HONEST.iter().try_for_each(|worker| cluster.start_worker(worker))?;
    cluster.start_coordinator(&[])?;
    runtime()?.block_on(async {
        let channel = cluster.channel(PeerRole::Verifier).await?;
        let mut client = WorkerServiceClient::new(channel.clone());
        let named = |name: String| v1::RegisterRequest { name, ..register(v1::Role::Verifier, "") };
        refused("a name of 8 MiB", client.register(named("n".repeat(8 << 20))).await, &["name", "8388608", "256"])?;
        refused("a name of 1 KiB", client.register(named("n".repeat(1024))).await, &["name", "1024", "256"])?;
        refused("no name", client.register(named(String::new())).await, &["name", "empty"])?;
        refused("an escape sequence", client.register(named("\u{1b}[2J".into())).await, &["name", "control"])?;
        let huge = v1::RegisterRequest { attempt: "a".repeat(1024), ..register(v1::Role::Verifier, "verifier-9") };
        refused("an attempt of 1 KiB", client.register(huge).await, &["attempt", "256"])?;
        let other = client.register(register(v1::Role::Learner, "learner-9")).await.err().context("of another role")?;
        ensure!(other.code() == Code::PermissionDenied, "{other}");
        // Names are scoped by role: a verifier with the learner's name must not take the learner's slot.
        cluster.wait_for("learner", |cluster| cluster.said("coordinator").contains("generation formed"))?;
        let worker_id = join(&channel, v1::Role::Verifier, "learner-0").await?;
        leave(&channel, worker_id).await
    })?;
    finishes(&mut cluster, &HONEST)?;
    let lost = cluster.said("coordinator").lines().filter(|line| line.contains("generation formed")).count();
    ensure!(lost == 1, "the learner was thrown out: {}", cluster.said("coordinator"));
    Ok(())
}

/// Number of silent connections, above the coordinator's open-file limit.
const SILENT: usize = 1100;

#[test]
fn silent_connections_take_no_file_and_no_turn_of_those_that_work() -> Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if hard < 2 * SILENT as u64 {
        eprintln!("skipped: this process may have {hard} files, and {SILENT} connections need more");
        return Ok(());
    }
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(2 * SILENT as u64), hard)?;
    let mut cluster = cluster()?;
    cluster.limit_files(1024);
    cluster.start_coordinator(&[])?;
    cluster.no_limits();
    cluster.wait_for("coordinator", |cluster| cluster.said("coordinator").contains("serving "))?;
    let address = launch::find(&cluster.job.run_path("").display().to_string())?;
    let mut silent = (0..SILENT)
        .map(|_| TcpStream::connect(&address).context("connect and say nothing"))
        .collect::<Result<Vec<_>>>()?;
    // With these connections open, operators must be answered, and workers must be able to join and work.
    HONEST.iter().try_for_each(|worker| cluster.start_worker(worker))?;
    runtime()?.block_on(async {
        for _ in 0..5 {
            let mut client = OperatorServiceClient::new(cluster.channel(PeerRole::Operator).await?);
            client.get_status(v1::GetStatusRequest {}).await?;
            silent.extend((0..50).filter_map(|_| TcpStream::connect(&address).ok()));
        }
        Ok::<_, anyhow::Error>(())
    })?;
    finishes(&mut cluster, &HONEST)?;
    let said = cluster.said("coordinator");
    ensure!(!said.contains("Too many open files"), "{said}");
    // Most of them were closed, to make room or by timeout.
    let closed = |stream: &mut TcpStream| {
        stream.set_nonblocking(true).is_ok()
            && !matches!(stream.read(&mut [0]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    };
    let closed = silent.iter_mut().filter_map(|stream| closed(stream).then_some(())).count();
    ensure!(closed >= SILENT / 2, "{closed} of {} connections are closed", silent.len());
    Ok(())
}
