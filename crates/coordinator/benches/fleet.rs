//! `cargo xtask bench fleet`: thousands of workers on one coordinator, each over a connection of its own with mutual TLS. The
//! coordinator is the program `pacs`, in a process of its own; all workers are in this one, so their costs are apart.
//!
//! Workers join, keep alive and look for their run with the code that real ones have ([`Membership`]); what they hand in is made
//! up. Prints one JSON line a part: joining, idling, working at a rate, both again while others watch, and losses of many workers at
//! once.

#[path = "support/observers.rs"]
mod observers;
mod support;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use self::observers::Observers;
use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use pacs_protocol::v1;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_runtime::net::{PeerRole, RunChannel, RunIdentity, dial};
use pacs_runtime::{Health, Link, Membership, Shutdown, WorkerIdentity, launch};
use pacs_types::{Role, mix};
use serde_json::{Value, json};
use support::{Batches, beat, cpu_time, judge, learn, memory, quantiles, sample_of, submission, sync_times, told};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;

/// Longest wait of a call that asks for work, as rollout workers and verifiers have it.
const WAIT_MS: u32 = 5000;
/// Longest that any part may take beyond its own time.
const DEADLINE: Duration = Duration::from_secs(180);
/// How long the coordinator waits for a silent worker.
const HEARTBEAT_TIMEOUT: f64 = 10.0;

#[derive(Clone, Parser)]
struct Arguments {
    /// Workers, the learner and the verifiers included.
    #[arg(long, default_value_t = 10_000)]
    workers: u32,
    /// Verifiers among them.
    #[arg(long, default_value_t = 64)]
    verifiers: u32,
    /// Samples a second.
    #[arg(long, default_value_t = 5000.0)]
    rate: f64,
    /// Samples of a group, which is what a lease is for.
    #[arg(long, default_value_t = 8)]
    samples: u32,
    /// Bytes of a sample: half of them text, a quarter token ids, a quarter log-probs.
    #[arg(long, default_value_t = 1024)]
    sample_bytes: usize,
    /// How long the workers idle, and how long they work.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Workers that join at once: all of them are one process here, whose heartbeats wait for its handshakes.
    #[arg(long, default_value_t = 500)]
    at_once: usize,
    /// Browsers on the dashboard, and as many streams of events, while workers idle and work a second time; next to them one scraper.
    #[arg(long, default_value_t = 0)]
    browsers: u32,
    /// How often many workers are lost at once.
    #[arg(long, default_value_t = 3)]
    losses: u32,
    /// How many of them.
    #[arg(long, default_value_t = 1000)]
    lost: u32,
    /// Processors of the coordinator, as `taskset -c` takes them; the others are the workers' [default: all, for both]
    #[arg(long)]
    processors: Option<String>,
    /// The program `pacs` [default: the one that was built with this]
    #[arg(long)]
    pacs: Option<PathBuf>,
    /// Where the run folder is made and removed [default: a temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.workers > arguments.verifiers + 1, "no rollout worker is left");
    raise_descriptors(u64::from(arguments.workers) + 512)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(play(&arguments));
    runtime.shutdown_background();
    result
}

/// Each worker has a connection here, and one in the coordinator, which raises its own limit.
fn raise_descriptors(wanted: u64) -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (now, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(
        most >= wanted,
        "{wanted} file descriptors are needed, and the hard limit is {most}; raise it (`ulimit -Hn`)"
    );
    if now < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    }
    Ok(())
}

/// What all workers share.
struct Fleet {
    link: Link,
    shutdown: Shutdown,
    arguments: Arguments,
    /// The processes that share a certificate.
    verifier: Link,
    learner: Link,
    is_working: AtomicBool,
    dialling: Semaphore,
    joined: AtomicU64,
    /// Registrations that the coordinator has given up although their workers live.
    lapsed: AtomicU64,
    refused: AtomicU64,
    /// Told when the first worker ends.
    someone_ends: Notify,
    /// Samples that were dropped, because the coordinator had undone the weights or given the lease up.
    dropped: AtomicU64,
    samples: AtomicU64,
    steps: AtomicU64,
    /// Time from the request for a group to its lease, in microseconds.
    leases: Mutex<Vec<u64>>,
    /// Time of a call that hands a sample in.
    submits: Mutex<Vec<u64>>,
    /// Who holds a group.
    held: Mutex<HashMap<u64, u32>>,
    /// Workers that ask for a group.
    asking: AtomicU32,
}

impl Fleet {
    /// Time for which a group is generated, so that all rollout workers together make `rate` samples a second.
    fn generation(&self) -> Duration {
        let rollouts = self.arguments.workers - self.arguments.verifiers - 1;
        Duration::from_secs_f64(f64::from(rollouts) * f64::from(self.arguments.samples) / self.arguments.rate)
    }

    async fn join(&self, role: Role, name: String) -> Result<Membership> {
        let link = match role {
            Role::Rollout => &self.link,
            Role::Verifier => &self.verifier,
            Role::Learner => &self.learner,
        };
        let identity = WorkerIdentity { role, name, collective_address: "bench:1".into() };
        let _turn = self.dialling.acquire().await?;
        let membership = Membership::join(link, &identity, &self.shutdown).await?;
        self.joined.fetch_add(1, Ordering::Relaxed);
        Ok(membership)
    }

    /// Groups that are on lease to some workers.
    fn held_by(&self, workers: &[u32]) -> Vec<u64> {
        let held = self.held.lock().expect("nobody panics with it");
        held.iter().filter(|(_, worker)| workers.contains(worker)).map(|(group, _)| *group).collect()
    }
}

/// `pacs coordinator`; killed when it is dropped.
struct Coordinator {
    child: Child,
    run_dir: PathBuf,
    /// Where it serves `/metrics`.
    metrics: SocketAddr,
}

impl Coordinator {
    fn start(arguments: &Arguments, folder: &Path) -> Result<Self> {
        let pacs = match &arguments.pacs {
            Some(pacs) => pacs.clone(),
            // Benchmarks lie in target/release/deps.
            None => std::env::current_exe()?.ancestors().nth(2).context("the folder of programs")?.join("pacs"),
        };
        let certificates = folder.join("certs");
        let made = Command::new(&pacs).arg("certs").arg(&certificates).stdout(Stdio::null()).status();
        let made =
            made.with_context(|| format!("start `{}`; `cargo build --release -p pacs` makes it", pacs.display()))?;
        ensure!(made.success(), "pacs certs: {made}");
        let job = folder.join("job.toml");
        std::fs::write(&job, spec(arguments, folder)?)?;
        let run_dir = folder.join("run");
        let mut command = match &arguments.processors {
            Some(processors) => {
                let mut command = Command::new("taskset");
                command.args(["-c", processors]).arg(&pacs);
                command
            }
            None => Command::new(&pacs),
        };
        command.arg("coordinator").arg(&job).args(["--listen", "127.0.0.1:0", "--run-dir"]).arg(&run_dir);
        command.arg("--tls-dir").arg(&certificates).stdin(Stdio::null()).stdout(Stdio::null());
        // Another process may take this port first; the coordinator then reports that it is in use.
        let metrics = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        command.arg("--metrics-listen").arg(metrics.to_string()).args(["--dashboard-listen", "127.0.0.1:0"]);
        let said = std::fs::File::create(folder.join("coordinator.log"))?;
        let child = command.stderr(said).spawn().context("start the coordinator")?;
        Ok(Self { child, run_dir, metrics })
    }

    async fn address(&mut self) -> Result<String> {
        let began = Instant::now();
        let run_dir = self.run_dir.display().to_string();
        loop {
            if let (Ok(address), true) = (launch::find(&run_dir), self.run_dir.join("run_id").exists()) {
                return Ok(address);
            }
            if let Some(status) = self.child.try_wait()? {
                let log = std::fs::read_to_string(self.run_dir.with_file_name("coordinator.log"))?;
                bail!("the coordinator ended with {status}: {log}");
            }
            ensure!(began.elapsed() < DEADLINE, "the coordinator does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn cpu_time(&self) -> Result<f64> {
        Ok(cpu_time(&self.child.id().to_string())?.as_secs_f64())
    }

    fn resident(&self) -> Result<u64> {
        memory(self.child.id(), "VmRSS:")
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A job with room for more groups than there are workers, so that a lease waits for the coordinator and never for work.
fn spec(arguments: &Arguments, folder: &Path) -> Result<String> {
    let problems = folder.join("problems.jsonl");
    let rows: Vec<String> =
        (0..1000).map(|i| format!("{{\"question\": \"What is {i} + 1?\", \"answer\": \"{}\"}}", i + 1)).collect();
    std::fs::write(&problems, rows.join("\n"))?;
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
    let (samples, prompts) = (arguments.samples, arguments.workers.div_ceil(2).max(8));
    Ok(format!(
        "name = 'fleet'\nmodel.path = '{}'\ndata.train.path = '{}'\nrollout.samples_per_prompt = {samples}\n\
         rollout.max_new_tokens = {}\nrollout.max_concurrent_samples = 65536\n\
         batch = {{ steps = 1000000, prompts_per_step = {prompts}, mini_batches = 1 }}\n\
         evaluation = {{ every_steps = 0, before = false, after = false }}\ncheckpoint.every_steps = 0\n\
         logging.samples = false\nasynchrony.max_lag = 3\n",
        model.display(),
        problems.display(),
        (arguments.sample_bytes / 16).max(16),
    ))
}

async fn play(arguments: &Arguments) -> Result<()> {
    let folder = match &arguments.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let sync = quantiles(&mut sync_times(folder.path())?);
    let mut coordinator = Coordinator::start(arguments, folder.path())?;
    let address = coordinator.address().await?;
    let certificates = folder.path().join("certs");
    let run = std::fs::read_to_string(coordinator.run_dir.join("run_id"))?;
    let link = |role: PeerRole| -> Result<Link> {
        Ok(Link {
            coordinator: address.clone(),
            attempt: String::new(),
            run_id: RunIdentity::told(run.trim_end())?,
            started: 0,
            join_timeout: DEADLINE,
            security: launch::security(&certificates, role)?,
            health: Health::default(),
        })
    };
    let operator = link(PeerRole::Operator)?;
    let channel = dial(&address, PeerRole::Coordinator, &operator.security, &operator.run_id).await?;
    let mut watch = Watch(OperatorServiceClient::new(channel).max_decoding_message_size(16 << 20));
    let fleet = Arc::new(Fleet {
        link: link(PeerRole::Rollout)?,
        verifier: link(PeerRole::Verifier)?,
        learner: link(PeerRole::Learner)?,
        shutdown: Shutdown::new(),
        arguments: arguments.clone(),
        is_working: AtomicBool::new(false),
        dialling: Semaphore::new(arguments.at_once),
        joined: AtomicU64::new(0),
        lapsed: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        someone_ends: Notify::new(),
        dropped: AtomicU64::new(0),
        samples: AtomicU64::new(0),
        steps: AtomicU64::new(0),
        leases: Mutex::default(),
        submits: Mutex::default(),
        held: Mutex::default(),
        asking: AtomicU32::new(0),
    });
    let beats = beats(fleet.verifier.dial(&address, PeerRole::Coordinator).await?, Arc::clone(&fleet)).await?;
    let parts = async {
        let mut workers = joining(&fleet, &coordinator, arguments).await?;
        let mut streams = Vec::new();
        for _ in 0..arguments.browsers {
            streams.push(operator.dial(&address, PeerRole::Coordinator).await?);
        }
        let observe =
            |streams| Observers::start(arguments.browsers, &coordinator.run_dir, coordinator.metrics, streams);
        idling(&fleet, &coordinator, &mut watch, &beats, arguments, None).await?;
        if arguments.browsers > 0 {
            let observers = observe(streams.clone())?;
            idling(&fleet, &coordinator, &mut watch, &beats, arguments, Some(&observers)).await?;
        }
        working(&fleet, &coordinator, &mut watch, &beats, &sync, arguments, None).await?;
        if arguments.browsers > 0 {
            let observers = observe(streams)?;
            working(&fleet, &coordinator, &mut watch, &beats, &sync, arguments, Some(&observers)).await?;
        }
        losing(&fleet, &mut watch, &mut workers, arguments).await
    };
    // A part may wait for what a worker that has ended would have done.
    tokio::select! {
        done = parts => done,
        () = fleet.someone_ends.notified() => {
            bail!("{} workers have ended, the first as said above", fleet.refused.load(Ordering::Relaxed))
        }
    }
}

/// Starts all workers at once, and waits until all of them are members.
async fn joining(
    fleet: &Arc<Fleet>,
    coordinator: &Coordinator,
    arguments: &Arguments,
) -> Result<HashMap<u32, JoinHandle<()>>> {
    let (memory, cpu, own) = (coordinator.resident()?, coordinator.cpu_time()?, cpu_time("self")?);
    let began = Instant::now();
    let workers = (0..arguments.workers).map(|slot| (slot, start(fleet, slot))).collect();
    all_joined(fleet, u64::from(arguments.workers)).await?;
    let seconds = began.elapsed().as_secs_f64();
    let cpu = coordinator.cpu_time()? - cpu;
    // What the handshakes have taken for a while is given back.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let taken = coordinator.resident()?.saturating_sub(memory);
    println!(
        "{}",
        json!({"bench": "fleet", "what": "joining", "workers": arguments.workers, "seconds": seconds,
            "joined_per_second": f64::from(arguments.workers) / seconds, "coordinator_cpu_seconds": cpu,
            "coordinator_cpu_ms_each": 1000.0 * cpu / f64::from(arguments.workers),
            "workers_cpu_seconds": (cpu_time("self")? - own).as_secs_f64(),
            "memory_kib_each": taken as f64 / 1024.0 / f64::from(arguments.workers)})
    );
    Ok(workers)
}

async fn all_joined(fleet: &Fleet, wanted: u64) -> Result<()> {
    let began = Instant::now();
    while fleet.joined.load(Ordering::Relaxed) < wanted {
        let (joined, refused) = (fleet.joined.load(Ordering::Relaxed), fleet.refused.load(Ordering::Relaxed));
        ensure!(refused == 0, "{refused} workers have ended");
        ensure!(began.elapsed() < DEADLINE, "only {joined} of {wanted} workers have joined");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Starts a worker that lives until it is aborted, which is a loss: nobody is told.
fn start(fleet: &Arc<Fleet>, slot: u32) -> JoinHandle<()> {
    let fleet = Arc::clone(fleet);
    tokio::spawn(async move {
        let result = loop {
            let result = match slot {
                0 => learner(&fleet).await,
                _ if slot <= fleet.arguments.verifiers => verifier(&fleet, slot).await,
                _ => rollout(&fleet, slot).await,
            };
            let status = result.as_ref().err().and_then(|error| error.downcast_ref::<tonic::Status>());
            if status.is_none_or(|status| status.code() != tonic::Code::NotFound) {
                break result;
            }
            // As real ones do.
            fleet.lapsed.fetch_add(1, Ordering::Relaxed);
        };
        if fleet.refused.fetch_add(1, Ordering::Relaxed) == 0 {
            let error = result.err().map(|error| format!("{error:#}")).unwrap_or_default();
            eprintln!("worker {slot} has ended: {error}");
            fleet.someone_ends.notify_one();
        }
    })
}

/// Members that only live.
async fn idling(
    fleet: &Fleet,
    coordinator: &Coordinator,
    watch: &mut Watch,
    beats: &Beats,
    arguments: &Arguments,
    observers: Option<&Observers>,
) -> Result<()> {
    beats.take();
    let (cpu, own, began) = (coordinator.cpu_time()?, cpu_time("self")?, Instant::now());
    tokio::time::sleep(Duration::from_secs_f64(arguments.seconds)).await;
    let seconds = began.elapsed().as_secs_f64();
    let status = watch.status().await?;
    println!(
        "{}",
        json!({"bench": "fleet", "what": "idling", "observed": told_by(observers)?, "seconds": seconds, "members": status.members, "lost": status.lost,
            "lapsed": fleet.lapsed.load(Ordering::Relaxed),
            "coordinator_processors": (coordinator.cpu_time()? - cpu) / seconds,
            "workers_processors": (cpu_time("self")? - own).as_secs_f64() / seconds, "heartbeat_ms": beats.take()})
    );
    Ok(())
}

fn told_by(observers: Option<&Observers>) -> Result<Value> {
    observers.map_or(Ok(Value::Null), Observers::told)
}

/// All workers at the rate that was asked for.
async fn working(
    fleet: &Fleet,
    coordinator: &Coordinator,
    watch: &mut Watch,
    beats: &Beats,
    sync: &Value,
    arguments: &Arguments,
    observers: Option<&Observers>,
) -> Result<()> {
    fleet.is_working.store(true, Ordering::Relaxed);
    // Workers begin at any time of their first group.
    tokio::time::sleep(fleet.generation() + Duration::from_secs(2)).await;
    for times in [&fleet.leases, &fleet.submits] {
        times.lock().expect("nobody panics with it").clear();
    }
    beats.take();
    let (cpu, own, began) = (coordinator.cpu_time()?, cpu_time("self")?, Instant::now());
    let (samples, steps) = (fleet.samples.load(Ordering::Relaxed), fleet.steps.load(Ordering::Relaxed));
    tokio::time::sleep(Duration::from_secs_f64(arguments.seconds)).await;
    let seconds = began.elapsed().as_secs_f64();
    let samples = fleet.samples.load(Ordering::Relaxed) - samples;
    let cpu = coordinator.cpu_time()? - cpu;
    let status = watch.status().await?;
    println!(
        "{}",
        json!({"bench": "fleet", "what": "working", "observed": told_by(observers)?, "seconds": seconds, "asked_samples_per_second": arguments.rate,
            "samples_per_second": samples as f64 / seconds,
            "steps": fleet.steps.load(Ordering::Relaxed) - steps, "members": status.members, "lost": status.lost,
            "lapsed": fleet.lapsed.load(Ordering::Relaxed), "dropped_samples": fleet.dropped.load(Ordering::Relaxed), "lease_ms": quantiles(&mut take(&fleet.leases)), "target_p99_ms": 20,
            "submit_ms": quantiles(&mut take(&fleet.submits)), "heartbeat_ms": beats.take(), "fdatasync_ms": sync,
            "coordinator_processors": cpu / seconds, "coordinator_cpu_us_a_sample": 1e6 * cpu / samples as f64,
            "workers_processors": (cpu_time("self")? - own).as_secs_f64() / seconds,
            "resident_bytes": coordinator.resident()?})
    );
    Ok(())
}

/// Loses workers at once, again and again. Room for groups is short now, so that some workers wait for what becomes free.
async fn losing(
    fleet: &Arc<Fleet>,
    watch: &mut Watch,
    workers: &mut HashMap<u32, JoinHandle<()>>,
    arguments: &Arguments,
) -> Result<()> {
    let rollouts = arguments.workers - arguments.verifiers - 1;
    ensure!(arguments.lost <= rollouts, "only {rollouts} rollout workers can be lost");
    watch.set_slots((arguments.workers.div_ceil(2)).max(rollouts * 3 / 4)).await?;
    for round in 1..=arguments.losses {
        watch.until(|status| status.waiting == 0).await?;
        let before = watch.status().await?;
        // Others each time.
        let first = arguments.verifiers + 1 + (round - 1) * arguments.lost % (rollouts - arguments.lost + 1);
        let lost: Vec<u32> = (first..first + arguments.lost).collect();
        for slot in &lost {
            if let Some(worker) = workers.remove(slot) {
                worker.abort();
            }
        }
        let gone = Instant::now();
        let held = fleet.held_by(&lost);
        let asking = fleet.asking.load(Ordering::Relaxed);
        let wanted = before.lost + u64::from(arguments.lost);
        let first_noticed = watch.until(|status| status.lost > before.lost).await?;
        let noticed = watch.until(|status| status.lost >= wanted).await?;
        // Groups of lost workers can be re-issued only to idle workers. Busy ones ask one by one as they finish, which takes
        // as long as they generate and says nothing of the coordinator.
        let idle = fleet.asking.load(Ordering::Relaxed);
        let waiting = watch.status().await?.waiting;
        let issued = watch.until(|status| status.waiting <= waiting.saturating_sub(idle)).await?;
        let status = watch.status().await?;
        let (rejoining, joined) = (Instant::now(), fleet.joined.load(Ordering::Relaxed));
        workers.extend(lost.iter().map(|slot| (*slot, start(fleet, *slot))));
        all_joined(fleet, joined + u64::from(arguments.lost)).await?;
        println!(
            "{}",
            json!({"bench": "fleet", "what": "losing", "round": round, "lost": status.lost - before.lost,
                "groups_held": held.len(), "timeout_seconds": HEARTBEAT_TIMEOUT,
                "first_noticed_seconds": (first_noticed - gone).as_secs_f64(),
                "all_noticed_seconds": (noticed - gone).as_secs_f64(),
                "workers_asking": asking,
                "groups_waiting": waiting, "idle_workers": idle, "issued_again_after_ms": (issued - noticed).as_secs_f64() * 1000.0,
                "target_issued_again_ms": 1000,
                "quarantined": status.quarantined, "mass_losses": status.mass_losses - before.mass_losses,
                "all_back_seconds": rejoining.elapsed().as_secs_f64()})
        );
    }
    let status = watch.status().await?;
    ensure!(status.quarantined == 0, "{} groups are accused", status.quarantined);
    Ok(())
}

/// A look at the run, as operators have it.
struct Watch(OperatorServiceClient<RunChannel>);

struct Status {
    members: u32,
    lost: u64,
    mass_losses: u64,
    quarantined: usize,
    waiting: u32,
}

impl Watch {
    async fn status(&mut self) -> Result<Status> {
        let status = self.0.get_status(v1::GetStatusRequest {}).await.map_err(told)?.into_inner();
        let count = |name: &str| status.counters.get(name).copied().unwrap_or(0);
        let deadly = count("deadly_samples") + count("dropped_groups");
        Ok(Status {
            members: status.workers.len() as u32 + status.left_out.get("workers").copied().unwrap_or(0),
            lost: count("lost_workers"),
            mass_losses: count("mass_losses"),
            quarantined: status.set_aside.len() + deadly as usize,
            waiting: status.queues.unwrap_or_default().groups_waiting,
        })
    }

    /// Waits until the run is as it is to be; when that was seen.
    async fn until(&mut self, reached: impl Fn(&Status) -> bool) -> Result<Instant> {
        let began = Instant::now();
        loop {
            if reached(&self.status().await?) {
                return Ok(Instant::now());
            }
            ensure!(began.elapsed() < DEADLINE, "the run does not come there");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn set_slots(&mut self, slots: u32) -> Result<()> {
        let command = v1::operate_request::Command::Slots(slots);
        let request = v1::OperateRequest { operator: "bench".into(), command: Some(command) };
        self.0.operate(request).await.map_err(told)?;
        Ok(())
    }
}

/// Times of the heartbeats of a worker that does nothing else, every 10 ms, in microseconds.
struct Beats(Arc<Mutex<Vec<u64>>>);

impl Beats {
    fn take(&self) -> Value {
        quantiles(&mut take(&self.0))
    }
}

fn take(times: &Mutex<Vec<u64>>) -> Vec<u64> {
    std::mem::take(&mut *times.lock().expect("nobody panics with it"))
}

async fn beats(channel: RunChannel, fleet: Arc<Fleet>) -> Result<Beats> {
    let mut client = WorkerServiceClient::new(channel);
    let registration = support::registration(v1::Role::Verifier, "beating");
    let id = client.register(registration).await.map_err(told)?.into_inner().worker_id;
    let times = Arc::new(Mutex::new(Vec::new()));
    let beats = Beats(Arc::clone(&times));
    tokio::spawn(async move {
        loop {
            let began = Instant::now();
            if let Err(status) = client.heartbeat(beat(id)).await {
                eprintln!("the beating worker was refused: {status}");
                fleet.refused.fetch_add(1, Ordering::Relaxed);
                fleet.someone_ends.notify_one();
                return;
            }
            times.lock().expect("nobody panics with it").push(began.elapsed().as_micros() as u64);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    Ok(beats)
}

/// Counts a worker among those that ask, until it is answered or aborted.
struct Asking<'a>(&'a Fleet);

impl<'a> Asking<'a> {
    fn new(fleet: &'a Fleet) -> Self {
        fleet.asking.fetch_add(1, Ordering::Relaxed);
        Self(fleet)
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.asking.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn rollout(fleet: &Fleet, slot: u32) -> Result<()> {
    let member = fleet.join(Role::Rollout, format!("rollout-{slot}")).await?;
    let worker_id = member.worker.0;
    let mut client = RolloutServiceClient::new(member.channel.clone()).max_decoding_message_size(16 << 20);
    while !fleet.is_working.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let generation = fleet.generation();
    // Evenly in the time of a group, so that as many leases are asked for in every moment.
    let place = f64::from(mix(u64::from(slot)) as u32) / f64::from(u32::MAX);
    tokio::time::sleep(generation.mul_f64(place)).await;
    for number in 1.. {
        let request = v1::LeaseGroupsRequest {
            worker_id,
            free_samples: fleet.arguments.samples,
            wait_ms: WAIT_MS,
            request: number,
        };
        let began = Instant::now();
        let leases = {
            let _asking = Asking::new(fleet);
            client.lease_groups(request).await?.into_inner().groups
        };
        if !leases.is_empty() {
            fleet.leases.lock().expect("nobody panics with it").push(began.elapsed().as_micros() as u64);
        }
        for lease in leases {
            let began = tokio::time::Instant::now();
            fleet.held.lock().expect("nobody panics with it").insert(lease.group_id, slot);
            for (number, wanted) in (1u32..).zip(&lease.samples) {
                let share = f64::from(number) / lease.samples.len() as f64;
                tokio::time::sleep_until(began + generation.mul_f64(share)).await;
                // Any id of the vocabulary.
                let sample = sample_of(fleet.arguments.sample_bytes, 100 + wanted.index, lease.min_version);
                let began = Instant::now();
                let request = submission(worker_id, &lease, wanted.index, sample);
                match client.submit_sample(request).await {
                    Ok(_) => {}
                    // As real ones do.
                    Err(status) if status.code() == tonic::Code::FailedPrecondition => {
                        fleet.dropped.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    Err(status) => return Err(status.into()),
                }
                fleet.submits.lock().expect("nobody panics with it").push(began.elapsed().as_micros() as u64);
                fleet.samples.fetch_add(1, Ordering::Relaxed);
            }
            fleet.held.lock().expect("nobody panics with it").remove(&lease.group_id);
        }
    }
    Ok(())
}

async fn verifier(fleet: &Fleet, slot: u32) -> Result<()> {
    let member = fleet.join(Role::Verifier, format!("verifier-{slot}")).await?;
    let worker_id = member.worker.0;
    let mut client = VerifierServiceClient::new(member.channel.clone()).max_decoding_message_size(16 << 20);
    for number in 1.. {
        let request = v1::LeaseSamplesRequest { worker_id, max_samples: 64, wait_ms: WAIT_MS, request: number };
        let tasks = client.lease_samples(request).await?.into_inner().tasks;
        if !tasks.is_empty() {
            client.submit_verdicts(judge(worker_id, tasks)).await?;
        }
    }
    Ok(())
}

/// Counts the steps.
struct Steps<'a>(&'a Fleet);

impl Batches for Steps<'_> {
    fn whole(&mut self, _task: &v1::TrainTask) -> Result<()> {
        self.0.steps.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Receives batches and drops them.
async fn learner(fleet: &Fleet) -> Result<()> {
    let member = fleet.join(Role::Learner, "learner-0".to_owned()).await?;
    learn(member.channel.clone(), member.worker.0, WAIT_MS, Steps(fleet)).await
}
