//! The dashboard of the run: [`pacs_dashboard`] over this observer, with a key that stays in the run folder.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use pacs_dashboard::{Answer, Key, KeyError, Run, Server, ServerError, Source, SourceError};
use pacs_protocol::v1;
use pacs_spec::JobSpec;
use serde::{Deserialize, Serialize};

use super::{ObserveError, Observer};
use crate::FileError;
use crate::records::write_atomically;

/// Why the dashboard cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum DashboardError {
    /// Its key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// It cannot listen.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// Its address cannot be written into the run folder.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Where the dashboard of a run is served: `dashboard.json` in the run folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DashboardRecord {
    /// Address that was listened on, on the host of the coordinator.
    pub address: SocketAddr,
}

impl DashboardRecord {
    const FILE: &str = "dashboard.json";
    const KEY: &str = "dashboard.key";

    /// Reads the record and the key of a run folder; `None` where no dashboard was served.
    #[must_use]
    pub fn read(run_dir: &Path) -> Option<(Self, Key)> {
        let text = std::fs::read_to_string(run_dir.join(Self::FILE)).ok()?;
        Some((serde_json::from_str(&text).ok()?, Key::read(&run_dir.join(Self::KEY)).ok()?))
    }

    /// Removes the record, so that nobody is sent to the port of another process.
    pub(crate) fn forget(run_dir: &Path) {
        // There is none in most folders.
        let _ = std::fs::remove_file(run_dir.join(Self::FILE));
    }
}

impl Observer {
    /// Serves the dashboard of the run at a loopback address, until the server is dropped.
    ///
    /// # Errors
    /// When the address is not loopback or cannot be listened on, or the key or the record cannot be kept.
    pub async fn serve_dashboard(&self, address: SocketAddr, spec: &JobSpec) -> Result<Server, DashboardError> {
        let run_dir = &self.0.run_dir;
        let key = Key::of_file(&run_dir.join(DashboardRecord::KEY))?;
        let facts = [
            ("run id".to_owned(), self.0.run_id.clone()),
            ("program".to_owned(), format!("pacs {}", env!("CARGO_PKG_VERSION"))),
            ("run folder".to_owned(), run_dir.display().to_string()),
        ];
        let run = Run {
            name: spec.name.clone(),
            live: true,
            settings: spec.resolved_toml(),
            model: Some(spec.model.path.clone()),
            facts: facts.into(),
            source: Box::new(self.clone()),
        };
        let server = Server::bind(address, key, &self.0.run_id, vec![run]).await?;
        let record = DashboardRecord { address: server.address() };
        let path = run_dir.join(DashboardRecord::FILE);
        let text = serde_json::to_string(&record).expect("an address is JSON");
        write_atomically(&path, |file| file.write_all(text.as_bytes())).map_err(FileError::file("write", &path))?;
        Ok(server)
    }
}

impl Source for Observer {
    fn status(&self) -> Answer<'_, Option<Arc<v1::GetStatusResponse>>> {
        Box::pin(async { Ok(Some(Observer::status(self))) })
    }

    fn metrics(&self, request: v1::GetMetricsRequest) -> Answer<'_, v1::GetMetricsResponse> {
        Box::pin(async move { Observer::metrics(self, request).await.map_err(refused) })
    }

    fn samples(&self, request: v1::ListSamplesRequest) -> Answer<'_, v1::ListSamplesResponse> {
        Box::pin(async move { Observer::samples(self, request).await.map_err(refused) })
    }

    fn sample(&self, request: v1::GetSampleRequest) -> Answer<'_, v1::GetSampleResponse> {
        Box::pin(async move { Observer::sample(self, request).await.map_err(refused) })
    }

    fn events(&self, past: u32) -> Answer<'_, Vec<Arc<v1::WatchResponse>>> {
        Box::pin(async move { Ok(self.0.feed.subscribe(past as usize).past) })
    }
}

fn refused(error: ObserveError) -> SourceError {
    let message = error.to_string();
    match error {
        ObserveError::Invalid { .. } => SourceError::Invalid(message),
        ObserveError::NotFound(_) => SourceError::NotFound(message),
        ObserveError::File(_) | ObserveError::Ending(_) | ObserveError::Busy(_) => SourceError::Unavailable(message),
    }
}
