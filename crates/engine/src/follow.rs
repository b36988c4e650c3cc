//! Following the weights: what is announced is received while the engine generates, and given to it for its next pass.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pacs_protocol::v1;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_runtime::net::{PeerRole, RunChannel, Security};
use pacs_runtime::{Activity, Membership, Policy};
use pacs_weights::{
    Announcement, DataServer, FetchOptions, GroupTransport, HostStore, Receiver, ServerOptions, Shelf, Source,
    VersionId,
};
use tokio::sync::watch;

use crate::serve::client;
use crate::{CALL_DEADLINE, NotPrepared, RolloutEngine, RolloutError, ServeError};

/// How long one call waits for news.
const NEWS_WAIT: Duration = Duration::from_secs(10);
const AWAIT_WEIGHTS: Policy = Policy::new("AwaitWeights", NEWS_WAIT.saturating_add(CALL_DEADLINE));
/// Times in a row that a version is tried to be received before the registration is given up.
const ATTEMPTS: u32 = 3;

/// What a process has for the weights of its run; it outlives registrations.
#[derive(Debug)]
pub struct HostWeights {
    store: Arc<HostStore>,
    receiver: Receiver,
    server: DataServer,
}

impl HostWeights {
    /// Opens the store of a run on this host, and hands on at `bind` what is fetched.
    ///
    /// # Errors
    /// When there is no place for the store, or the address cannot be listened on.
    pub fn open(
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
        Ok(Self { store, receiver, server })
    }

    /// Where the versions of this host lie.
    #[must_use]
    pub fn store(&self) -> &Arc<HostStore> {
        &self.store
    }

    /// Gives the store up before the process ends, and removes it if no other process holds it: a transfer or a pass that is not waited
    /// for may hold it, so that it would never be dropped.
    pub fn leave(&self) {
        self.store.leave();
    }
}

/// Keeps the engine's weights the newest.
#[derive(Debug)]
pub struct Following<E> {
    client: RolloutServiceClient<RunChannel>,
    worker: u64,
    host: Arc<HostWeights>,
    engine: Arc<E>,
    activity: Activity,
    /// What was announced last.
    announced: watch::Sender<Option<Announcement>>,
    /// What was given to the engine last.
    given: watch::Sender<Option<VersionId>>,
}

impl<E: RolloutEngine + 'static> Following<E> {
    /// Follows the weights that the coordinator of a registration announces.
    #[must_use]
    pub fn new(membership: &Membership, host: Arc<HostWeights>, engine: Arc<E>) -> Self {
        let (announced, given) = (watch::Sender::new(None), watch::Sender::new(None));
        let (client, activity) = (client(membership), membership.activity.clone());
        Self { client, worker: membership.worker.0, host, engine, activity, announced, given }
    }

    /// Follows until the registration fails.
    ///
    /// # Errors
    /// Always; see [`ServeError`].
    pub async fn run(self) -> Result<Infallible, ServeError> {
        tokio::select! {
            listened = self.listen() => listened,
            received = self.receive() => received,
        }
    }

    /// Asks for news, and says what this worker holds.
    async fn listen(&self) -> Result<Infallible, ServeError> {
        let mut given = self.given.subscribe();
        loop {
            let has = *given.borrow_and_update();
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
                Ok(()) = given.changed() => continue,
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
            let given = *self.given.borrow();
            let is_news = |announced: &Option<Announcement>| {
                announced.as_ref().is_some_and(|announced| Some(announced.description.id()) != given)
            };
            let Some(wanted) = announced.wait_for(is_news).await.map_err(gone)?.clone() else { continue };
            let id = wanted.description.id();
            if self.engine.holds(&wanted.description) {
                self.given.send_replace(Some(id));
                continue;
            }
            if given.is_none() {
                self.activity.set("receiving weights");
            }
            match self.bring(wanted, &mut announced).await {
                Ok(weights) => {
                    failures = 0;
                    // Before others hear of it: groups that are given to the engine come after.
                    self.engine.install(weights);
                    self.given.send_replace(Some(id));
                }
                Err(NotPrepared::Refused(problem)) => return Err(ServeError::Fatal(RolloutError::Config(problem))),
                // There are newer ones by now.
                Err(NotPrepared::Failed(problem))
                    if self.announced.borrow().as_ref().is_some_and(|newest| newest.description.id() != id) =>
                {
                    tracing::debug!("{id} was not received: {problem}");
                }
                Err(NotPrepared::Failed(problem)) => {
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
    ) -> Result<E::Weights, NotPrepared> {
        let id = wanted.description.id();
        let cancelled = CancelOnDrop(Arc::default());
        let flag = Arc::clone(&cancelled.0);
        let (host, engine, find) = (Arc::clone(&self.host), Arc::clone(&self.engine), self.finder(id));
        let receiving = tokio::task::spawn_blocking(move || {
            let started = std::time::Instant::now();
            let failed = |error: &dyn std::fmt::Display| NotPrepared::Failed(error.to_string());
            let received = host.receiver.receive(&wanted, &find, &flag).map_err(|error| failed(&error))?;
            let weights = engine.prepare(&received, wanted.probe.as_ref())?;
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
            Ok(weights)
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
        received.map_err(|error| NotPrepared::Failed(format!("the receiving thread panicked: {error}")))?
    }

    /// Asks the coordinator who hands the version out.
    fn finder(&self, id: VersionId) -> impl Fn(&[String]) -> Result<Vec<Source>, String> + Send + Sync + use<E> {
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

/// Has a transfer that nobody waits for end soon.
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}
