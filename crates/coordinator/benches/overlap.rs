//! `cargo xtask bench asynchrony`: what asynchrony is worth: the time of a step while generation runs ahead, and while it does
//! not. Prints one JSON line a measurement.
//!
//! The workers wait instead of computing, so that generation and training cost exactly what they are said to cost and
//! overlap on any number of cores; the coordinator, its journal and the calls over the network are the real ones.

mod support;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as Done;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_runtime::net::RunChannel;
use serde_json::json;
use support::{Job, Served, WAIT_MS, join, judge, told, weights};
use tokio::task::JoinSet;

/// A step takes so many times less with `max_lag` = 1 than with 0 where generation and training cost the same.
const RATIO_TARGET: f64 = 1.7;
/// Groups of a step, and samples of a group.
const GROUPS: u32 = 16;
const GROUP: u32 = 8;
/// Steps before the clock starts: the pipeline fills.
const WARM_UP: u64 = 2;
/// Steps that are timed.
const STEPS: u64 = 12;

#[derive(Parser)]
struct Arguments {
    /// Seconds that the steps take altogether.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Cost of a step's generation, in multiples of that of its training.
    #[arg(long, default_value_t = 1.0)]
    generation: f64,
    /// Problems that every version is evaluated on, each at the cost of a group of the step; 0: no evaluation.
    #[arg(long, default_value_t = 0)]
    evaluation: u32,
    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    support::serve_if_told()?;
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // The synchronous loop takes two thirds of the time, for a step of it is generation and training.
    let training = Duration::from_secs_f64(arguments.seconds / (3.0 * STEPS as f64));
    let work = Work { training, generation: training.mul_f64(arguments.generation), evaluation: arguments.evaluation };
    let mut measured = Vec::new();
    for max_lag in [0, 1] {
        let step = runtime.block_on(step_time(max_lag, work))?.as_secs_f64();
        let line = json!({
            "bench": "asynchrony", "max_lag": max_lag, "steps": STEPS, "evaluation_problems": work.evaluation,
            "generation_seconds": work.generation.as_secs_f64(), "training_seconds": work.training.as_secs_f64(),
            "step_seconds": step,
        });
        println!("{line}");
        measured.push(step);
    }
    let ratio = measured[0] / measured[1];
    println!("{}", json!({"bench": "asynchrony", "ratio_of_step_times": ratio, "target": RATIO_TARGET}));
    Ok(())
}

/// What a step costs.
#[derive(Clone, Copy)]
struct Work {
    generation: Duration,
    training: Duration,
    /// Problems of the evaluation after each step, which cost as much as groups of the step.
    evaluation: u32,
}

/// The mean time of a step.
async fn step_time(max_lag: u32, work: Work) -> Result<Duration> {
    let folder = tempfile::tempdir()?;
    let job = Job { max_lag, evaluation: work.evaluation, ..Job::new(folder.path(), GROUPS, GROUP, WARM_UP + STEPS) };
    let coordinator = Served::start(&job)?;
    let channel = coordinator.channel().await?;
    let mut others = JoinSet::new();
    others.spawn(rollout(channel.clone(), work.generation / GROUPS));
    others.spawn(verifier(channel.clone()));
    let trained = learner(channel, work.training);
    tokio::select! {
        times = trained => {
            let times = times?;
            let (first, last) = (times[WARM_UP as usize - 1], times[times.len() - 1]);
            Ok((last - first) / u32::try_from(STEPS)?)
        }
        Some(ended) = others.join_next() => Err(anyhow!("a worker has ended: {ended:?}")),
    }
}

/// Generates one group after the other, each in the time that a group costs. Samples are submitted meanwhile, as by an
/// engine that continues to generate meanwhile.
async fn rollout(channel: RunChannel, group_time: Duration) -> Result<()> {
    let member = join(&channel, v1::Role::Rollout, "rollout-0").await?;
    let (worker_id, mut client) = (member.id, RolloutServiceClient::new(channel));
    let mut handing_in: JoinSet<Result<()>> = JoinSet::new();
    loop {
        while let Some(done) = handing_in.try_join_next() {
            done??;
        }
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: GROUP, wait_ms: WAIT_MS, request: 0 };
        let leases = client.lease_groups(request).await.map_err(told)?.into_inner().groups;
        for lease in leases {
            tokio::time::sleep(group_time).await;
            for wanted in &lease.samples {
                let sample = support::sample_of(512, 100 + wanted.index, lease.min_version);
                let request = support::submission(worker_id, &lease, wanted.index, sample);
                let mut client = client.clone();
                handing_in.spawn(async move { client.submit_sample(request).await.map(drop).map_err(told) });
            }
        }
    }
}

/// Judges at once.
async fn verifier(channel: RunChannel) -> Result<()> {
    let member = join(&channel, v1::Role::Verifier, "verifier-0").await?;
    let (worker_id, mut client) = (member.id, VerifierServiceClient::new(channel));
    loop {
        let request = v1::LeaseSamplesRequest { worker_id, max_samples: 64, wait_ms: WAIT_MS, request: 0 };
        let tasks = client.lease_samples(request).await.map_err(told)?.into_inner().tasks;
        client.submit_verdicts(judge(worker_id, tasks)).await.map_err(told)?;
    }
}

/// Trains each step in the time that it costs; when each was done.
async fn learner(channel: RunChannel, work: Duration) -> Result<Vec<Instant>> {
    let member = join(&channel, v1::Role::Learner, "learner-0").await?;
    let (worker_id, mut client) = (member.id, LearnerServiceClient::new(channel));
    let request = v1::JoinGenerationRequest { worker_id, wait_ms: WAIT_MS };
    let group = client.join_generation(request).await.map_err(told)?.into_inner().group;
    let generation = group.context("no generation was formed")?.generation;
    let weights = |version| Some(weights(generation, version));
    let mut done = Vec::new();
    loop {
        let request = v1::NextTaskRequest { worker_id, generation, wait_ms: WAIT_MS, busy: false };
        let next = client.next_task(request).await.map_err(told)?.into_inner();
        let result = match next.task {
            None => continue,
            Some(Task::Prepare(_)) => Done::Prepared(v1::PrepareResult { weights: weights(0) }),
            Some(Task::Train(task)) => {
                tokio::time::sleep(work).await;
                let weights = weights(task.step);
                Done::Trained(v1::TrainResult { weights, ..Default::default() })
            }
            // Only the last step is saved.
            Some(Task::Save(_)) => return Ok(done),
            Some(Task::Regroup(regroup)) => return Err(anyhow!(regroup.reason)),
        };
        let trained = matches!(result, Done::Trained(_));
        let request = v1::CompleteTaskRequest { worker_id, generation, task_id: next.task_id, result: Some(result) };
        client.complete_task(request).await.map_err(told)?;
        done.extend(trained.then(Instant::now));
    }
}
