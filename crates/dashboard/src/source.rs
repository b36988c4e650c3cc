use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use pacs_protocol::v1;

/// A pending answer of a [`Source`].
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, SourceError>> + Send + 'a>>;

/// Why a source has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The request is out of bounds.
    #[error("{0}")]
    Invalid(String),
    /// What was asked for does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The run cannot answer now.
    #[error("{0}")]
    Unavailable(String),
}

/// Where a dashboard reads a run: the calls of `ObserveService` and the status, whoever answers them.
///
/// Answers are bounded by the source as those of the RPCs are (4 MiB).
pub trait Source: Send + Sync + 'static {
    /// The status; `None` for a run that is over, of which only files are left.
    fn status(&self) -> Answer<'_, Option<Arc<v1::GetStatusResponse>>>;
    /// Metrics over the steps.
    fn metrics(&self, request: v1::GetMetricsRequest) -> Answer<'_, v1::GetMetricsResponse>;
    /// Samples, newest first.
    fn samples(&self, request: v1::ListSamplesRequest) -> Answer<'_, v1::ListSamplesResponse>;
    /// One sample with its tokens.
    fn sample(&self, request: v1::GetSampleRequest) -> Answer<'_, v1::GetSampleResponse>;
    /// The newest `past` events, oldest first.
    fn events(&self, past: u32) -> Answer<'_, Vec<Arc<v1::WatchResponse>>>;
}
