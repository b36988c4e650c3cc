//! The project's own engine behind the seam of all engines.

use std::convert::Infallible;
use std::sync::Arc;

use pacs_engine::{EngineGone, GroupJob, NotPrepared, RolloutEngine, RolloutError, ServeError};
use pacs_runtime::Activity;
use pacs_torch::tch::Kind;
use pacs_weights::{Description, HostStore, Probe, Received, VersionId};
use tokio::sync::watch;

use crate::thread::{Attached, Command, Setup};
use crate::weights::{BaseCell, MappedWeights, OWN, kind};

/// A registration's hold on the engine's thread.
pub(crate) struct NativeEngine {
    attached: Attached,
    setup: Arc<Setup>,
    store: Arc<HostStore>,
    /// What adapters are merged into.
    base: Arc<BaseCell>,
    capacity: watch::Sender<usize>,
    /// What the engine has, or will have before the commands that are sent next.
    serves: watch::Sender<Option<VersionId>>,
}

impl NativeEngine {
    pub(crate) fn new(attached: Attached, setup: Arc<Setup>, store: Arc<HostStore>, base: Arc<BaseCell>) -> Self {
        let (capacity, serves) = (watch::Sender::new(setup.options.rows), watch::Sender::new(None));
        Self { attached, setup, store, base, capacity, serves }
    }

    /// Gives the engine the model's own weights, which never change: nothing is trained, so nobody publishes any.
    pub(crate) async fn keep_own(&self, kind: Kind, activity: &Activity) -> Result<Infallible, ServeError> {
        // The engine of an earlier registration has them already; to read a large model again takes minutes.
        if self.attached.held() == Some(OWN) {
            self.serves.send_replace(Some(OWN));
            return std::future::pending().await;
        }
        activity.set("loading the model");
        let (store, setup) = (Arc::clone(&self.store), Arc::clone(&self.setup));
        let load = move || MappedWeights::of_model(&store, &setup, kind);
        let loaded = tokio::task::spawn_blocking(load).await;
        let loaded = loaded.map_err(|error| format!("the loading thread panicked: {error}")).and_then(|loaded| loaded);
        let loaded = loaded.map_err(|problem| ServeError::Fatal(RolloutError::Config(problem)))?;
        self.install(loaded);
        std::future::pending().await
    }
}

impl RolloutEngine for NativeEngine {
    type Weights = MappedWeights;

    fn capacity(&self) -> watch::Receiver<usize> {
        self.capacity.subscribe()
    }

    fn serves(&self) -> watch::Receiver<Option<VersionId>> {
        self.serves.subscribe()
    }

    /// The thread obeys in order, so what comes after weights is generated with them or with newer ones.
    fn generate(&self, job: GroupJob, _oldest: VersionId) -> Result<(), EngineGone> {
        self.attached.commands.send(Command::Generate(job)).map_err(|_| EngineGone)
    }

    fn cancel(&self, ticket: u64) {
        // A thread that is gone is noticed by what it does not say.
        let _ = self.attached.commands.send(Command::Cancel { ticket });
    }

    fn holds(&self, wanted: &Description) -> bool {
        let holds = self.attached.holds(wanted);
        if holds {
            // They were given by an earlier registration.
            self.serves.send_replace(Some(wanted.id()));
        }
        holds
    }

    /// The weights are mapped from the file whose digests were verified, so there is nothing to probe.
    fn prepare(&self, received: &Received, _probe: Option<&Arc<Probe>>) -> Result<MappedWeights, NotPrepared> {
        let description = received.whole.description();
        let loaded = match self.setup.trained().lora {
            None => MappedWeights::map(received, self.setup.config()),
            Some(_) => {
                let base = self.base.get(&self.store, &self.setup, kind(description.kind()));
                MappedWeights::map_adapters(received, base.map_err(NotPrepared::Failed)?)
            }
        };
        loaded.map_err(|error| match error.is_final() {
            true => NotPrepared::Refused(format!("use {}: {error}", description.id())),
            false => NotPrepared::Failed(error.to_string()),
        })
    }

    fn install(&self, weights: MappedWeights) {
        let id = self.attached.give(weights);
        self.serves.send_replace(Some(id));
    }
}
