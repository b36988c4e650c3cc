//! Measures the way of samples through the coordinator, without network and without models: lease, sample, verdict,
//! batch, with the journal on. For `cargo xtask bench coordinator`; nothing else uses it.

mod overlap;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pacs_protocol::v1;
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::v1::worker_service_server::WorkerService;
use tonic::Request;

pub use self::overlap::{Overlap, step_time};
use crate::services::Services;
use crate::{Coordinator, CoordinatorOptions};

/// Samples of a group.
const GROUP: u32 = 8;
/// Rollout workers: each has so many calls in flight that the disk takes them in batches.
const ROLLOUTS: u32 = 4;
const CALLS: usize = 64;
/// Longest wait of a call that asks for work.
const WAIT_MS: u32 = 1000;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where the run folder is made; has to be empty.
    pub folder: PathBuf,
    /// A folder with a tokenizer and a chat template.
    pub model: PathBuf,
    /// Bytes of one sample: tokens, their log-probs and the text.
    pub sample_bytes: usize,
    /// Samples of a step.
    pub samples_per_step: u32,
    /// Steps.
    pub steps: u64,
    /// How far generation may run ahead.
    pub max_lag: u32,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Samples that went all the way.
    pub samples: u64,
    /// How long that took.
    pub elapsed: Duration,
    /// Processor time of all threads meanwhile, those of the made-up workers included.
    pub cpu: Duration,
}

/// What a full pool costs.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// Samples in flight.
    pub samples: u64,
    /// Their bytes.
    pub bytes: u64,
    /// By how much the memory of the process has grown.
    pub resident_bytes: u64,
    /// How long a coordinator takes that finds them in the journal of one that was killed.
    pub restart: Duration,
    /// Processor time of that.
    pub restart_cpu: Duration,
}

/// Runs a whole job with workers that make up what they hand in.
///
/// # Errors
/// When the run cannot be started or does not go its way.
pub async fn throughput(load: &Load) -> Result<Measured, String> {
    let coordinator = Arc::new(start(load, load.steps).await?);
    let services = coordinator.own_services();
    let (began, cpu_before) = (Instant::now(), cpu_time()?);
    let mut tasks = tokio::task::JoinSet::new();
    for slot in 0..ROLLOUTS {
        tasks.spawn(rollout(services.clone(), slot, load.sample_bytes, Arc::default()));
    }
    tasks.spawn(verifier(services.clone()));
    tasks.spawn(learner(services.clone(), load.folder.clone()));
    let learner = async {
        while let Some(done) = tasks.join_next().await {
            match done {
                Ok(Ok(true)) => return Ok(began.elapsed()),
                Ok(Ok(false)) => {}
                Ok(Err(problem)) => return Err(problem),
                Err(panic) => return Err(panic.to_string()),
            }
        }
        Err("all workers have ended".to_owned())
    };
    let elapsed = learner.await?;
    let cpu = cpu_time()?.saturating_sub(cpu_before);
    tasks.shutdown().await;
    Ok(Measured { samples: u64::from(load.samples_per_step) * load.steps, elapsed, cpu })
}

/// Fills all slots with samples that nobody judges, then starts another coordinator on what the first has written.
///
/// # Errors
/// As [`throughput`].
pub async fn held(load: &Load) -> Result<Held, String> {
    let coordinator = start(load, 2).await?;
    let services = coordinator.own_services();
    let handed_in: Arc<AtomicU64> = Arc::default();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(learner(services.clone(), load.folder.clone()));
    let before = resident()?;
    for slot in 0..ROLLOUTS {
        tasks.spawn(rollout(services.clone(), slot, load.sample_bytes, Arc::clone(&handed_in)));
    }
    // The slots of two steps: rollouts may be one ahead.
    let wanted = 2 * u64::from(load.samples_per_step);
    while handed_in.load(Ordering::Relaxed) < wanted {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if let Some(ended) = tasks.try_join_next() {
            return Err(format!("a worker has ended: {ended:?}"));
        }
    }
    let resident_bytes = resident()?.saturating_sub(before);
    tasks.shutdown().await;
    // As a killed process would leave it: no goodbye, and the lock is free.
    services.forget();
    drop(coordinator);
    let (began, cpu_before) = (Instant::now(), cpu_time()?);
    let coordinator = start(load, 2).await?;
    let (restart, restart_cpu) = (began.elapsed(), cpu_time()?.saturating_sub(cpu_before));
    let found = coordinator.own_services().samples_in_flight();
    if found as u64 != wanted {
        return Err(format!("{found} of {wanted} samples were found again"));
    }
    Ok(Held { samples: wanted, bytes: wanted * load.sample_bytes as u64, resident_bytes, restart, restart_cpu })
}

async fn start(load: &Load, steps: u64) -> Result<Coordinator, String> {
    let problems = load.folder.join("problems.jsonl");
    let rows: Vec<String> =
        (0..1000).map(|i| format!("{{\"question\": \"What is {i} + 1?\", \"answer\": \"{}\"}}", i + 1)).collect();
    std::fs::write(&problems, rows.join("\n")).map_err(|error| error.to_string())?;
    let prompts = load.samples_per_step / GROUP;
    let text = format!(
        "name = 'bench'\nmodel.path = '{}'\ndata.train.path = '{}'\nrollout.samples_per_prompt = {GROUP}\n\
         rollout.max_new_tokens = 64\nrollout.max_concurrent_samples = 65536\n\
         batch = {{ steps = {steps}, prompts_per_step = {prompts}, mini_batches = 1 }}\n\
         evaluation = {{ every_steps = 0, before = false, after = false }}\ncheckpoint.every_steps = 0\n\
         logging.samples = false\nasynchrony.max_lag = {}\n",
        load.model.display(),
        problems.display(),
        load.max_lag
    );
    let spec = pacs_spec::parse(&text, Path::new("bench")).map_err(|errors| errors.to_string())?;
    let listen = "127.0.0.1:0".parse().map_err(|_| "an address is an address".to_owned())?;
    let options = CoordinatorOptions::local(spec, load.folder.join("run"), listen);
    Coordinator::start(options).await.map_err(|error| error.to_string())
}

async fn register(services: &Services, role: v1::Role, name: String) -> Result<u64, String> {
    let request = v1::RegisterRequest {
        role: role.into(),
        name,
        host: "bench".into(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        attempt: String::new(),
        run_id: String::new(),
        started: 0,
        collective_address: "bench:1".into(),
    };
    let reply = services.register(Request::new(request)).await.map_err(told)?;
    Ok(reply.into_inner().worker_id)
}

fn told(status: tonic::Status) -> String {
    status.message().to_owned()
}

/// Hands in samples of a size as fast as they are taken, `CALLS` at a time.
async fn rollout(services: Services, slot: u32, bytes: usize, handed_in: Arc<AtomicU64>) -> Result<bool, String> {
    let worker_id = register(&services, v1::Role::Rollout, format!("rollout-{slot}")).await?;
    // Half of a sample is text, a quarter token ids, a quarter log-probs.
    let tokens = bytes / 16;
    let text = "x".repeat(bytes - 8 * tokens);
    loop {
        let _ = services
            .heartbeat(Request::new(v1::HeartbeatRequest { worker_id, activity: String::new(), ending: false }))
            .await;
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: 512, wait_ms: WAIT_MS, request: 0 };
        let leases = services.lease_groups(Request::new(request)).await.map_err(told)?.into_inner().groups;
        let mut calls = tokio::task::JoinSet::new();
        for lease in leases {
            for wanted in lease.samples {
                let sample = v1::Sample {
                    tokens: vec![1000 + wanted.index; tokens],
                    logprobs: vec![-0.5; tokens],
                    entropy_sum: 1.0,
                    text: text.clone(),
                    finish: v1::FinishReason::Stop.into(),
                    version: lease.weights.as_ref().map_or(0, |weights| weights.version),
                    ..v1::Sample::default()
                };
                let request = v1::SubmitSampleRequest {
                    worker_id,
                    lease_id: lease.lease_id,
                    group_id: lease.group_id,
                    sample_index: wanted.index,
                    sample: Some(sample),
                };
                let services = services.clone();
                if calls.len() >= CALLS {
                    calls.join_next().await;
                }
                let handed_in = Arc::clone(&handed_in);
                calls.spawn(async move {
                    if services.submit_sample(Request::new(request)).await.is_ok() {
                        handed_in.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        }
        while calls.join_next().await.is_some() {}
    }
}

async fn verifier(services: Services) -> Result<bool, String> {
    let worker_id = register(&services, v1::Role::Verifier, "verifier-0".into()).await?;
    loop {
        let _ = services
            .heartbeat(Request::new(v1::HeartbeatRequest { worker_id, activity: String::new(), ending: false }))
            .await;
        let request = v1::LeaseSamplesRequest { worker_id, max_samples: 256, wait_ms: WAIT_MS, request: 0 };
        let tasks = services.lease_samples(Request::new(request)).await.map_err(told)?.into_inner().tasks;
        services.submit_verdicts(Request::new(judge(worker_id, tasks))).await.map_err(told)?;
    }
}

/// Verdicts without a look at the answers: every other one is right.
fn judge(worker_id: u64, tasks: Vec<v1::VerifyTask>) -> v1::SubmitVerdictsRequest {
    let verdicts = tasks.into_iter().map(|task| {
        let right = task.sample_index % 2 == 0;
        let verdict = v1::Verdict {
            outcome: if right { v1::Outcome::Correct } else { v1::Outcome::Wrong }.into(),
            label: f64::from(u8::from(right)),
            reward: f64::from(u8::from(right)),
            extracted: None,
            rule: "bench".into(),
        };
        let v1::VerifyTask { lease_id, group_id, sample_index, .. } = task;
        let verdict = Some(verdict);
        v1::TaskVerdict { lease_id, group_id, sample_index, verdict, verifications: Vec::new() }
    });
    v1::SubmitVerdictsRequest { worker_id, verdicts: verdicts.collect() }
}

/// Takes batches and says that they are trained; true when it has made the last step.
async fn learner(services: Services, folder: PathBuf) -> Result<bool, String> {
    use v1::complete_task_request::Result as Done;
    use v1::next_task_response::Task;
    let worker_id = register(&services, v1::Role::Learner, "learner-0".into()).await?;
    let request = v1::JoinGenerationRequest { worker_id, wait_ms: WAIT_MS };
    let group = services.join_generation(Request::new(request)).await.map_err(told)?.into_inner().group;
    let generation = group.ok_or("no generation was formed")?.generation;
    let weights = |version| {
        Some(v1::WeightsRef { version, generation, path: folder.display().to_string(), ..Default::default() })
    };
    loop {
        let _ = services
            .heartbeat(Request::new(v1::HeartbeatRequest { worker_id, activity: String::new(), ending: false }))
            .await;
        let request = v1::NextTaskRequest { worker_id, generation, wait_ms: WAIT_MS, busy: false };
        let next = services.next_task(Request::new(request)).await.map_err(told)?.into_inner();
        let result = match next.task {
            None => continue,
            Some(Task::Prepare(_)) => Done::Prepared(v1::PrepareResult { weights: weights(0) }),
            Some(Task::Train(task)) => {
                let weights = weights(task.step);
                Done::Trained(v1::TrainResult { weights, metrics: Default::default(), skipped_updates: 0 })
            }
            // Only the last step is saved.
            Some(Task::Save(_)) => return Ok(true),
            Some(Task::Regroup(regroup)) => return Err(regroup.reason),
        };
        let request = v1::CompleteTaskRequest { worker_id, generation, task_id: next.task_id, result: Some(result) };
        services.complete_task(Request::new(request)).await.map_err(told)?;
    }
}

/// Linux counts processor time in hundredths of a second, on every architecture.
const TICKS_PER_SECOND: u64 = 100;

/// Processor time that all threads of this process have used, to a hundredth of a second.
fn cpu_time() -> Result<Duration, String> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|error| error.to_string())?;
    // The second field is the program's name in parentheses; user and system time are the twelfth and thirteenth behind it.
    let (_, fields) = stat.rsplit_once(')').ok_or("/proc/self/stat has no name")?;
    let ticks: Option<Vec<u64>> = fields.split_whitespace().skip(11).take(2).map(|field| field.parse().ok()).collect();
    let ticks: u64 = ticks.filter(|ticks| ticks.len() == 2).ok_or("/proc/self/stat has no times")?.iter().sum();
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// Memory of this process, in bytes.
fn resident() -> Result<u64, String> {
    let status = std::fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("the system does not say")?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().map_err(|_| "VmRSS is no number".to_owned())?;
    Ok(kilobytes * 1024)
}
