//! A coordinator to be measured, and workers that make up what they hand in.

#![allow(dead_code, reason = "every benchmark uses its part")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use pacs_coordinator::{Coordinator, CoordinatorOptions};
use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as Done;
use pacs_protocol::v1::learner_service_client::LearnerServiceClient;
use pacs_protocol::v1::next_task_response::Task;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_runtime::net::{RunChannel, RunIdentity, of_run};
use pacs_weights::{Announcement, Description, VersionId, WeightKind};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};

/// Longest wait of a call that asks for work.
pub(crate) const WAIT_MS: u32 = 1000;
/// Rollout workers: each has so many calls in flight that the disk takes them in batches.
pub(crate) const ROLLOUTS: u32 = 4;
pub(crate) const CALLS: usize = 64;

/// A job with made-up problems.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Where the run folder is made; has to be empty.
    pub(crate) folder: PathBuf,
    pub(crate) prompts: u32,
    /// Samples of a prompt.
    pub(crate) samples: u32,
    pub(crate) steps: u64,
    pub(crate) max_lag: u32,
    pub(crate) max_new_tokens: u32,
    pub(crate) learners: u32,
    /// Whether samples are archived.
    pub(crate) archive: bool,
    /// Problems that every version but the first and the last is evaluated on.
    pub(crate) evaluation: u32,
}

impl Job {
    pub(crate) fn new(folder: &Path, prompts: u32, samples: u32, steps: u64) -> Self {
        let folder = folder.to_owned();
        let (max_lag, max_new_tokens, learners) = (1, 64, 1);
        Self { folder, prompts, samples, steps, max_lag, max_new_tokens, learners, archive: false, evaluation: 0 }
    }

    pub(crate) fn sequences(&self) -> u64 {
        u64::from(self.prompts) * u64::from(self.samples)
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.folder.join("run")
    }

    /// Starts its coordinator in this process.
    pub(crate) async fn start(&self) -> Result<Coordinator> {
        let problems = self.problems("problems", 1, 2000)?;
        let model = roomy_model(&self.folder)?;
        let Self { prompts, samples, steps, max_lag, max_new_tokens, learners, archive, .. } = self;
        let evaluation = match self.evaluation {
            0 => "evaluation = { every_steps = 0, before = false, after = false }".to_owned(),
            count => format!(
                "data.evaluation.path = '{}'\nevaluation = {{ every_steps = 1, before = false, after = false, \
                 samples_per_problem = {samples} }}",
                self.problems("evaluation", 2, count)?.display()
            ),
        };
        let text = format!(
            "name = 'bench'\nmodel.path = '{}'\ndata.train.path = '{}'\nrollout.samples_per_prompt = {samples}\n\
             rollout.max_new_tokens = {max_new_tokens}\nrollout.max_concurrent_samples = 65536\n\
             batch = {{ steps = {steps}, prompts_per_step = {prompts}, mini_batches = 1 }}\n\
             {evaluation}\ncheckpoint.every_steps = 0\n\
             logging.samples = {archive}\nasynchrony.max_lag = {max_lag}\nresources.learners = {learners}\n",
            model.display(),
            problems.display(),
        );
        let spec = pacs_spec::parse(&text, Path::new("bench")).map_err(|errors| anyhow!("{errors}"))?;
        let listen: SocketAddr = "127.0.0.1:0".parse()?;
        Ok(Coordinator::start(CoordinatorOptions::local(spec, self.run_dir(), listen)).await?)
    }

    /// Writes a file of `count` problems, whose questions differ with `added`.
    fn problems(&self, name: &str, added: u32, count: u32) -> Result<PathBuf> {
        let row = |i: u32| format!("{{\"question\": \"What is {i} + {added}?\", \"answer\": \"{}\"}}", i + added);
        let path = self.folder.join(name).with_extension("jsonl");
        std::fs::write(&path, (0..count).map(row).collect::<Vec<_>>().join("\n"))?;
        Ok(path)
    }

    fn json(&self) -> Value {
        let Self { folder, prompts, samples, steps, max_lag, max_new_tokens, learners, archive, evaluation } = self;
        json!([folder, prompts, samples, steps, max_lag, max_new_tokens, learners, archive, evaluation])
    }

    fn read(text: &str) -> Result<Self> {
        let (folder, prompts, samples, steps, max_lag, max_new_tokens, learners, archive, evaluation) =
            serde_json::from_str(text)?;
        Ok(Self { folder, prompts, samples, steps, max_lag, max_new_tokens, learners, archive, evaluation })
    }
}

/// The golden model's tokenizer and configuration with room for long answers, in `folder`/model.
fn roomy_model(folder: &Path) -> Result<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen2-tied");
    let model = folder.join("model");
    std::fs::create_dir_all(&model)?;
    for entry in std::fs::read_dir(&golden)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            std::fs::copy(&path, model.join(path.file_name().context("a file has a name")?))?;
        }
    }
    let config = model.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config)?)?;
    json["max_position_embeddings"] = 1_000_000.into();
    std::fs::write(&config, json.to_string())?;
    Ok(model)
}

/// Set for the process that is to be the coordinator: its job.
const SERVE: &str = "PACS_BENCH_SERVE";

/// A coordinator in a process of its own, whose memory and processor time are its alone. Killed when it is dropped.
pub(crate) struct Served {
    child: Child,
    pub(crate) address: String,
    run: RunIdentity,
}

impl Served {
    pub(crate) fn start(job: &Job) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .env(SERVE, job.json().to_string())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the coordinator")?;
        let mut address = String::new();
        let output = child.stdout.take().context("reach the coordinator's output")?;
        BufReader::new(output).read_line(&mut address).context("read the coordinator's address")?;
        let address = address.trim().to_owned();
        anyhow::ensure!(!address.is_empty(), "the coordinator did not start");
        let run = RunIdentity::told(&pacs_coordinator::run_id(&job.run_dir())?)?;
        Ok(Self { child, address, run })
    }

    pub(crate) async fn channel(&self) -> Result<RunChannel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address))?;
        // As the workers of a run set it.
        let endpoint =
            endpoint.initial_stream_window_size(Some(4 << 20)).initial_connection_window_size(Some(16 << 20));
        Ok(of_run(endpoint.connect().await?, self.run.clone()))
    }

    /// Processor time of all its threads, to a hundredth of a second.
    pub(crate) fn cpu_time(&self) -> Result<Duration> {
        cpu_time(&self.child.id().to_string())
    }

    pub(crate) fn resident(&self) -> Result<u64> {
        memory(self.child.id(), "VmRSS:")
    }

    pub(crate) fn peak(&self) -> Result<u64> {
        memory(self.child.id(), "VmHWM:")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is the coordinator, in a process that [`Served`] has started, until it is killed; returns in others.
pub(crate) fn serve_if_told() -> Result<()> {
    let Ok(told) = std::env::var(SERVE) else { return Ok(()) };
    let job = Job::read(&told)?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let coordinator = job.start().await?;
        println!("{}", coordinator.address());
        std::future::pending().await
    })
}

/// Linux counts processor time in hundredths of a second, on every architecture.
const TICKS_PER_SECOND: u64 = 100;

/// Processor time that all threads of a process have used; `self` is this one.
pub(crate) fn cpu_time(process: &str) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The second field is the program's name in parentheses; user and system time are the twelfth and thirteenth after it.
    let (_, fields) = stat.rsplit_once(')').context("its stat has no name")?;
    let ticks: Option<Vec<u64>> = fields.split_whitespace().skip(11).take(2).map(|field| field.parse().ok()).collect();
    let ticks: u64 = ticks.filter(|ticks| ticks.len() == 2).context("its stat has no times")?.iter().sum();
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

/// A line of a process's status, in bytes.
pub(crate) fn memory(process: u32, what: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(what)).context("the system does not say")?;
    Ok(1024 * line.trim().trim_end_matches(" kB").parse::<u64>()?)
}

pub(crate) fn told(status: Status) -> anyhow::Error {
    anyhow!("{}", status.message())
}

pub(crate) fn registration(role: v1::Role, name: &str) -> v1::RegisterRequest {
    v1::RegisterRequest {
        role: role.into(),
        name: name.to_owned(),
        host: "bench".into(),
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").into(),
        collective_address: "bench:1".into(),
        ..Default::default()
    }
}

/// Registers with services of this process.
pub(crate) async fn register(services: &impl WorkerService, role: v1::Role, name: &str) -> Result<u64> {
    let reply = services.register(Request::new(registration(role, name))).await.map_err(told)?;
    Ok(reply.into_inner().worker_id)
}

/// A member of the run that beats as long as it is not dropped.
pub(crate) struct Member {
    pub(crate) id: u64,
    _beats: JoinSet<()>,
}

/// Registers over the network.
pub(crate) async fn join(channel: &RunChannel, role: v1::Role, name: &str) -> Result<Member> {
    let mut client = WorkerServiceClient::new(channel.clone());
    let id = client.register(registration(role, name)).await.map_err(told)?.into_inner().worker_id;
    let mut beats = JoinSet::new();
    beats.spawn(async move {
        loop {
            let _ = client.heartbeat(beat(id)).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    Ok(Member { id, _beats: beats })
}

pub(crate) fn beat(worker_id: u64) -> v1::HeartbeatRequest {
    v1::HeartbeatRequest { worker_id, activity: "waits as if it worked".into(), ..Default::default() }
}

/// Verdicts without a look at the answers: every other one is right.
pub(crate) fn judge(worker_id: u64, tasks: Vec<v1::VerifyTask>) -> v1::SubmitVerdictsRequest {
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

/// Half of a sample of so many bytes is text, a quarter token ids, a quarter log-probs.
pub(crate) fn sample_of(bytes: usize, token: u32, version: u64) -> v1::Sample {
    let tokens = bytes / 16;
    v1::Sample {
        tokens: vec![token; tokens],
        logprobs: vec![-0.5; tokens],
        entropy_sum: 1.0,
        text: "x".repeat(bytes - 8 * tokens),
        finish: v1::FinishReason::Stop.into(),
        version,
        ..v1::Sample::default()
    }
}

/// The request that hands a sample of a lease in.
pub(crate) fn submission(
    worker_id: u64,
    lease: &v1::GroupLease,
    index: u32,
    sample: v1::Sample,
) -> v1::SubmitSampleRequest {
    let (lease_id, group_id) = (lease.lease_id, lease.group_id);
    v1::SubmitSampleRequest { worker_id, lease_id, group_id, sample_index: index, sample: Some(sample) }
}

/// Weights that nobody reads.
pub(crate) fn weights(generation: u64, version: u64) -> v1::WeightsRef {
    let id = VersionId::new(generation, version);
    let description = Description::of(id, WeightKind::Float32, &version.to_le_bytes());
    (&Announcement { description, address: String::new(), probe: None }).into()
}

/// What the disk takes to make 4 KiB durable, in microseconds, as the journal does at least once before an answer.
pub(crate) fn sync_times(folder: &Path) -> Result<Vec<u64>> {
    let mut file = File::create(folder.join("synced"))?;
    let mut times = Vec::new();
    for _ in 0..500 {
        file.write_all(&[7; 4096])?;
        let began = Instant::now();
        file.sync_data()?;
        times.push(began.elapsed().as_micros() as u64);
    }
    Ok(times)
}

/// p50, p99 and the largest of times in microseconds, in milliseconds.
pub(crate) fn quantiles(times: &mut [u64]) -> Value {
    times.sort_unstable();
    let at = |share: f64| {
        let place = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(place).map(|us| *us as f64 / 1000.0)
    };
    json!({"count": times.len(), "p50": at(0.5), "p99": at(0.99), "largest": at(1.0)})
}

/// What a made-up learner does with what comes; of itself nothing, for ever.
pub(crate) trait Batches: Send {
    /// A task came, or none in time.
    fn task(&mut self, _next: &v1::NextTaskResponse) {}

    /// A part of a batch came, which is dropped after this. Whether the learner lives on.
    fn piece(&mut self, _piece: &v1::BatchPiece) -> bool {
        true
    }

    /// All of a batch is there.
    fn whole(&mut self, _task: &v1::TrainTask) -> Result<()> {
        Ok(())
    }

    /// Its step is reported. Returns whether the learner continues.
    fn reported(&mut self) -> bool {
        true
    }
}

/// A learner that receives batches and says that it has trained on them, until `batches` says that it is enough. When its
/// generation is over, it joins the next one.
pub(crate) async fn learn(channel: RunChannel, worker_id: u64, wait_ms: u32, mut batches: impl Batches) -> Result<()> {
    let mut client = LearnerServiceClient::new(channel).max_decoding_message_size(16 << 20);
    loop {
        let request = v1::JoinGenerationRequest { worker_id, wait_ms };
        let Some(group) = client.join_generation(request).await?.into_inner().group else { continue };
        match learn_in(&mut client, worker_id, wait_ms, group, &mut batches).await {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            // What is said to an earlier generation.
            Err(error) if code_of(&error) == Some(Code::FailedPrecondition) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The status code that a call has failed with.
pub(crate) fn code_of(error: &anyhow::Error) -> Option<Code> {
    error.downcast_ref::<Status>().map(Status::code)
}

/// Works in one generation. Whether to join the next one.
async fn learn_in(
    client: &mut LearnerServiceClient<RunChannel>,
    worker_id: u64,
    wait_ms: u32,
    group: v1::LearnerGroup,
    batches: &mut impl Batches,
) -> Result<bool> {
    let generation = group.generation;
    let weights = |version| (group.rank == 0).then(|| weights(generation, version));
    loop {
        let request = v1::NextTaskRequest { worker_id, generation, wait_ms, busy: false };
        let next = client.next_task(request).await?.into_inner();
        batches.task(&next);
        let task_id = next.task_id;
        let result = match next.task {
            None => continue,
            // There is no checkpoint, so a lost generation goes back to the first weights.
            Some(Task::Prepare(_)) => Done::Prepared(v1::PrepareResult { weights: weights(0) }),
            Some(Task::Train(task)) => {
                let request = v1::StreamBatchRequest { worker_id, generation, task_id, ..Default::default() };
                let mut pieces = client.stream_batch(request).await?.into_inner();
                while let Some(piece) = pieces.message().await? {
                    if !batches.piece(&piece) {
                        return Ok(false);
                    }
                }
                batches.whole(&task)?;
                Done::Trained(v1::TrainResult { weights: weights(task.step), ..Default::default() })
            }
            Some(Task::Save(_)) => {
                let message = "made-up learners have nothing to save".to_owned();
                Done::Failed(v1::TaskFailure { message, kind: v1::FailureKind::Write.into() })
            }
            Some(Task::Regroup(_)) => return Ok(true),
        };
        let is_step = matches!(result, Done::Trained(_));
        let request = v1::CompleteTaskRequest { worker_id, generation, task_id, result: Some(result) };
        client.complete_task(request).await?;
        if is_step && !batches.reported() {
            return Ok(false);
        }
    }
}
