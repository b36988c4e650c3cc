//! Publishing weight versions to the rollout workers: in the store of this host, and to other hosts through
//! the data server.

use std::sync::{Arc, Mutex, PoisonError};

use pacs_model::Parameters;
use pacs_protocol::v1;
use pacs_runtime::net::Security;
use pacs_torch::bytes;
use pacs_torch::tch::Device;
use pacs_weights::{
    Adapted, Announcement, DataServer, GroupTransport, HostStore, Probe, ServerOptions, Shelf, StoreError, VersionId,
};

use crate::weights::weight_kind;

/// Writes weight versions where rollout workers find them, and retires old ones.
#[derive(Debug)]
pub(super) struct Publisher {
    store: HostStore,
    shelf: Shelf,
    server: DataServer,
    /// The version published last. It stays readable while the next one is written, since a worker may still
    /// be fetching it.
    newest: Mutex<Option<VersionId>>,
}

/// Why weights cannot be published.
#[derive(Debug, thiserror::Error)]
pub(super) enum PublishError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("serve weights at `{address}`: {error}")]
    Listen { address: String, error: std::io::Error },
}

impl Publisher {
    /// Opens the store and the data server of run `run`; other hosts fetch at `bind` or receive over `broadcast`.
    pub(super) fn new(
        run: &str,
        bind: &str,
        security: &Security,
        broadcast: Option<Arc<dyn GroupTransport>>,
    ) -> Result<Self, PublishError> {
        let store = HostStore::open(run)?;
        let shelf = Shelf::default();
        let address = format!("{bind}:0");
        let options = ServerOptions { broadcast, ..ServerOptions::new(security.clone(), run) };
        let server = DataServer::start(&address, shelf.clone(), options);
        let server = server.map_err(|error| PublishError::Listen { address, error })?;
        Ok(Self { store, shelf, server, newest: Mutex::new(None) })
    }

    /// Removes the published weights before the process ends, unless rollout workers of this host still use them.
    pub(super) fn leave(&self) {
        self.store.leave();
    }

    /// Publishes the weights as `version` of `generation` and returns their announcement, which carries `probe`; `adapted` says what they
    /// adapt, where they are adapters.
    pub(super) fn publish(
        &self,
        parameters: &Parameters,
        adapted: Option<&Adapted>,
        generation: u64,
        version: u64,
        probe: Option<Probe>,
    ) -> anyhow::Result<v1::WeightsRef> {
        let on_host;
        let flat = if parameters.flat.device() == Device::Cpu {
            &parameters.flat
        } else {
            on_host = parameters.flat.to_device(Device::Cpu);
            &on_host
        };
        let id = VersionId::new(generation, version);
        // Everything before the newest version goes first: memory holds two versions at most, never three.
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(newest) = *newest {
            self.store.retire_before(newest);
            self.shelf.retire_before(newest);
        }
        let kind = weight_kind(flat.kind());
        let content = bytes(flat)?;
        let whole = match adapted {
            None => self.store.publish(id, kind, content)?,
            Some(adapted) => self.store.publish_adapters(id, kind, adapted, content)?,
        };
        self.shelf.put(&whole);
        *newest = Some(id);
        let (description, address) = (whole.description().clone(), self.server.address().to_string());
        Ok((&Announcement { description, address, probe: probe.map(Arc::new) }).into())
    }
}
