//! The rollout worker that drives vLLM servers.

use std::convert::Infallible;
use std::sync::Arc;

use pacs_engine::{Following, HostWeights, LeaseTerms, RolloutError, ServeError, serve};
use pacs_runtime::{Activity, Exit, Link, Membership, Shutdown, Worker, WorkerIdentity, work};
use pacs_spec::{JobSpec, RolloutEngineKind};
use pacs_types::Role;
use tokio::sync::watch;

use crate::engine::{VllmEngine, VllmOptions};

/// How to run the worker.
#[derive(Clone, Debug)]
pub struct VllmWorkerOptions {
    /// How the coordinator is reached.
    pub link: Link,
    /// Stable name of the process slot, for example `rollout-0`.
    pub name: String,
    /// Address at which rollout workers of other hosts reach this process, to fetch weights; the port is chosen freely.
    pub bind: String,
    /// Servers and their key.
    pub vllm: VllmOptions,
}

/// Works until the coordinator says that the job is over, or shutdown is requested.
///
/// A lost registration is followed by a new one; the work in hand is dropped, as the coordinator gives it to somebody else.
///
/// # Errors
/// See [`RolloutError`].
pub async fn run(options: VllmWorkerOptions, shutdown: Shutdown) -> Result<Exit, RolloutError> {
    let identity =
        WorkerIdentity { role: Role::Rollout, name: options.name.clone(), collective_address: String::new() };
    let link = options.link.clone();
    let mut rollout = Rollout { options, engine: None, weights: None };
    let result = work(&link, &identity, &shutdown, &mut rollout).await;
    rollout.weights.iter().for_each(|weights| weights.leave());
    result
}

/// What outlives a registration.
struct Rollout {
    options: VllmWorkerOptions,
    engine: Option<VllmEngine>,
    weights: Option<Arc<HostWeights>>,
}

impl Worker for Rollout {
    type Error = RolloutError;

    async fn serve(&mut self, membership: &Membership) -> Result<Infallible, ServeError> {
        let config = |problem: String| ServeError::Fatal(RolloutError::Config(problem));
        let spec: JobSpec =
            toml::from_str(&membership.job_spec).map_err(|error| config(format!("job spec: {error}")))?;
        if spec.rollout.engine != RolloutEngineKind::Vllm {
            let problem =
                "`rollout.engine` of the job is \"native\": its rollout workers are started as `pacs-worker rollout`";
            return Err(config(problem.to_owned()));
        }
        let run_id = membership.run_id.get().unwrap_or_default();
        let VllmWorkerOptions { bind, link, name, vllm } = &self.options;
        let weights = match &self.weights {
            Some(weights) => Arc::clone(weights),
            None => {
                let opened = HostWeights::open(run_id, bind, &link.security, None).map_err(config)?;
                Arc::clone(self.weights.insert(Arc::new(opened)))
            }
        };
        self.engine.take_if(|engine| !engine.serves_for(&spec));
        let engine = match &self.engine {
            Some(engine) => engine,
            None => self.engine.insert(VllmEngine::start(&spec, run_id, name, vllm).map_err(config)?),
        };
        let (attached, outputs) = engine.attach();
        let attached = Arc::new(attached);
        let following = Following::new(membership, weights, Arc::clone(&attached));
        // Servers are asked for no routes, and a spec that wants some is refused.
        let terms = LeaseTerms { most_samples: spec.rollout.max_concurrent_samples as usize, records_routes: false };
        tokio::select! {
            result = serve(membership, attached, outputs, terms, following.run()) => result,
            gone = show(engine.servers(), &membership.activity) => Err(gone),
        }
    }
}

/// Shows the servers in the status of the run.
async fn show(mut servers: watch::Receiver<Vec<pacs_protocol::v1::EngineServer>>, activity: &Activity) -> ServeError {
    loop {
        let now = servers.borrow_and_update().clone();
        activity.set_servers(now);
        if servers.changed().await.is_err() {
            return ServeError::Rejoin("the engine ended".to_owned());
        }
    }
}
