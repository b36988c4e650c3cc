//! `cargo xtask bench step`: plays a training step of a large job with made-up samples and workers, against a real coordinator
//! in a process of its own: its memory, the largest message, how long a rank waits for its batch, and how long others wait
//! meanwhile. Prints one JSON line.

mod support;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use pacs_protocol::v1;
use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::v1::worker_service_client::WorkerServiceClient;
use pacs_runtime::net::RunChannel;
use pacs_types::mix;
use prost::Message;
use serde_json::{Value, json};
use support::{Batches, CALLS, Job, ROLLOUTS, Served, WAIT_MS, beat, join, judge, learn, told};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

/// How long the coordinator may take to rest after a step.
const REST: Duration = Duration::from_secs(60);

#[derive(Clone, Parser)]
struct Arguments {
    /// Prompts of the step.
    #[arg(long, default_value_t = 1024)]
    prompts: u32,
    /// Samples of a prompt.
    #[arg(long, default_value_t = 8)]
    samples: u32,
    /// Mean length of the samples, which lie between half of it and one and a half.
    #[arg(long, default_value_t = 4000)]
    mean_tokens: u32,
    /// All samples have the mean length.
    #[arg(long)]
    equal: bool,
    /// Learner ranks among which each batch is divided.
    #[arg(long, default_value_t = 1)]
    ranks: u32,
    /// Token ids are below this.
    #[arg(long, default_value_t = 151_936)]
    vocabulary: u32,
    /// Bytes of text of a token.
    #[arg(long, default_value_t = 4)]
    text_bytes: usize,
    /// Kills the learner when it has this share of its batch; another one takes its place. For one rank.
    #[arg(long)]
    kill_at: Option<f64>,
    /// Where the run folder is made and removed [default: a temporary folder]
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Cargo passes it.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Arguments {
    fn length(&self, group: u64, index: u32) -> usize {
        let mean = self.mean_tokens as usize;
        let spread = mix(mix(group) ^ u64::from(index)) as usize % mean.max(1);
        if self.equal { mean } else { mean.div_ceil(2) + spread }
    }
}

/// What the workers see.
#[derive(Default)]
struct Seen {
    samples: AtomicU64,
    tokens: AtomicU64,
    verdicts: AtomicU64,
    largest_message: AtomicUsize,
    batch_bytes: AtomicUsize,
    trained: AtomicU64,
    /// Sequences of the batch that a killed learner had.
    lost_sequences: AtomicU64,
    ended: AtomicBool,
}

impl Seen {
    fn message(&self, message: &impl Message) -> usize {
        let bytes = message.encoded_len();
        self.largest_message.fetch_max(bytes, Ordering::Relaxed);
        bytes
    }
}

fn main() -> Result<()> {
    support::serve_if_told()?;
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    println!("{}", runtime.block_on(play(&arguments))?);
    Ok(())
}

async fn play(arguments: &Arguments) -> Result<Value> {
    if let Some(share) = arguments.kill_at {
        ensure!(arguments.ranks == 1 && (0.0..1.0).contains(&share), "--kill-at is a share below 1, for one rank");
    }
    let folder = match &arguments.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    let job = Job {
        max_lag: 0,
        max_new_tokens: 2 * arguments.mean_tokens,
        learners: arguments.ranks,
        archive: true,
        // One more than is played, so that the run does not end.
        ..Job::new(folder.path(), arguments.prompts, arguments.samples, 2)
    };
    let wanted = job.sequences();
    let coordinator = Served::start(&job)?;
    let began = Instant::now();
    let at_start = coordinator.resident()?;
    let seen: Arc<Seen> = Arc::default();
    let (last_verdict, mut verdicts_in) = mpsc::channel(1);
    let (first_sequence, mut first_sequences) = mpsc::channel(arguments.ranks as usize);
    let mut workers = JoinSet::new();
    for rank in 0..arguments.ranks {
        let kill_at = arguments.kill_at.map(|share| (share * wanted as f64) as usize);
        let learner = Learner { seen: Arc::clone(&seen), first: first_sequence.clone(), sequences: 0, kill_at };
        let successor = Learner { kill_at: None, ..learner.clone() };
        let (first, second) = (coordinator.channel().await?, coordinator.channel().await?);
        workers.spawn(async move {
            learner.run(first, rank).await?;
            // It does not return if it was not killed.
            successor.run(second, rank).await
        });
    }
    let room = Arc::new(Semaphore::new(usize::try_from(wanted)?));
    for slot in 0..ROLLOUTS {
        let channel = coordinator.channel().await?;
        workers.spawn(rollout(channel, slot, arguments.clone(), Arc::clone(&seen), Arc::clone(&room)));
    }
    workers.spawn(verifier(coordinator.channel().await?, wanted, Arc::clone(&seen), last_verdict));
    let status = tokio::spawn(status_times(coordinator.channel().await?, Arc::clone(&seen)));
    let beats = tokio::spawn(heartbeat_times(coordinator.channel().await?, Arc::clone(&seen)));

    let judged: Instant = or_ended(verdicts_in.recv(), &mut workers).await?;
    let mut waits = Vec::new();
    for _ in 0..arguments.ranks {
        let first: Instant = or_ended(first_sequences.recv(), &mut workers).await?;
        waits.push(first.saturating_duration_since(judged).as_secs_f64());
    }
    while seen.trained.load(Ordering::Relaxed) < u64::from(arguments.ranks) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let delivered = judged.elapsed();
    // The archive is the last to read the samples.
    let archive = job.run_dir().join("samples/step-000001.parquet");
    let resting = Instant::now();
    while !archive.exists() {
        ensure!(resting.elapsed() < REST, "the step was not archived");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let archived = judged.elapsed();
    seen.ended.store(true, Ordering::Relaxed);
    let (status, beats) = (status.await??, beats.await??);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (peak, at_rest) = (coordinator.peak()?, coordinator.resident()?);
    workers.shutdown().await;
    let tokens = seen.tokens.load(Ordering::Relaxed);
    let bytes = 8 * tokens;
    waits.sort_by(f64::total_cmp);
    Ok(json!({
        "bench": "step", "prompts": arguments.prompts, "samples_per_prompt": arguments.samples,
        "mean_tokens": tokens as f64 / wanted as f64, "ranks": arguments.ranks,
        "sample_bytes": bytes, "text_bytes": tokens * arguments.text_bytes as u64,
        "peak_bytes": peak, "peak_share": peak as f64 / bytes as f64,
        "at_start_bytes": at_start, "at_rest_bytes": at_rest,
        "largest_message_bytes": seen.largest_message.load(Ordering::Relaxed),
        "killed_with_sequences": seen.lost_sequences.load(Ordering::Relaxed),
        "batch_bytes": seen.batch_bytes.load(Ordering::Relaxed),
        "seconds_until_judged": (judged - began).as_secs_f64(),
        "seconds_to_first_sequence": {"first_rank": waits[0], "last_rank": waits[waits.len() - 1]},
        "seconds_to_whole_batch": delivered.as_secs_f64(), "seconds_to_archived": archived.as_secs_f64(),
        "get_status_ms": status, "heartbeat_ms": beats,
    }))
}

async fn or_ended<T>(told: impl Future<Output = Option<T>>, workers: &mut JoinSet<Result<()>>) -> Result<T> {
    tokio::select! {
        told = told => told.context("who tells it has ended"),
        Some(ended) = workers.join_next() => Err(anyhow!("a worker has ended: {ended:?}")),
    }
}

/// Hands in samples until there are as many as there is room for; then it only lives.
async fn rollout(
    channel: RunChannel,
    slot: u32,
    arguments: Arguments,
    seen: Arc<Seen>,
    room: Arc<Semaphore>,
) -> Result<()> {
    let member = join(&channel, v1::Role::Rollout, &format!("rollout-{slot}")).await?;
    let (worker_id, mut client) = (member.id, RolloutServiceClient::new(channel).max_decoding_message_size(16 << 20));
    let longest = 2 * arguments.mean_tokens as usize;
    let token = |at: usize| mix(at as u64 + u64::from(slot)) as u32 % arguments.vocabulary;
    let tokens: Arc<[u32]> = (0..2 * longest).map(token).collect();
    let mut number = 0;
    while room.available_permits() > 0 {
        number += 1;
        let request = v1::LeaseGroupsRequest { worker_id, free_samples: 512, wait_ms: WAIT_MS, request: number };
        let leases = client.lease_groups(request).await.map_err(told)?.into_inner();
        seen.message(&leases);
        let mut calls = JoinSet::new();
        for lease in leases.groups {
            for wanted in &lease.samples {
                room.acquire().await?.forget();
                if calls.len() >= CALLS {
                    calls.join_next().await.context("there are calls")???;
                }
                let length = arguments.length(lease.group_id, wanted.index);
                let begin = mix(lease.group_id) as usize % longest;
                let sample = v1::Sample {
                    tokens: tokens[begin..begin + length].to_vec(),
                    logprobs: vec![-0.5; length],
                    entropy_sum: 1.0,
                    text: "x".repeat(arguments.text_bytes * length),
                    finish: v1::FinishReason::Stop.into(),
                    version: lease.min_version,
                    ..v1::Sample::default()
                };
                let request = support::submission(worker_id, &lease, wanted.index, sample);
                seen.message(&request);
                let (mut client, seen) = (client.clone(), Arc::clone(&seen));
                calls.spawn(async move {
                    client.submit_sample(request).await.map_err(told)?;
                    seen.samples.fetch_add(1, Ordering::Relaxed);
                    seen.tokens.fetch_add(length as u64, Ordering::Relaxed);
                    anyhow::Ok(())
                });
            }
        }
        while let Some(call) = calls.join_next().await {
            call??;
        }
    }
    std::future::pending().await
}

/// Judges until all samples are judged, says when that was, and then only lives.
async fn verifier(channel: RunChannel, wanted: u64, seen: Arc<Seen>, last: mpsc::Sender<Instant>) -> Result<()> {
    let member = join(&channel, v1::Role::Verifier, "verifier-0").await?;
    let (worker_id, mut client) = (member.id, VerifierServiceClient::new(channel).max_decoding_message_size(16 << 20));
    let (mut judged, mut number) = (0, 0);
    while judged < wanted {
        number += 1;
        let request = v1::LeaseSamplesRequest { worker_id, max_samples: 512, wait_ms: WAIT_MS, request: number };
        let tasks = client.lease_samples(request).await.map_err(told)?.into_inner();
        seen.message(&tasks);
        judged += tasks.tasks.len() as u64;
        let verdicts = judge(worker_id, tasks.tasks);
        seen.message(&verdicts);
        if !verdicts.verdicts.is_empty() {
            client.submit_verdicts(verdicts).await.map_err(told)?;
        }
        seen.verdicts.store(judged, Ordering::Relaxed);
    }
    last.send(Instant::now()).await?;
    std::future::pending().await
}

#[derive(Clone)]
struct Learner {
    seen: Arc<Seen>,
    /// Told when the first sequence is there.
    first: mpsc::Sender<Instant>,
    sequences: usize,
    /// It dies when it has this many sequences.
    kill_at: Option<usize>,
}

impl Learner {
    /// Receives one batch and says that it is trained; then it only lives. Returns when it is killed.
    async fn run(self, channel: RunChannel, slot: u32) -> Result<()> {
        let member = join(&channel, v1::Role::Learner, &format!("learner-{slot}")).await?;
        let is_to_die = self.kill_at.is_some();
        learn(channel, member.id, WAIT_MS, self).await?;
        if is_to_die {
            return Ok(());
        }
        std::future::pending().await
    }
}

impl Batches for Learner {
    fn task(&mut self, next: &v1::NextTaskResponse) {
        self.seen.message(next);
        self.sequences = 0;
    }

    fn piece(&mut self, piece: &v1::BatchPiece) -> bool {
        if self.sequences == 0 && !piece.sequences.is_empty() {
            // It has room for one of each rank.
            let _ = self.first.try_send(Instant::now());
        }
        self.sequences += piece.sequences.len();
        self.seen.batch_bytes.fetch_add(self.seen.message(piece), Ordering::Relaxed);
        let is_killed = self.kill_at.is_some_and(|most| self.sequences > most);
        if is_killed {
            self.seen.lost_sequences.store(self.sequences as u64, Ordering::Relaxed);
        }
        !is_killed
    }

    fn whole(&mut self, task: &v1::TrainTask) -> Result<()> {
        let (came, wanted) = (std::mem::take(&mut self.sequences), task.rank_sequences);
        ensure!(came == wanted as usize, "{came} of {wanted} sequences came");
        Ok(())
    }

    fn reported(&mut self) -> bool {
        self.seen.trained.fetch_add(1, Ordering::Relaxed);
        false
    }
}

/// Asks for the status every few milliseconds until the end.
async fn status_times(channel: RunChannel, seen: Arc<Seen>) -> Result<Value> {
    let mut client = OperatorServiceClient::new(channel);
    let mut times = Vec::new();
    while !seen.ended.load(Ordering::Relaxed) {
        let began = Instant::now();
        let status = client.get_status(v1::GetStatusRequest {}).await.map_err(told)?.into_inner();
        times.push(began.elapsed());
        seen.message(&status);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(quantiles(times))
}

/// Beats every few milliseconds until the end.
async fn heartbeat_times(channel: RunChannel, seen: Arc<Seen>) -> Result<Value> {
    let member = join(&channel, v1::Role::Verifier, "beating").await?;
    let mut client = WorkerServiceClient::new(channel);
    let mut times = Vec::new();
    while !seen.ended.load(Ordering::Relaxed) {
        let began = Instant::now();
        client.heartbeat(beat(member.id)).await.map_err(told)?;
        times.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(quantiles(times))
}

fn quantiles(mut times: Vec<Duration>) -> Value {
    times.sort();
    let at = |share: f64| {
        let place = ((times.len().saturating_sub(1)) as f64 * share) as usize;
        times.get(place).map_or(0.0, |time| (time.as_secs_f64() * 1e6).round() / 1e3)
    };
    json!({"calls": times.len(), "p50": at(0.5), "p99": at(0.99), "most": at(1.0)})
}
