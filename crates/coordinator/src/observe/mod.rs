//! Looking at a run: its numbers, its samples, what happens.
//!
//! Whoever looks must not hold the run up. Files are read on threads of their own and outside of every lock, a few at a time; what
//! is asked of the driver is small and bounded; a status is made once for all who ask within half a second; and a watcher that does
//! not read loses events.

mod exporter;
mod feed;
mod history;
mod http;
mod in_flight;
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

use self::feed::Feed;
use self::in_flight::{Candidates, InFlight};
use self::query::{Found, Query};
pub use self::recorded::Recorded;
use self::recorded::Window;
use crate::FileError;
use crate::driver::{Poisoned, Shared, bounded};
use crate::progress::{Progress, RunEnd};

/// Calls that read files at once; others wait for them.
const READERS: usize = 4;
/// How long a call waits for its turn.
const READER_WAIT: Duration = Duration::from_secs(10);
/// Most watchers at once.
const MOST_WATCHERS: usize = 128;
/// How old a status may be that is given out.
const STATUS_AGE: Duration = Duration::from_millis(500);

/// Why something cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The request is out of its bounds.
    #[error("field `{field}` {problem}")]
    Invalid {
        /// Of the request.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// What was asked for is not there.
    #[error("{0}")]
    NotFound(String),
    /// The file system refuses.
    #[error(transparent)]
    File(FileError),
    /// The run of this process is about to end.
    #[error("{0}")]
    Ending(String),
    /// Too many look at once.
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

/// Looks at the run of a coordinator; clones share it.
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
    /// Held by who asks how full the disk is.
    disk: Arc<Semaphore>,
}

impl Observer {
    /// Starts to follow the run.
    pub(crate) fn start(
        shared: &Shared,
        (run_dir, run_id): (&Path, &str),
        security: Security,
        (events, end): (broadcast::Receiver<Progress>, watch::Receiver<Option<RunEnd>>),
    ) -> Self {
        let feed = Feed::new();
        // Ends with the run, or when it is closed.
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

    /// The status of the run, at most half a second old. Once somebody has panicked in the driver, the last one that is known: nobody
    /// sees the state any more, and the process is about to end.
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

    /// See `ObserveService.GetMetrics`.
    ///
    /// # Errors
    /// When the request is out of its bounds, the file cannot be read, or too many read at once.
    pub async fn metrics(&self, request: v1::GetMetricsRequest) -> Result<v1::GetMetricsResponse, ObserveError> {
        let recorded = Arc::clone(&self.0.recorded);
        self.read(move || recorded.metrics(&request)).await
    }

    /// See `ObserveService.ListSamples`.
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

    /// See `ObserveService.GetSample`.
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

    /// Reads files, a few calls at a time, on a thread that may block.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Result<T, ObserveError> + Send + 'static,
    ) -> Result<T, ObserveError> {
        let busy =
            |_| ObserveError::Busy(format!("{READERS} others have been reading for {} s", READER_WAIT.as_secs()));
        let turn = tokio::time::timeout(READER_WAIT, self.0.readers.acquire()).await.map_err(busy)?;
        let _turn = turn.map_err(|_| ObserveError::NotFound("the run is gone".into()))?;
        // A damaged file can make its reader panic; that is the end of this call and of nothing else.
        let read = tokio::task::spawn_blocking(read).await;
        read.unwrap_or_else(|_| Err(ObserveError::NotFound("what was asked for is damaged and cannot be read".into())))
    }
}
