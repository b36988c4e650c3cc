use std::sync::{Arc, LazyLock};
use std::time::Duration;

use pacs_machine::{Event, FailureKind, Membership, Reply, TaskKind, TaskOrder, TaskResult};
use pacs_protocol::v1::complete_task_request::Result as WireResult;
use pacs_protocol::v1::learner_service_server::LearnerService;
use pacs_protocol::v1::next_task_response::Task as WireTask;
use pacs_protocol::{MOST_SIGNALS, v1};
use pacs_types::{Generation, GroupId, SampleId, WeightVersion, WorkerId};
use pacs_weights::Announcement;
use prost::Message;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::Span;

use super::{Services, check_name, required, sentence, wrong_answer};
use crate::driver::{Batch, Driver, Pieces, Received, Shared, Wait};
use crate::records::RankFile;

/// Pieces that are encoded at once for all ranks, because other calls need the processors, too.
static TURNS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2))));
/// Time within which a rank must take a piece. A rank that is slower has to ask again for the rest.
const TAKEN_WITHIN: Duration = Duration::from_secs(60);

#[tonic::async_trait]
impl LearnerService for Services {
    async fn join_generation(
        &self,
        request: Request<v1::JoinGenerationRequest>,
    ) -> Result<Response<v1::JoinGenerationResponse>, Status> {
        let v1::JoinGenerationRequest { worker_id, wait_ms } = request.into_inner();
        Span::current().record("worker", worker_id);
        let event = Event::JoinGeneration { worker: WorkerId(worker_id) };
        let attempt = |driver: &mut Driver| {
            let Reply::Joined(membership) = driver.call(event.clone())? else { return Err(wrong_answer()) };
            Ok(membership.map(|membership| group(driver, membership)))
        };
        let group = self.0.poll(Wait::Generation, wait_ms, attempt).await?;
        Ok(Response::new(v1::JoinGenerationResponse { group }))
    }

    async fn next_task(&self, request: Request<v1::NextTaskRequest>) -> Result<Response<v1::NextTaskResponse>, Status> {
        let v1::NextTaskRequest { worker_id, generation, wait_ms, busy } = request.into_inner();
        Span::current().record("worker", worker_id).record("generation", generation);
        let event = Event::NextTask { worker: WorkerId(worker_id), generation: Generation(generation) };
        let attempt = |driver: &mut Driver| {
            let Reply::Task(order) = driver.call(event.clone())? else { return Err(wrong_answer()) };
            let order = order.filter(|order| !busy || matches!(order.kind, TaskKind::Regroup { .. }));
            let order = order.filter(|order| driver.may_hand_out(order));
            order.map(|order| task(driver, order)).transpose()
        };
        let task = self.0.poll(Wait::Task, wait_ms, attempt).await?;
        Ok(Response::new(task.unwrap_or(v1::NextTaskResponse { task_id: 0, task: None })))
    }

    type StreamBatchStream = ReceiverStream<Result<v1::BatchPiece, Status>>;

    async fn stream_batch(
        &self,
        request: Request<v1::StreamBatchRequest>,
    ) -> Result<Response<Self::StreamBatchStream>, Status> {
        let request = request.into_inner();
        // Returns once the records are durable, and with them the samples of the batch.
        let pieces = self.0.call(|driver| pieces(driver, &request)).await?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(send(self.0.clone(), pieces, sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn complete_task(
        &self,
        request: Request<v1::CompleteTaskRequest>,
    ) -> Result<Response<v1::CompleteTaskResponse>, Status> {
        let request = request.into_inner();
        let payload = request.encode_to_vec();
        let v1::CompleteTaskRequest { worker_id, generation, task_id, result } = request;
        Span::current().record("worker", worker_id).record("generation", generation);
        let wire = required("result", result)?;
        let result = read(&wire)?;
        let worker = WorkerId(worker_id);
        let event = Event::CompleteTask { worker, generation: Generation(generation), task: task_id, result };
        let complete = |driver: &mut Driver| {
            let rank = driver.machine.rank(worker);
            check_report(driver, (worker, Generation(generation), task_id), &wire)?;
            let (reply, effects) = driver.ask_with(event, Some(payload), None)?;
            // Stored before the effects are applied, because this may be the report that completes the task.
            if let (Reply::Accepted { fresh: true }, Some(rank)) = (reply, rank) {
                keep_result(driver, rank, wire);
            }
            driver.apply(effects);
            Ok(())
        };
        self.0.call(complete).await?;
        Ok(Response::new(v1::CompleteTaskResponse {}))
    }
}

fn group(driver: &Driver, membership: Membership) -> v1::LearnerGroup {
    let Membership { generation, rank, addresses, checkpoint, step } = membership;
    let checkpoint = checkpoint.map(|step| driver.checkpoints.path(step).display().to_string()).unwrap_or_default();
    let world_size = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    v1::LearnerGroup { generation: generation.0, rank, world_size, addresses, checkpoint, step }
}

fn task(driver: &Driver, order: TaskOrder) -> Result<v1::NextTaskResponse, Status> {
    let task = match order.kind {
        TaskKind::Prepare => WireTask::Prepare(v1::PrepareTask {}),
        TaskKind::Regroup { reason } => WireTask::Regroup(v1::RegroupTask { reason }),
        TaskKind::Save { step, model, background } => WireTask::Save(v1::SaveTask {
            directory: driver.checkpoints.unfinished(step, order.task).display().to_string(),
            step,
            training_state: true,
            model,
            background,
        }),
        TaskKind::Train { step } => {
            let learning_rate = driver.machine.position().learning_rate;
            WireTask::Train(v1::TrainTask { learning_rate, ..batch(driver, step)?.task(order.rank) })
        }
    };
    Ok(v1::NextTaskResponse { task_id: order.task, task: Some(task) })
}

fn batch(driver: &Driver, step: u64) -> Result<&Batch, Status> {
    let batch = driver.batch.as_ref().filter(|batch| batch.step == step);
    batch.ok_or_else(|| Status::internal(format!("the batch of step {step} is gone")))
}

/// The pieces of the batch that a rank has to train on now.
fn pieces(driver: &mut Driver, request: &v1::StreamBatchRequest) -> Result<Pieces, Status> {
    let (worker, generation) = (WorkerId(request.worker_id), Generation(request.generation));
    let Reply::Task(order) = driver.call(Event::NextTask { worker, generation })? else { return Err(wrong_answer()) };
    let (rank, step) = match order {
        Some(TaskOrder { task, rank, kind: TaskKind::Train { step } }) if task == request.task_id => (rank, step),
        _ => {
            let task = request.task_id;
            return Err(Status::failed_precondition(format!("task {task} is not one that this rank is to train")));
        }
    };
    let problems = Arc::clone(&driver.problems);
    let prompt = move |group: GroupId| problems.train_at(group.0).prompt_tokens.clone();
    let received = Received { index: request.index_received, sequences: request.sequences_received };
    let route_bytes = driver.door.route_bytes();
    let pieces = Pieces::new(batch(driver, step)?.content(), rank, received, route_bytes, prompt);
    pieces.ok_or_else(|| Status::invalid_argument("more is said to be received of the batch than it has"))
}

/// Sends one piece after the other, each encoded when the one before it was taken. Ends after the last piece, at a
/// sample that cannot be read, or when the rank is gone or takes nothing for too long.
async fn send(shared: Shared, mut pieces: Pieces, taken: mpsc::Sender<Result<v1::BatchPiece, Status>>) {
    loop {
        let Ok(Ok(room)) = tokio::time::timeout(TAKEN_WITHIN, taken.reserve()).await else { return };
        let Ok(turn) = TURNS.acquire().await else { return };
        // Blocking: reads the disk.
        let made = tokio::task::spawn_blocking(move || (pieces.next(), pieces)).await;
        drop(turn);
        let piece = match made {
            Ok((None, _)) => return,
            Ok((Some(piece), rest)) => {
                pieces = rest;
                piece
            }
            Err(panic) => return room.send(Err(Status::internal(panic.to_string()))),
        };
        match piece {
            Ok(piece) => room.send(Ok(piece)),
            Err(lost) => {
                shared.content_lost(lost.sample, &lost.error);
                return room.send(Err(Status::data_loss(lost.to_string())));
            }
        }
    }
}

/// Bound on the metrics of a step, which are kept in memory, in the journal and in a line per step.
const MOST_METRICS: usize = 1024;
const MOST_FILES: usize = 16_384;

/// Refuses results with more entries than any learner reports.
fn check_amount(wire: &WireResult) -> Result<(), Status> {
    let too_many = |field: &str, count: usize, most: usize| {
        Err(Status::invalid_argument(format!("field `{field}` has {count} entries, expected at most {most}")))
    };
    match wire {
        WireResult::Trained(v1::TrainResult { metrics, .. }) if metrics.len() > MOST_METRICS => {
            too_many("trained.metrics", metrics.len(), MOST_METRICS)
        }
        WireResult::Trained(v1::TrainResult { signals, .. }) if signals.len() > MOST_SIGNALS => {
            too_many("trained.signals", signals.len(), MOST_SIGNALS)
        }
        WireResult::Trained(result) => {
            check_signals(&result.signals)?;
            result.metrics.keys().try_for_each(|name| check_name("trained.metrics", name))
        }
        WireResult::Saved(v1::SaveResult { files }) if files.len() > MOST_FILES => {
            too_many("saved.files", files.len(), MOST_FILES)
        }
        WireResult::Saved(result) => {
            result.files.iter().try_for_each(|file| check_name("saved.files.path", &file.path))
        }
        WireResult::Prepared(_) | WireResult::Captured(_) | WireResult::Failed(_) => Ok(()),
    }
}

/// Refuses numbers that no objective gives.
fn check_signals(signals: &[v1::TrainingSignal]) -> Result<(), Status> {
    for signal in signals {
        let v1::TrainingSignal { group_id, sample_index: index, score, coefficient } = *signal;
        for (what, value) in [("score", score.unwrap_or_default()), ("coefficient", coefficient)] {
            if !value.is_finite() {
                let sample = SampleId { group: GroupId(group_id), index };
                let problem =
                    format!("field `trained.signals` gives {sample} a {what} of {value}, expected a finite number");
                return Err(Status::invalid_argument(problem));
            }
        }
    }
    Ok(())
}

/// Refuses signals of samples that the reporting rank was not given to train. Repeats of reports on earlier tasks are
/// left to the machine, which does not count them.
fn check_report(
    driver: &Driver,
    (worker, generation, task): (WorkerId, Generation, u64),
    wire: &WireResult,
) -> Result<(), Status> {
    let WireResult::Trained(v1::TrainResult { signals, .. }) = wire else { return Ok(()) };
    let Some(rank) = driver.machine.training_rank(worker, generation, task) else { return Ok(()) };
    let batch = batch(driver, driver.machine.position().step + 1)?;
    let checked = batch.content().check_report(rank, signals);
    checked.map_err(|problem| Status::invalid_argument(format!("field `trained.signals` {problem}")))
}

fn read(wire: &WireResult) -> Result<TaskResult, Status> {
    check_amount(wire)?;
    // Announcements for rollout workers are checked here, so that the learner that made them gets the error.
    let version = |weights: &Option<v1::WeightsRef>| -> Result<Option<WeightVersion>, Status> {
        let weights = weights.as_ref().map(Announcement::try_from).transpose()?;
        Ok(weights.map(|weights| weights.description.id().version))
    };
    Ok(match wire {
        WireResult::Prepared(result) => TaskResult::Prepared { weights: version(&result.weights)? },
        WireResult::Trained(result) => {
            TaskResult::Trained { weights: version(&result.weights)?, skipped_updates: result.skipped_updates }
        }
        WireResult::Captured(_) => TaskResult::Captured,
        WireResult::Saved(_) => TaskResult::Saved,
        WireResult::Failed(failure) => {
            let kind = match failure.kind() {
                v1::FailureKind::Unspecified => {
                    return Err(Status::invalid_argument("field `failed.kind` is missing or unknown"));
                }
                v1::FailureKind::Generation => FailureKind::Generation,
                v1::FailureKind::Write => FailureKind::Write,
                v1::FailureKind::Permanent => FailureKind::Permanent,
            };
            TaskResult::Failed { message: sentence(failure.message.clone()), kind }
        }
    })
}

/// Stores the parts of a result that the machine does not hold: weights, metrics, signals and files.
pub(crate) fn keep_result(driver: &mut Driver, rank: u32, wire: WireResult) {
    match wire {
        WireResult::Prepared(result) if rank == 0 => driver.published = result.weights,
        WireResult::Trained(mut result) => {
            driver.signals.put(std::mem::take(&mut result.signals));
            if rank == 0 {
                driver.published.clone_from(&result.weights);
                driver.trained = Some(result);
            }
        }
        WireResult::Saved(result) => {
            let file = |file: v1::SavedFile| RankFile { path: file.path, bytes: file.bytes, crc32: file.crc32 };
            driver.saved.insert(rank, result.files.into_iter().map(file).collect());
        }
        WireResult::Prepared(_) | WireResult::Captured(_) | WireResult::Failed(_) => {}
    }
}
