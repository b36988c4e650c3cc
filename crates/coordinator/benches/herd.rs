//! What thousands of workers cost a coordinator: those that wait, those that only live, those that lease, and those that come
//! back all at once. Prints one JSON line a measurement.
//!
//! ```console
//! $ cargo bench -p pacs-coordinator --bench herd -- waiting      # or members, leases, rejoin; with options: --help
//! ```

mod support;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::{Parser, Subcommand};
use pacs_coordinator::{Coordinator, CoordinatorOptions, Progress, Timing};
use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as Done;
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_runtime::Backoff;
use pacs_runtime::net::{RunChannel, RunIdentity, of_run};
use serde_json::json;
use tokio::task::JoinSet;
use tonic::transport::Endpoint;
use tonic::{Code, Request};

use self::support::{beat, judge, quantiles, registration, sample_of, submission, sync_times, weights};

/// Longest wait of a call that asks for work, as rollout workers and verifiers have it.
const WAIT_MS: u32 = 5000;
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Size of a sample: 8 tokens.
const SAMPLE_BYTES: usize = 128;

#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
    /// Where run folders are made [default: the folder of temporary files]
    #[arg(long, global = true)]
    folder: Option<PathBuf>,
    /// cargo gives it to every benchmark
    #[arg(long, global = true, hide = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Steps a second while so many workers wait for work, half of them for groups, half for samples
    Waiting {
        #[arg(long, value_delimiter = ',', default_values_t = [0, 200, 1000, 4000])]
        workers: Vec<u32>,
        #[arg(long, default_value_t = 10.0)]
        seconds: f64,
    },
    /// Whether so many workers stay members while the run works, by calls within the process
    Members {
        #[arg(long, default_value_t = 10_000)]
        workers: u32,
        #[arg(long, default_value_t = 30.0)]
        seconds: f64,
    },
    /// How long a lease takes at so many of them a second, over gRPC, next to what the disk takes for a sync
    Leases {
        #[arg(long, default_value_t = 5000)]
        rate: u32,
        #[arg(long, default_value_t = 10.0)]
        seconds: f64,
    },
    /// How soon so many workers are back after the coordinator has started again, over gRPC
    Rejoin {
        #[arg(long, default_value_t = 1000)]
        workers: u32,
        /// How long there is no coordinator
        #[arg(long, default_value_t = 3.0)]
        away: f64,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let folder = arguments.folder.unwrap_or_else(std::env::temp_dir);
    runtime.block_on(async {
        match arguments.what {
            What::Waiting { workers, seconds } => waiting(&folder, &workers, seconds).await,
            What::Members { workers, seconds } => members(&folder, workers, seconds).await,
            What::Leases { rate, seconds } => leases(&folder, rate, seconds).await,
            What::Rejoin { workers, away } => {
                for keeps_journal in [true, false] {
                    rejoin(&folder, workers, Duration::from_secs_f64(away), keeps_journal).await?;
                }
                Ok(())
            }
        }
    })
}

/// Starts a coordinator in `folder` whose steps have so many prompts of two samples.
async fn start(folder: &Path, prompts: u32, steps: u64) -> Result<Coordinator> {
    let problems = folder.join("problems.jsonl");
    let rows: Vec<String> =
        (0..1000).map(|i| format!("{{\"question\": \"What is {i} + 1?\", \"answer\": \"{}\"}}", i + 1)).collect();
    std::fs::write(&problems, rows.join("\n"))?;
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
    let text = format!(
        "name = 'bench'\nmodel.path = '{}'\ndata.train.path = '{}'\nrollout.samples_per_prompt = 2\n\
         rollout.max_new_tokens = 64\nrollout.max_concurrent_samples = 65536\n\
         batch = {{ steps = {steps}, prompts_per_step = {prompts}, mini_batches = 1 }}\n\
         evaluation = {{ every_steps = 0, before = false, after = false }}\ncheckpoint.every_steps = 0\n\
         logging.samples = false\nasynchrony.max_lag = 0\n",
        model.display(),
        problems.display(),
    );
    let spec = pacs_spec::parse(&text, Path::new("bench")).map_err(|errors| anyhow!("{errors}"))?;
    let options = CoordinatorOptions::local(spec, folder.join("run"), "127.0.0.1:0".parse()?);
    Ok(Coordinator::start_with(options, Timing::default()).await?)
}

/// The coordinator's services, called without a network.
trait Local: WorkerService + RolloutService + VerifierService + LearnerService + Clone {}
impl<T: WorkerService + RolloutService + VerifierService + LearnerService + Clone> Local for T {}

/// What workers of a run share.
#[derive(Debug, Default)]
struct Run {
    /// Steps that are made, which is the version of the weights.
    steps: AtomicU64,
    /// Time from a heartbeat to its answer, in microseconds.
    beats: std::sync::Mutex<Vec<u64>>,
}

/// Registers a worker and keeps it a member.
async fn join(services: &impl Local, run: &Arc<Run>, role: v1::Role, name: String) -> Result<u64> {
    let reply = services.register(Request::new(registration(role, &name))).await?;
    let worker_id = reply.into_inner().worker_id;
    let (services, run) = (services.clone(), Arc::clone(run));
    tokio::spawn(async move {
        // Not all at the same moment.
        tokio::time::sleep(HEARTBEAT.mul_f64(noise(worker_id))).await;
        let mut ticker = tokio::time::interval(HEARTBEAT);
        loop {
            ticker.tick().await;
            let began = Instant::now();
            if services.heartbeat(Request::new(beat(worker_id))).await.is_ok() {
                let took = began.elapsed().as_micros() as u64;
                run.beats.lock().expect("nobody panics with it").push(took);
            }
        }
    });
    Ok(worker_id)
}

/// Evenly in 0 to 1.
fn noise(seed: u64) -> f64 {
    (pacs_types::mix(seed) >> 11) as f64 / (1u64 << 53) as f64
}

async fn rollout(services: impl Local, run: Arc<Run>, name: String) -> Result<()> {
    let worker_id = join(&services, &run, v1::Role::Rollout, name).await?;
    for number in 1.. {
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: 64, wait_ms: WAIT_MS, request: number };
        for lease in services.lease_groups(Request::new(request)).await?.into_inner().groups {
            // Without a lag, everything in flight is of the newest version.
            let version = run.steps.load(Ordering::SeqCst);
            // All at once, as an engine hands them in: one by one, a step would be as many round trips to the disk.
            let mut calls = JoinSet::new();
            for wanted in &lease.samples {
                let sample = sample_of(SAMPLE_BYTES, 100 + wanted.index, version);
                let (services, request) = (services.clone(), submission(worker_id, &lease, wanted.index, sample));
                calls.spawn(async move { services.submit_sample(Request::new(request)).await });
            }
            while let Some(submitted) = calls.join_next().await {
                submitted??;
            }
        }
    }
    Ok(())
}

async fn verifier(services: impl Local, run: Arc<Run>, name: String) -> Result<()> {
    let worker_id = join(&services, &run, v1::Role::Verifier, name).await?;
    for number in 1.. {
        let request = v1::LeaseSamplesRequest { worker_id, max_samples: 64, wait_ms: WAIT_MS, request: number };
        let tasks = services.lease_samples(Request::new(request)).await?.into_inner().tasks;
        if !tasks.is_empty() {
            services.submit_verdicts(Request::new(judge(worker_id, tasks))).await?;
        }
    }
    Ok(())
}

async fn learner(services: impl Local, run: Arc<Run>) -> Result<()> {
    let worker_id = join(&services, &run, v1::Role::Learner, "learner-0".into()).await?;
    let request = v1::JoinGenerationRequest { worker_id, wait_ms: WAIT_MS };
    let group = services.join_generation(Request::new(request)).await?.into_inner().group;
    let generation = group.context("form a generation")?.generation;
    let weights = |version| Some(weights(generation, version));
    loop {
        let request = v1::NextTaskRequest { worker_id, generation, wait_ms: WAIT_MS, busy: false };
        let next = services.next_task(Request::new(request)).await?.into_inner();
        let result = match next.task {
            None => continue,
            Some(Task::Prepare(_)) => Done::Prepared(v1::PrepareResult { weights: weights(0) }),
            Some(Task::Train(task)) => {
                run.steps.store(task.step, Ordering::SeqCst);
                let weights = weights(task.step);
                Done::Trained(v1::TrainResult { weights, ..Default::default() })
            }
            Some(Task::Save(_)) => return Ok(()),
            Some(Task::Regroup(regroup)) => return Err(anyhow!("the generation is over: {}", regroup.reason)),
        };
        let request = v1::CompleteTaskRequest { worker_id, generation, task_id: next.task_id, result: Some(result) };
        services.complete_task(Request::new(request)).await?;
    }
}

/// A run with one working worker of each role, and others that take what they can get.
struct Herd {
    coordinator: Coordinator,
    run: Arc<Run>,
    tasks: JoinSet<Result<()>>,
    _folder: tempfile::TempDir,
}

impl Herd {
    async fn start(folder: &Path, others: u32) -> Result<Self> {
        let folder = tempfile::tempdir_in(folder)?;
        let coordinator = start(folder.path(), 8, 1_000_000).await?;
        let (services, run) = (coordinator.services(), Arc::<Run>::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(learner(services.clone(), Arc::clone(&run)));
        for slot in 0..1 + others.div_ceil(2) {
            tasks.spawn(rollout(services.clone(), Arc::clone(&run), format!("rollout-{slot}")));
        }
        for slot in 0..1 + others / 2 {
            tasks.spawn(verifier(services.clone(), Arc::clone(&run), format!("verifier-{slot}")));
        }
        let mut herd = Self { coordinator, run, tasks, _folder: folder };
        // All of them are there and have asked once.
        herd.pass(Duration::from_secs(3)).await?;
        herd.run.beats.lock().expect("nobody panics with it").clear();
        Ok(herd)
    }

    /// Lets time pass in which no worker may end.
    async fn pass(&mut self, time: Duration) -> Result<()> {
        match tokio::time::timeout(time, self.tasks.join_next()).await {
            Err(_) => Ok(()),
            Ok(ended) => Err(anyhow!("a worker has ended: {ended:?}")),
        }
    }

    /// Steps a second over a time.
    async fn rate(&mut self, seconds: f64) -> Result<f64> {
        let (before, began) = (self.run.steps.load(Ordering::SeqCst), Instant::now());
        self.pass(Duration::from_secs_f64(seconds)).await?;
        let steps = self.run.steps.load(Ordering::SeqCst) - before;
        Ok(steps as f64 / began.elapsed().as_secs_f64())
    }
}

async fn waiting(folder: &Path, workers: &[u32], seconds: f64) -> Result<()> {
    let mut alone = None;
    for others in workers {
        let mut herd = Herd::start(folder, *others).await?;
        let rate = herd.rate(seconds).await?;
        let alone = *alone.get_or_insert(rate);
        let beats = quantiles(&mut herd.run.beats.lock().expect("nobody panics with it"));
        println!(
            "{}",
            json!({"bench": "herd", "what": "waiting", "workers": others, "steps_per_second": rate,
                "of_the_first": rate / alone, "target": 0.8, "heartbeat_ms": beats})
        );
    }
    Ok(())
}

async fn members(folder: &Path, workers: u32, seconds: f64) -> Result<()> {
    let mut herd = Herd::start(folder, workers).await?;
    let mut events = herd.coordinator.events();
    let rate = herd.rate(seconds).await?;
    let mut lost = 0;
    while let Ok(event) = events.try_recv() {
        lost += u32::from(matches!(event, Progress::WorkerLost { .. }));
    }
    let members = herd.coordinator.known_workers().len();
    let beats = quantiles(&mut herd.run.beats.lock().expect("nobody panics with it"));
    println!(
        "{}",
        json!({"bench": "herd", "what": "members", "workers": workers + 3, "members_at_the_end": members, "lost": lost,
            "seconds": seconds, "steps_per_second": rate, "heartbeat_ms": beats})
    );
    Ok(())
}

async fn leases(folder: &Path, rate: u32, seconds: f64) -> Result<()> {
    let folder = tempfile::tempdir_in(folder)?;
    let sync = quantiles(&mut sync_times(folder.path())?);
    let prompts = (f64::from(rate) * seconds * 1.2) as u32;
    let coordinator = start(folder.path(), prompts, 1).await?;
    let run = Arc::<Run>::default();
    let mut tasks = JoinSet::new();
    tasks.spawn(learner(coordinator.services(), Arc::clone(&run)));
    let channels = channels(&coordinator, 16).await?;
    let mut workers = Vec::new();
    for slot in 0..64 {
        workers.push(join(&coordinator.services(), &run, v1::Role::Rollout, format!("rollout-{slot}")).await?);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    run.beats.lock().expect("nobody panics with it").clear();
    // Whether or not the answers come: so many a second are asked for.
    let (mut calls, began) = (JoinSet::new(), Instant::now());
    let wanted = (f64::from(rate) * seconds) as u64;
    let mut asked = 0u64;
    while asked < wanted {
        let due = ((began.elapsed().as_secs_f64() * f64::from(rate)) as u64).min(wanted);
        for number in asked..due {
            let mut client = RolloutServiceClient::new(channels[number as usize % channels.len()].clone());
            let worker_id = workers[number as usize % workers.len()];
            calls.spawn(async move {
                let began = Instant::now();
                let request = v1::LeaseGroupsRequest { worker_id, free_samples: 2, wait_ms: 0, request: 0 };
                let groups = client.lease_groups(request).await?.into_inner().groups.len();
                Ok::<_, tonic::Status>((began.elapsed().as_micros() as u64, groups))
            });
        }
        asked = due;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (mut times, mut leased) = (Vec::new(), 0);
    while let Some(done) = calls.join_next().await {
        let (took, groups) = done??;
        times.push(took);
        leased += groups;
    }
    let elapsed = began.elapsed().as_secs_f64();
    let beats = quantiles(&mut run.beats.lock().expect("nobody panics with it"));
    println!(
        "{}",
        json!({"bench": "herd", "what": "leases", "asked_per_second": rate, "leased": leased,
            "leased_per_second": leased as f64 / elapsed, "lease_ms": quantiles(&mut times), "target_p99_ms": 20,
            "fdatasync_ms": sync, "heartbeat_ms": beats})
    );
    Ok(())
}

async fn channels(coordinator: &Coordinator, count: usize) -> Result<Vec<RunChannel>> {
    let (address, run) = (coordinator.address(), RunIdentity::told(coordinator.run_id())?);
    let mut channels = Vec::new();
    for _ in 0..count {
        channels.push(of_run(Endpoint::from_shared(format!("http://{address}"))?.connect().await?, run.clone()));
    }
    Ok(channels)
}

/// Calls by the tenth of a second in which they were made.
#[derive(Debug)]
struct Calls {
    began: Instant,
    by_tenth: std::sync::Mutex<Vec<u64>>,
}

impl Calls {
    fn note(&self) {
        let tenth = (self.began.elapsed().as_secs_f64() * 10.0) as usize;
        let mut calls = self.by_tenth.lock().expect("nobody panics with it");
        if calls.len() <= tenth {
            calls.resize(tenth + 1, 0);
        }
        calls[tenth] += 1;
    }

    /// The most calls within any second.
    fn peak(&self) -> u64 {
        let calls = self.by_tenth.lock().expect("nobody panics with it");
        calls.windows(10.min(calls.len()).max(1)).map(|second| second.iter().sum()).max().unwrap_or(0)
    }
}

async fn rejoin(folder: &Path, workers: u32, away: Duration, keeps_journal: bool) -> Result<()> {
    let folder = tempfile::tempdir_in(folder)?;
    let coordinator = start(folder.path(), 8, 1_000_000).await?;
    let address = coordinator.address();
    let (joined, joins) = tokio::sync::watch::channel(0u32);
    // A new epoch begins when the coordinator is there again: a worker is back when it was heard in it.
    let (epoch, epochs) = tokio::sync::watch::channel(0u32);
    let calls = Arc::new(Calls { began: Instant::now(), by_tenth: std::sync::Mutex::default() });
    let mut tasks = JoinSet::new();
    let began = Instant::now();
    for slot in 0..workers {
        let (joined, epochs, calls) = (joined.clone(), epochs.clone(), Arc::clone(&calls));
        tasks.spawn(live(address, slot, joined, epochs, calls));
    }
    let all_are_there = |mut joins: tokio::sync::watch::Receiver<u32>| async move {
        tokio::time::timeout(Duration::from_secs(120), joins.wait_for(|there| *there == workers)).await.is_ok()
    };
    ensure!(all_are_there(joins.clone()).await, "only {} of {workers} have joined", *joins.borrow());
    let joined_in = began.elapsed();
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Without a goodbye, as it would be killed; its connections break with it.
    drop(coordinator);
    if !keeps_journal {
        std::fs::remove_dir_all(folder.path().join("run/journal")).context("lose the journal")?;
    }
    tokio::time::sleep(away).await;
    calls.by_tenth.lock().expect("nobody panics with it").clear();
    joined.send_replace(0);
    epoch.send_replace(1);
    let began = Instant::now();
    let coordinator = start(folder.path(), 8, 1_000_000).await?;
    ensure!(coordinator.address() == address, "it listens elsewhere");
    let serves_after = began.elapsed();
    ensure!(all_are_there(joins.clone()).await, "only {} of {workers} are back", *joins.borrow());
    let back = began.elapsed();
    println!(
        "{}",
        json!({"bench": "herd", "what": "rejoin", "workers": workers, "journal": if keeps_journal { "kept" } else { "lost" },
            "joined_seconds": joined_in.as_secs_f64(), "away_seconds": away.as_secs_f64(),
            "serves_after_seconds": serves_after.as_secs_f64(), "all_back_seconds": back.as_secs_f64(),
            "peak_calls_per_second": calls.peak()})
    );
    drop(tasks);
    Ok(())
}

/// A worker that registers, beats, and looks for the coordinator again with jittered waits when that is gone.
async fn live(
    address: SocketAddr,
    slot: u32,
    joined: tokio::sync::watch::Sender<u32>,
    epochs: tokio::sync::watch::Receiver<u32>,
    calls: Arc<Calls>,
) {
    let new_backoff = || Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
    let mut backoff = new_backoff();
    let (mut worker, mut heard_in): (Option<u64>, Option<u32>) = (None, None);
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address is a URI");
    let run = RunIdentity::default();
    let mut client: Option<WorkerServiceClient<RunChannel>> = None;
    loop {
        calls.note();
        let answered = async {
            if client.is_none() {
                client = Some(WorkerServiceClient::new(of_run(endpoint.connect().await.ok()?, run.clone())));
            }
            let client = client.as_mut()?;
            let result = match worker {
                None => {
                    client.register(registration(v1::Role::Rollout, &format!("rollout-{slot}"))).await.map(|reply| {
                        let registered = reply.into_inner();
                        // The same run, or there would be no registration.
                        let _ = run.tell(&registered.run_id);
                        worker = Some(registered.worker_id);
                    })
                }
                Some(worker_id) => client.heartbeat(beat(worker_id)).await.map(|reply| {
                    if reply.into_inner().directive() == v1::Directive::Register {
                        worker = None;
                    }
                }),
            };
            match result {
                Ok(()) => Some(worker.is_some()),
                Err(status) if status.code() == Code::NotFound => {
                    worker = None;
                    Some(false)
                }
                Err(_) => None,
            }
        };
        match tokio::time::timeout(Duration::from_secs(5), answered).await {
            Ok(Some(is_member)) => {
                backoff = new_backoff();
                let epoch = *epochs.borrow();
                if is_member && heard_in != Some(epoch) {
                    heard_in = Some(epoch);
                    joined.send_modify(|there| *there += 1);
                }
                if is_member {
                    tokio::time::sleep(HEARTBEAT).await;
                }
            }
            Ok(None) | Err(_) => {
                client = None;
                tokio::time::sleep(backoff.wait()).await;
            }
        }
    }
}
