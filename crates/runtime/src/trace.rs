//! Correlates the log lines of several processes by trace id.
//!
//! A trace is a unit of work: a group of samples, a training step, or else one call. Its id is in the log lines of
//! every process that works on it, and travels with calls as W3C trace context (`traceparent`). Ids of groups and steps
//! are derived from the run, so that every process computes the same one without a message, and so can a person. Spans
//! are not exported; they exist in the log only.

use std::fmt;

use tonic::codegen::http;
use tonic::metadata::{Ascii, MetadataValue};
use tracing::field::Empty;
use tracing::instrument::Instrumented;
use tracing::{Instrument, Span};

use crate::net::RunIdentity;

/// Metadata key of the W3C trace context.
pub(crate) const TRACEPARENT: &str = "traceparent";

tokio::task_local! {
    /// The trace that the running task works on.
    static CURRENT: TraceContext;
}

/// A position in a trace: its id, and the span that calls are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Trace id, never 0.
    trace: u128,
    /// Span id, never 0.
    span: u64,
}

/// Id of a trace, displayed as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(u128);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl TraceContext {
    /// A new trace with a random id.
    #[must_use]
    pub fn random() -> Self {
        Self { trace: fastrand::u128(1..), span: fastrand::u64(1..) }
    }

    /// The trace of a group in a run.
    #[must_use]
    pub fn of_group(run: &str, group: u64) -> Self {
        Self::of(run, "group", group)
    }

    /// The trace of a training step in a run.
    #[must_use]
    pub fn of_step(run: &str, step: u64) -> Self {
        Self::of(run, "step", step)
    }

    /// Derives the id by 128-bit FNV-1a: spread well enough to avoid collisions within a run, and the same in every
    /// version of every program.
    fn of(run: &str, kind: &str, number: u64) -> Self {
        const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
        let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        for byte in run.bytes().chain(*b"/").chain(kind.bytes()).chain(*b"/").chain(number.to_be_bytes()) {
            hash = (hash ^ u128::from(byte)).wrapping_mul(PRIME);
        }
        Self { trace: hash.max(1), span: fastrand::u64(1..) }
    }

    /// A new span in the same trace.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span: fastrand::u64(1..), ..self }
    }

    /// The id that correlates log lines.
    #[must_use]
    pub fn trace_id(self) -> TraceId {
        TraceId(self.trace)
    }

    /// Parses a `traceparent` of version 00, or of a later one with the same beginning; `None` if it is malformed.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let mut hex = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits)?;
            let is_lower = part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            is_lower.then(|| u128::from_str_radix(part, 16).ok()).flatten()
        };
        let (version, trace, span, _flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let is_known = version == 0 && parts.next().is_none() || (1..0xff).contains(&version);
        (is_known && trace != 0 && span != 0).then_some(Self { trace, span: span as u64 })
    }

    /// The metadata for a call from this position.
    pub(crate) fn metadata(self) -> MetadataValue<Ascii> {
        let mut value = MetadataValue::try_from(self.to_string()).expect("digits and dashes are metadata");
        // Keeps it out of the header compression's table: no value comes twice, and each would push another header out.
        value.set_sensitive(true);
        value
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-01", self.trace, self.span)
    }
}

/// The trace of the running task, if it runs [`within`] one.
#[must_use]
pub fn current() -> Option<TraceContext> {
    CURRENT.try_with(|context| *context).ok()
}

/// A future that runs in a trace.
pub type Traced<F> = tokio::task::futures::TaskLocalFuture<TraceContext, Instrumented<F>>;

/// Runs a future in a trace: its calls carry the context, and its log lines are in `span`. Tasks that it spawns do not
/// inherit this, unless they are wrapped, too.
pub fn within<F: Future>(context: TraceContext, span: Span, future: F) -> Traced<F> {
    CURRENT.scope(context, future.instrument(span))
}

/// The first digits of a run id, for log lines.
#[must_use]
pub fn short(run: &RunIdentity) -> &str {
    run.get().map_or("", |id| &id[..8])
}

/// The span of an incoming call. The handler records what the call is about.
pub(crate) fn server_span(request: &http::Request<()>) -> Span {
    let said = request.headers().get(TRACEPARENT).and_then(|value| TraceContext::parse(value.to_str().ok()?));
    let context = said.unwrap_or_else(TraceContext::random);
    let method = request.uri().path().rsplit('/').next().unwrap_or_default();
    // They are most of a large fleet's calls, work on nothing, and hardly ever log a line.
    if method == "Heartbeat" {
        return tracing::debug_span!("call", method, trace_id = %context.trace_id());
    }
    tracing::info_span!(
        "call",
        method,
        trace_id = %context.trace_id(),
        worker = Empty,
        group = Empty,
        sample = Empty,
        lease = Empty,
        generation = Empty,
        step = Empty,
        version = Empty
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "0123456789abcdef0123456789abcdef";

    #[test]
    fn contexts_are_read_as_they_are_written() {
        for context in [TraceContext::random(), TraceContext::of_group(RUN, 7), TraceContext::of_step(RUN, 7).child()] {
            assert_eq!(TraceContext::parse(&context.to_string()), Some(context));
            assert!(context.to_string().contains(&context.trace_id().to_string()));
        }
        // The example of the W3C specification, and a later version with more fields.
        let example = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let read = TraceContext::parse(example).expect("well formed");
        assert_eq!(read.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(read.to_string(), example);
        let later = "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more";
        assert_eq!(TraceContext::parse(later), Some(read));
    }

    #[test]
    fn what_is_no_context_is_refused() {
        for text in [
            "",
            "00",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
        ] {
            assert_eq!(TraceContext::parse(text), None, "{text}");
        }
    }

    #[test]
    fn every_process_derives_the_same_trace_of_a_group_and_another_one_of_anything_else() {
        let id = |context: TraceContext| context.trace_id().to_string();
        // Fixed values, so that no version of the program derives other ids.
        assert_eq!(id(TraceContext::of_group(RUN, 7)), id(TraceContext::of_group(RUN, 7)));
        let mut all: Vec<String> = (0..1000).map(|group| id(TraceContext::of_group(RUN, group))).collect();
        all.extend((0..1000).map(|step| id(TraceContext::of_step(RUN, step))));
        all.extend((0..1000).map(|group| id(TraceContext::of_group("fedcba9876543210fedcba9876543210", group))));
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 3000);
    }

    #[tokio::test]
    async fn a_task_knows_the_trace_that_it_works_for() {
        assert_eq!(current(), None);
        let context = TraceContext::random();
        let inside = within(context, Span::none(), async {
            let child = tokio::spawn(async { current() }).await.expect("no panic");
            (current(), child)
        });
        assert_eq!(inside.await, (Some(context), None), "what is spawned is on its own");
    }
}
