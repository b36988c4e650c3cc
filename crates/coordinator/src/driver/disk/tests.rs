//! Runs a job on a disk that is slower than its steps.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as Done;
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::v1::operator_service_server::OperatorService;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_shape::{ModelConfig, ParameterLayout};
use pacs_weights::{Announcement, Description, VersionId, WeightKind};
use tonic::Request;

use super::MOST_WAITING;
use crate::records::state_file;
use crate::services::Services;
use crate::{Coordinator, CoordinatorOptions, RunEnd, Timing, slow_disk};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/models/qwen2-tied");
const STEPS: u64 = 12;
const WAIT_MS: u32 = 200;
/// Timeout of each test.
const PATIENCE: Duration = Duration::from_secs(60);

async fn start(folder: &Path) -> Coordinator {
    let problems = folder.join("problems.jsonl");
    std::fs::write(&problems, "{\"question\": \"1 + 1?\", \"answer\": \"2\"}\n").unwrap();
    let text = format!(
        "name = 'slow'\nmodel.path = '{}'\ndata.train.path = '{}'\nrollout.samples_per_prompt = 2\n\
         rollout.max_new_tokens = 16\nbatch = {{ steps = {STEPS}, prompts_per_step = 1, mini_batches = 1 }}\n\
         evaluation = {{ every_steps = 0, before = false, after = false }}\ncheckpoint.every_steps = 5\n",
        MODEL,
        problems.display()
    );
    let spec = pacs_spec::parse(&text, Path::new("slow")).unwrap();
    let options = CoordinatorOptions::local(spec, folder.join("run"), "127.0.0.1:0".parse().unwrap());
    let timing = Timing { heartbeat_timeout: PATIENCE, goodbye: Duration::from_millis(50), ..Timing::default() };
    Coordinator::start_with(options, timing).await.unwrap()
}

async fn register(services: &Services, role: v1::Role, name: &str) -> u64 {
    let request = v1::RegisterRequest {
        role: role.into(),
        name: name.into(),
        host: "here".into(),
        pid: 1,
        version: env!("CARGO_PKG_VERSION").into(),
        collective_address: "here:1".into(),
        ..v1::RegisterRequest::default()
    };
    services.register(Request::new(request)).await.unwrap().into_inner().worker_id
}

async fn rollout(services: Services, version: Arc<AtomicU64>) {
    let worker_id = register(&services, v1::Role::Rollout, "rollout-0").await;
    loop {
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: 8, wait_ms: WAIT_MS, ..Default::default() };
        let Ok(leases) = services.lease_groups(Request::new(request)).await else { return };
        for lease in leases.into_inner().groups {
            for wanted in lease.samples {
                let sample = v1::Sample {
                    tokens: vec![7],
                    logprobs: vec![-0.5],
                    text: "2".into(),
                    finish: v1::FinishReason::Stop.into(),
                    version: version.load(Ordering::Relaxed),
                    ..v1::Sample::default()
                };
                let request = v1::SubmitSampleRequest {
                    worker_id,
                    lease_id: lease.lease_id,
                    group_id: lease.group_id,
                    sample_index: wanted.index,
                    sample: Some(sample),
                };
                services.submit_sample(Request::new(request)).await.unwrap();
            }
        }
    }
}

async fn verifier(services: Services) {
    let worker_id = register(&services, v1::Role::Verifier, "verifier-0").await;
    loop {
        let request = v1::LeaseSamplesRequest { worker_id, max_samples: 8, wait_ms: WAIT_MS, ..Default::default() };
        let Ok(tasks) = services.lease_samples(Request::new(request)).await else { return };
        let verdicts = tasks.into_inner().tasks.into_iter().map(|task| {
            let right = task.sample_index == 0;
            let outcome = if right { v1::Outcome::Correct } else { v1::Outcome::Wrong };
            let label = f64::from(u8::from(right));
            let verdict = v1::Verdict { outcome: outcome.into(), label, reward: label, ..v1::Verdict::default() };
            let v1::VerifyTask { lease_id, group_id, sample_index, .. } = task;
            let verdict = Some(verdict);
            v1::TaskVerdict { lease_id, group_id, sample_index, verdict, verifications: Vec::new() }
        });
        let request = v1::SubmitVerdictsRequest { worker_id, verdicts: verdicts.collect() };
        services.submit_verdicts(Request::new(request)).await.unwrap();
    }
}

/// Writes the files that the coordinator expects of a save.
fn saved(save: &v1::SaveTask) -> Vec<v1::SavedFile> {
    let config = ModelConfig::read(Path::new(MODEL)).unwrap();
    let total = ParameterLayout::new(&config).total();
    let state = state_file(save.step, &format!("0+{total}"), total);
    let mut files = vec![("training-state.safetensors", state.clone())];
    if save.model {
        files.extend([("model/config.json", b"{}".to_vec()), ("model/model.safetensors", state)]);
        std::fs::create_dir(Path::new(&save.directory).join("model")).unwrap();
    }
    let write = |(path, content): (&str, Vec<u8>)| {
        std::fs::write(Path::new(&save.directory).join(path), &content).unwrap();
        v1::SavedFile { path: path.into(), bytes: content.len() as u64, crc32: crc32fast::hash(&content) }
    };
    files.into_iter().map(write).collect()
}

async fn learner(services: Services, version: Arc<AtomicU64>) {
    let worker_id = register(&services, v1::Role::Learner, "learner-0").await;
    let request = v1::JoinGenerationRequest { worker_id, wait_ms: WAIT_MS };
    let joined = services.join_generation(Request::new(request)).await.unwrap().into_inner();
    let generation = joined.group.expect("one is enough").generation;
    loop {
        let request = v1::NextTaskRequest { worker_id, generation, wait_ms: WAIT_MS, busy: false };
        let Ok(next) = services.next_task(Request::new(request)).await else { return };
        let v1::NextTaskResponse { task_id, task } = next.into_inner();
        let weights = |version| {
            let id = VersionId::new(generation, version);
            let description = Description::of(id, WeightKind::Float32, &version.to_le_bytes());
            Some((&Announcement { description, address: String::new(), probe: None }).into())
        };
        let result = match task {
            None => continue,
            Some(Task::Prepare(_)) => Done::Prepared(v1::PrepareResult { weights: weights(0) }),
            Some(Task::Train(train)) => {
                version.store(train.step, Ordering::Relaxed);
                Done::Trained(v1::TrainResult { weights: weights(train.step), ..v1::TrainResult::default() })
            }
            Some(Task::Save(save)) => {
                assert!(Path::new(&save.directory).is_dir(), "the folder is there before ranks hear of it");
                Done::Saved(v1::SaveResult { files: saved(&save) })
            }
            Some(Task::Regroup(regroup)) => panic!("{}", regroup.reason),
        };
        let request = v1::CompleteTaskRequest { worker_id, generation, task_id, result: Some(result) };
        services.complete_task(Request::new(request)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_waits_for_a_slow_disk_where_it_says_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    slow_disk(Duration::from_millis(200));
    let coordinator = start(folder.path()).await;
    slow_disk(Duration::ZERO);
    let (services, version) = (coordinator.all_services(), Arc::default());
    let workers = [
        tokio::spawn(rollout(services.clone(), Arc::clone(&version))),
        tokio::spawn(verifier(services.clone())),
        tokio::spawn(learner(services.clone(), version)),
    ];
    let watching = tokio::spawn(async move {
        let mut most = 0;
        loop {
            let status = services.get_status(Request::new(v1::GetStatusRequest {})).await.unwrap().into_inner();
            // When the machine waits for a checkpoint, the sentence has no number.
            let waiting = status.waiting_for.strip_prefix("waits for the disk to take ");
            let steps = waiting.and_then(|rest| rest.split_once(" steps and evaluations")?.0.parse::<usize>().ok());
            most = most.max(steps.unwrap_or(0));
            if status.step == STEPS {
                return most;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let end = tokio::time::timeout(PATIENCE, coordinator.wait()).await.expect("the run ends");
    assert!(matches!(end, RunEnd::Finished { step: STEPS, .. }), "{end:?}");
    workers.iter().for_each(|worker| worker.abort());
    let most = tokio::time::timeout(PATIENCE, watching).await.expect("the last step was seen").unwrap();
    // A step was held back, and the disk never lagged by more than the bound.
    assert_eq!(most, MOST_WAITING);
    let run_dir = folder.path().join("run");
    let lines = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
    let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap();
    assert!(lines.lines().map(step).eq(1..=STEPS), "{lines}");
    let archived = std::fs::read_dir(run_dir.join("samples")).unwrap().count();
    assert_eq!(archived as u64, STEPS);
    assert!(run_dir.join(format!("checkpoints/step-{STEPS:06}/manifest.json")).exists());
}
