//! Joins the log lines of several processes by one identifier.
//!
//! A trace is a unit of work: a group of samples, a training step, or else one call. Its identifier stands in the lines of
//! every process that works on it, and travels with calls as W3C trace context (`traceparent`). Groups and steps have
//! identifiers that every process of a run derives alike, so that no message has to carry them, and a person can, too.
//! Nothing is exported: the log is where spans end up.

use std::fmt;

use tonic::codegen::http;
use tonic::metadata::{Ascii, MetadataValue};
use tracing::field::Empty;
use tracing::instrument::Instrumented;
use tracing::{Instrument, Span};

use crate::net::RunIdentity;

/// Metadata key of the trace context, as the W3C has it.
pub(crate) const TRACEPARENT: &str = "traceparent";

tokio::task_local! {
    /// The trace that the running task works for.
    static CURRENT: TraceContext;
}

/// A place in a trace: the trace, and the span within it that calls are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// Not 0.
    trace: u128,
    /// Not 0.
    span: u64,
}

/// Identifier of a trace, 32 hexadecimal digits in print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceId(u128);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl TraceContext {
    /// A trace of its own.
    #[must_use]
    pub fn random() -> Self {
        Self { trace: fastrand::u128(1..), span: fastrand::u64(1..) }
    }

    /// The trace of a group of a run.
    #[must_use]
    pub fn of_group(run: &str, group: u64) -> Self {
        Self::of(run, "group", group)
    }

    /// The trace of a training step of a run.
    #[must_use]
    pub fn of_step(run: &str, step: u64) -> Self {
        Self::of(run, "step", step)
    }

    /// FNV-1a of 128 bits: spread well enough that no two works of a run meet, and the same in every version of every
    /// program.
    fn of(run: &str, kind: &str, number: u64) -> Self {
        const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
        let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        for byte in run.bytes().chain(*b"/").chain(kind.bytes()).chain(*b"/").chain(number.to_be_bytes()) {
            hash = (hash ^ u128::from(byte)).wrapping_mul(PRIME);
        }
        Self { trace: hash.max(1), span: fastrand::u64(1..) }
    }

    /// Another span of the trace.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span: fastrand::u64(1..), ..self }
    }

    /// What joins log lines.
    #[must_use]
    pub fn trace_id(self) -> TraceId {
        TraceId(self.trace)
    }

    /// Reads a `traceparent` of version 00, or of a later one, which begins alike.
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

    /// The metadata of a call that is made from here.
    pub(crate) fn metadata(self) -> MetadataValue<Ascii> {
        MetadataValue::try_from(self.to_string()).expect("digits and dashes are metadata")
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-01", self.trace, self.span)
    }
}

/// The trace that the running task works for, if it is one of [`within`].
#[must_use]
pub fn current() -> Option<TraceContext> {
    CURRENT.try_with(|context| *context).ok()
}

/// A task that works for a trace.
pub type Traced<F> = tokio::task::futures::TaskLocalFuture<TraceContext, Instrumented<F>>;

/// Has a future work for a trace: the calls that it makes carry the context, its log lines stand in `span`. A task that it
/// spawns does not, unless it is given to this function, too.
pub fn within<F: Future>(context: TraceContext, span: Span, future: F) -> Traced<F> {
    CURRENT.scope(context, future.instrument(span))
}

/// The first digits of a run identifier, for log lines: enough to find it by.
#[must_use]
pub fn short(run: &RunIdentity) -> &str {
    run.get().map_or("", |id| &id[..8])
}

/// The span of a call that a server takes. What the call is about, its handler records.
pub(crate) fn server_span(request: &http::Request<()>) -> Span {
    let said = request.headers().get(TRACEPARENT).and_then(|value| TraceContext::parse(value.to_str().ok()?));
    let context = said.unwrap_or_else(TraceContext::random);
    let method = request.uri().path().rsplit('/').next().unwrap_or_default();
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
        // The example of the W3C, and a later version with more behind it.
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
        // Written down, so that no version of the program derives another one.
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
