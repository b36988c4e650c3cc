//! Workers that do no work: they speak the wire protocol and make up what they submit.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pacs_coordinator::{Coordinator, CoordinatorOptions, Progress, Recorded, RunEnd, StartError, Timing};
use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as TaskResult;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_runtime::net::{RunChannel, RunIdentity, of_run};
use pacs_weights::{Announcement, Description, VersionId, WeightKind};
use tokio::task::JoinHandle;
use tonic::transport::Endpoint;

/// No test may take longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
const WAIT_MS: u32 = 200;

pub(crate) struct Job {
    folder: PathBuf,
    /// Steps between evaluations during training; 0: none.
    evaluated_every: u64,
    /// Removes the folder in the end; the process that serves for a test does not.
    _owned: Option<tempfile::TempDir>,
}

impl Job {
    pub(crate) fn new() -> Self {
        // In memory where the system has that: processes are killed here, not machines, and a disk that is busy with
        // something else takes half a second for every answer.
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let problems = |name: &str, count: u32| {
            let lines: Vec<String> = (0..count)
                .map(|i| format!("{{\"question\": \"{name}: what is {i} + 1?\", \"answer\": \"{}\"}}", i + 1))
                .collect();
            std::fs::write(folder.path().join(format!("{name}.jsonl")), lines.join("\n")).unwrap();
        };
        problems("train", 10);
        problems("evaluation", 3);
        Self { folder: folder.path().to_owned(), evaluated_every: 0, _owned: Some(folder) }
    }

    /// A job that is evaluated after so many steps each; 0: only before and after training.
    pub(crate) fn evaluated(every: u64) -> Self {
        Self { evaluated_every: every, ..Self::new() }
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// A file of problems, in the place of the one that is there.
    pub(crate) fn write_problems(&self, name: &str, rows: &[(String, String)]) {
        let line = |(question, answer): &(String, String)| {
            serde_json::json!({"question": question, "answer": answer}).to_string()
        };
        let lines: Vec<String> = rows.iter().map(line).collect();
        std::fs::write(self.folder.join(format!("{name}.jsonl")), lines.join("\n")).unwrap();
    }

    pub(crate) fn spec(&self, steps: u64, changes: &str) -> pacs_spec::JobSpec {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
        let (model, folder, every) = (model.display(), self.folder.display(), self.evaluated_every);
        let text = format!(
            "name = 'test'\n[model]\npath = '{model}'\n[data.train]\npath = '{folder}/train.jsonl'\n\
             [data.evaluation]\npath = '{folder}/evaluation.jsonl'\n[rollout]\nsamples_per_prompt = 2\n\
             max_new_tokens = 16\n[batch]\nsteps = {steps}\nprompts_per_step = 4\nmini_batches = 2\n\
             [evaluation]\nevery_steps = {every}\nsamples_per_problem = 2\n[checkpoint]\nevery_steps = 2\n\
             [resources]\nrollouts = 2\nlearners = 2\nverifiers = 1\n{changes}"
        );
        pacs_spec::parse(&text, Path::new("test")).unwrap()
    }

    pub(crate) async fn start(&self, steps: u64, changes: &str) -> Result<Coordinator, StartError> {
        let listen: SocketAddr = "127.0.0.1:0".parse().unwrap();
        self.start_at(steps, changes, listen).await
    }

    pub(crate) async fn start_at(
        &self,
        steps: u64,
        changes: &str,
        listen: SocketAddr,
    ) -> Result<Coordinator, StartError> {
        self.start_patiently(steps, changes, listen, Duration::from_secs(2)).await
    }

    /// One of several starts of the job, whose workers carry its name.
    pub(crate) async fn start_as(&self, attempt: &str) -> Result<Coordinator, StartError> {
        let options = CoordinatorOptions::local(self.spec(3, ""), self.run_dir(), "127.0.0.1:0".parse().unwrap());
        let options = CoordinatorOptions { attempt: attempt.to_owned(), ..options };
        Coordinator::start(options).await
    }

    async fn start_patiently(
        &self,
        steps: u64,
        changes: &str,
        listen: SocketAddr,
        heartbeat_timeout: Duration,
    ) -> Result<Coordinator, StartError> {
        let options = CoordinatorOptions::local(self.spec(steps, changes), self.run_dir(), listen);
        let timing = Timing {
            heartbeat_interval: Duration::from_millis(50),
            heartbeat_timeout,
            tick: Duration::from_millis(50),
            goodbye: Duration::from_secs(3),
        };
        Coordinator::start_with(options, timing).await
    }

    /// Checks that every archived sample of training, `samples` of them, has what the learners have said of it, and no
    /// other does.
    pub(crate) fn check_signals(&self, samples: usize) {
        let recorded = Recorded::new(&self.run_dir());
        let (mut trained, mut page) = (0, String::new());
        loop {
            let request = v1::ListSamplesRequest { limit: 500, page, ..Default::default() };
            let response = recorded.samples(request).unwrap();
            for sample in &response.samples {
                let expected = match sample.purpose() {
                    v1::Purpose::Train => {
                        trained += 1;
                        let said = signal(sample.step(), sample.group_id, sample.index);
                        (said.score, Some(said.coefficient))
                    }
                    v1::Purpose::Evaluate | v1::Purpose::Unspecified => (None, None),
                };
                assert_eq!((sample.score, sample.coefficient), expected, "{sample:?}");
            }
            page = response.next_page;
            if page.is_empty() {
                break;
            }
        }
        assert_eq!(trained, samples);
    }

    pub(crate) fn steps_in(&self, file: &str) -> Vec<u64> {
        let text = std::fs::read_to_string(self.run_dir().join(file)).unwrap();
        text.lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap())
            .collect()
    }
}

/// What the fake workers have seen.
#[derive(Default)]
pub(crate) struct Seen {
    /// Train tasks of rank 0 by step.
    pub(crate) trained: BTreeMap<u64, Vec<v1::SequenceIndex>>,
    /// Sequences of all ranks by step.
    pub(crate) sequences: BTreeMap<u64, Vec<v1::SequenceData>>,
    pub(crate) started_from: Vec<(String, u64)>,
    pub(crate) streams: Vec<(v1::Purpose, u64, u64)>,
    pub(crate) failed_verdicts: u32,
    /// Those of them that were of evaluations.
    pub(crate) failed_measurements: u32,
    /// Samples that were acknowledged: purpose, weights, group, index, attempt.
    acknowledged: BTreeSet<(i32, u64, u64, u32, u32)>,
    /// Acknowledged samples that were asked for again, and steps that were trained again.
    pub(crate) asked_again: u32,
    pub(crate) trained_again: u32,
    /// Calls that had to be made again.
    pub(crate) retries: u32,
    /// What learners are to do: report saves of nothing, and fail by this group.
    pub(crate) saves_nothing: bool,
    pub(crate) pill: Option<u64>,
    /// Training tasks that have failed by it.
    pub(crate) poisoned: u32,
}

pub(crate) type Shared = Arc<Mutex<Seen>>;

pub(crate) struct Fleet {
    pub(crate) seen: Shared,
    tasks: Vec<JoinHandle<()>>,
}

impl Fleet {
    /// Two rollout workers (the second dies silently after `dies_after` samples), a verifier that fails every third
    /// verification, and two learners.
    pub(crate) fn start(address: SocketAddr, dies_after: Option<usize>) -> Self {
        let seen = Shared::default();
        let mut tasks = Vec::new();
        for (slot, dies_after) in [(0, None), (1, dies_after)] {
            tasks.push(tokio::spawn(rollout(address, slot, dies_after, Arc::clone(&seen))));
        }
        tasks.push(tokio::spawn(verifier(address, Arc::clone(&seen))));
        for slot in 0..2 {
            tasks.push(tokio::spawn(learner(address, slot, Arc::clone(&seen))));
        }
        Self { seen, tasks }
    }

    /// Kills the second learner without a goodbye, and starts another process in its slot.
    pub(crate) async fn replace_learner(&mut self, address: SocketAddr) {
        let killed = self.tasks.pop().unwrap();
        killed.abort();
        assert!(killed.await.unwrap_err().is_cancelled());
        self.tasks.push(tokio::spawn(learner(address, 1, Arc::clone(&self.seen))));
    }

    /// Waits until all have left; a panic of one is a panic here.
    pub(crate) async fn join(self) {
        for task in self.tasks {
            tokio::time::timeout(PATIENCE, task).await.expect("workers leave when told").expect("workers do not panic");
        }
    }
}

pub(crate) async fn end_of(coordinator: Coordinator) -> RunEnd {
    tokio::time::timeout(PATIENCE, coordinator.wait()).await.expect("the run ends")
}

pub(crate) async fn until(
    events: &mut tokio::sync::broadcast::Receiver<Progress>,
    mut found: impl FnMut(&Progress) -> bool,
) {
    let mut seen = Vec::new();
    let search = async {
        loop {
            let event = events.recv().await.expect("the run continues");
            if found(&event) {
                return;
            }
            seen.push(event);
        }
    };
    if tokio::time::timeout(PATIENCE, search).await.is_err() {
        panic!("it does not happen; what does: {seen:#?}");
    }
}

/// A registered worker which sends heartbeats until it is dropped.
struct Member {
    id: u64,
    channel: RunChannel,
    left: tokio::sync::watch::Receiver<bool>,
    beats: JoinHandle<()>,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.beats.abort();
    }
}

async fn join(address: SocketAddr, role: v1::Role, name: String) -> Member {
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
    let run = RunIdentity::default();
    let channel = of_run(channel, run.clone());
    let mut client = WorkerServiceClient::new(channel.clone());
    let request = v1::RegisterRequest {
        role: role.into(),
        collective_address: format!("{name}:7000"),
        name,
        host: "here".into(),
        pid: 1,
        attempt: String::new(),
        run_id: String::new(),
        started: 0,
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let registered = client.register(request).await.unwrap().into_inner();
    assert_eq!(run.tell(&registered.run_id), Ok(true));
    assert!(registered.job_spec.contains("name = \"test\""));
    let id = registered.worker_id;
    let (leave, left) = tokio::sync::watch::channel(false);
    let beats = tokio::spawn(async move {
        loop {
            let beat = v1::HeartbeatRequest { worker_id: id, activity: "pretends".into(), ..Default::default() };
            if let Ok(reply) = client.heartbeat(beat).await
                && matches!(reply.into_inner().directive(), v1::Directive::Leave | v1::Directive::LeaveForNow)
            {
                leave.send_replace(true);
                let _ = client.leave(v1::LeaveRequest { worker_id: id, error: String::new() }).await;
                return;
            }
            tokio::time::sleep(Duration::from_millis(u64::from(registered.heartbeat_interval_ms))).await;
        }
    });
    Member { id, channel, left, beats }
}

impl Member {
    fn dismissed(&self) -> bool {
        *self.left.borrow()
    }
}

/// Makes a call until there is an answer, as workers do: a coordinator that is away comes back.
async fn persist<T, F: Future<Output = Result<tonic::Response<T>, tonic::Status>>>(
    member: &Member,
    seen: &Shared,
    call: impl Fn() -> F,
) -> Option<T> {
    loop {
        match call().await {
            Ok(reply) => return Some(reply.into_inner()),
            Err(status) if is_away(status.code()) && !member.dismissed() => {
                seen.lock().unwrap().retries += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(_) => return None,
        }
    }
}

/// One call of a client, by [`persist`].
macro_rules! persist {
    ($member:expr, $seen:expr, $client:expr, $method:ident, $request:expr) => {
        persist($member, $seen, || {
            let (mut client, request) = ($client.clone(), $request.clone());
            async move { client.$method(request).await }
        })
        .await
    };
}

fn is_away(code: tonic::Code) -> bool {
    matches!(code, tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Cancelled)
}

async fn rollout(address: SocketAddr, slot: u32, dies_after: Option<usize>, seen: Shared) {
    let member = join(address, v1::Role::Rollout, format!("rollout-{slot}")).await;
    let client = RolloutServiceClient::new(member.channel.clone());
    let (mut handed_in, mut number) = (0, 0);
    while !member.dismissed() {
        number += 1;
        let request =
            v1::LeaseGroupsRequest { worker_id: member.id, free_samples: 4, wait_ms: WAIT_MS, request: number };
        let Some(leases) = persist!(&member, &seen, client, lease_groups, request) else { continue };
        for lease in leases.groups {
            // What a lease wants was announced before.
            let request = v1::AwaitWeightsRequest { worker_id: member.id, ..v1::AwaitWeightsRequest::default() };
            if let Some(weights) = persist!(&member, &seen, client, await_weights, request).and_then(|r| r.weights) {
                let wanted = (lease.generation, lease.min_version);
                assert!((weights.generation, weights.version) >= wanted, "{weights:?} for {wanted:?}");
            }
            let (version, sampling) = (lease.min_version, lease.sampling.clone().unwrap());
            seen.lock().unwrap().streams.push((lease.purpose(), version, sampling.stream));
            assert!(!lease.prompt_tokens.is_empty());
            for v1::WantedSample { index, attempt } in lease.samples {
                let what = (lease.purpose, version, lease.group_id, index, attempt);
                if seen.lock().unwrap().acknowledged.contains(&what) {
                    seen.lock().unwrap().asked_again += 1;
                }
                if dies_after == Some(handed_in) {
                    return;
                }
                let length = 1 + (lease.group_id + u64::from(index)) as usize % 5;
                let sample = v1::Sample {
                    tokens: vec![7; length],
                    logprobs: vec![-0.5; length],
                    entropy_sum: 0.25 * length as f64,
                    // Sample 0 of a group is right.
                    text: if index == 0 { "right".into() } else { "wrong".into() },
                    finish: v1::FinishReason::Stop.into(),
                    version,
                    ..v1::Sample::default()
                };
                let request = v1::SubmitSampleRequest {
                    worker_id: member.id,
                    lease_id: lease.lease_id,
                    group_id: lease.group_id,
                    sample_index: index,
                    sample: Some(sample),
                };
                // Refused when the run was stopped meanwhile.
                if persist!(&member, &seen, client, submit_sample, request).is_some() {
                    seen.lock().unwrap().acknowledged.insert(what);
                }
                handed_in += 1;
            }
        }
    }
}

async fn verifier(address: SocketAddr, seen: Shared) {
    let member = join(address, v1::Role::Verifier, "verifier-0".into()).await;
    let client = VerifierServiceClient::new(member.channel.clone());
    let (mut count, mut number) = (0, 0);
    while !member.dismissed() {
        number += 1;
        let request =
            v1::LeaseSamplesRequest { worker_id: member.id, max_samples: 2, wait_ms: WAIT_MS, request: number };
        let Some(tasks) = persist!(&member, &seen, client, lease_samples, request) else { continue };
        let mut verdicts = Vec::new();
        for task in tasks.tasks {
            assert!(!task.question.is_empty() && task.answer_tokens > 0, "{task:?}");
            count += 1;
            let (outcome, label) = match task.response.as_str() {
                _ if count % 3 == 0 => {
                    let mut seen = seen.lock().unwrap();
                    seen.failed_verdicts += 1;
                    // Groups of evaluations have ids of their own.
                    seen.failed_measurements += u32::from(task.group_id >= 1 << 40);
                    // A label that nobody may ever see.
                    (v1::Outcome::Failed, 0.5)
                }
                "right" => (v1::Outcome::Correct, 1.0),
                "wrong" => (v1::Outcome::Wrong, 0.0),
                other => panic!("response `{other}`"),
            };
            assert!(task.gold.parse::<u32>().is_ok(), "gold `{}`", task.gold);
            let verdict = v1::Verdict {
                outcome: outcome.into(),
                label,
                reward: label,
                extracted: Some(task.gold),
                rule: "test".into(),
            };
            let verification = v1::Verification {
                verifier: "label".into(),
                outcome: outcome.into(),
                reward: label,
                elapsed_us: 100,
                cached: false,
            };
            let v1::VerifyTask { lease_id, group_id, sample_index, .. } = task;
            let (verdict, verifications) = (Some(verdict), vec![verification]);
            verdicts.push(v1::TaskVerdict { lease_id, group_id, sample_index, verdict, verifications });
        }
        if !verdicts.is_empty() {
            let request = v1::SubmitVerdictsRequest { worker_id: member.id, verdicts };
            let _ = persist!(&member, &seen, client, submit_verdicts, request);
        }
    }
}

async fn learner(address: SocketAddr, slot: u32, seen: Shared) {
    let member = join(address, v1::Role::Learner, format!("learner-{slot}")).await;
    let client = LearnerServiceClient::new(member.channel.clone());
    while !member.dismissed() {
        let request = v1::JoinGenerationRequest { worker_id: member.id, wait_ms: WAIT_MS };
        let joined = persist!(&member, &seen, client, join_generation, request);
        let Some(group) = joined.and_then(|reply| reply.group) else { continue };
        assert_eq!((group.world_size, group.addresses.len()), (2, 2));
        if group.rank == 0 {
            seen.lock().unwrap().started_from.push((group.checkpoint.clone(), group.step));
        }
        work(&member, &client, &group, &seen).await;
    }
}

async fn work(member: &Member, client: &LearnerServiceClient<RunChannel>, group: &v1::LearnerGroup, seen: &Shared) {
    let generation = group.generation;
    let weights = |version| {
        let id = VersionId::new(generation, version);
        let description = Description::of(id, WeightKind::Float32, &version.to_le_bytes());
        (group.rank == 0).then(|| (&Announcement { description, address: String::new(), probe: None }).into())
    };
    while !member.dismissed() {
        let request = v1::NextTaskRequest { worker_id: member.id, generation, wait_ms: WAIT_MS, busy: false };
        let next = persist!(member, seen, client, next_task, request);
        let Some(v1::NextTaskResponse { task_id, task }) = next else { continue };
        let result = match task {
            None => continue,
            Some(Task::Regroup(_)) => return,
            Some(Task::Prepare(_)) => TaskResult::Prepared(v1::PrepareResult { weights: weights(group.step) }),
            Some(Task::Train(train)) => {
                let step = train.step;
                let request = v1::StreamBatchRequest {
                    worker_id: member.id,
                    generation,
                    task_id,
                    ..v1::StreamBatchRequest::default()
                };
                let Some(pieces) = whole_stream(client, request).await else { continue };
                if fails_by(&pieces, seen) {
                    let failure = v1::TaskFailure {
                        message: "cannot digest it".into(),
                        kind: v1::FailureKind::Generation.into(),
                    };
                    let result = Some(TaskResult::Failed(failure));
                    let request = v1::CompleteTaskRequest { worker_id: member.id, generation, task_id, result };
                    let _ = persist!(member, seen, client, complete_task, request);
                    continue;
                }
                let signals = signals(step, &pieces, group.rank);
                note_training(&train, pieces, group.rank, seen);
                let metrics = [("loss".to_owned(), 0.5)].into();
                TaskResult::Trained(v1::TrainResult { weights: weights(step), metrics, skipped_updates: 0, signals })
            }
            Some(Task::Save(_)) if seen.lock().unwrap().saves_nothing => TaskResult::Saved(v1::SaveResult::default()),
            Some(Task::Save(save)) => TaskResult::Saved(save_files(&save, group.rank)),
        };
        let request = v1::CompleteTaskRequest { worker_id: member.id, generation, task_id, result: Some(result) };
        let _ = persist!(member, seen, client, complete_task, request);
    }
}

/// What these learners say of a sample of a step: numbers that tell steps, groups and samples apart.
pub(crate) fn signal(step: u64, group_id: u64, sample_index: u32) -> v1::TrainingSignal {
    let score = step as f32 + group_id as f32 / 64.0 + sample_index as f32 / 4.0;
    v1::TrainingSignal { group_id, sample_index, score: Some(score), coefficient: 0.25 - sample_index as f32 / 2.0 }
}

/// A rank's report on its own sequences.
fn signals(step: u64, pieces: &[v1::BatchPiece], rank: u32) -> Vec<v1::TrainingSignal> {
    let own = pieces.iter().flat_map(|piece| &piece.index).filter(|entry| entry.rank == rank);
    own.map(|entry| signal(step, entry.group_id, entry.sample_index)).collect()
}

/// All pieces of a batch; none when the stream breaks, and the task is asked for again.
async fn whole_stream(
    client: &LearnerServiceClient<RunChannel>,
    request: v1::StreamBatchRequest,
) -> Option<Vec<v1::BatchPiece>> {
    let mut stream = client.clone().stream_batch(request).await.ok()?.into_inner();
    let mut pieces = Vec::new();
    while let Some(piece) = stream.message().await.ok()? {
        pieces.push(piece);
    }
    Some(pieces)
}

/// Whether a batch has the group that learners are to fail by.
fn fails_by(pieces: &[v1::BatchPiece], seen: &Shared) -> bool {
    let mut seen = seen.lock().unwrap();
    let mut entries = pieces.iter().flat_map(|piece| &piece.index);
    let fails = seen.pill.is_some_and(|pill| entries.any(|entry| entry.group_id == pill));
    seen.poisoned += u32::from(fails);
    fails
}

fn note_training(train: &v1::TrainTask, pieces: Vec<v1::BatchPiece>, rank: u32, seen: &Shared) {
    let (mut index, mut prompts, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
    for piece in pieces {
        index.extend(piece.index);
        prompts.extend(piece.prompts);
        sequences.extend(piece.sequences);
    }
    assert_eq!((index.len(), sequences.len()), (train.sequences as usize, train.rank_sequences as usize));
    for data in &sequences {
        let entry = &index[data.position as usize];
        assert_eq!((entry.rank, entry.answer_tokens as usize), (rank, data.tokens.len()));
        assert!(prompts.iter().any(|prompt| prompt.group_id == entry.group_id && !prompt.tokens.is_empty()));
    }
    let mut seen = seen.lock().unwrap();
    seen.sequences.entry(train.step).or_default().extend(sequences);
    if rank == 0 && seen.trained.insert(train.step, index).is_some() {
        seen.trained_again += 1;
    }
}

/// Writes a half of the state each, and rank 0 the model.
fn save_files(save: &v1::SaveTask, rank: u32) -> v1::SaveResult {
    let total = parameters();
    let (start, held) = [(0, total / 2), (total / 2, total - total / 2)][rank as usize];
    let state = state_file(save.step, start, held);
    let mut files = vec![(format!("training-state-{rank}-of-2.safetensors"), state)];
    if save.model && rank == 0 {
        std::fs::create_dir(Path::new(&save.directory).join("model")).unwrap();
        files.push(("model/config.json".into(), b"{}".to_vec()));
        files.push(("model/model.safetensors".into(), state_file(save.step, 0, total)));
    }
    v1::SaveResult { files: files.into_iter().map(|(path, content)| write_file(save, path, &content)).collect() }
}

pub(crate) fn write_file(save: &v1::SaveTask, path: String, content: &[u8]) -> v1::SavedFile {
    std::fs::write(Path::new(&save.directory).join(&path), content).unwrap();
    v1::SavedFile { path, bytes: content.len() as u64, crc32: crc32fast::hash(content) }
}

/// Parameters of the job's model, as state files count them.
fn parameters() -> usize {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
    pacs_shape::ParameterLayout::new(&pacs_shape::ModelConfig::read(&model).unwrap()).total()
}

/// A state file of zeros that holds so many parameters, from one on.
pub(crate) fn state_file(step: u64, start: usize, held: usize) -> Vec<u8> {
    let bytes = 4 * held;
    let tensor = |place: usize| serde_json::json!({"dtype": "F32", "shape": [held], "data_offsets": [place * bytes, (place + 1) * bytes]});
    let metadata = serde_json::json!({"step": step.to_string(), "ranges": format!("{start}+{held}")});
    let header = serde_json::json!({
        "__metadata__": metadata, "master": tensor(0), "moment1": tensor(1), "moment2": tensor(2),
    });
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + 3 * bytes, 0);
    file
}

/// A coordinator in a process of its own, which can be killed.
pub(crate) struct Killable {
    child: std::process::Child,
}

/// Set for the process that is to be the coordinator: folder, steps between evaluations, steps, what is changed in the
/// job, and the address.
const SERVE: &str = "PACS_TEST_SERVE";

impl Killable {
    /// Starts the coordinator of a job at a fixed address.
    pub(crate) fn start(job: &Job, steps: u64, changes: &str, address: SocketAddr) -> Self {
        let told =
            serde_json::json!([job.folder, job.evaluated_every, steps, changes, address.to_string()]).to_string();
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "end_to_end::serves_when_it_is_told_to", "--nocapture", "--test-threads", "1"])
            .env(SERVE, told)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        Self { child }
    }

    /// Kills it, as a power failure would.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for it to end well.
    pub(crate) async fn wait(mut self) {
        let started = std::time::Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "the coordinator ended with {status}");
                return;
            }
            assert!(started.elapsed() < PATIENCE, "the run does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Killable {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is the coordinator, in a process that [`Killable`] has started; nothing in others.
pub(crate) async fn serve_if_told() {
    let Ok(told) = std::env::var(SERVE) else { return };
    let (folder, evaluated_every, steps, changes, address): (PathBuf, u64, u64, String, String) =
        serde_json::from_str(&told).unwrap();
    let job = Job { folder, evaluated_every, _owned: None };
    // No worker dies in these tests, so one that is not heard of is only slow.
    let timeout = Duration::from_secs(30);
    let coordinator = job.start_patiently(steps, &changes, address.parse().unwrap(), timeout).await.unwrap();
    assert!(matches!(end_of(coordinator).await, RunEnd::Finished { .. }));
}

/// A free port of this machine.
pub(crate) fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Waits until somebody listens there.
pub(crate) async fn until_it_serves(address: SocketAddr) {
    wait_for("a coordinator", || std::net::TcpStream::connect(address).is_ok()).await;
}

/// Looks again and again until it is so.
pub(crate) async fn wait_for(what: &str, is_so: impl Fn() -> bool) {
    let started = std::time::Instant::now();
    while !is_so() {
        assert!(started.elapsed() < PATIENCE, "no {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
