//! Samples on their way: no message is larger than it may be, and what the disk loses is generated again.

use std::path::Path;

use crate::support::{PATIENCE, signal};
use pacs_coordinator::{Coordinator, CoordinatorOptions};
use pacs_protocol::v1::complete_task_request::Result as Done;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::v1::observe_service_client::ObserveServiceClient;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_protocol::{ANSWER_BYTES, MAX_MESSAGE_BYTES, MOST_SIGNALS, v1};
use pacs_runtime::net::{RunChannel, RunIdentity, of_run};
use pacs_types::MAX_SAMPLE_BYTES;
use pacs_weights::{Announcement, Description, VersionId, WeightKind};
use prost::Message;
use tonic::transport::Endpoint;
use tonic::{Code, Status};

pub(crate) const WAIT_MS: u32 = 1000;
/// Prompts of the step, and samples of a prompt.
pub(crate) const PROMPTS: u32 = 6;
pub(crate) const SAMPLES: u32 = 4;
/// Tokens of the model, and the one that samples are made of.
const VOCABULARY: u32 = 200_000;
const TOKEN: u32 = 150_000;

fn spec(folder: &Path, changes: &str) -> pacs_spec::JobSpec {
    let rows: Vec<String> =
        (0..20).map(|i| format!("{{\"question\": \"What is {i} + 1?\", \"answer\": \"{}\"}}", i + 1)).collect();
    std::fs::write(folder.join("train.jsonl"), rows.join("\n")).unwrap();
    let model = roomy_model(folder);
    let text = format!(
        "name = 'large'\nmodel.path = '{}'\ndata.train.path = '{}/train.jsonl'\nrollout.max_new_tokens = 600000\n\
         rollout.samples_per_prompt = {SAMPLES}\nrollout.max_concurrent_samples = 65536\nasynchrony.max_lag = 0\n\
         evaluation = {{ every_steps = 0, before = false, after = false }}\ncheckpoint.every_steps = 0\n\
         batch = {{ steps = 2, prompts_per_step = {PROMPTS}, mini_batches = 1 }}\nresources.learners = 2\n{changes}",
        model.display(),
        folder.display()
    );
    pacs_spec::parse(&text, Path::new("large")).unwrap()
}

/// The golden model's tokenizer and configuration with room for long answers, in `folder`/model.
fn roomy_model(folder: &Path) -> std::path::PathBuf {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
    let model = folder.join("model");
    std::fs::create_dir_all(&model).unwrap();
    for entry in std::fs::read_dir(&golden).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "json") {
            std::fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
        }
    }
    let config = model.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["max_position_embeddings"] = 1_000_000.into();
    json["vocab_size"] = VOCABULARY.into();
    std::fs::write(&config, json.to_string()).unwrap();
    model
}

pub(crate) async fn start(folder: &Path) -> Coordinator {
    start_with(folder, VOCABULARY).await
}

/// Starts with a model of so many tokens.
async fn start_with(folder: &Path, vocabulary: u32) -> Coordinator {
    let (listen, spec) = ("127.0.0.1:0".parse().unwrap(), spec(folder, ""));
    let config = folder.join("model/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace(&VOCABULARY.to_string(), &vocabulary.to_string())).unwrap();
    Coordinator::start(CoordinatorOptions::local(spec, folder.join("run"), listen)).await.unwrap()
}

pub(crate) async fn connect(coordinator: &Coordinator) -> RunChannel {
    let endpoint = Endpoint::from_shared(format!("http://{}", coordinator.address())).unwrap();
    of_run(endpoint.connect().await.unwrap(), RunIdentity::told(coordinator.run_id()).unwrap())
}

/// A worker that beats until the test ends.
pub(crate) async fn join(channel: &RunChannel, role: v1::Role, name: &str) -> u64 {
    let mut client = WorkerServiceClient::new(channel.clone());
    let request = v1::RegisterRequest {
        role: role.into(),
        name: name.into(),
        host: "here".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        collective_address: "here:1".into(),
        ..Default::default()
    };
    let worker_id = client.register(request).await.unwrap().into_inner().worker_id;
    tokio::spawn(async move {
        let beat = v1::HeartbeatRequest { worker_id, ..Default::default() };
        while client.heartbeat(beat.clone()).await.is_ok() {
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        }
    });
    worker_id
}

/// A sample whose tokens take a third of `bytes` with their log-probs, and whose text takes the rest.
fn sample(bytes: usize) -> v1::Sample {
    let tokens = bytes / 3 / 7;
    v1::Sample {
        tokens: vec![TOKEN; tokens],
        logprobs: vec![-0.5; tokens],
        text: "x".repeat(bytes - 7 * tokens),
        finish: v1::FinishReason::Stop.into(),
        ..Default::default()
    }
}

/// The largest message of each kind that was seen.
#[derive(Debug, Default)]
struct Largest {
    leases: usize,
    tasks: usize,
    pieces: usize,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_of_very_large_samples_goes_through_in_bounded_messages() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = start(folder.path()).await;
    let channel = connect(&coordinator).await;
    let mut largest = Largest::default();

    let learners: Vec<_> = (0..2).map(|rank| tokio::spawn(learner(channel.clone(), rank))).collect();
    // One as large as may be, others of up to 3 MiB.
    let bytes = |sample| match sample {
        0 => MAX_SAMPLE_BYTES - 100,
        other => 100 + (other as usize % 4) * (1 << 20),
    };
    let rollout = join(&channel, v1::Role::Rollout, "rollout-0").await;
    largest.leases = hand_in(&channel, rollout, PROMPTS * SAMPLES, bytes).await;
    let verifier = join(&channel, v1::Role::Verifier, "verifier-0").await;
    largest.tasks = judge(&channel, verifier, PROMPTS * SAMPLES).await;
    let mut sequences = 0;
    for learner in learners {
        let (pieces, own) = learner.await.unwrap();
        largest.pieces = largest.pieces.max(pieces);
        sequences += own;
    }
    assert_eq!(sequences, PROMPTS * SAMPLES);

    // One item alone may take more than a list of them.
    assert!(largest.leases <= ANSWER_BYTES, "{largest:?}");
    assert!(largest.tasks > ANSWER_BYTES && largest.tasks <= MAX_MESSAGE_BYTES, "{largest:?}");
    assert!(largest.pieces <= MAX_MESSAGE_BYTES, "{largest:?}");
    let mut operator = OperatorServiceClient::new(channel);
    let status = operator.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    assert!(status.left_out.is_empty() && status.encoded_len() < ANSWER_BYTES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn samples_in_flight_are_shown_in_bounded_answers() {
    const ALL: u32 = PROMPTS * SAMPLES;
    let folder = tempfile::tempdir().unwrap();
    let coordinator = start(folder.path()).await;
    let channel = connect(&coordinator).await;
    // They never get a batch: one sample is not judged.
    let learners: Vec<_> = (0..2)
        .map(|slot| {
            let channel = channel.clone();
            tokio::spawn(async move {
                let (worker_id, generation, mut client) = prepared(&channel, slot).await;
                train_task(&mut client, worker_id, generation).await
            })
        })
        .collect();
    let rollout = join(&channel, v1::Role::Rollout, "rollout-0").await;
    let bytes = |sample| if sample == 0 { MAX_SAMPLE_BYTES - 100 } else { 400_000 };
    hand_in(&channel, rollout, ALL, bytes).await;
    let verifier = join(&channel, v1::Role::Verifier, "verifier-0").await;
    judge(&channel, verifier, ALL - 1).await;

    let mut observer = ObserveServiceClient::new(channel);
    let mut list = async |request: v1::ListSamplesRequest| {
        let (mut samples, mut pages, mut page) = (Vec::new(), 0, String::new());
        loop {
            let request = v1::ListSamplesRequest { page, ..request.clone() };
            let response = observer.list_samples(request).await.unwrap().into_inner();
            assert!(response.encoded_len() <= ANSWER_BYTES && response.notes.is_empty(), "{:?}", response.notes);
            samples.extend(response.samples);
            (pages, page) = (pages + 1, response.next_page);
            if page.is_empty() {
                return (samples, pages);
            }
        }
    };
    let any = v1::ListSamplesRequest { text_bytes: 65_536, limit: 7, ..Default::default() };
    let (samples, pages) = list(any.clone()).await;
    assert_eq!(pages, 4);
    let mut ids: Vec<_> = samples.iter().map(|sample| (std::cmp::Reverse(sample.group_id), sample.index)).collect();
    assert!(ids.is_sorted(), "the newest group first: {ids:?}");
    ids.dedup();
    assert_eq!(ids.len(), ALL as usize, "each once");
    for sample in &samples {
        assert!(sample.shortened && sample.response.len() == 65_536 && sample.question.starts_with("What is "));
        assert_eq!((sample.purpose(), sample.step), (v1::Purpose::Train, None));
        assert_eq!(sample.verdict.is_some(), sample.state() == v1::SampleState::Judged);
    }
    let unjudged = v1::ListSamplesRequest { state: v1::SampleState::Unjudged.into(), ..any.clone() };
    assert_eq!(list(unjudged).await.0.len(), 1);
    let right = v1::ListSamplesRequest { outcomes: vec![v1::Outcome::Correct.into()], ..any.clone() };
    let (right, _) = list(right).await;
    assert!(right.iter().all(|sample| sample.index % 2 == 1) && (11..=12).contains(&right.len()), "{}", right.len());
    let group = v1::ListSamplesRequest { group_id: Some(2), ..any.clone() };
    assert_eq!(list(group).await.0.len(), SAMPLES as usize);
    assert!(list(v1::ListSamplesRequest { text: "WHAT IS".into(), ..any.clone() }).await.0.len() == ALL as usize);
    assert!(list(v1::ListSamplesRequest { text: "nowhere".into(), ..any.clone() }).await.0.is_empty());
    assert!(list(v1::ListSamplesRequest { step: Some(1), ..any }).await.0.is_empty(), "no step is made");

    let largest = samples.iter().max_by_key(|sample| sample.tokens).unwrap();
    let request = v1::GetSampleRequest { group_id: largest.group_id, index: largest.index, ..Default::default() };
    let whole = observer.get_sample(request).await.unwrap().into_inner();
    assert!(whole.encoded_len() <= ANSWER_BYTES && whole.tokens.len() == 65_536, "{}", whole.encoded_len());
    assert!(!whole.prompt_tokens.is_empty() && whole.spans.len() == 1);
    let end = v1::GetSampleRequest { first_token: largest.tokens - 3, ..request };
    let end = observer.get_sample(end).await.unwrap().into_inner();
    assert_eq!((end.tokens, end.logprobs), (vec![TOKEN; 3], vec![-0.5; 3]));
    let absent = v1::GetSampleRequest { index: SAMPLES, ..request };
    assert_eq!(observer.get_sample(absent).await.unwrap_err().code(), Code::NotFound);
    let large = v1::ListSamplesRequest { limit: u32::MAX, ..Default::default() };
    assert_eq!(observer.list_samples(large).await.unwrap_err().code(), Code::InvalidArgument);
    learners.iter().for_each(tokio::task::JoinHandle::abort);
}

/// A rank that was given its part of a batch.
struct Training {
    worker_id: u64,
    generation: u64,
    task_id: u64,
    client: LearnerServiceClient<RunChannel>,
}

impl Training {
    async fn begin(channel: RunChannel, slot: u32) -> Self {
        let (worker_id, generation, mut client) = prepared(&channel, slot).await;
        let (task_id, _) = train_task(&mut client, worker_id, generation).await.expect("a batch");
        Self { worker_id, generation, task_id, client }
    }

    async fn index(&mut self) -> Vec<v1::SequenceIndex> {
        let Self { worker_id, generation, task_id, .. } = *self;
        let request = v1::StreamBatchRequest { worker_id, generation, task_id, ..Default::default() };
        let mut stream = self.client.stream_batch(request).await.unwrap().into_inner();
        let mut index = Vec::new();
        while let Some(piece) = stream.message().await.unwrap() {
            index.extend(piece.index);
        }
        index
    }

    /// Reports the first step as trained, with these signals.
    async fn report(&mut self, signals: &[v1::TrainingSignal]) -> Result<(), Status> {
        let Self { worker_id, generation, task_id, .. } = *self;
        let description = Description::of(VersionId::new(generation, 1), WeightKind::Float32, &[0; 4]);
        let weights = Some((&Announcement { description, address: String::new(), probe: None }).into());
        let result = v1::TrainResult { weights, signals: signals.to_vec(), ..Default::default() };
        let result = Some(Done::Trained(result));
        let request = v1::CompleteTaskRequest { worker_id, generation, task_id, result };
        self.client.complete_task(request).await.map(drop)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signals_of_what_a_rank_was_not_given_are_refused_and_its_own_are_archived() {
    const ALL: usize = (PROMPTS * SAMPLES) as usize;
    let folder = tempfile::tempdir().unwrap();
    let coordinator = start(folder.path()).await;
    let channel = connect(&coordinator).await;
    let [first, second] = [0, 1].map(|slot| tokio::spawn(Training::begin(channel.clone(), slot)));
    let rollout = join(&channel, v1::Role::Rollout, "rollout-0").await;
    hand_in(&channel, rollout, ALL as u32, |_| 1000).await;
    let verifier = join(&channel, v1::Role::Verifier, "verifier-0").await;
    judge(&channel, verifier, ALL as u32).await;
    let (mut first, mut second) = (first.await.unwrap(), second.await.unwrap());
    let index = first.index().await;
    let own = |rank: u32| -> Vec<v1::TrainingSignal> {
        let own = index.iter().filter(|entry| entry.rank == rank);
        own.map(|entry| signal(1, entry.group_id, entry.sample_index)).collect()
    };
    let (of_first, mut of_second) = (own(0), own(1));
    assert!(of_first.len() > 2 && of_second.len() > 2 && of_first.len() + of_second.len() == ALL, "both have a part");

    let changed = |change: &dyn Fn(&mut Vec<v1::TrainingSignal>)| {
        let mut signals = of_first.clone();
        change(&mut signals);
        signals
    };
    let name = |signal: &v1::TrainingSignal| format!("g{}.{}", signal.group_id, signal.sample_index);
    for (signals, expected) in [
        (changed(&|all| all[1].score = Some(f32::NAN)), format!("{} a score of NaN", name(&of_first[1]))),
        (
            changed(&|all| all[0].coefficient = f32::NEG_INFINITY),
            format!("{} a coefficient of -inf", name(&of_first[0])),
        ),
        (changed(&|all| all[1] = all[0]), format!("{}, which comes twice", name(&of_first[0]))),
        (changed(&|all| all.swap(0, 1)), format!("{}, which comes twice, or out of the order", name(&of_first[0]))),
        (changed(&|all| all.extend(all.clone())), format!("{}, which comes twice", name(&of_first[0]))),
        (changed(&|all| all[0] = of_second[0]), format!("{}, which rank 1 trains", name(&of_second[0]))),
        (
            changed(&|all| all[0].group_id = 1 << 41),
            format!("g{}.{}, which is not in the batch", 1u64 << 41, of_first[0].sample_index),
        ),
        (
            changed(&|all| all[2].sample_index = SAMPLES),
            format!("g{}.{SAMPLES}, which is not in the batch", of_first[2].group_id),
        ),
        (
            vec![of_first[0]; MOST_SIGNALS + 1],
            format!("has {} entries, expected at most {MOST_SIGNALS}", MOST_SIGNALS + 1),
        ),
    ] {
        let refused = first.report(&signals).await.expect_err(&expected);
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        let message = refused.message();
        assert!(
            message.starts_with("field `trained.signals` ") && message.contains(&expected),
            "{expected}: {message}"
        );
    }

    // Nothing of that counted. A report shows with the samples in flight, and its repeat changes nothing.
    let mut observer = ObserveServiceClient::new(channel);
    let request = v1::ListSamplesRequest { limit: 500, ..Default::default() };
    let seen = observer.list_samples(request.clone()).await.unwrap().into_inner().samples;
    assert!(seen.len() == ALL && seen.iter().all(|sample| (sample.score, sample.coefficient) == (None, None)));
    for _ in 0..2 {
        first.report(&of_first).await.unwrap();
    }
    let said = |signals: &[v1::TrainingSignal], sample: &v1::ObservedSample| {
        let of = signals.iter().find(|of| (of.group_id, of.sample_index) == (sample.group_id, sample.index));
        (of.and_then(|of| of.score), of.map(|of| of.coefficient))
    };
    let seen = observer.list_samples(request.clone()).await.unwrap().into_inner().samples;
    assert!(seen.len() == ALL && seen.iter().all(|sample| sample.step.is_none()));
    for sample in &seen {
        assert_eq!((sample.score, sample.coefficient), said(&of_first, sample), "{sample:?}");
    }

    // A rank need not say something of everything: what it leaves out has nothing.
    of_second.pop();
    second.report(&of_second).await.unwrap();
    let of_step = v1::ListSamplesRequest { step: Some(1), ..request };
    let archived = async {
        loop {
            let samples = observer.list_samples(of_step.clone()).await.unwrap().into_inner().samples;
            if samples.len() == ALL {
                return samples;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let archived = tokio::time::timeout(PATIENCE, archived).await.expect("the step is archived");
    let all = [of_first, of_second].concat();
    for sample in &archived {
        assert_eq!((sample.score, sample.coefficient), said(&all, sample), "{sample:?}");
    }
    assert_eq!(archived.iter().filter(|sample| sample.coefficient.is_none()).count(), 1);
    let one = &archived[0];
    let request =
        v1::GetSampleRequest { group_id: one.group_id, index: one.index, step: Some(1), ..Default::default() };
    let whole = observer.get_sample(request).await.unwrap().into_inner();
    assert_eq!(whole.sample.map(|sample| (sample.score, sample.coefficient)), Some((one.score, one.coefficient)));
}

/// Hands in so many samples, each of as many bytes as it is said to have; returns the largest answer to a request for leases.
/// Before the first of them, samples that are too large are refused.
pub(crate) async fn hand_in(channel: &RunChannel, worker_id: u64, samples: u32, bytes: impl Fn(u32) -> usize) -> usize {
    let mut client = RolloutServiceClient::new(channel.clone()).max_encoding_message_size(2 * MAX_MESSAGE_BYTES);
    let (mut handed_in, mut largest) = (0, 0);
    while handed_in < samples {
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: 1000, wait_ms: WAIT_MS, request: 0 };
        let leases = client.lease_groups(request).await.unwrap().into_inner();
        largest = largest.max(leases.encoded_len());
        for lease in leases.groups {
            for wanted in lease.samples {
                let submission = |bytes| v1::SubmitSampleRequest {
                    worker_id,
                    lease_id: lease.lease_id,
                    group_id: lease.group_id,
                    sample_index: wanted.index,
                    sample: Some(sample(bytes)),
                };
                if handed_in == 0 {
                    let refused = client.submit_sample(submission(MAX_SAMPLE_BYTES)).await.unwrap_err();
                    assert_eq!(refused.code(), Code::InvalidArgument);
                    assert!(refused.message().contains("a sample may take"), "{refused}");
                    let refused = client.submit_sample(submission(MAX_MESSAGE_BYTES)).await.unwrap_err();
                    assert_eq!(refused.code(), Code::OutOfRange, "{refused}");
                }
                client.submit_sample(submission(bytes(handed_in))).await.unwrap();
                handed_in += 1;
            }
        }
    }
    largest
}

/// Judges so many samples; returns the largest answer to a request for them.
pub(crate) async fn judge(channel: &RunChannel, worker_id: u64, samples: u32) -> usize {
    let mut client = VerifierServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let (mut judged, mut largest) = (0, 0);
    while judged < samples {
        let max_samples = samples - judged;
        let request = v1::LeaseSamplesRequest { worker_id, max_samples, wait_ms: WAIT_MS, request: 0 };
        let tasks = client.lease_samples(request).await.unwrap().into_inner();
        let bytes = tasks.encoded_len();
        assert!(tasks.tasks.len() <= 1 || bytes <= ANSWER_BYTES, "{} tasks take {bytes} bytes", tasks.tasks.len());
        largest = largest.max(bytes);
        let verdicts = tasks.tasks.into_iter().map(|task| {
            judged += 1;
            assert!(!task.response.is_empty() && !task.question.is_empty());
            let label = f64::from(task.sample_index % 2);
            let outcome = if label > 0.5 { v1::Outcome::Correct } else { v1::Outcome::Wrong }.into();
            let verdict = v1::Verdict { outcome, label, reward: label, ..Default::default() };
            let v1::VerifyTask { lease_id, group_id, sample_index, .. } = task;
            v1::TaskVerdict { lease_id, group_id, sample_index, verdict: Some(verdict), verifications: Vec::new() }
        });
        let request = v1::SubmitVerdictsRequest { worker_id, verdicts: verdicts.collect() };
        client.submit_verdicts(request).await.unwrap();
    }
    largest
}

/// Receives one batch; its largest piece, and how many sequences came.
async fn learner(channel: RunChannel, slot: u32) -> (usize, u32) {
    let (worker_id, generation, mut client) = prepared(&channel, slot).await;
    let (task_id, task) = train_task(&mut client, worker_id, generation).await.expect("nobody is lost");
    let stranger = v1::StreamBatchRequest { worker_id, generation, task_id: task_id + 1, ..Default::default() };
    let refused = client.stream_batch(stranger).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let request = v1::StreamBatchRequest { worker_id, generation, task_id, ..Default::default() };
    let more = v1::StreamBatchRequest { index_received: 1000, ..request };
    assert_eq!(client.stream_batch(more).await.unwrap_err().code(), Code::InvalidArgument);
    let (largest, sequences) = whole_batch(&mut client, request).await.unwrap();
    assert_eq!(sequences, task.rank_sequences);
    (largest, sequences)
}

/// The largest piece of a batch, and its sequences.
async fn whole_batch(
    client: &mut LearnerServiceClient<RunChannel>,
    request: v1::StreamBatchRequest,
) -> Result<(usize, u32), Status> {
    let mut stream = client.stream_batch(request).await?.into_inner();
    let (mut largest, mut sequences) = (0, 0);
    while let Some(piece) = stream.message().await? {
        largest = largest.max(piece.encoded_len());
        sequences += piece.sequences.len() as u32;
    }
    Ok((largest, sequences))
}

/// A learner that is a rank of a generation: its worker, and the generation.
pub(crate) async fn prepared(channel: &RunChannel, slot: u32) -> (u64, u64, LearnerServiceClient<RunChannel>) {
    let worker_id = join(channel, v1::Role::Learner, &format!("learner-{slot}")).await;
    let mut client = LearnerServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let generation = loop {
        let request = v1::JoinGenerationRequest { worker_id, wait_ms: WAIT_MS };
        if let Some(group) = client.join_generation(request).await.unwrap().into_inner().group {
            break group.generation;
        }
    };
    (worker_id, generation, client)
}

/// Prepares, and waits for the batch; none when the generation is dissolved.
pub(crate) async fn train_task(
    client: &mut LearnerServiceClient<RunChannel>,
    worker_id: u64,
    generation: u64,
) -> Option<(u64, v1::TrainTask)> {
    loop {
        let request = v1::NextTaskRequest { worker_id, generation, wait_ms: WAIT_MS, busy: false };
        let next = client.next_task(request).await.unwrap().into_inner();
        let task_id = next.task_id;
        match next.task {
            None => {}
            Some(Task::Prepare(_)) => {
                let description = Description::of(VersionId::new(generation, 0), WeightKind::Float32, &[0; 4]);
                let weights = (&Announcement { description, address: String::new(), probe: None }).into();
                let result = Some(Done::Prepared(v1::PrepareResult { weights: Some(weights) }));
                let request = v1::CompleteTaskRequest { worker_id, generation, task_id, result };
                client.complete_task(request).await.unwrap();
            }
            Some(Task::Train(task)) => return Some((task_id, task)),
            Some(Task::Regroup(_)) => return None,
            Some(Task::Save(_)) => panic!("nothing is to be saved"),
        }
    }
}

/// Damages the first sample that is on the disk.
fn damage(folder: &Path) {
    let path = folder.join("run/journal/samples-000001.seg");
    let mut bytes = std::fs::read(&path).unwrap();
    // In the body of the first frame.
    bytes[40] ^= 1;
    let file = std::fs::File::options().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sample_that_the_disk_has_lost_is_generated_again_and_judged_again() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = start(folder.path()).await;
    let channel = connect(&coordinator).await;
    let learners: Vec<_> = (0..2).map(|slot| tokio::spawn(learner(channel.clone(), slot))).collect();
    let rollout = join(&channel, v1::Role::Rollout, "rollout-0").await;
    let verifier = join(&channel, v1::Role::Verifier, "verifier-0").await;
    hand_in(&channel, rollout, PROMPTS * SAMPLES, |_| 1000).await;
    damage(folder.path());
    judge(&channel, verifier, PROMPTS * SAMPLES - 1).await;
    hand_in(&channel, rollout, 1, |_| 1000).await;
    judge(&channel, verifier, 1).await;
    let mut sequences = 0;
    for learner in learners {
        sequences += learner.await.unwrap().1;
    }
    assert_eq!(sequences, PROMPTS * SAMPLES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_would_be_refused_now_is_not_taken_from_the_journal_either() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = start(folder.path()).await;
    let channel = connect(&coordinator).await;
    let prepare = |slot| {
        let channel = channel.clone();
        tokio::spawn(async move {
            let (worker_id, generation, mut client) = prepared(&channel, slot).await;
            train_task(&mut client, worker_id, generation).await
        })
    };
    let learners = [prepare(0), prepare(1)];
    let rollout = join(&channel, v1::Role::Rollout, "rollout-0").await;
    hand_in(&channel, rollout, PROMPTS * SAMPLES, |_| 1000).await;
    learners.iter().for_each(tokio::task::JoinHandle::abort);
    drop((channel, coordinator));
    for (vocabulary, kept) in [(VOCABULARY, (PROMPTS * SAMPLES) as usize), (TOKEN, 0)] {
        let coordinator = start_with(folder.path(), vocabulary).await;
        let mut observer = ObserveServiceClient::new(connect(&coordinator).await);
        let state = v1::SampleState::Unjudged.into();
        let request = v1::ListSamplesRequest { limit: 100, state, ..Default::default() };
        let samples = observer.list_samples(request).await.unwrap().into_inner().samples;
        assert_eq!(samples.len(), kept, "of a model with {vocabulary} tokens");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_sample_the_disk_has_lost_costs_one_generation() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = start(folder.path()).await;
    let channel = connect(&coordinator).await;
    let first = channel.clone();
    let lost = |slot| {
        let channel = first.clone();
        tokio::spawn(async move {
            let (worker_id, generation, mut client) = prepared(&channel, slot).await;
            // The rank that does not meet the damage may have its part, or hear that the generation is over.
            let task = train_task(&mut client, worker_id, generation).await;
            let Some((task_id, _)) = task else { return Ok((0, 0)) };
            let request = v1::StreamBatchRequest { worker_id, generation, task_id, ..Default::default() };
            let code = whole_batch(&mut client, request).await.map_err(|status| status.code());
            // Its task stays open until the loss is known.
            while train_task(&mut client, worker_id, generation).await.is_some() {}
            code
        })
    };
    let learners = [lost(0), lost(1)];
    let rollout = join(&channel, v1::Role::Rollout, "rollout-0").await;
    let verifier = join(&channel, v1::Role::Verifier, "verifier-0").await;
    hand_in(&channel, rollout, PROMPTS * SAMPLES, |_| 1000).await;
    judge(&channel, verifier, PROMPTS * SAMPLES - 1).await;
    damage(folder.path());
    judge(&channel, verifier, 1).await;
    let mut codes = Vec::new();
    for learner in learners {
        codes.push(learner.await.unwrap());
    }
    assert!(codes.contains(&Err(Code::DataLoss)), "{codes:?}");
    let mut operator = OperatorServiceClient::new(channel);
    let status = operator.get_status(v1::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!(status.counters.get("lost_samples"), Some(&1));
}

#[tokio::test]
async fn a_name_that_no_status_could_show_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let coordinator = start(folder.path()).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", coordinator.address())).unwrap();
    let mut client = WorkerServiceClient::new(endpoint.connect().await.unwrap());
    let request = v1::RegisterRequest {
        role: v1::Role::Verifier.into(),
        name: "x".repeat(8 << 20),
        version: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    };
    let refused = client.register(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("field `name` has 8388608 bytes"), "{refused}");
}
