//! Every call with any content: of workers and of operators. Used by a bounded test here, and by the fuzzer
//! (`tests/fuzz`), which includes this file.

use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as TaskResult;
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::operate_request::Command;
use pacs_protocol::v1::operator_service_server::OperatorService;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_types::mix;
use pacs_weights::{Announcement, Description, VersionId, WeightKind};
use tonic::Request;

/// Where numbers and content come from.
pub(crate) enum Any {
    /// One seed, without end.
    Seed(u64),
    /// What the fuzzer has made up, with the place in it; zeros after its end.
    #[allow(dead_code, reason = "the bounded test goes by seeds")]
    Bytes(Vec<u8>, usize),
}

/// What was given out and may be said again.
#[derive(Default)]
pub(crate) struct Known {
    workers: Vec<u64>,
    leases: Vec<(u64, u64, u32)>,
    judged: Vec<(u64, u64, u32)>,
    tasks: Vec<(u64, u64)>,
}

impl Any {
    /// Whether all that the fuzzer has made up is used.
    #[allow(dead_code, reason = "the bounded test goes by seeds")]
    pub(crate) fn is_over(&self) -> bool {
        matches!(self, Self::Bytes(bytes, place) if *place >= bytes.len())
    }

    fn next(&mut self) -> u64 {
        match self {
            Self::Seed(seed) => {
                *seed = seed.wrapping_add(1);
                mix(*seed)
            }
            Self::Bytes(..) => u64::from_le_bytes([0; 8].map(|_: u8| self.byte())),
        }
    }

    fn byte(&mut self) -> u8 {
        match self {
            Self::Seed(_) => self.next() as u8,
            Self::Bytes(bytes, place) => {
                *place += 1;
                bytes.get(*place - 1).copied().unwrap_or(0)
            }
        }
    }

    fn below(&mut self, n: u64) -> u64 {
        match self {
            Self::Seed(_) => self.next() % n,
            // One byte a choice: the fuzzer finds its way by what a byte changes.
            Self::Bytes(..) if n <= 256 => u64::from(self.byte()) % n,
            Self::Bytes(..) => self.next() % n,
        }
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
            routes: if self.below(8) == 0 { vec![self.below(256) as u8; tokens].into() } else { Default::default() },
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
        let mut weights = v1::WeightsRef::from(&Announcement { description, address: String::new(), probe: None });
        match self.below(5) {
            0 => return None,
            1 => weights.bytes = self.number(),
            2 => weights.piece_bytes = self.number(),
            3 => weights.probe = Some(self.probe()),
            _ => {}
        }
        Some(weights)
    }

    fn signal(&mut self) -> v1::TrainingSignal {
        v1::TrainingSignal {
            group_id: if self.below(4) == 0 { self.number() } else { self.below(4) },
            sample_index: if self.below(4) == 0 { self.number() as u32 } else { self.below(2) as u32 },
            score: (self.below(2) == 0).then(|| if self.below(8) == 0 { self.float() as f32 } else { 0.5 }),
            coefficient: if self.below(8) == 0 { self.float() as f32 } else { -0.25 },
        }
    }

    fn probe(&mut self) -> v1::Probe {
        let tokens = if self.below(10) == 0 { 1025 } else { self.below(6) };
        let numbers = |any: &mut Self| -> Vec<f32> {
            (0..any.below(6)).map(|_| if any.below(10) == 0 { any.float() as f32 } else { -0.5 }).collect()
        };
        v1::Probe {
            tokens: (0..tokens).map(|_| self.number() as u32).collect(),
            answer_from: self.below(6) as u32,
            logprobs: numbers(self),
            previous_logprobs: numbers(self),
            previous_version: self.below(3),
        }
    }

    fn result(&mut self) -> Option<TaskResult> {
        Some(match self.below(6) {
            0 => return None,
            1 => TaskResult::Prepared(v1::PrepareResult { weights: self.weights() }),
            2 => TaskResult::Trained(v1::TrainResult {
                weights: self.weights(),
                metrics: (0..self.below(3)).map(|_| (self.text(), self.float())).collect(),
                skipped_updates: self.number() as u32,
                signals: (0..self.below(4)).map(|_| self.signal()).collect(),
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

/// Makes one call of an operator. A run that is stopped takes no more work, so that is asked for now and then only.
async fn operate<S: OperatorService>(services: &S, any: &mut Any) {
    let operator = any.text();
    match any.below(60) {
        0 => {
            let request = v1::StopRunRequest { operator, mode: any.below(5) as i32 };
            return drop(services.stop_run(Request::new(request)).await);
        }
        1..10 => return drop(services.get_status(Request::new(v1::GetStatusRequest {})).await),
        _ => {}
    }
    let command = match any.below(9) {
        0 => Some(Command::Pause(v1::Pause {})),
        1..4 => Some(Command::Resume(v1::Resume {})),
        4 => Some(Command::Checkpoint(v1::Checkpoint {})),
        5 => Some(Command::Drain(v1::Drain { worker: any.text() })),
        6 => Some(Command::Slots(any.number() as u32)),
        7 => Some(Command::LearningRate(any.float())),
        _ => (any.below(4) > 0).then(|| Command::LogLevel(any.below(8) as i32)),
    };
    drop(services.operate(Request::new(v1::OperateRequest { operator, command })).await);
}

/// Makes one call; what it gives out is known afterwards.
pub(crate) async fn call<S>(services: &S, any: &mut Any, known: &mut Known)
where
    S: WorkerService + RolloutService + VerifierService + LearnerService + OperatorService,
{
    let worker_id = any.worker(known);
    let request = any.below(4);
    match any.below(16) {
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
            drop(
                services
                    .heartbeat(Request::new(v1::HeartbeatRequest { worker_id, activity, ending, ..Default::default() }))
                    .await,
            );
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
        12 => operate(services, any).await,
        13 => {
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
