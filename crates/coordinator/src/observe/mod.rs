//! The read-only view of a run: its metrics, its samples and its events.
//!
//! Observers must not slow the run down. Files are read on blocking threads outside of every lock, a few at a time;
//! requests to the driver are small and bounded; one status serves all who ask within half a second; and a watcher that
//! does not read loses events.

mod dashboard;
mod exporter;
mod feed;
mod history;
mod http;
mod in_flight;
mod otlp;
mod query;
mod recorded;
mod watching;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pacs_protocol::v1;
use pacs_runtime::net::Security;
use pacs_types::{GroupId, SampleId};
use tokio::sync::{Semaphore, broadcast, watch};

pub use self::dashboard::{DashboardError, DashboardRecord};
use self::feed::Feed;
use self::in_flight::{Candidates, InFlight};
pub use self::otlp::{TraceExport, TraceExportError};
use self::query::{Found, Query};
pub use self::recorded::Recorded;
use self::recorded::Window;
use crate::FileError;
use crate::driver::{Poisoned, Shared, bounded};
use crate::progress::{Progress, RunEnd};

/// Concurrent calls that read files; others wait for a turn.
const READERS: usize = 4;
/// Longest wait for a turn.
const READER_WAIT: Duration = Duration::from_secs(10);
/// Bound on concurrent watchers.
const MOST_WATCHERS: usize = 128;
/// Age up to which a status is reused.
const STATUS_AGE: Duration = Duration::from_millis(500);

/// Why a request to observe the run fails.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// A field of the request is out of bounds.
    #[error("field `{field}` {problem}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it, and what is expected.
        problem: String,
    },
    /// What was asked for does not exist.
    #[error("{0}")]
    NotFound(String),
    /// A file could not be read.
    #[error(transparent)]
    File(FileError),
    /// The coordinator process is about to end.
    #[error("{0}")]
    Ending(String),
    /// Too many observers at once.
    #[error("{0}; try again")]
    Busy(String),
}

impl From<Poisoned> for ObserveError {
    fn from(poisoned: Poisoned) -> Self {
        Self::Ending(poisoned.to_string())
    }
}

impl ObserveError {
    fn invalid(field: &'static str, problem: String) -> Self {
        Self::Invalid { field, problem }
    }
}

/// A read-only view of a coordinator's run; clones share it.
#[derive(Clone, Debug)]
pub struct Observer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shared: Shared,
    recorded: Arc<Recorded>,
    feed: Feed,
    readers: Semaphore,
    watchers: Arc<Semaphore>,
    status: Mutex<Option<(Instant, Arc<v1::GetStatusResponse>)>>,
    run_dir: PathBuf,
    run_id: String,
    security: Security,
    /// Held while the disk is asked for its free space.
    disk: Arc<Semaphore>,
}

impl Observer {
    /// Starts to collect events of the run.
    pub(crate) fn start(
        shared: &Shared,
        (run_dir, run_id): (&Path, &str),
        security: Security,
        (events, end): (broadcast::Receiver<Progress>, watch::Receiver<Option<RunEnd>>),
    ) -> Self {
        let feed = Feed::new();
        // Ends with the run, or when the feed is closed.
        tokio::spawn(feed.clone().follow(events, end));
        Self(Arc::new(Inner {
            shared: shared.clone(),
            recorded: Arc::new(Recorded::new(run_dir)),
            feed,
            readers: Semaphore::new(READERS),
            watchers: Arc::new(Semaphore::new(MOST_WATCHERS)),
            status: Mutex::default(),
            run_dir: run_dir.to_owned(),
            run_id: run_id.to_owned(),
            security,
            disk: Arc::new(Semaphore::new(1)),
        }))
    }

    /// Ends the streams of all watchers.
    pub(crate) fn close(&self) {
        self.0.feed.close();
    }

    /// The status of the run, at most half a second old. After a panic in the driver it is the last known one, because
    /// the state is unusable and the process is about to end.
    #[must_use]
    pub fn status(&self) -> Arc<v1::GetStatusResponse> {
        let mut kept = self.0.status.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((made, status)) if made.elapsed() < STATUS_AGE => Arc::clone(status),
            known => {
                let Ok(driver) = self.0.shared.lock() else {
                    return known.as_ref().map(|(_, status)| Arc::clone(status)).unwrap_or_default();
                };
                let status = driver.status();
                drop(driver);
                let status = Arc::new(bounded(status));
                *kept = Some((Instant::now(), Arc::clone(&status)));
                status
            }
        }
    }

    /// Returns metrics over the steps; implements `ObserveService.GetMetrics`.
    ///
    /// # Errors
    /// When the request is out of bounds, the file cannot be read, or too many calls read at once.
    pub async fn metrics(&self, request: v1::GetMetricsRequest) -> Result<v1::GetMetricsResponse, ObserveError> {
        let recorded = Arc::clone(&self.0.recorded);
        self.read(move || recorded.metrics(&request)).await
    }

    /// Lists samples, newest first; implements `ObserveService.ListSamples`.
    ///
    /// # Errors
    /// As [`Self::metrics`].
    pub async fn samples(&self, request: v1::ListSamplesRequest) -> Result<v1::ListSamplesResponse, ObserveError> {
        let query = Query::new(request)?;
        let in_flight = match query.wants_in_flight() {
            true => Some(Candidates::of(&*self.0.shared.lock()?, &query)),
            false => None,
        };
        let recorded = Arc::clone(&self.0.recorded);
        self.read(move || {
            let mut found = Found::new(query);
            if let Some(candidates) = in_flight {
                candidates.search(&mut found);
            }
            if !found.is_full() {
                recorded.search(&mut found)?;
            }
            Ok(found.into_response())
        })
        .await
    }

    /// Returns one sample with its tokens; implements `ObserveService.GetSample`.
    ///
    /// # Errors
    /// As [`Self::metrics`], and when there is no such sample.
    pub async fn sample(&self, request: v1::GetSampleRequest) -> Result<v1::GetSampleResponse, ObserveError> {
        let window = Window::new(&request)?;
        let id = SampleId { group: GroupId(request.group_id), index: request.index };
        let in_flight = match request.step {
            None => InFlight::of(&*self.0.shared.lock()?, id),
            Some(_) => None,
        };
        let recorded = Arc::clone(&self.0.recorded);
        self.read(move || match in_flight {
            Some((sample, problems)) => sample.whole(&problems, window),
            None => recorded.sample(&request),
        })
        .await
    }

    /// Reads files on a blocking thread; only a few calls at a time.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Result<T, ObserveError> + Send + 'static,
    ) -> Result<T, ObserveError> {
        let busy =
            |_| ObserveError::Busy(format!("{READERS} others have been reading for {} s", READER_WAIT.as_secs()));
        let turn = tokio::time::timeout(READER_WAIT, self.0.readers.acquire()).await.map_err(busy)?;
        let _turn = turn.map_err(|_| ObserveError::NotFound("the run is gone".into()))?;
        // A damaged file can make its reader panic, which must only end this call.
        let read = tokio::task::spawn_blocking(read).await;
        read.unwrap_or_else(|_| Err(ObserveError::NotFound("what was asked for is damaged and cannot be read".into())))
    }
}
