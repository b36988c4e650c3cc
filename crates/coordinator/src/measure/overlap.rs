//! What asynchrony is worth: the time of a step while generation runs ahead, and while it does not.
//!
//! The workers wait instead of computing, so that generation and training cost exactly what they are said to cost and
//! overlap on any number of cores; the coordinator, its journal and the calls over the network are the real ones.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as Done;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

use super::{GROUP, Load, WAIT_MS, judge, made_up_weights, start, told};

/// Groups of a step.
const GROUPS: u32 = 16;
/// Steps before the clock starts: the pipeline fills.
const WARM_UP: u64 = 2;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Overlap {
    /// Where the run folder is made; has to be empty.
    pub folder: PathBuf,
    /// A folder with a tokenizer and a chat template.
    pub model: PathBuf,
    /// `asynchrony.max_lag`.
    pub max_lag: u32,
    /// What the generation of a step costs, and what its training costs.
    pub work: Duration,
    /// Steps that are timed.
    pub steps: u64,
}

/// The mean time of a step.
///
/// # Errors
/// When the run cannot be started or does not go its way.
pub async fn step_time(overlap: &Overlap) -> Result<Duration, String> {
    let load = Load {
        folder: overlap.folder.clone(),
        model: overlap.model.clone(),
        sample_bytes: 1024,
        samples_per_step: GROUPS * GROUP,
        steps: WARM_UP + overlap.steps,
        max_lag: overlap.max_lag,
    };
    let coordinator = start(&load, load.steps).await?;
    let endpoint = Endpoint::from_shared(format!("http://{}", coordinator.address())).map_err(|e| e.to_string())?;
    let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
    let mut others = JoinSet::new();
    others.spawn(rollout(channel.clone(), overlap.work / GROUPS));
    others.spawn(verifier(channel.clone()));
    let trained = learner(channel, overlap.work);
    tokio::select! {
        times = trained => {
            let times = times?;
            let (first, last) = (times[WARM_UP as usize - 1], times[times.len() - 1]);
            Ok((last - first) / u32::try_from(overlap.steps).unwrap_or(u32::MAX))
        }
        Some(ended) = others.join_next() => Err(format!("a worker has ended: {ended:?}")),
    }
}

/// A member of the run that beats as long as it is not dropped.
struct Member {
    id: u64,
    _beats: JoinSet<()>,
}

async fn join(channel: &Channel, role: v1::Role, name: &str) -> Result<Member, String> {
    let mut client = WorkerServiceClient::new(channel.clone());
    let request = v1::RegisterRequest {
        role: role.into(),
        name: name.to_owned(),
        host: "bench".into(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        collective_address: "bench:1".into(),
        attempt: String::new(),
    };
    let id = client.register(request).await.map_err(told)?.into_inner().worker_id;
    let mut beats = JoinSet::new();
    beats.spawn(async move {
        loop {
            let beat = v1::HeartbeatRequest { worker_id: id, activity: "waits as if it worked".into(), ending: false };
            let _ = client.heartbeat(beat).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    Ok(Member { id, _beats: beats })
}

/// Generates one group after the other, each in the time that a group costs. Samples are handed in beside that, as by an
/// engine that goes on generating meanwhile.
async fn rollout(channel: Channel, group_time: Duration) -> Result<(), String> {
    let member = join(&channel, v1::Role::Rollout, "rollout-0").await?;
    let (worker_id, mut client) = (member.id, RolloutServiceClient::new(channel));
    let mut handing_in: JoinSet<Result<(), String>> = JoinSet::new();
    loop {
        while let Some(done) = handing_in.try_join_next() {
            done.map_err(|panic| panic.to_string())??;
        }
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: GROUP, wait_ms: WAIT_MS, request: 0 };
        let leases = client.lease_groups(request).await.map_err(told)?.into_inner().groups;
        for lease in leases {
            tokio::time::sleep(group_time).await;
            for wanted in lease.samples {
                let sample = v1::Sample {
                    tokens: vec![1000 + wanted.index; 32],
                    logprobs: vec![-0.5; 32],
                    text: "an answer".to_owned(),
                    finish: v1::FinishReason::Stop.into(),
                    version: lease.min_version,
                    ..v1::Sample::default()
                };
                let request = v1::SubmitSampleRequest {
                    worker_id,
                    lease_id: lease.lease_id,
                    group_id: lease.group_id,
                    sample_index: wanted.index,
                    sample: Some(sample),
                };
                let mut client = client.clone();
                handing_in.spawn(async move { client.submit_sample(request).await.map(drop).map_err(told) });
            }
        }
    }
}

/// Judges at once.
async fn verifier(channel: Channel) -> Result<(), String> {
    let member = join(&channel, v1::Role::Verifier, "verifier-0").await?;
    let (worker_id, mut client) = (member.id, VerifierServiceClient::new(channel));
    loop {
        let request = v1::LeaseSamplesRequest { worker_id, max_samples: 64, wait_ms: WAIT_MS, request: 0 };
        let tasks = client.lease_samples(request).await.map_err(told)?.into_inner().tasks;
        client.submit_verdicts(judge(worker_id, tasks)).await.map_err(told)?;
    }
}

/// Trains each step in the time that it costs; when each was done.
async fn learner(channel: Channel, work: Duration) -> Result<Vec<Instant>, String> {
    let member = join(&channel, v1::Role::Learner, "learner-0").await?;
    let (worker_id, mut client) = (member.id, LearnerServiceClient::new(channel));
    let request = v1::JoinGenerationRequest { worker_id, wait_ms: WAIT_MS };
    let group = client.join_generation(request).await.map_err(told)?.into_inner().group;
    let generation = group.ok_or("no generation was formed")?.generation;
    let weights = |version| Some(made_up_weights(generation, version));
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
                Done::Trained(v1::TrainResult { weights, metrics: Default::default(), skipped_updates: 0 })
            }
            // Only the last step is saved.
            Some(Task::Save(_)) => return Ok(done),
            Some(Task::Regroup(regroup)) => return Err(regroup.reason),
        };
        let trained = matches!(result, Done::Trained(_));
        let request = v1::CompleteTaskRequest { worker_id, generation, task_id: next.task_id, result: Some(result) };
        client.complete_task(request).await.map_err(told)?;
        done.extend(trained.then(Instant::now));
    }
}
