//! The thread that owns the engine and its tensors. It outlives registrations: a worker that joins again has its weights.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as sync;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pacs_engine::{Finished, GroupJob, Output};
use pacs_model::{ModelConfig, missing_kernels};
use pacs_spec::{JobSpec, Kernels, Precision};
use pacs_text::Tokenizer;
use pacs_torch::Graphs;
use pacs_torch::tch::{Device, Kind};
use pacs_weights::{Description, VersionId};
use tokio::sync::mpsc;
use tracing::Span;

use crate::weights::MappedWeights;
use crate::{Engine, EngineCounts, EngineOptions, cache_tokens};

/// Tokens of prompts in one pass: enough to keep matrix products busy, few enough that a pass stays short.
const PREFILL_TOKENS: usize = 2048;
/// Finished samples that wait to be handed in; a full channel makes generation wait.
const FINISHED_QUEUE: usize = 4096;
/// How often the end of the thread is looked for.
const LOOK: Duration = Duration::from_millis(5);

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Forget all groups, and work for another registration, whose log lines stand in the span. Registrations are numbered.
    Attach(mpsc::Sender<Output>, Span, u64),
    /// Forget all groups of this registration, unless there is a later one: nobody wants them any more.
    Detach(u64),
    /// Generate with these weights from the next pass on.
    Weights(Box<MappedWeights>),
    /// Generate a group.
    Generate(GroupJob),
    /// Forget a group.
    Cancel { ticket: u64 },
}

/// What the engine is built from.
#[derive(Debug)]
pub(crate) struct Setup {
    /// With 0 tokens of cache where the spec leaves that open.
    pub(crate) options: EngineOptions,
    /// Most tokens of a sample, prompt included.
    longest: usize,
    /// The GPU may be shared with other workers.
    shares_gpu: bool,
    model: PathBuf,
    config: ModelConfig,
    /// What is trained: the model, or adapters of it.
    trained: ModelConfig,
    tokenizer: Arc<Tokenizer>,
    device: Device,
}

impl Setup {
    /// Reads the model's configuration and tokenizer and prepares libtorch.
    pub(crate) fn read(spec: &JobSpec, cuda: bool, threads: usize) -> anyhow::Result<Self> {
        let device = pacs_torch::init(cuda, threads)?;
        let longest = spec.longest_sequence();
        let config = ModelConfig::read(&spec.model.path)?.for_sequences(longest);
        let trained = spec.model.trained(&config)?;
        let tokenizer = Arc::new(Tokenizer::read(&spec.model.path)?);
        let options = EngineOptions {
            rows: spec.rollout.max_concurrent_samples as usize,
            prefill_tokens: PREFILL_TOKENS,
            cache_tokens: usize::try_from(spec.rollout.cache_tokens)?,
            kernels: spec.rollout.kernels,
            cuda_graphs: spec.rollout.cuda_graphs,
        };
        if spec.resources.require_gpu_kernels && options.kernels == Kernels::Auto {
            let kind = if spec.model.precision == Precision::Float32 { Kind::Float } else { Kind::BFloat16 };
            if let Some(problem) = missing_kernels(&config, kind, device) {
                anyhow::bail!("{problem}");
            }
            if options.cuda_graphs
                && matches!(device, Device::Cuda(_))
                && let Err(error) = Graphs::new(device)
            {
                anyhow::bail!(
                    "passes cannot be recorded as CUDA graphs: {error}. `rollout.cuda_graphs = false` does without, and decodes \
                     several times slower with small models"
                );
            }
        }
        let shares_gpu = spec.resources.share_gpus;
        Ok(Self { options, longest, shares_gpu, model: spec.model.path.clone(), config, trained, tokenizer, device })
    }

    /// The model's folder.
    pub(crate) fn model(&self) -> &Path {
        &self.model
    }

    /// Where the engine computes.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    /// The model's configuration, which weights have to fit.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The configuration of what is trained, which published versions hold.
    pub(crate) fn trained(&self) -> &ModelConfig {
        &self.trained
    }

    /// Whether an engine of the other one serves for this one, too.
    fn is_like(&self, other: &Self) -> bool {
        (self.options, self.longest, self.shares_gpu, &self.model, &self.config, &self.trained, self.device)
            == (
                other.options,
                other.longest,
                other.shares_gpu,
                &other.model,
                &other.config,
                &other.trained,
                other.device,
            )
    }

    /// An engine; what the spec leaves open is decided when the weights have their memory.
    fn engine(&self, weights: MappedWeights) -> Result<Engine, String> {
        let no_room = |error: &dyn std::fmt::Display| format!("make room for generation: {error}");
        let kind = weights.kind();
        let (parameters, version) = weights.into_first(self.device).map_err(|error| no_room(&error))?;
        let mut options = self.options;
        if options.cache_tokens == 0 {
            options.cache_tokens =
                cache_tokens(&self.config, kind, self.device, self.shares_gpu, [options.rows, self.longest]);
        }
        let tokenizer = Some(Arc::clone(&self.tokenizer));
        Engine::new(self.config.clone(), parameters, version, tokenizer, options).map_err(|error| no_room(&error))
    }
}

/// Handle of the thread.
#[derive(Debug)]
pub(crate) struct EngineThread {
    setup: Arc<Setup>,
    /// The thread ends when the last sender is gone.
    commands: sync::Sender<Command>,
    thread: JoinHandle<()>,
    /// The weights that it was given last.
    held: Arc<Mutex<Option<Description>>>,
    /// Number of the newest registration.
    registrations: AtomicU64,
}

impl EngineThread {
    /// Starts the thread. Commands are bounded by the samples on lease, outputs by [`FINISHED_QUEUE`].
    pub(crate) fn start(setup: Setup) -> std::io::Result<Self> {
        let (commands, inbox) = sync::channel();
        let setup = Arc::new(setup);
        let built = Arc::clone(&setup);
        let generate = move || {
            let registration = Span::none();
            Worker { setup: &built, engine: None, outbox: None, registration, number: 0, weights: None, told: 0 }
                .run(&inbox);
        };
        let thread = std::thread::Builder::new().name("engine".into()).spawn(generate)?;
        Ok(Self { setup, commands, thread, held: Arc::default(), registrations: AtomicU64::new(0) })
    }

    /// Whether it serves for `setup`, too.
    pub(crate) fn serves(&self, setup: &Setup) -> bool {
        self.setup.is_like(setup) && !self.thread.is_finished()
    }

    /// What it was built from.
    pub(crate) fn setup(&self) -> &Arc<Setup> {
        &self.setup
    }

    /// Has it work for a registration until the value is dropped. The span says whose its log lines are.
    pub(crate) fn attach(&self, registration: Span) -> (Attached, mpsc::Receiver<Output>) {
        let (outbox, outputs) = mpsc::channel(FINISHED_QUEUE);
        // A thread that is gone is noticed by what it does not say.
        let number = 1 + self.registrations.fetch_add(1, Ordering::Relaxed);
        let _ = self.commands.send(Command::Attach(outbox, registration, number));
        (Attached { commands: self.commands.clone(), held: Arc::clone(&self.held), number }, outputs)
    }

    /// Ends the thread and waits for it; false when it does not come back in time. A pass that it computes comes first.
    pub(crate) fn end(self, patience: Duration) -> bool {
        let Self { commands, thread, .. } = self;
        drop(commands);
        let started = Instant::now();
        while !thread.is_finished() {
            if started.elapsed() > patience {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        if thread.join().is_err() {
            tracing::error!("the generating thread panicked");
        }
        true
    }
}

/// A registration's hold on the thread.
#[derive(Debug)]
pub(crate) struct Attached {
    pub(crate) commands: sync::Sender<Command>,
    held: Arc<Mutex<Option<Description>>>,
    number: u64,
}

impl Attached {
    /// Whether the thread was given these weights last, by whichever registration.
    pub(crate) fn holds(&self, wanted: &Description) -> bool {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(wanted)
    }

    /// The version that the thread was given last, by whichever registration.
    pub(crate) fn held(&self) -> Option<VersionId> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Description::id)
    }

    /// Gives the thread weights, for its next pass and the groups that it is given from now on.
    pub(crate) fn give(&self, weights: MappedWeights) -> VersionId {
        let description = weights.description.clone();
        let id = description.id();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        // A thread that is gone is noticed by what it does not say.
        let _ = self.commands.send(Command::Weights(Box::new(weights)));
        *held = Some(description);
        id
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // A thread that receives weights may drop the last handle when the next registration has begun.
        let _ = self.commands.send(Command::Detach(self.number));
    }
}

/// What the thread has.
struct Worker<'a> {
    setup: &'a Setup,
    engine: Option<Engine>,
    /// Nobody listens between two registrations.
    outbox: Option<mpsc::Sender<Output>>,
    /// Of the registration.
    registration: Span,
    number: u64,
    /// The version of the engine.
    weights: Option<VersionId>,
    /// Preemptions that the log knows of.
    told: u64,
}

impl Worker<'_> {
    /// Serves commands until their senders are gone, or the engine fails.
    fn run(mut self, inbox: &sync::Receiver<Command>) {
        if let Err(problem) = self.serve(inbox)
            && let Some(outbox) = &self.outbox
        {
            // Nobody listens any more when the registration has ended meanwhile.
            let _ = outbox.blocking_send(Output::Failed(problem));
        }
    }

    fn serve(&mut self, inbox: &sync::Receiver<Command>) -> Result<(), String> {
        loop {
            let mut next = match self.engine.as_ref().is_none_or(Engine::is_idle) {
                true => {
                    self.tell_preemptions();
                    inbox.recv().map_err(|_| sync::TryRecvError::Disconnected)
                }
                false => inbox.try_recv(),
            };
            loop {
                match next {
                    Ok(command) => self.registration.clone().in_scope(|| self.obey(command))?,
                    Err(sync::TryRecvError::Empty) => break,
                    Err(sync::TryRecvError::Disconnected) => return Ok(()),
                }
                next = inbox.try_recv();
            }
            let Some(engine) = &mut self.engine else { continue };
            // One a pass: without that level it costs a comparison.
            let (generation, version) = self.weights.map_or((0, 0), |id| (id.generation.0, id.version.0));
            let pass = tracing::debug_span!(parent: &self.registration, "pass", generation, version).entered();
            for finished in engine.step().map_err(|error| error.to_string())? {
                let Finished { ticket: lease, index: sample, .. } = finished;
                tracing::debug!(lease, sample, tokens = finished.sample.tokens.len(), "sample generated");
                let output = Output::Finished(Box::new(finished));
                let sent = self.outbox.as_ref().is_some_and(|outbox| outbox.blocking_send(output).is_ok());
                if !sent {
                    // The registration has ended, and its leases with it.
                    self.outbox = None;
                    engine.cancel_all();
                    break;
                }
            }
            drop(pass);
        }
    }

    fn obey(&mut self, command: Command) -> Result<(), String> {
        match command {
            Command::Attach(outbox, registration, number) => {
                (self.outbox, self.registration, self.number) = (Some(outbox), registration, number);
                self.forget();
            }
            Command::Detach(number) if number < self.number => {}
            Command::Detach(_) => {
                (self.outbox, self.registration) = (None, Span::none());
                self.forget();
            }
            Command::Weights(weights) => self.load(*weights)?,
            Command::Generate(job) => {
                let engine = self.engine.as_mut().ok_or("a group came before the weights")?;
                let (lease, samples) = (job.ticket, job.samples.len());
                tracing::debug!(lease, samples, "group given to the engine");
                engine.submit(job).map_err(|error| error.to_string())?;
            }
            Command::Cancel { ticket } => {
                if let Some(engine) = &mut self.engine {
                    engine.cancel(ticket);
                }
            }
        }
        Ok(())
    }

    fn forget(&mut self) {
        if let Some(engine) = &mut self.engine {
            engine.cancel_all();
        }
    }

    fn load(&mut self, weights: MappedWeights) -> Result<(), String> {
        let (id, started) = (weights.description.id(), Instant::now());
        match &mut self.engine {
            None => self.engine = Some(self.setup.engine(weights)?),
            Some(engine) => {
                let old = weights.replace(engine).map_err(|error| format!("libtorch: {error}"))?;
                // Ends by itself. Without a thread they are dropped here, which takes longer.
                let _ = std::thread::Builder::new().name("old-weights".into()).spawn(move || drop(old));
            }
        }
        self.weights = Some(id);
        let seconds = started.elapsed().as_secs_f64();
        tracing::debug!(
            generation = id.generation.0,
            version = id.version.0,
            seconds,
            "generation stalled for weights"
        );
        Ok(())
    }

    fn tell_preemptions(&mut self) {
        let Some(EngineCounts { preemptions, recomputed_tokens, .. }) = self.engine.as_ref().map(Engine::counts) else {
            return;
        };
        if preemptions > self.told {
            tracing::info!(preemptions, recomputed_tokens, "the cache was full: samples were preempted and recomputed");
            self.told = preemptions;
        }
    }
}

#[cfg(test)]
mod tests {
    use pacs_model::Parameters;
    use pacs_torch::bytes;
    use pacs_types::{GroupId, NoiseKey, SampleId};
    use pacs_weights::{Fetched, HostStore, Received, Transport, WeightKind};

    use super::*;
    use crate::SamplingOptions;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn setup() -> Setup {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        let mut config = ModelConfig::read(&model).expect("golden model");
        config.end_tokens.clear();
        let tokenizer = Arc::new(Tokenizer::read(&model).expect("golden tokenizer"));
        let options = EngineOptions {
            rows: 2,
            prefill_tokens: 64,
            cache_tokens: 4000,
            kernels: Kernels::Auto,
            cuda_graphs: false,
        };
        let trained = config.clone();
        Setup { options, longest: 200, shares_gpu: false, model, config, trained, tokenizer, device: Device::Cpu }
    }

    fn weights(setup: &Setup, version: u64) -> MappedWeights {
        let parameters = Parameters::random(&setup.config, Kind::Float, Device::Cpu, 1);
        let place = tempfile::tempdir().expect("a temporary folder");
        let store = HostStore::open_in("run", &[place.path().to_owned()]).expect("a store");
        let content = bytes(&parameters.flat).expect("host memory");
        let whole = store.publish(VersionId::new(1, version), WeightKind::Float32, content).expect("room");
        let received = Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
        MappedWeights::map(&received, &setup.config).expect("of this model")
    }

    fn group(ticket: u64, samples: u32, max_new_tokens: u32) -> Command {
        let key = |index| (index, NoiseKey::new(1, 0, SampleId { group: GroupId(ticket), index }));
        let options =
            SamplingOptions { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, max_new_tokens, stop: Vec::new() };
        let samples = (0..samples).map(key).collect();
        Command::Generate(GroupJob { ticket, prompt: vec![1, 2, 3], samples, options, records_routes: false })
    }

    fn finished(output: Output) -> Finished {
        match output {
            Output::Finished(finished) => *finished,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_thread_outlives_a_registration_and_forgets_its_groups() {
        let thread = EngineThread::start(setup()).expect("a thread");
        let given = weights(&setup(), 5);
        let description = given.description.clone();
        {
            let (attached, mut outputs) = thread.attach(Span::none());
            assert!(!attached.holds(&description));
            attached.give(given);
            // More than can be done by the time that the first is out.
            (1..=20).for_each(|ticket| attached.commands.send(group(ticket, 2, 20)).expect("it lives"));
            assert_eq!(finished(outputs.blocking_recv().expect("a sample")).sample.version.0, 5);
        }
        let (attached, mut outputs) = thread.attach(Span::none());
        assert!(attached.holds(&description), "weights stay");
        attached.commands.send(group(100, 2, 3)).expect("it lives");
        for _ in 0..2 {
            assert_eq!(finished(outputs.blocking_recv().expect("a sample")).ticket, 100, "nothing of before");
        }
        assert!(thread.serves(&setup()));
        let other = Setup { longest: 300, ..setup() };
        assert!(!thread.serves(&other));
        drop(attached);
        assert!(thread.end(PATIENCE));
        assert!(outputs.blocking_recv().is_none());
    }

    #[test]
    fn a_thread_that_generates_ends_when_it_is_told_to() {
        let thread = EngineThread::start(setup()).expect("a thread");
        let (attached, _outputs) = thread.attach(Span::none());
        attached.give(weights(&setup(), 1));
        (1..=50).for_each(|ticket| attached.commands.send(group(ticket, 2, 100)).expect("it lives"));
        drop(attached);
        assert!(thread.end(PATIENCE));
    }

    #[test]
    fn a_group_before_any_weights_is_an_error_of_ours() {
        let thread = EngineThread::start(setup()).expect("a thread");
        let (attached, mut outputs) = thread.attach(Span::none());
        attached.commands.send(group(1, 1, 3)).expect("it lives");
        let Some(Output::Failed(problem)) = outputs.blocking_recv() else { panic!("it generates without weights") };
        assert!(problem.contains("before the weights"), "{problem}");
    }
}
