//! The worker: membership, weights and the engine, which has a thread of its own.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use pacs_engine::{Following, HostWeights, LeaseTerms, RolloutError, ServeError, serve};
use pacs_runtime::{Exit, Link, Membership, Shutdown, Worker, WorkerIdentity, work};
use pacs_spec::{JobSpec, Precision, RolloutEngineKind};
use pacs_torch::multiplies_bf16;
use pacs_torch::tch::Kind;
use pacs_types::Role;
use pacs_weights::GroupTransport;

use crate::native::NativeEngine;
use crate::thread::{EngineThread, Setup};
use crate::weights::BaseCell;

/// How long the engine may take to end: a pass of a large model, and some.
const ENGINE_PATIENCE: Duration = Duration::from_secs(30);

/// How to run a rollout worker.
#[derive(Clone, Debug)]
pub struct RolloutOptions {
    /// How the coordinator is reached.
    pub link: Link,
    /// Stable name of the process slot, for example `rollout-0`.
    pub name: String,
    /// Address that rollout workers of other hosts reach this process at, to fetch weights; the port is chosen freely.
    pub bind: String,
    /// Compute on CUDA instead of the CPU.
    pub cuda: bool,
    /// Threads of libtorch; 0 for one a core.
    pub threads: usize,
    /// Over what it takes part in broadcasts of weights; `None`: it fetches them.
    pub broadcast: Option<Arc<dyn GroupTransport>>,
}

/// Works until the coordinator says that the job is over, or shutdown is requested.
///
/// A lost registration (a restarted coordinator, a network cut) is followed by a new one; the work in hand is dropped,
/// as the coordinator gives it to somebody else.
///
/// # Errors
/// See [`RolloutError`].
pub async fn run(options: RolloutOptions, shutdown: Shutdown) -> Result<Exit, RolloutError> {
    let identity =
        WorkerIdentity { role: Role::Rollout, name: options.name.clone(), collective_address: String::new() };
    let link = options.link.clone();
    let mut rollout = Rollout { options, engine: None, weights: None, base: Arc::default() };
    let result = work(&link, &identity, &shutdown, &mut rollout).await;
    rollout.weights.iter().for_each(|weights| weights.leave());
    let engine = rollout.engine;
    // Static destructors of libtorch must not run under it; see `pacs_torch::end_process` for the one that does not come back.
    let ended = tokio::task::spawn_blocking(move || engine.is_none_or(|engine| engine.end(ENGINE_PATIENCE))).await;
    if !matches!(ended, Ok(true)) {
        tracing::warn!("the generating thread does not return from its pass; the process exits without it");
    }
    result
}

/// What outlives a registration.
struct Rollout {
    options: RolloutOptions,
    engine: Option<EngineThread>,
    weights: Option<Arc<HostWeights>>,
    /// What adapters are merged into.
    base: Arc<BaseCell>,
}

impl Worker for Rollout {
    type Error = RolloutError;

    async fn serve(&mut self, membership: &Membership) -> Result<Infallible, ServeError> {
        let config = |problem: String| ServeError::Fatal(RolloutError::Config(problem));
        let mut spec: JobSpec =
            toml::from_str(&membership.job_spec).map_err(|error| config(format!("job spec: {error}")))?;
        if spec.rollout.engine != RolloutEngineKind::Native {
            let problem = "`rollout.engine` of the job is \"vllm\": its rollout workers are started as `pacs rollout`";
            return Err(config(problem.to_owned()));
        }
        // The coordinator names its own copy of a model of the hub; this machine may have one elsewhere.
        spec.model.path = pacs_hub::snapshot_here(&spec.model.path).map_err(|error| config(error.to_string()))?;
        let setup =
            Setup::read(&spec, self.options.cuda, self.options.threads).map_err(|error| config(error.to_string()))?;
        let rows = setup.options.rows;
        let weights = match &self.weights {
            Some(weights) => Arc::clone(weights),
            None => {
                let run_id = membership.run_id.get().unwrap_or_default();
                let RolloutOptions { bind, link, broadcast, .. } = &self.options;
                let opened = HostWeights::open(run_id, bind, &link.security, broadcast.clone()).map_err(config)?;
                Arc::clone(self.weights.insert(Arc::new(opened)))
            }
        };
        let engine = ready_engine(&mut self.engine, setup).await?;
        let run = membership.run_id.get().unwrap_or_default();
        let (attached, outputs) = engine.attach(tracing::info_span!("engine", run, worker = membership.worker.0));
        let setup = Arc::clone(engine.setup());
        let kind = match spec.model.precision {
            Precision::Bfloat16 => Kind::BFloat16,
            Precision::Auto if multiplies_bf16(setup.device()) => Kind::BFloat16,
            Precision::Auto | Precision::Float32 => Kind::Float,
        };
        let store = Arc::clone(weights.store());
        let engine = Arc::new(NativeEngine::new(attached, setup, store, Arc::clone(&self.base)));
        let following = Following::new(membership, weights, Arc::clone(&engine));
        let own = Arc::clone(&engine);
        let activity = membership.activity.clone();
        let weights = async move {
            match spec.evaluation.only {
                true => own.keep_own(kind, &activity).await,
                false => following.run().await,
            }
        };
        let terms = LeaseTerms { most_samples: rows, records_routes: spec.rollout.router_replay };
        serve(membership, engine, outputs, terms, weights).await
    }
}

/// The engine of an earlier registration where it serves for this one; else another, once the old one has given its memory back.
async fn ready_engine(kept: &mut Option<EngineThread>, setup: Setup) -> Result<&EngineThread, ServeError> {
    let fatal = |problem: String| ServeError::Fatal(RolloutError::Engine(problem));
    if let Some(old) = kept.take_if(|engine| !engine.serves(&setup)) {
        let ended = tokio::task::spawn_blocking(move || old.end(ENGINE_PATIENCE)).await;
        if !matches!(ended, Ok(true)) {
            let waited = ENGINE_PATIENCE.as_secs();
            return Err(fatal(format!(
                "the engine of the job before does not come back from its pass within {waited} s"
            )));
        }
    }
    match kept {
        Some(engine) => Ok(engine),
        None => {
            let started = EngineThread::start(setup).map_err(|error| fatal(format!("start the engine: {error}")))?;
            Ok(kept.insert(started))
        }
    }
}
