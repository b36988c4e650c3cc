//! Every call of workers with any content, against the real machine, driver and journal: nothing panics, and whatever was called,
//! the next coordinator resumes from the journal and honest workers finish the run.
//!
//! `PACS_SEEDS` and `PACS_FIRST_SEED` say how much is tried; a failure names its seed.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[expect(dead_code, reason = "other tests use more of it")]
mod support;

use std::time::Duration;

use pacs_coordinator::RunEnd;
use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as TaskResult;
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_types::mix;
use pacs_weights::{Announcement, Description, VersionId, WeightKind};
use support::{Fleet, Job, end_of};
use tonic::Request;

const SEEDS: u64 = 4;
const CALLS: usize = 2000;
/// No call may take longer.
const DEADLINE: Duration = Duration::from_secs(20);

/// Numbers and content, from one seed.
struct Any(u64);

/// What was given out and may be said again.
#[derive(Default)]
struct Known {
    workers: Vec<u64>,
    leases: Vec<(u64, u64, u32)>,
    judged: Vec<(u64, u64, u32)>,
    tasks: Vec<(u64, u64)>,
}

impl Any {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Clone>(&mut self, items: &[T]) -> Option<T> {
        let place = self.below(items.len().max(1) as u64) as usize;
        items.get(place).cloned()
    }

    /// A number as it comes, a small one, or one at a border.
    fn number(&mut self) -> u64 {
        match self.below(4) {
            0 => self.next(),
            1 => self.pick(&[0, 1, u64::MAX, u64::MAX - 1, u64::from(u32::MAX), 1 << 63]).unwrap(),
            _ => self.below(20),
        }
    }

    fn float(&mut self) -> f64 {
        let border = [0.0, 1.0, -1.0, 0.5, 1e308, -1e308, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0, 5e-324];
        if self.below(2) == 0 { self.pick(&border).unwrap() } else { f64::from_bits(self.next()) }
    }

    fn text(&mut self) -> String {
        let words = ["", "fuzz-0", "fuzz-1", "label", "\u{1b}[2J", "\u{0}", "../../etc", "ä", "a\nb", "127.0.0.1:1"];
        match self.below(8) {
            0 => "x".repeat(self.below(5000) as usize),
            _ => self.pick(&words).unwrap().to_owned(),
        }
    }

    fn worker(&mut self, known: &Known) -> u64 {
        let any = self.number();
        if self.below(8) == 0 { any } else { self.pick(&known.workers).unwrap_or(any) }
    }

    fn sample(&mut self) -> v1::Sample {
        let tokens = self.below(20) as usize;
        let numbers = |any: &mut Self, count: usize| -> Vec<f32> {
            (0..count).map(|_| if any.below(10) == 0 { any.float() as f32 } else { -0.5 }).collect()
        };
        let count = if self.below(6) == 0 { self.below(20) as usize } else { tokens };
        let token = |any: &mut Self| if any.below(10) == 0 { any.number() as u32 } else { any.below(50) as u32 };
        v1::Sample {
            tokens: (0..tokens).map(|_| token(self)).collect(),
            logprobs: numbers(self, count),
            sampled_logprobs: if self.below(2) == 0 { Vec::new() } else { numbers(self, count) },
            entropy_sum: if self.below(4) == 0 { self.float() } else { 1.0 },
            text: self.text(),
            finish: self.below(4) as i32,
            version: self.below(3),
            spans: (0..self.below(3)).map(|_| self.span()).collect(),
        }
    }

    fn span(&mut self) -> v1::VersionSpan {
        v1::VersionSpan { version: self.below(3), tokens: self.below(12) as u32 }
    }

    fn verdict(&mut self) -> v1::Verdict {
        v1::Verdict {
            outcome: self.below(7) as i32,
            label: if self.below(2) == 0 { self.float() } else { self.below(2) as f64 },
            reward: if self.below(2) == 0 { self.float() } else { self.below(2) as f64 },
            extracted: (self.below(2) == 0).then(|| self.text()),
            rule: self.text(),
        }
    }

    fn verification(&mut self) -> v1::Verification {
        v1::Verification {
            verifier: if self.below(3) == 0 { self.text() } else { "label".into() },
            outcome: self.below(7) as i32,
            reward: self.float(),
            elapsed_us: self.number(),
            cached: self.below(2) == 0,
        }
    }

    fn weights(&mut self) -> Option<v1::WeightsRef> {
        let id = VersionId::new(self.below(3), self.below(3));
        let description = Description::of(id, WeightKind::Float32, &self.next().to_le_bytes());
        let mut weights = v1::WeightsRef::from(&Announcement { description, address: String::new() });
        match self.below(4) {
            0 => return None,
            1 => weights.bytes = self.number(),
            2 => weights.piece_bytes = self.number(),
            _ => {}
        }
        Some(weights)
    }

    fn result(&mut self) -> Option<TaskResult> {
        Some(match self.below(6) {
            0 => return None,
            1 => TaskResult::Prepared(v1::PrepareResult { weights: self.weights() }),
            2 => TaskResult::Trained(v1::TrainResult {
                weights: self.weights(),
                metrics: (0..self.below(3)).map(|_| (self.text(), self.float())).collect(),
                skipped_updates: self.number() as u32,
            }),
            3 => {
                let file =
                    |any: &mut Self| v1::SavedFile { path: any.text(), bytes: any.number(), crc32: any.next() as u32 };
                TaskResult::Saved(v1::SaveResult { files: (0..self.below(4)).map(|_| file(self)).collect() })
            }
            4 => TaskResult::Captured(v1::CaptureResult {}),
            _ => TaskResult::Failed(v1::TaskFailure { message: self.text(), kind: self.below(5) as i32 }),
        })
    }
}

/// Makes one call; what it gives out is known afterwards.
async fn call<S>(services: &S, any: &mut Any, known: &mut Known)
where
    S: WorkerService + RolloutService + VerifierService + LearnerService,
{
    let worker_id = any.worker(known);
    let request = any.below(4);
    match any.below(14) {
        0 => {
            let name = format!("fuzz-{}", any.below(6));
            let request = v1::RegisterRequest {
                role: any.below(5) as i32,
                name: if any.below(4) == 0 { any.text() } else { name },
                host: any.text(),
                pid: any.below(3) as u32,
                started: any.number(),
                collective_address: any.text(),
                version: if any.below(8) == 0 { any.text() } else { env!("CARGO_PKG_VERSION").into() },
                attempt: String::new(),
                run_id: if any.below(8) == 0 { any.text() } else { String::new() },
            };
            if let Ok(registered) = services.register(Request::new(request)).await {
                known.workers.push(registered.into_inner().worker_id);
            }
        }
        1 => {
            let (activity, ending) = (any.text(), any.below(10) == 0);
            drop(services.heartbeat(Request::new(v1::HeartbeatRequest { worker_id, activity, ending })).await);
        }
        2 => {
            let error = any.text();
            if any.below(4) == 0 {
                drop(services.leave(Request::new(v1::LeaveRequest { worker_id, error })).await);
            }
        }
        3 | 4 => {
            let free_samples = any.number() as u32;
            let request = v1::LeaseGroupsRequest { worker_id, free_samples, wait_ms: 0, request };
            if let Ok(leases) = services.lease_groups(Request::new(request)).await {
                for lease in leases.into_inner().groups {
                    known.leases.extend(lease.samples.iter().map(|it| (lease.lease_id, lease.group_id, it.index)));
                }
            }
        }
        5 | 6 => {
            let lease = any.pick(&known.leases).filter(|_| any.below(8) > 0);
            let (lease_id, group_id, sample_index) =
                lease.unwrap_or_else(|| (any.number(), any.number(), any.number() as u32));
            let sample = (any.below(10) > 0).then(|| any.sample());
            let request = v1::SubmitSampleRequest { worker_id, lease_id, group_id, sample_index, sample };
            drop(services.submit_sample(Request::new(request)).await);
        }
        7 => {
            let (version, generation, held) = (any.number(), any.number(), any.below(2) == 0);
            let request = v1::AwaitWeightsRequest {
                worker_id,
                digest: vec![7; 32].into(),
                generation,
                version,
                held,
                wait_ms: 0,
            };
            drop(services.await_weights(Request::new(request)).await);
            let failed = (0..any.below(70)).map(|_| any.text()).collect();
            let address = any.text();
            let request = v1::FindSourcesRequest { worker_id, generation, version, address, failed };
            drop(services.find_sources(Request::new(request)).await);
        }
        8 => {
            let max_samples = any.number() as u32;
            let request = v1::LeaseSamplesRequest { worker_id, max_samples, wait_ms: 0, request };
            if let Ok(tasks) = services.lease_samples(Request::new(request)).await {
                let tasks = tasks.into_inner().tasks.into_iter();
                known.judged.extend(tasks.map(|task| (task.lease_id, task.group_id, task.sample_index)));
            }
        }
        9 => {
            let verdict = |any: &mut Any| {
                let lease = any.pick(&known.judged).filter(|_| any.below(8) > 0);
                let (lease_id, group_id, sample_index) =
                    lease.unwrap_or_else(|| (any.number(), any.number(), any.number() as u32));
                let verdict = (any.below(10) > 0).then(|| any.verdict());
                let verifications = (0..any.below(3)).map(|_| any.verification()).collect();
                v1::TaskVerdict { lease_id, group_id, sample_index, verdict, verifications }
            };
            let verdicts = (0..any.below(3)).map(|_| verdict(any)).collect();
            drop(services.submit_verdicts(Request::new(v1::SubmitVerdictsRequest { worker_id, verdicts })).await);
        }
        10 => {
            let request = v1::JoinGenerationRequest { worker_id, wait_ms: 0 };
            if let Ok(joined) = services.join_generation(Request::new(request)).await
                && let Some(group) = joined.into_inner().group
            {
                known.tasks.push((group.generation, 0));
            }
        }
        11 => {
            let (generation, _) = any.pick(&known.tasks).unwrap_or((any.number(), 0));
            let busy = any.below(2) == 0;
            let request = v1::NextTaskRequest { worker_id, generation, wait_ms: 0, busy };
            if let Ok(next) = services.next_task(Request::new(request)).await {
                known.tasks.push((generation, next.into_inner().task_id));
            }
        }
        12 => {
            let (generation, task_id) = any.pick(&known.tasks).unwrap_or((any.number(), any.number()));
            let (index_received, sequences_received) = (any.number() as u32, any.number() as u32);
            let request = v1::StreamBatchRequest { worker_id, generation, task_id, index_received, sequences_received };
            drop(services.stream_batch(Request::new(request)).await);
        }
        _ => {
            let (generation, task_id) = any.pick(&known.tasks).unwrap_or((any.number(), any.number()));
            let result = any.result();
            let request = v1::CompleteTaskRequest { worker_id, generation, task_id, result };
            drop(services.complete_task(Request::new(request)).await);
        }
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect("a number"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_whatever_it_holds_keeps_honest_workers_from_finishing_the_run() {
    let (first, count) = (setting("PACS_FIRST_SEED").unwrap_or(0), setting("PACS_SEEDS").unwrap_or(SEEDS));
    for seed in first..first + count {
        eprintln!("seed {seed}");
        let job = Job::new();
        let coordinator = job.start(2, "").await.unwrap();
        let services = coordinator.services();
        let (mut any, mut known) = (Any(mix(seed)), Known::default());
        for _ in 0..CALLS {
            tokio::time::timeout(DEADLINE, call(&services, &mut any, &mut known)).await.expect("an answer in time");
        }
        drop(services);
        drop(coordinator);
        // It may have been told that the run has failed: another start resumes it all the same.
        let coordinator = job.start(2, "").await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let fleet = Fleet::start(coordinator.address(), None);
        let end = end_of(coordinator).await;
        assert!(matches!(end, RunEnd::Finished { step: 2, .. }), "seed {seed}: {end:?}");
        fleet.join().await;
        assert_eq!(job.steps_in("metrics.jsonl"), [1, 2], "seed {seed}");
    }
}
