//! The thread that owns the engine and its tensors.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc as sync;

use pacs_model::{ModelConfig, Parameters};
use pacs_protocol::v1;
use pacs_spec::JobSpec;
use pacs_text::Tokenizer;
use pacs_torch::tch::{Device, Kind};
use pacs_types::WeightVersion;
use tokio::sync::mpsc;

use crate::weights;
use crate::{Engine, EngineCounts, EngineError, EngineOptions, Finished, GroupJob, cache_tokens};

/// Tokens of prompts in one pass: enough to keep matrix products busy, few enough that a pass stays short.
const PREFILL_TOKENS: usize = 2048;
/// Finished samples that wait to be handed in; a full channel makes generation wait.
const FINISHED_QUEUE: usize = 4096;

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Generate a group with these weights (reference and local file).
    Generate { job: GroupJob, weights: Arc<(v1::WeightsRef, PathBuf)> },
    /// Forget a group.
    Cancel { ticket: u64 },
}

/// What the thread tells.
#[derive(Debug)]
pub(crate) enum Output {
    /// A sample is complete.
    Finished(Box<Finished>),
    /// Weights could not be loaded.
    Weights(String),
    /// The engine failed and is gone.
    Failed(String),
}

/// What the engine is built from.
#[derive(Debug)]
pub(crate) struct Setup {
    /// With 0 tokens of cache where the spec leaves that open.
    pub(crate) options: EngineOptions,
    /// Most tokens of a sample, prompt included.
    longest: usize,
    config: ModelConfig,
    tokenizer: Arc<Tokenizer>,
    device: Device,
}

impl Setup {
    /// Reads the model's configuration and tokenizer and prepares libtorch.
    pub(crate) fn read(spec: &JobSpec, cuda: bool, threads: usize) -> anyhow::Result<Self> {
        let device = pacs_torch::init(cuda, threads)?;
        let config = ModelConfig::read(&spec.model.path)?;
        let tokenizer = Arc::new(Tokenizer::read(&spec.model.path)?);
        let options = EngineOptions {
            rows: spec.rollout.max_concurrent_samples as usize,
            prefill_tokens: PREFILL_TOKENS,
            cache_tokens: usize::try_from(spec.rollout.cache_tokens)?,
            kernels: spec.rollout.kernels,
            cuda_graphs: spec.rollout.cuda_graphs,
        };
        let longest = spec.data.max_prompt_tokens + spec.rollout.max_new_tokens as usize;
        Ok(Self { options, longest, config, tokenizer, device })
    }

    /// An engine without weights; what the spec leaves open is decided when they have their memory.
    fn engine(&self, kind: Kind, version: WeightVersion) -> Result<Engine, EngineError> {
        let parameters = Parameters::zeros(&self.config, kind, self.device);
        let mut options = self.options;
        if options.cache_tokens == 0 {
            options.cache_tokens = cache_tokens(&self.config, kind, self.device, options.rows, self.longest);
        }
        Engine::new(self.config.clone(), parameters, version, Some(Arc::clone(&self.tokenizer)), options)
    }
}

/// Handle of the thread; dropping every command sender ends it.
#[derive(Debug)]
pub(crate) struct EngineThread {
    pub(crate) commands: sync::Sender<Command>,
}

impl EngineThread {
    /// Starts the thread. Commands are bounded by the samples on lease, outputs by [`FINISHED_QUEUE`].
    pub(crate) fn start(setup: Setup) -> (Self, mpsc::Receiver<Output>) {
        let (commands, inbox) = sync::channel();
        let (outbox, outputs) = mpsc::channel(FINISHED_QUEUE);
        std::thread::spawn(move || {
            if let Err(error) = generate(&setup, &inbox, &outbox) {
                // Nobody listens any more when the registration has ended meanwhile.
                let _ = outbox.blocking_send(error);
            }
        });
        (Self { commands }, outputs)
    }
}

/// Serves commands until their senders are gone.
fn generate(setup: &Setup, inbox: &sync::Receiver<Command>, outbox: &mpsc::Sender<Output>) -> Result<(), Output> {
    let mut engine: Option<Engine> = None;
    let mut loaded: Option<(u64, u64)> = None;
    let mut told = 0;
    loop {
        let idle = engine.as_ref().is_none_or(Engine::is_idle);
        if let Some(engine) = engine.as_ref().filter(|engine| idle && engine.counts().preemptions > told) {
            let EngineCounts { preemptions, recomputed_tokens, .. } = engine.counts();
            tracing::info!(
                preemptions,
                recomputed_tokens,
                "the cache was full: samples had to wait and were computed again"
            );
            told = preemptions;
        }
        let next = if idle { inbox.recv().ok() } else { None };
        if idle && next.is_none() {
            return Ok(());
        }
        for command in next.into_iter().chain(inbox.try_iter()) {
            match command {
                Command::Generate { job, weights } => {
                    let (reference, path) = &*weights;
                    let wanted = (reference.generation, reference.version);
                    if loaded != Some(wanted) {
                        load(setup, &mut engine, reference, path).map_err(Output::Weights)?;
                        loaded = Some(wanted);
                    }
                    let engine = engine.as_mut().expect("loading weights makes an engine");
                    engine.submit(job).map_err(|error| Output::Failed(error.to_string()))?;
                }
                Command::Cancel { ticket } => {
                    if let Some(engine) = &mut engine {
                        engine.cancel(ticket);
                    }
                }
            }
        }
        if let Some(engine) = &mut engine {
            for finished in engine.step().map_err(|error| Output::Failed(error.to_string()))? {
                if outbox.blocking_send(Output::Finished(Box::new(finished))).is_err() {
                    return Ok(());
                }
            }
        }
    }
}

fn load(
    setup: &Setup,
    engine: &mut Option<Engine>,
    reference: &v1::WeightsRef,
    path: &std::path::Path,
) -> Result<(), String> {
    let kind = weights::kind(reference).ok_or_else(|| format!("weights of unknown kind `{}`", reference.kind))?;
    let version = WeightVersion(reference.version);
    let engine = match engine {
        Some(engine) => engine,
        None => {
            let made = setup.engine(kind, version);
            engine.insert(made.map_err(|error| format!("make room for generation: {error}"))?)
        }
    };
    weights::load(reference, path, engine.parameters_mut(version)).map_err(|error| error.to_string())
}
