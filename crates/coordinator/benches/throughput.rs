//! `cargo xtask bench coordinator`: the way of samples through the coordinator, without models: lease, sample, verdict, batch,
//! with the journal on; then memory with all slots full, and a restart. Prints one JSON line a measurement.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Parser, Subcommand};
use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as Done;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_runtime::net::RunChannel;
use serde_json::json;
use support::{CALLS, Job, ROLLOUTS, Served, WAIT_MS, beat, cpu_time, join, judge, register, told, weights};
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::Request;

/// Samples of a group.
const GROUP: u32 = 8;

#[derive(Parser)]
struct Arguments {
    /// Seconds that each throughput takes if it meets its target.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    #[command(subcommand)]
    only: Option<Only>,
    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Only {
    /// Fills the slots of two steps with samples, and starts the coordinator again.
    InFlight {
        /// Bytes of one sample: tokens, their log-probs and the text.
        bytes: usize,
        /// How many samples.
        samples: u32,
    },
}

fn main() -> Result<()> {
    support::serve_if_told()?;
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if let Some(Only::InFlight { bytes, samples }) = arguments.only {
        return runtime.block_on(in_flight(bytes, samples));
    }
    for (sample_bytes, samples_per_step, target) in [(2048, 8000, 20_000.0), (65_536, 800, 2000.0)] {
        let folder = tempfile::tempdir()?;
        // As many steps as the target would make in that time.
        let steps = (target * arguments.seconds / f64::from(samples_per_step)).ceil().max(1.0) as u64;
        let job = Job::new(folder.path(), samples_per_step / GROUP, GROUP, steps);
        let (elapsed, cpu) = runtime.block_on(throughput(&job, sample_bytes))?;
        let samples = (job.sequences() * job.steps) as f64;
        let line = json!({
            "bench": "coordinator", "what": "throughput", "sample_bytes": sample_bytes, "samples": samples,
            "seconds": elapsed.as_secs_f64(), "samples_per_second": samples / elapsed.as_secs_f64(), "target": target,
            // The workers that make the samples up are part of it.
            "cpu_seconds": cpu.as_secs_f64(), "cpu_microseconds_per_sample": 1e6 * cpu.as_secs_f64() / samples,
            "samples_per_second_of_two_free_cores": 2.0 * samples / cpu.as_secs_f64(),
        });
        println!("{line}");
    }
    for (sample_bytes, samples) in [(2048, 100_000), (65_536, 4000)] {
        runtime.block_on(in_flight(sample_bytes, samples))?;
    }
    Ok(())
}

/// Runs a whole job with workers of this process, which call the services without a network.
async fn throughput(job: &Job, sample_bytes: usize) -> Result<(Duration, Duration)> {
    let coordinator = job.start().await?;
    let services = coordinator.services();
    let (began, cpu_before) = (Instant::now(), cpu_time("self")?);
    let mut tasks = JoinSet::new();
    for slot in 0..ROLLOUTS {
        tasks.spawn(rollout(services.clone(), slot, sample_bytes));
    }
    tasks.spawn(verifier(services.clone()));
    tasks.spawn(learner(services));
    // Only the learner ends well.
    let ended = tasks.join_next().await.context("there are workers")?;
    ended.map_err(|panic| anyhow!("{panic}"))??;
    Ok((began.elapsed(), cpu_time("self")?.saturating_sub(cpu_before)))
}

/// Hands in samples of a size as fast as they are taken, `CALLS` at a time.
async fn rollout<S>(services: S, slot: u32, bytes: usize) -> Result<()>
where
    S: WorkerService + RolloutService + Clone,
{
    let worker_id = register(&services, v1::Role::Rollout, &format!("rollout-{slot}")).await?;
    let made = support::sample_of(bytes, 100, 0);
    loop {
        let _ = services.heartbeat(Request::new(beat(worker_id))).await;
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: 512, wait_ms: WAIT_MS, request: 0 };
        let leases = services.lease_groups(Request::new(request)).await.map_err(told)?.into_inner().groups;
        let mut calls = JoinSet::new();
        for lease in leases {
            for wanted in &lease.samples {
                let sample = v1::Sample { version: lease.min_version, ..made.clone() };
                let request = support::submission(worker_id, &lease, wanted.index, sample);
                let services = services.clone();
                if calls.len() >= CALLS {
                    calls.join_next().await;
                }
                calls.spawn(async move { services.submit_sample(Request::new(request)).await.is_ok() });
            }
        }
        while calls.join_next().await.is_some() {}
    }
}

async fn verifier(services: impl WorkerService + VerifierService) -> Result<()> {
    let worker_id = register(&services, v1::Role::Verifier, "verifier-0").await?;
    loop {
        let _ = services.heartbeat(Request::new(beat(worker_id))).await;
        let request = v1::LeaseSamplesRequest { worker_id, max_samples: 256, wait_ms: WAIT_MS, request: 0 };
        let tasks = services.lease_samples(Request::new(request)).await.map_err(told)?.into_inner().tasks;
        services.submit_verdicts(Request::new(judge(worker_id, tasks))).await.map_err(told)?;
    }
}

/// Takes batches and says that they are trained; ends when it has made the last step.
async fn learner(services: impl WorkerService + LearnerService) -> Result<()> {
    let worker_id = register(&services, v1::Role::Learner, "learner-0").await?;
    let request = v1::JoinGenerationRequest { worker_id, wait_ms: WAIT_MS };
    let group = services.join_generation(Request::new(request)).await.map_err(told)?.into_inner().group;
    let generation = group.context("no generation was formed")?.generation;
    loop {
        let _ = services.heartbeat(Request::new(beat(worker_id))).await;
        let request = v1::NextTaskRequest { worker_id, generation, wait_ms: WAIT_MS, busy: false };
        let next = services.next_task(Request::new(request)).await.map_err(told)?.into_inner();
        let task_id = next.task_id;
        let result = match next.task {
            None => continue,
            Some(Task::Prepare(_)) => Done::Prepared(v1::PrepareResult { weights: Some(weights(generation, 0)) }),
            Some(Task::Train(task)) => {
                let request = v1::StreamBatchRequest { worker_id, generation, task_id, ..Default::default() };
                let pieces = services.stream_batch(Request::new(request)).await.map_err(told)?.into_inner();
                let mut pieces = std::pin::pin!(pieces);
                let mut sequences = 0;
                while let Some(piece) = pieces.next().await {
                    sequences += piece.map_err(told)?.sequences.len();
                }
                ensure!(sequences == task.rank_sequences as usize, "{sequences} sequences came");
                let weights = Some(weights(generation, task.step));
                Done::Trained(v1::TrainResult { weights, ..Default::default() })
            }
            // Only the last step is saved.
            Some(Task::Save(_)) => return Ok(()),
            Some(Task::Regroup(regroup)) => return Err(anyhow!(regroup.reason)),
        };
        let request = v1::CompleteTaskRequest { worker_id, generation, task_id, result: Some(result) };
        services.complete_task(Request::new(request)).await.map_err(told)?;
    }
}

/// Fills all slots with samples that nobody judges, kills the coordinator, and starts another one on what it has written.
async fn in_flight(sample_bytes: usize, samples: u32) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let job = Job::new(folder.path(), samples / 2 / GROUP, GROUP, 2);
    let coordinator = Served::start(&job)?;
    let channel = coordinator.channel().await?;
    let handed_in: Arc<AtomicU64> = Arc::default();
    // The slots of two steps: rollouts may be one ahead.
    let wanted = 2 * job.sequences();
    let mut tasks = JoinSet::new();
    tasks.spawn(prepare(channel.clone()));
    let before = coordinator.resident()?;
    for slot in 0..ROLLOUTS {
        tasks.spawn(hand_in(channel.clone(), slot, sample_bytes, Arc::clone(&handed_in)));
    }
    while handed_in.load(Ordering::Relaxed) < wanted {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if let Some(ended) = tasks.try_join_next() {
            return Err(anyhow!("a worker has ended: {ended:?}"));
        }
    }
    let resident = coordinator.resident()?.saturating_sub(before);
    tasks.shutdown().await;
    drop(coordinator);
    let began = Instant::now();
    let coordinator = Served::start(&job)?;
    let (restart, restart_cpu) = (began.elapsed(), coordinator.cpu_time()?);
    let mut operator = OperatorServiceClient::new(coordinator.channel().await?);
    let status = operator.get_status(v1::GetStatusRequest {}).await.map_err(told)?.into_inner();
    let found = status.queues.context("the status has queues")?.samples_waiting;
    ensure!(u64::from(found) == wanted, "{found} of {wanted} samples were found again");
    let bytes = wanted * sample_bytes as u64;
    let line = json!({
        "bench": "coordinator", "what": "in flight", "sample_bytes": sample_bytes, "samples": wanted, "bytes": bytes,
        "resident_bytes": resident, "resident_share": resident as f64 / bytes as f64, "resident_share_target": 1.3,
        "restart_seconds": restart.as_secs_f64(), "restart_cpu_seconds": restart_cpu.as_secs_f64(), "restart_target": 5,
    });
    println!("{line}");
    Ok(())
}

/// A learner that never gets a batch.
async fn prepare(channel: RunChannel) -> Result<()> {
    let member = join(&channel, v1::Role::Learner, "learner-0").await?;
    let (worker_id, mut client) = (member.id, LearnerServiceClient::new(channel));
    let request = v1::JoinGenerationRequest { worker_id, wait_ms: WAIT_MS };
    let group = client.join_generation(request).await.map_err(told)?.into_inner().group;
    let generation = group.context("no generation was formed")?.generation;
    loop {
        let request = v1::NextTaskRequest { worker_id, generation, wait_ms: WAIT_MS, busy: false };
        let next = client.next_task(request).await.map_err(told)?.into_inner();
        match next.task {
            None => {}
            Some(Task::Prepare(_)) => {
                let result = Done::Prepared(v1::PrepareResult { weights: Some(weights(generation, 0)) });
                let (task_id, result) = (next.task_id, Some(result));
                let request = v1::CompleteTaskRequest { worker_id, generation, task_id, result };
                client.complete_task(request).await.map_err(told)?;
            }
            Some(task) => return Err(anyhow!("there is a task: {task:?}")),
        }
    }
}

/// As [`rollout`], over the network.
async fn hand_in(channel: RunChannel, slot: u32, bytes: usize, handed_in: Arc<AtomicU64>) -> Result<()> {
    let member = join(&channel, v1::Role::Rollout, &format!("rollout-{slot}")).await?;
    let (worker_id, mut client) = (member.id, RolloutServiceClient::new(channel));
    let made = support::sample_of(bytes, 100, 0);
    loop {
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: 512, wait_ms: WAIT_MS, request: 0 };
        let leases = client.lease_groups(request).await.map_err(told)?.into_inner().groups;
        let mut calls = JoinSet::new();
        for lease in leases {
            for wanted in &lease.samples {
                let request = support::submission(worker_id, &lease, wanted.index, made.clone());
                if calls.len() >= CALLS {
                    calls.join_next().await;
                }
                let (mut client, handed_in) = (client.clone(), Arc::clone(&handed_in));
                calls.spawn(async move {
                    if client.submit_sample(request).await.is_ok() {
                        handed_in.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        }
        while calls.join_next().await.is_some() {}
    }
}
