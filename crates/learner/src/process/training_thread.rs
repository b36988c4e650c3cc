//! The training thread, which owns the trainer, its tensors and the communicator.

use std::any::Any;
use std::cell::OnceCell;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc as sync;
use std::time::{Duration, Instant};

use pacs_collective::{AbortHandle, Collective, CudaDevice, GroupConfig, HostCollective, HostListener, NcclCollective};
use pacs_model::{ModelConfig, missing_kernels};
use pacs_protocol::v1;
use pacs_protocol::v1::complete_task_request::Result as TaskResult;
use pacs_runtime::available_bytes;
use pacs_spec::{JobSpec, Precision};
use pacs_torch::ExposeError;
use pacs_torch::tch::{Device, Kind};
use pacs_torch::{device_memory, multiplies_bf16, release_memory};
use pacs_types::Generation;
use pacs_weights::Probe;
use tokio::sync::oneshot;
use tracing::Span;

use super::publish::Publisher;
use super::signals;
use crate::checkpoint::{BackgroundWriter, Busy, WriteOutcome, exported};
use crate::error::{CheckpointError, TrainError};
use crate::settings::TrainerSettings;
use crate::update::{TrainBatch, Trainer};

/// How long the ranks of a new generation wait for each other, and the base deadline of one exchange: the lag of the
/// slowest rank after the fastest, with a margin.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a save waits for an earlier write that the coordinator has already given up, and how long a new generation
/// waits for a write of the old one.
const WRITER_PATIENCE: Duration = Duration::from_secs(60);

/// Collective backend that carries gradients between ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// NCCL between ranks on GPUs, otherwise the TCP ring.
    #[default]
    Auto,
    /// The TCP ring; GPU tensors are copied through host memory.
    Host,
    /// NCCL, even for a single rank.
    Nccl,
}

/// What the thread keeps for the life of a registration.
#[derive(Debug)]
pub(super) struct ThreadSetup {
    pub(super) spec: JobSpec,
    /// Fences the communicator: ranks of other runs of the same job cannot join it.
    pub(super) run_id: String,
    pub(super) device: Device,
    pub(super) backend: Backend,
    pub(super) listener: Arc<HostListener>,
    pub(super) publisher: Arc<Publisher>,
}

/// A job for the thread.
#[derive(Debug)]
pub(super) enum Job {
    /// Forms the communicator of a generation. The handle aborts the communicator, or the wait for its other ranks.
    Join(v1::LearnerGroup, AbortHandle),
    /// Loads the model and the checkpoint, and publishes the weights.
    Prepare,
    /// Trains a step, at the learning rate that an operator has set or else that of the job spec.
    Train(TrainBatch, Option<f64>),
    Save(v1::SaveTask),
}

impl Job {
    /// Step that the job belongs to, if any.
    pub(super) fn step(&self) -> Option<u64> {
        match self {
            Self::Join(..) | Self::Prepare => None,
            Self::Train(batch, _) => Some(batch.step),
            Self::Save(task) => Some(task.step),
        }
    }
}

/// Result of a job.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and it is moved twice a step")]
pub(super) enum Done {
    /// The communicator is ready.
    Joined,
    /// A task is complete or has failed; goes to the coordinator.
    Task(TaskResult),
    /// The state is captured; the outcome of writing it follows on the channel.
    Captured(oneshot::Receiver<WriteOutcome>),
}

/// Handle of the thread. Dropping it ends the thread after its current job.
#[derive(Clone, Debug)]
pub(super) struct LearnerThread {
    jobs: sync::SyncSender<(Job, Span, oneshot::Sender<Done>)>,
}

impl LearnerThread {
    pub(super) fn start(setup: ThreadSetup) -> Self {
        // Capacity 1 is enough, because the service runs one job at a time.
        let (jobs, inbox) = sync::sync_channel::<(Job, Span, oneshot::Sender<Done>)>(1);
        std::thread::spawn(move || {
            let writer = BackgroundWriter::default();
            let mut state =
                Learner { setup, gpu_bytes: OnceCell::new(), group: None, collective: None, trainer: None, writer };
            while let Ok((job, span, reply)) = inbox.recv() {
                // The caller is gone if it lost its registration; the job's effects are fenced by generation.
                let _ = reply.send(span.in_scope(|| state.run(job)));
            }
        });
        Self { jobs }
    }

    /// Runs a job; `None` if the thread has ended.
    pub(super) async fn run(&self, job: Job) -> Option<Done> {
        let (reply, done) = oneshot::channel();
        self.jobs.try_send((job, Span::current(), reply)).ok()?;
        done.await.ok()
    }
}

/// Share of a GPU's free memory that a rank plans with where rollout workers may use the GPU, too. Their caches and weights
/// come later.
const SHARED_GPU: f64 = 0.55;

struct Learner {
    setup: ThreadSetup,
    /// What this process may use of its GPU.
    gpu_bytes: OnceCell<u64>,
    group: Option<v1::LearnerGroup>,
    collective: Option<Box<dyn Collective>>,
    trainer: Option<Trainer>,
    writer: BackgroundWriter,
}

impl Learner {
    fn run(&mut self, job: Job) -> Done {
        let result = match job {
            Job::Join(group, abort) => match self.join(group, abort) {
                Ok(()) => return Done::Joined,
                Err(failure) => Err(failure),
            },
            Job::Prepare => self.prepare().map(TaskResult::Prepared),
            Job::Train(batch, learning_rate) => self.train(&batch, learning_rate).map(TaskResult::Trained),
            Job::Save(task) if task.background => match self.capture(&task) {
                Ok(None) => Ok(TaskResult::Saved(v1::SaveResult { files: Vec::new() })),
                Ok(Some(outcome)) => return Done::Captured(outcome),
                Err(failure) => Err(failure),
            },
            Job::Save(task) => self.save(&task).map(TaskResult::Saved),
        };
        Done::Task(result.unwrap_or_else(TaskResult::Failed))
    }

    fn join(&mut self, group: v1::LearnerGroup, abort: AbortHandle) -> Result<(), v1::TaskFailure> {
        // The old communicator goes first, so that its peers notice.
        self.collective = None;
        // A checkpoint of the old generation that is still being written can no longer be committed.
        self.writer.give_up();
        if let Err(busy) = self.writer.settle(WRITER_PATIENCE) {
            tracing::warn!("{busy}; continuing next to it");
        }
        let config = GroupConfig {
            job: self.setup.run_id.clone(),
            generation: Generation(group.generation),
            rank: group.rank as usize,
            addresses: group.addresses.clone(),
            timeout: COLLECTIVE_TIMEOUT,
        };
        self.collective = Some(self.connect(config, abort)?);
        self.group = Some(group);
        Ok(())
    }

    fn connect(&self, config: GroupConfig, abort: AbortHandle) -> Result<Box<dyn Collective>, v1::TaskFailure> {
        let listener = &self.setup.listener;
        let host = |config, abort| HostCollective::connect_abortable(listener, config, abort).map_err(transient);
        let index = match (self.setup.backend, self.setup.device) {
            (Backend::Host, _) | (Backend::Auto, Device::Cpu) => return Ok(Box::new(host(config, abort)?)),
            // A single rank exchanges nothing, so NCCL need not be installed.
            (Backend::Auto, _) if config.addresses.len() == 1 => return Ok(Box::new(host(config, abort)?)),
            (_, Device::Cuda(index)) => index,
            (Backend::Nccl, _) => {
                return Err(permanent("the `nccl` backend needs `--device cuda`: it carries the memory of GPUs"));
            }
            (Backend::Auto, _) => return Ok(Box::new(host(config, abort)?)),
        };
        let device = CudaDevice::open(index).map_err(permanent)?;
        Ok(Box::new(NcclCollective::connect(listener, config, abort, &device).map_err(transient)?))
    }

    fn prepare(&mut self) -> Result<v1::PrepareResult, v1::TaskFailure> {
        let Some(group) = self.group.clone() else { return Err(transient("prepare came before a generation")) };
        // The old trainer's buffers are freed before new ones are allocated.
        self.trainer = None;
        release_memory();
        let spec = &self.setup.spec;
        let kind = match spec.model.precision {
            Precision::Float32 => Kind::Float,
            Precision::Bfloat16 => Kind::BFloat16,
            Precision::Auto if multiplies_bf16(self.setup.device) => Kind::BFloat16,
            Precision::Auto => Kind::Float,
        };
        if spec.resources.require_gpu_kernels {
            let config = ModelConfig::read(&spec.model.path).map_err(permanent)?;
            if let Some(problem) = missing_kernels(&config, kind, self.setup.device) {
                return Err(permanent(problem));
            }
        }
        let mut settings = TrainerSettings::new(spec, group.rank as usize, group.world_size as usize);
        settings.memory_bytes = settings.memory_bytes.or_else(|| self.memory(u64::from(group.world_size)));
        let mut trainer =
            Trainer::load(&spec.model.path, settings, kind, self.setup.device).map_err(|error| fail(&error))?;
        if !group.checkpoint.is_empty() {
            trainer.restore(Path::new(&group.checkpoint)).map_err(permanent)?;
        }
        release_memory();
        tracing::info!(step = trainer.step, kind = ?kind, "ready to train");
        self.trainer = Some(trainer);
        // Only a step has scored a sequence with two versions.
        Ok(v1::PrepareResult { weights: self.publish(None)? })
    }

    /// Memory that this rank may use if the job does not say (bytes): what other processes leave free on its GPU, or an equal
    /// share of the free host memory, as if all ranks were on this machine.
    fn memory(&self, ranks: u64) -> Option<u64> {
        match device_memory(self.setup.device) {
            // Asked for once: later on, libtorch's allocator holds what this process has used before, which is free for it.
            Some((free, _)) => Some(*self.gpu_bytes.get_or_init(|| {
                let share = if self.setup.spec.resources.share_gpus { SHARED_GPU } else { 1.0 };
                (free as f64 * share) as u64
            })),
            None => Some(available_bytes() / ranks).filter(|bytes| *bytes > 0),
        }
    }

    /// Publishes the weights on rank 0, with the probe of the step. The other ranks take part in gathering sharded weights.
    fn publish(&mut self, probe: Option<Probe>) -> Result<Option<v1::WeightsRef>, v1::TaskFailure> {
        let (Some(group), Some(trainer), Some(collective)) = (&self.group, &mut self.trainer, &mut self.collective)
        else {
            return Err(transient("weights are to be published before there are any"));
        };
        let Some(weights) = trainer.weights(collective.as_mut(), group.rank == 0).map_err(|error| fail(&error))? else {
            return Ok(None);
        };
        let adapted = trainer.policy.adapted.as_ref();
        let publisher = &self.setup.publisher;
        let published = publisher.publish(&weights, adapted, group.generation, trainer.step, probe);
        published.map(Some).map_err(transient)
    }

    fn train(&mut self, batch: &TrainBatch, learning_rate: Option<f64>) -> Result<v1::TrainResult, v1::TaskFailure> {
        let (Some(trainer), Some(collective)) = (&mut self.trainer, &mut self.collective) else {
            return Err(transient("a training step came before the weights were prepared"));
        };
        if let Some(learning_rate) = learning_rate {
            trainer.settings_mut().optimizer.learning_rate = learning_rate;
        }
        let vocabulary = trainer.policy.config.vocab_size;
        if let Some((group, token)) = batch.outside_vocabulary(vocabulary) {
            let problem = format!("group {group} has token {token}, and the vocabulary has {vocabulary} tokens");
            return Err(permanent(problem));
        }
        let started = Instant::now();
        let report = panic::catch_unwind(AssertUnwindSafe(|| trainer.train(batch, collective.as_mut())));
        let report = match report {
            Ok(report) => report.map_err(|error| fail(&error))?,
            Err(payload) => {
                // The trainer holds half an update. A new generation reloads the state, and the coordinator finds out
                // whether the batch is at fault. Ending the process would only make this rank return later.
                (self.trainer, self.collective) = (None, None);
                return Err(transient(format!("the step panicked: {}", panic_message(payload.as_ref()))));
            }
        };
        let trained = started.elapsed().as_secs_f64();
        let started = Instant::now();
        let weights = self.publish(report.probe)?;
        let mut metrics: std::collections::HashMap<String, f64> = report.metrics.into_iter().collect();
        metrics.insert("seconds_update".into(), trained);
        metrics.insert("seconds_publish".into(), started.elapsed().as_secs_f64());
        if let Some(weights) = &weights {
            metrics.insert("published_bytes".into(), weights.bytes as f64);
        }
        let signals = signals::report(batch, &report.signals);
        Ok(v1::TrainResult { weights, metrics, skipped_updates: report.skipped_updates, signals })
    }

    /// Captures the state to be saved and starts writing it in the background. Returns `None` if this rank has
    /// nothing to write.
    fn capture(&mut self, task: &v1::SaveTask) -> Result<Option<oneshot::Receiver<WriteOutcome>>, v1::TaskFailure> {
        let Some(trainer) = &self.trainer else {
            return Err(transient("a save came before the weights were prepared"));
        };
        let cannot_write = |error: &Busy| failure(error, v1::FailureKind::Write);
        // A second capture would exceed the memory plan.
        self.writer.settle(WRITER_PATIENCE).map_err(|busy| cannot_write(&busy))?;
        let started = Instant::now();
        let captured = trainer.capture();
        if captured.is_empty() {
            return Ok(None);
        }
        let seconds = started.elapsed().as_secs_f64();
        let bytes = captured.bytes();
        tracing::debug!(step = task.step, bytes, seconds, "state captured");
        let folder = PathBuf::from(&task.directory);
        let outcome = self.writer.start(task.step, captured, folder, WRITER_PATIENCE);
        outcome.map(Some).map_err(|busy| cannot_write(&busy))
    }

    fn save(&mut self, task: &v1::SaveTask) -> Result<v1::SaveResult, v1::TaskFailure> {
        let (Some(trainer), Some(collective)) = (&mut self.trainer, &mut self.collective) else {
            return Err(transient("a save came before the weights were prepared"));
        };
        let export = task.model.then(|| exported(&self.setup.spec, &self.setup.spec.model.path));
        let export = export.transpose().map_err(permanent)?;
        let folder = Path::new(&task.directory);
        let files = trainer.save(folder, task.training_state, export.as_ref(), collective.as_mut());
        let files = files.map_err(|error| fail_save(&error))?;
        Ok(v1::SaveResult { files })
    }
}

/// Message of a panic.
fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("nothing")
}

fn transient(error: impl std::fmt::Display) -> v1::TaskFailure {
    failure(&error, v1::FailureKind::Generation)
}

fn permanent(error: impl std::fmt::Display) -> v1::TaskFailure {
    failure(&error, v1::FailureKind::Permanent)
}

fn failure(error: &impl std::fmt::Display, kind: v1::FailureKind) -> v1::TaskFailure {
    v1::TaskFailure { message: error.to_string(), kind: kind.into() }
}

/// Converts the outcome of a background write to a task result.
pub(super) fn written(outcome: WriteOutcome) -> TaskResult {
    match outcome {
        Ok(files) => TaskResult::Saved(v1::SaveResult { files }),
        Err(error) => TaskResult::Failed(fail_save(&error)),
    }
}

/// Classifies a failed save: a failed write loses nothing, a failed gather means a lost peer.
fn fail_save(error: &CheckpointError) -> v1::TaskFailure {
    match error {
        CheckpointError::Gather(lost) => fail(lost),
        CheckpointError::View(_) => permanent(error),
        CheckpointError::File { .. }
        | CheckpointError::Content { .. }
        | CheckpointError::Unwanted { .. }
        | CheckpointError::Model(_) => failure(error, v1::FailureKind::Write),
    }
}

/// Classifies a failed step: a lost peer may return, while an unreadable model or a refused batch fails again.
fn fail(error: &TrainError) -> v1::TaskFailure {
    match error {
        TrainError::Collective(_)
        | TrainError::ExchangesEnded
        | TrainError::Overdue { .. }
        | TrainError::Expose(ExposeError::Device(_)) => transient(error),
        TrainError::Batch(_)
        | TrainError::Objective(_)
        | TrainError::External(_)
        | TrainError::Model(_)
        | TrainError::View(_)
        | TrainError::Expose(_)
        | TrainError::TooManyExchanges { .. } => permanent(error),
    }
}
