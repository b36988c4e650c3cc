//! Following the weights: what is announced is received while the engine generates, and given to it for its next pass.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pacs_protocol::v1;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_runtime::net::{PeerRole, RunChannel, Security};
use pacs_runtime::{Activity, Policy};
use pacs_torch::tch::Kind;
use pacs_weights::{
    Announcement, DataServer, FetchOptions, GroupTransport, HostStore, Receiver, ServerOptions, Shelf, Source,
    VersionId,
};
use tokio::sync::watch;

use crate::service::{CALL_DEADLINE, RolloutError, ServeError};
use crate::thread::{Attached, Setup};
use crate::weights::{BaseCell, MappedWeights, OWN, kind};

/// How long one call waits for news.
const NEWS_WAIT: Duration = Duration::from_secs(10);
const AWAIT_WEIGHTS: Policy = Policy::new("AwaitWeights", NEWS_WAIT.saturating_add(CALL_DEADLINE));
/// Times in a row that a version is tried to be received before the registration is given up.
const ATTEMPTS: u32 = 3;

/// What a process has for the weights of its run; it outlives registrations.
#[derive(Debug)]
pub(crate) struct HostWeights {
    store: Arc<HostStore>,
    receiver: Receiver,
    server: DataServer,
    /// What adapters are merged into.
    base: BaseCell,
}

impl HostWeights {
    /// Opens the store of a run on this host, and hands on at `bind` what is fetched.
    pub(crate) fn open(
        run: &str,
        bind: &str,
        security: &Security,
        broadcast: Option<Arc<dyn GroupTransport>>,
    ) -> Result<Self, String> {
        let store = Arc::new(HostStore::open(run).map_err(|error| error.to_string())?);
        let shelf = Shelf::default();
        let address = format!("{bind}:0");
        let server = DataServer::start(&address, shelf.clone(), ServerOptions::new(security.clone(), run));
        let server = server.map_err(|error| format!("hand on weights at `{address}`: {error}"))?;
        let receiver = Receiver::new(Arc::clone(&store), shelf, FetchOptions::new(security.clone(), run));
        let receiver = receiver.with_broadcast(broadcast);
        Ok(Self { store, receiver, server, base: BaseCell::default() })
    }
}

/// Keeps the engine's weights the newest.
pub(crate) struct Following {
    client: RolloutServiceClient<RunChannel>,
    worker: u64,
    host: Arc<HostWeights>,
    setup: Arc<Setup>,
    engine: Attached,
    activity: Activity,
    /// What was announced last.
    announced: watch::Sender<Option<Announcement>>,
    /// What the engine has, or will have before the commands that are sent next.
    held: watch::Sender<Option<VersionId>>,
}

impl Following {
    pub(crate) fn new(
        client: RolloutServiceClient<RunChannel>,
        worker: u64,
        host: Arc<HostWeights>,
        setup: Arc<Setup>,
        engine: Attached,
        activity: Activity,
    ) -> Self {
        let (announced, held) = (watch::Sender::new(None), watch::Sender::new(None));
        Self { client, worker, host, setup, engine, activity, announced, held }
    }

    /// The version that groups are generated with which are given to the engine from now on.
    pub(crate) fn held(&self) -> watch::Receiver<Option<VersionId>> {
        self.held.subscribe()
    }

    /// Gives the engine the model's own weights, which never change: nothing is trained, so nobody publishes any.
    pub(crate) async fn keep_own(self, kind: Kind) -> Result<Infallible, ServeError> {
        // The engine of an earlier registration has them already; to read a large model again takes minutes.
        if self.engine.held() == Some(OWN) {
            self.held.send_replace(Some(OWN));
            return std::future::pending().await;
        }
        self.activity.set("loading the model");
        let (host, setup) = (Arc::clone(&self.host), Arc::clone(&self.setup));
        let load = move || MappedWeights::of_model(&host.store, &setup, kind);
        let loaded = tokio::task::spawn_blocking(load).await;
        let loaded = loaded.map_err(|error| format!("the loading thread panicked: {error}")).and_then(|loaded| loaded);
        let loaded = loaded.map_err(|problem| ServeError::Fatal(RolloutError::Config(problem)))?;
        self.held.send_replace(Some(self.engine.give(loaded)));
        std::future::pending().await
    }

    pub(crate) async fn run(self) -> Result<Infallible, ServeError> {
        tokio::select! {
            listened = self.listen() => listened,
            received = self.receive() => received,
        }
    }

    /// Asks for news, and says what this worker holds.
    async fn listen(&self) -> Result<Infallible, ServeError> {
        let mut held = self.held.subscribe();
        loop {
            let has = *held.borrow_and_update();
            let known = self.announced.borrow().as_ref().map(|announcement| announcement.description.clone());
            let id = known.as_ref().map(pacs_weights::Description::id);
            let request = v1::AwaitWeightsRequest {
                worker_id: self.worker,
                digest: known.as_ref().map(|known| known.digest().to_vec().into()).unwrap_or_default(),
                generation: id.map_or(0, |id| id.generation.0),
                version: id.map_or(0, |id| id.version.0),
                held: id.is_some() && id == has,
                wait_ms: NEWS_WAIT.as_millis() as u32,
            };
            let call = || {
                let (mut client, request) = (self.client.clone(), request.clone());
                async move { client.await_weights(request).await }
            };
            let reply = tokio::select! {
                reply = AWAIT_WEIGHTS.run(call) => reply?,
                // The coordinator hears of it at once, for it may name this host to others.
                Ok(()) = held.changed() => continue,
            };
            let Some(weights) = reply.weights else { continue };
            let announcement = Announcement::try_from(&weights)
                .map_err(|error| ServeError::Rejoin(format!("the announced weights are malformed: {error}")))?;
            self.announced.send_replace(Some(announcement));
        }
    }

    /// Receives what is announced.
    async fn receive(&self) -> Result<Infallible, ServeError> {
        let mut announced = self.announced.subscribe();
        let mut failures = 0;
        loop {
            let gone = |_| ServeError::Rejoin("the listening side ended".into());
            let held = *self.held.borrow();
            let is_news = |announced: &Option<Announcement>| {
                announced.as_ref().is_some_and(|announced| Some(announced.description.id()) != held)
            };
            let Some(wanted) = announced.wait_for(is_news).await.map_err(gone)?.clone() else { continue };
            let id = wanted.description.id();
            if self.engine.holds(&wanted.description) {
                self.held.send_replace(Some(id));
                continue;
            }
            if held.is_none() {
                self.activity.set("receiving weights");
            }
            match self.bring(wanted, &mut announced).await {
                Ok(loaded) => {
                    failures = 0;
                    // Before others hear of it: groups that are given to the engine come after.
                    self.held.send_replace(Some(self.engine.give(loaded)));
                }
                Err(NotBrought::Refused(problem)) => return Err(ServeError::Fatal(RolloutError::Config(problem))),
                // There are newer ones by now.
                Err(NotBrought::Failed(problem))
                    if self.announced.borrow().as_ref().is_some_and(|newest| newest.description.id() != id) =>
                {
                    tracing::debug!("{id} was not received: {problem}");
                }
                Err(NotBrought::Failed(problem)) => {
                    failures += 1;
                    if failures >= ATTEMPTS {
                        return Err(ServeError::Rejoin(format!("receive {id}: {problem}")));
                    }
                    tracing::warn!("{id} was not received, trying again: {problem}");
                }
            }
        }
    }

    async fn bring(
        &self,
        wanted: Announcement,
        announced: &mut watch::Receiver<Option<Announcement>>,
    ) -> Result<MappedWeights, NotBrought> {
        let id = wanted.description.id();
        let cancelled = CancelOnDrop(Arc::default());
        let flag = Arc::clone(&cancelled.0);
        let (host, setup, find) = (Arc::clone(&self.host), Arc::clone(&self.setup), self.finder(id));
        let receiving = tokio::task::spawn_blocking(move || {
            let started = std::time::Instant::now();
            let failed = |error: &dyn std::fmt::Display| NotBrought::Failed(error.to_string());
            let received = host.receiver.receive(&wanted, &find, &flag).map_err(|error| failed(&error))?;
            let loaded = match setup.trained().lora {
                None => MappedWeights::map(&received, setup.config()),
                Some(_) => {
                    let base = host.base.get(&host.store, &setup, kind(wanted.description.kind()));
                    MappedWeights::map_adapters(&received, base.map_err(|error| failed(&error))?)
                }
            };
            let loaded = loaded.map_err(|error| match error.is_final() {
                true => NotBrought::Refused(format!("use {id}: {error}")),
                false => failed(&error),
            })?;
            tracing::debug!(
                generation = id.generation.0,
                version = id.version.0,
                transport = received.transport.name(),
                fetched_bytes = received.fetched.bytes,
                broadcast_bytes = received.fetched.broadcast_bytes,
                resumed_pieces = received.fetched.resumed_pieces,
                wrong_pieces = received.fetched.wrong_pieces,
                seconds = started.elapsed().as_secs_f64(),
                "weights received"
            );
            Ok(loaded)
        });
        tokio::pin!(receiving);
        // One that comes while another is on its way is the next; two, and this one has gone where it comes from.
        let is_past = |newest: &Option<Announcement>| {
            let newest = newest.as_ref().map(|newest| newest.description.id());
            newest.is_some_and(|newest| {
                newest.generation != id.generation || newest.version.0 > id.version.0.saturating_add(1)
            })
        };
        let received = tokio::select! {
            received = &mut receiving => received,
            // What it returns locks the value, which the listening side is to change.
            () = async { drop(announced.wait_for(is_past).await) } => {
                cancelled.0.store(true, Ordering::Release);
                receiving.await
            }
        };
        received.map_err(|error| NotBrought::Failed(format!("the receiving thread panicked: {error}")))?
    }

    /// Asks the coordinator who hands the version out.
    fn finder(&self, id: VersionId) -> impl Fn(&[String]) -> Result<Vec<Source>, String> + Send + Sync + use<> {
        let (client, worker_id) = (self.client.clone(), self.worker);
        let address = self.host.server.address().to_string();
        let runtime = tokio::runtime::Handle::current();
        move |failed| {
            let mut client = client.clone();
            let request = v1::FindSourcesRequest {
                worker_id,
                generation: id.generation.0,
                version: id.version.0,
                address: address.clone(),
                failed: failed.to_vec(),
            };
            let call = async move { tokio::time::timeout(CALL_DEADLINE, client.find_sources(request)).await };
            let reply = runtime.block_on(call).map_err(|_| "the coordinator does not answer".to_owned())?;
            let reply = reply.map_err(|status| status.message().to_owned())?.into_inner();
            let source = |source: v1::WeightSource| {
                let role = match source.role() {
                    v1::Role::Learner => PeerRole::Learner,
                    _ => PeerRole::Rollout,
                };
                Source { address: source.address, role }
            };
            Ok(reply.sources.into_iter().map(source).collect())
        }
    }
}

/// Why a version was not brought to the engine.
#[derive(Debug)]
enum NotBrought {
    /// Another try may succeed.
    Failed(String),
    /// It is not for this worker, and no version after it will be.
    Refused(String),
}

/// Has a transfer that nobody waits for end soon.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
