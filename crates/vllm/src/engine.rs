//! The engine: servers, their drivers and the dispatcher behind the seam of all engines.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pacs_engine::{EngineGone, GroupJob, NotPrepared, Output, RolloutEngine};
use pacs_hub::snapshot_here;
use pacs_protocol::v1;
use pacs_shape::ModelConfig;
use pacs_spec::{JobSpec, endpoint_authority};
use pacs_text::Tokenizer;
use pacs_weights::{Description, Probe, Received, VersionId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::answer::Model;
use crate::checksums::FleetSums;
use crate::driver::{Driver, Needs, Prepared, Shared, Timing};
use crate::fleet::{Board, Command, Fleet};
use crate::folder::Folders;
use crate::installed::Installed;
use crate::probe::Record;
use crate::seat::Seat;
use crate::{ApiKey, Client, Limits, label};

/// Finished samples that wait to be submitted; a full channel makes the dispatcher wait.
const FINISHED_QUEUE: usize = 4096;
/// News of drivers that wait for the dispatcher; a full channel makes them wait.
const NEWS_QUEUE: usize = 256;

/// What a worker is told besides its job.
#[derive(Clone, Debug, Default)]
pub struct VllmOptions {
    /// Servers in place of those of the job.
    pub endpoints: Vec<String>,
    /// Folder for versions in place of that of the job.
    pub weights_dir: Option<PathBuf>,
    /// The key that servers ask for.
    pub key: Option<ApiKey>,
    /// What no job sets.
    pub timing: Timing,
}

/// vLLM servers as an engine. It outlives registrations: servers keep their weights.
#[derive(Debug)]
pub struct VllmEngine {
    shared: Arc<Shared>,
    folders: Arc<Folders>,
    board: Arc<Board>,
    target: Arc<watch::Sender<Option<Arc<Prepared>>>>,
    /// Bounded by the samples on lease.
    commands: mpsc::UnboundedSender<Command>,
    registrations: AtomicU64,
    tasks: Vec<JoinHandle<()>>,
    /// What it was built from, to see whether it serves for another registration.
    spec: Box<JobSpec>,
}

impl Drop for VllmEngine {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl VllmEngine {
    /// An engine for a job of the run, with `worker` as the name of its worker. Within a tokio runtime.
    ///
    /// # Errors
    /// What of the job, the model or the folder for weights cannot be used.
    pub fn start(spec: &JobSpec, run: &str, worker: &str, options: &VllmOptions) -> Result<Self, String> {
        let vllm = spec.rollout.vllm.clone().unwrap_or_default();
        let endpoints = if options.endpoints.is_empty() { &vllm.endpoints } else { &options.endpoints };
        if endpoints.is_empty() {
            return Err("no server: name them in `rollout.vllm.endpoints`, or with --endpoint".to_owned());
        }
        // The coordinator names its own copy of a model of the hub; this machine may have one elsewhere.
        let folder = snapshot_here(&spec.model.path).map_err(|error| error.to_string())?;
        let config = ModelConfig::read(&folder).map_err(|error| error.to_string())?;
        let tokenizer = Tokenizer::read(&folder).map_err(|error| error.to_string())?;
        let vocabulary =
            u32::try_from(config.vocab_size).map_err(|_| "the model's vocabulary has no size".to_owned())?;
        let model = Arc::new(Model { tokenizer, end_tokens: config.end_tokens.clone(), vocabulary });

        // Workers of one run may share a folder, and each removes what it left there.
        let own = format!("pacs-vllm-{}-{worker}", run.get(..16).unwrap_or(run));
        let place = options.weights_dir.clone().or_else(|| vllm.weights_dir.clone());
        let place = place.unwrap_or_else(default_place).join(&own);
        let servers_place = vllm.server_weights_dir.as_ref().map(|folder| folder.join(&own));
        let trained = spec.model.trained(&config).map_err(|error| error.to_string())?;
        let folders = Folders::open(place, servers_place, &folder, &trained, vllm.untied_head)
            .map_err(|error| error.to_string())?;

        let request = Duration::from_secs(u64::from(vllm.request_seconds));
        let update = Duration::from_secs(u64::from(vllm.update_seconds));
        let limits = Limits { question: options.timing.question, request, update };
        let rollout = &spec.rollout;
        let needs = Needs {
            longest: spec.longest_sequence() as u64,
            short_positions: (config.most_positions() > config.max_positions).then_some(config.max_positions as u64),
            processed_logprobs: rollout.cuts_off() || rollout.temperature != 1.0,
            drained_updates: rollout.cuts_off(),
            checksums: vllm.checksums,
            max_probe_error: vllm.max_probe_error,
            tied: config.tie_embeddings,
            untied_head: vllm.untied_head,
            drain: request,
        };
        let shared = Arc::new(Shared {
            run: run.to_owned(),
            timing: options.timing,
            needs,
            installed: Installed::default(),
            sums: FleetSums::default(),
        });
        let (target, board) = (Arc::new(watch::Sender::new(None)), Arc::<Board>::default());
        let (commands, inbox) = mpsc::unbounded_channel();
        let (news_sender, news) = mpsc::channel(NEWS_QUEUE);
        let (mut seats, mut tasks) = (Vec::new(), Vec::new());
        for (number, endpoint) in endpoints.iter().enumerate() {
            let authority = endpoint_authority(endpoint)
                .ok_or_else(|| format!("`{endpoint}` is no address of a server: expected http://HOST:PORT"))?;
            let client = Client::new(authority, options.key.clone(), limits);
            let seat = Seat::new(endpoint.clone(), client.clone());
            let driver = Driver {
                seat: number,
                endpoint: endpoint.clone(),
                client,
                shared: Arc::clone(&shared),
                target: target.subscribe(),
                news: news_sender.clone(),
                wake: Arc::clone(&seat.wake),
                in_flight: seat.in_flight.subscribe(),
                held: None,
                sums: None,
                record: Record::default(),
            };
            seats.push(seat);
            tasks.push(tokio::spawn(driver.run()));
        }
        let bounds = (vllm.max_requests as usize, vllm.max_attempts);
        let fleet = Fleet::new(seats, Arc::clone(&shared), model, Arc::clone(&board), bounds);
        tasks.push(tokio::spawn(fleet.run(inbox, news)));
        let (folders, spec) = (Arc::new(folders), Box::new(spec.clone()));
        Ok(Self { shared, folders, board, target, commands, registrations: AtomicU64::new(0), tasks, spec })
    }

    /// Whether it serves for a job, too.
    #[must_use]
    pub fn serves_for(&self, spec: &JobSpec) -> bool {
        *self.spec == *spec && self.tasks.last().is_some_and(|fleet| !fleet.is_finished())
    }

    /// The servers, for the status page.
    #[must_use]
    pub fn servers(&self) -> watch::Receiver<Vec<v1::EngineServer>> {
        self.board.servers.subscribe()
    }

    /// Has it work for a registration until the value is dropped.
    #[must_use]
    pub fn attach(&self) -> (Attached, mpsc::Receiver<Output>) {
        let (outbox, outputs) = mpsc::channel(FINISHED_QUEUE);
        let number = 1 + self.registrations.fetch_add(1, Ordering::Relaxed);
        // An engine that is gone is noticed by what it does not say.
        let _ = self.commands.send(Command::Attach(outbox, number));
        let attached = Attached {
            shared: Arc::clone(&self.shared),
            folders: Arc::clone(&self.folders),
            board: Arc::clone(&self.board),
            target: Arc::clone(&self.target),
            commands: self.commands.clone(),
            number,
        };
        (attached, outputs)
    }
}

/// Where versions are written for servers of this machine.
fn default_place() -> PathBuf {
    // By user, so that one user's folder does not keep another's worker out.
    std::env::temp_dir().join(format!("pacs-{}", nix::unistd::getuid()))
}

/// A registration's hold on the engine.
#[derive(Debug)]
pub struct Attached {
    shared: Arc<Shared>,
    folders: Arc<Folders>,
    board: Arc<Board>,
    target: Arc<watch::Sender<Option<Arc<Prepared>>>>,
    commands: mpsc::UnboundedSender<Command>,
    number: u64,
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Detach(self.number));
    }
}

/// A version that was written for the servers.
#[derive(Debug)]
pub struct VllmWeights(Prepared);

impl RolloutEngine for Attached {
    type Weights = VllmWeights;

    fn capacity(&self) -> watch::Receiver<usize> {
        self.board.capacity.subscribe()
    }

    fn serves(&self) -> watch::Receiver<Option<VersionId>> {
        self.board.serves.subscribe()
    }

    fn generate(&self, job: GroupJob, oldest: VersionId) -> Result<(), EngineGone> {
        self.commands.send(Command::Generate(job, oldest)).map_err(|_| EngineGone)
    }

    fn cancel(&self, ticket: u64) {
        // An engine that is gone is noticed by what it does not say.
        let _ = self.commands.send(Command::Cancel(ticket));
    }

    fn holds(&self, wanted: &Description) -> bool {
        self.target.borrow().as_ref().is_some_and(|prepared| prepared.description == *wanted)
    }

    fn prepare(&self, received: &Received, probe: Option<&Arc<Probe>>) -> Result<VllmWeights, NotPrepared> {
        let description = received.whole.description().clone();
        let folder = self.folders.write(received).map_err(|error| match error.is_final() {
            true => NotPrepared::Refused(format!("use {}: {error}", description.id())),
            false => NotPrepared::Failed(error.to_string()),
        })?;
        let label = label::of_version(&self.shared.run, &description);
        Ok(VllmWeights(Prepared { description, label, folder, probe: probe.cloned() }))
    }

    fn install(&self, VllmWeights(prepared): VllmWeights) {
        for name in [label::unverified(&prepared.label), prepared.label.clone()] {
            self.shared.installed.add(&name, prepared.id());
        }
        self.target.send_replace(Some(Arc::new(prepared)));
    }
}
