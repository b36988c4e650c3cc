//! The run that a process belongs to, named in every call that it makes and checked in every call that it takes.
//!
//! Ports and names are reused: workers of a killed run must not work for the next run at the same address. So each call
//! names the caller's run in its metadata, and [`Guard`](super::Guard) compares it.

use std::sync::{Arc, OnceLock};

use tonic::codegen::http;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::trace::{self, TRACEPARENT, TraceContext};

/// Metadata key of the run identifier, on calls and on refusals by a server of another run.
pub const RUN_ID_KEY: &str = "pacs-run-id";

/// A channel whose calls name the caller's run.
pub type RunChannel = InterceptedService<Channel, Caller>;

/// The run of a process. It is set at the start or by the first registration, and kept for the life of the process.
/// Clones share it.
#[derive(Clone, Debug, Default)]
pub struct RunIdentity(Arc<OnceLock<Known>>);

#[derive(Debug)]
struct Known {
    id: String,
    /// The id as a metadata value.
    value: MetadataValue<Ascii>,
}

/// The text is not a run identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not a run identifier: expected 32 lower-case hexadecimal digits", .0.escape_debug())]
pub struct NoRunId(pub String);

impl RunIdentity {
    /// The run `id`; an empty text means that it is not known yet.
    ///
    /// # Errors
    /// When `id` is neither empty nor 32 lower-case hexadecimal digits.
    pub fn told(id: &str) -> Result<Self, NoRunId> {
        let identity = Self::default();
        if !id.is_empty() {
            identity.tell(id)?;
        }
        Ok(identity)
    }

    /// The identifier; `None` while it is not known.
    #[must_use]
    pub fn get(&self) -> Option<&str> {
        self.0.get().map(|known| known.id.as_str())
    }

    /// Sets the run to `id` if none is known. Returns whether `id` is the run of this process.
    ///
    /// # Errors
    /// When `id` is not a run identifier.
    pub fn tell(&self, id: &str) -> Result<bool, NoRunId> {
        let value = MetadataValue::try_from(id).ok().filter(|_| is_run_id(id)).ok_or_else(|| NoRunId(id.to_owned()))?;
        Ok(self.0.get_or_init(|| Known { id: id.to_owned(), value }).id == id)
    }
}

/// Whether a text is a run identifier. What peers send is compared, logged and shown only if it is.
#[must_use]
pub fn is_run_id(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The run that the metadata of a call or refusal names, if any.
///
/// # Errors
/// When the value is not a run identifier.
pub(crate) fn run_in(metadata: &MetadataMap) -> Result<Option<&str>, NoRunId> {
    let Some(value) = metadata.get(RUN_ID_KEY) else { return Ok(None) };
    let text = value.to_str().ok().filter(|text| is_run_id(text));
    text.map(Some).ok_or_else(|| NoRunId(String::from_utf8_lossy(value.as_encoded_bytes()).chars().take(40).collect()))
}

/// The run of the server that refused a call as one of another run.
pub(crate) fn run_of_refusal(status: &Status) -> Option<&str> {
    run_in(status.metadata()).ok().flatten()
}

/// The refusal of a caller that belongs to another run; its metadata names `ours`.
pub(crate) fn other_run(ours: &str, message: String) -> Status {
    let mut status = Status::aborted(message);
    if let Ok(value) = MetadataValue::try_from(ours) {
        status.metadata_mut().insert(RUN_ID_KEY, value);
    }
    status
}

/// Interceptor that adds the caller's run and trace to every call.
#[derive(Clone, Debug, Default)]
pub struct Caller(RunIdentity);

impl Interceptor for Caller {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(known) = self.0.0.get() {
            request.metadata_mut().insert(RUN_ID_KEY, known.value.clone());
        }
        let context = trace::current().unwrap_or_else(TraceContext::random);
        request.metadata_mut().insert(TRACEPARENT, context.metadata());
        Ok(request)
    }
}

/// A channel whose calls name `run`.
#[must_use]
pub fn of_run(channel: Channel, run: RunIdentity) -> RunChannel {
    InterceptedService::new(channel, Caller(run))
}

/// Path of the called method, for guards, because interceptors do not see it otherwise.
#[derive(Clone, Debug)]
pub(super) struct CalledPath(http::uri::PathAndQuery);

impl CalledPath {
    /// Whether it is the method that workers call before they know their run.
    pub(super) fn is_registration(&self) -> bool {
        self.0.path() == "/pacs.v1.WorkerService/Register"
    }
}

/// Records the called path in a request's extensions.
pub(super) fn with_called_path<B>(mut request: http::Request<B>) -> http::Request<B> {
    if let Some(path) = request.uri().path_and_query().cloned() {
        request.extensions_mut().insert(CalledPath(path));
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "ffffffffffffffffffffffffffffffff";

    #[test]
    fn the_first_run_that_is_told_stays() {
        let identity = RunIdentity::told("").expect("none yet");
        assert_eq!(identity.get(), None);
        let clone = identity.clone();
        assert_eq!(identity.tell(RUN), Ok(true));
        assert_eq!(clone.tell(OTHER), Ok(false));
        assert_eq!((identity.get(), clone.get()), (Some(RUN), Some(RUN)));
    }

    #[test]
    fn only_run_identifiers_are_taken() {
        for text in ["x", "0123456789ABCDEF0123456789ABCDEF", "0123456789abcdef0123456789abcde", "\u{1b}[31m"] {
            assert!(RunIdentity::told(text).is_err(), "{text:?}");
            assert!(!is_run_id(text), "{text:?}");
        }
        let error = RunIdentity::told("\u{1b}[31m").expect_err("control characters");
        assert!(error.to_string().starts_with("`\\u{1b}[31m` is not a run identifier"), "{error}");
    }

    #[test]
    fn calls_say_the_run_once_it_is_known() {
        let identity = RunIdentity::default();
        let mut caller = Caller(identity.clone());
        let call = |caller: &mut Caller| caller.call(Request::new(())).expect("sent");
        assert_eq!(run_in(call(&mut caller).metadata()), Ok(None));
        identity.tell(RUN).expect("a run");
        assert_eq!(run_in(call(&mut caller).metadata()), Ok(Some(RUN)));
        assert_eq!(run_in(other_run(OTHER, "no".into()).metadata()), Ok(Some(OTHER)));
        let mut metadata = MetadataMap::new();
        metadata.insert(RUN_ID_KEY, "a run".parse().expect("a value"));
        assert_eq!(run_in(&metadata), Err(NoRunId("a run".into())));
    }
}
