//! What the disk costs: `cargo bench -p pacs-coordinator --features faults --bench disk -- WHAT FOLDER`. Prints one JSON line a
//! measurement.
//!
//! `heartbeats` and `steps [MOST]` run coordinators whose workers make up what they hand in, over gRPC; `snapshot` compares
//! a copy of a machine with writing it out.
#![allow(clippy::unwrap_used, dead_code, reason = "a measurement that fails ends with a panic")]

#[path = "../tests/service/support.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use pacs_coordinator::{Coordinator, CoordinatorOptions, Progress, RunEnd, Timing, slow_disk};
use pacs_machine::{Event, Machine, Options};
use pacs_protocol::v1;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_runtime::net::{RunIdentity, of_run};
use pacs_types::Role;
use serde_json::json;
use support::Fleet;
use tonic::transport::Endpoint;

/// Steps after which the growing run is looked at.
const STEPS: [u64; 3] = [1_000, 10_000, 20_000];
/// What is removed while heartbeats are timed.
const FILES: u64 = 10_000;
const GIGABYTES: u64 = 20;
/// How much longer every job of the run folder takes on the slow disk.
const SLOW: Duration = Duration::from_secs(2);
/// How long each measurement of heartbeats takes, and the time between two of them.
const HEARTBEATS: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(2);
const TARGET_P99_MS: f64 = 50.0;

fn main() {
    // `cargo bench` adds an argument of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let (what, folder) = match arguments.as_slice() {
        [what, folder, ..] => (what.as_str(), PathBuf::from(folder)),
        _ => return eprintln!("name the measurement, heartbeats, steps or snapshot, and a folder for it"),
    };
    let most = arguments.get(2).map_or(u64::MAX, |most| most.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        match what {
            "heartbeats" => heartbeats(&folder).await,
            "steps" => steps(&folder, most).await,
            "snapshot" => snapshot(),
            other => eprintln!("there is no measurement `{other}`"),
        }
    });
}

/// A coordinator of a job of `steps` small steps in a folder.
async fn start(folder: &Path, steps: u64, prompts: u32, more: &str) -> Coordinator {
    fs::create_dir_all(folder).unwrap();
    for (name, count) in [("train", 1000), ("evaluation", 3)] {
        let lines = (0..count).map(|i| format!("{{\"question\": \"{name}: {i} + 1?\", \"answer\": \"{}\"}}\n", i + 1));
        fs::write(folder.join(format!("{name}.jsonl")), lines.collect::<String>()).unwrap();
    }
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
    let (model, data) = (model.display(), folder.display());
    let text = format!(
        "name = 'test'\nmodel.path = '{model}'\ndata.train.path = '{data}/train.jsonl'\n\
         data.evaluation.path = '{data}/evaluation.jsonl'\nrollout.samples_per_prompt = 2\n\
         rollout.max_new_tokens = 16\nbatch = {{ steps = {steps}, prompts_per_step = {prompts}, mini_batches = 1 }}\n\
         resources = {{ rollouts = 2, learners = 2, verifiers = 1 }}\nverifier.max_attempts = 10\n{more}"
    );
    let spec = pacs_spec::parse(&text, Path::new("bench")).unwrap_or_else(|errors| panic!("{errors}"));
    let options = CoordinatorOptions::local(spec, folder.join("run"), "127.0.0.1:0".parse().unwrap());
    let timing = Timing { heartbeat_timeout: Duration::from_secs(60), ..Timing::default() };
    Coordinator::start_with(options, timing).await.unwrap()
}

async fn heartbeats(folder: &Path) {
    let every = "evaluation = { every_steps = 0, before = false, after = false }\ncheckpoint.every_steps = 5\n";
    for (what, slow, leftover) in [
        ("nothing else", Duration::ZERO, None),
        ("10,000 files are removed", Duration::ZERO, Some((FILES, 64 << 10))),
        ("20 GB are removed", Duration::ZERO, Some((GIGABYTES, 1 << 30))),
        ("every job of the run folder takes 2 s longer", SLOW, None),
    ] {
        let folder = folder.join("heartbeats");
        let _ = fs::remove_dir_all(&folder);
        if let Some((files, bytes)) = leftover {
            litter(&folder.join("run/checkpoints/.unfinished-000000-1"), files, bytes);
        }
        slow_disk(slow);
        let coordinator = start(&folder, 1_000_000, 4, every).await;
        let mut events = coordinator.events();
        let fleet = Fleet::start(coordinator.address(), None);
        support::until(&mut events, |event| matches!(event, Progress::Step(_))).await;
        let began = Instant::now();
        let mut latencies = beat(&coordinator).await;
        latencies.sort_by(f64::total_cmp);
        let percentile = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
        let left = count(&folder.join("run/checkpoints"), &|path| path.to_string_lossy().contains(".discarded-"));
        let line = json!({
            "bench": "heartbeats", "while": what, "seconds": began.elapsed().as_secs_f64(), "calls": latencies.len(),
            "p50_ms": percentile(0.5), "p99_ms": percentile(0.99), "max_ms": percentile(1.0),
            "target_p99_ms": TARGET_P99_MS, "files_left_to_remove": left.0,
        });
        println!("{line}");
        drop(fleet);
        drop(coordinator);
    }
}

/// Leaves a folder as a save that came to nothing does. The blocks are reserved and not written: it is their release that
/// costs time.
fn litter(folder: &Path, files: u64, bytes: i64) {
    fs::create_dir_all(folder).unwrap();
    for file in 0..files {
        let file = fs::File::create(folder.join(format!("rank-{file}.bin"))).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, bytes).unwrap();
    }
}

/// Milliseconds of each heartbeat of a worker that does nothing else.
async fn beat(coordinator: &Coordinator) -> Vec<f64> {
    let endpoint = Endpoint::from_shared(format!("http://{}", coordinator.address())).unwrap();
    let run = RunIdentity::told(coordinator.run_id()).unwrap();
    let mut client = WorkerServiceClient::new(of_run(endpoint.connect().await.unwrap(), run));
    let request = v1::RegisterRequest {
        role: v1::Role::Rollout.into(),
        name: "rollout-9".into(),
        host: "bench".into(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..v1::RegisterRequest::default()
    };
    let worker_id = client.register(request).await.unwrap().into_inner().worker_id;
    let (began, mut latencies) = (Instant::now(), Vec::new());
    while began.elapsed() < HEARTBEATS {
        let called = Instant::now();
        let request = v1::HeartbeatRequest { worker_id, activity: String::new(), ..Default::default() };
        client.heartbeat(request).await.unwrap();
        latencies.push(1e3 * called.elapsed().as_secs_f64());
        tokio::time::sleep(PAUSE).await;
    }
    latencies
}

async fn steps(folder: &Path, most: u64) {
    let every = "evaluation = { every_steps = 10, before = true, after = true, samples_per_problem = 1 }\n\
                 checkpoint = { every_steps = 50, keep = 2 }\n";
    let folder = folder.join("steps");
    let _ = fs::remove_dir_all(&folder);
    for steps in STEPS.into_iter().filter(|steps| *steps <= most) {
        let coordinator = start(&folder, steps, 1, every).await;
        let fleet = Fleet::start(coordinator.address(), None);
        let began = Instant::now();
        let end = coordinator.wait().await;
        assert!(matches!(end, RunEnd::Finished { step, .. } if step == steps), "{end:?}");
        let made = began.elapsed();
        fleet.join().await;

        let began = Instant::now();
        let coordinator = start(&folder, steps, 1, every).await;
        let restart = began.elapsed();
        let mut operator = OperatorServiceClient::connect(format!("http://{}", coordinator.address())).await.unwrap();
        let (began, calls) = (Instant::now(), 200);
        for _ in 0..calls {
            operator.get_status(v1::GetStatusRequest {}).await.unwrap();
        }
        let status = began.elapsed() / calls;
        coordinator.wait().await;
        let run = folder.join("run");
        let lines = |path: &Path| path.extension().is_some_and(|extension| extension == "jsonl");
        let samples = |path: &Path| path.parent().is_some_and(|parent| parent.ends_with("samples"));
        let (all, lines, samples) = (count(&run, &|_| true), count(&run, &lines), count(&run, &samples));
        let line = json!({
            "bench": "steps", "steps": steps, "seconds_since_the_last": made.as_secs_f64(),
            "restart_ms": 1e3 * restart.as_secs_f64(), "status_us": 1e6 * status.as_secs_f64(),
            "files": all.0, "files_of_samples": samples.0, "bytes_of_lines": lines.1, "bytes_of_samples": samples.1,
            "bytes_of_the_rest": all.1 - lines.1 - samples.1,
        });
        println!("{line}");
    }
}

/// The slots of two of the paper's steps, 1,024 groups of 8 samples each.
fn snapshot() {
    let (groups, runs) = (1024, 20);
    let options =
        Options { samples_per_prompt: 8, prompts_per_step: groups, max_lag: 1, slots: 2 * groups, ..Options::small() };
    let mut machine = Machine::new(options, Duration::ZERO);
    let role = serde_json::to_value(Role::Learner).unwrap();
    let learner = json!({"role": role, "name": "learner-0", "host": "bench", "pid": 1, "collective_address": "bench:1",
                         "started": 0});
    // Ids are counted: the worker has the first one, its task the second.
    for event in [
        json!({"register": learner}),
        json!({"join_generation": {"worker": 1}}),
        json!({"complete_task": {"worker": 1, "generation": 1, "task": 2, "result": {"prepared": {"weights": 0}}}}),
    ] {
        let event: Event = serde_json::from_value(event).unwrap();
        let _ = machine.step(Duration::ZERO, event);
    }
    assert_eq!(machine.in_flight(), 2 * groups as usize, "the slots are full");
    let timed = |work: &dyn Fn() -> usize| {
        let began = Instant::now();
        let bytes = (0..runs).map(|_| work()).sum::<usize>() / runs as usize;
        (1e3 * began.elapsed().as_secs_f64() / f64::from(runs), bytes)
    };
    // The copy is dropped elsewhere.
    let copies = std::cell::RefCell::new(Vec::new());
    let (copy_ms, _) = timed(&|| {
        copies.borrow_mut().push(machine.clone());
        0
    });
    let (write_ms, bytes) = timed(&|| serde_json::to_string(&machine).unwrap().len());
    let samples = 2 * groups * 8;
    let line =
        json!({"bench": "snapshot", "samples": samples, "copy_ms": copy_ms, "write_out_ms": write_ms, "bytes": bytes});
    println!("{line}");
}

/// Files below a folder that are asked for, and their bytes.
fn count(folder: &Path, counts: &dyn Fn(&Path) -> bool) -> (u64, u64) {
    let mut sum = (0, 0);
    for entry in fs::read_dir(folder).unwrap() {
        // It may be removed meanwhile.
        let Ok(entry) = entry else { continue };
        let path = entry.path();
        let Ok(metadata) = entry.metadata() else { continue };
        let (files, bytes) = match metadata.is_dir() {
            true if path.exists() => count(&path, counts),
            _ => (u64::from(counts(&path)), u64::from(counts(&path)) * metadata.len()),
        };
        sum = (sum.0 + files, sum.1 + bytes);
    }
    sum
}
