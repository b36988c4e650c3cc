//! Handing samples in: several calls at a time, in the order in which the samples finished.
//!
//! The coordinator answers when a sample is on its disk. A worker that waited for each answer would hand in as many samples
//! a second as the disk makes syncs; with calls side by side, one sync serves many. Every sample has a call of its own,
//! which is repeated until it is answered, so that what is lost on the way costs nobody else anything.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use pacs_protocol::v1;
use pacs_runtime::net::RunIdentity;
use pacs_runtime::trace::{self, TraceContext};
use pacs_runtime::{CallError, PATIENCE, Policy};
use tokio::sync::{mpsc, watch};
use tonic::{Code, Response, Status};

use crate::{CALL_DEADLINE, Output, RolloutError, ServeError};

/// Calls on their way at once; another sample waits, and with it, when the queue of finished ones is full, generation.
const WINDOW: usize = 64;

const SUBMIT_SAMPLE: Policy = Policy::new("SubmitSample", CALL_DEADLINE);

/// What a lease is about; the engine's ticket is the lease number.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) lease: u64,
    pub(crate) group: u64,
    /// Samples that were not handed in yet.
    pub(crate) samples_left: usize,
}

/// Hands finished samples in; `C` is the call that does it.
pub(crate) struct Submitting<C> {
    call: C,
    worker: u64,
    run_id: String,
    in_flight: watch::Sender<usize>,
    leases: mpsc::Receiver<Held>,
    held: HashMap<u64, Held>,
    /// Has the engine forget a ticket.
    cancel: Box<dyn Fn(u64) + Send>,
    /// Told how many samples are in flight.
    progress: Box<dyn Fn(usize) + Send>,
    patience: Duration,
    window: Window<Result<Answer, ServeError>>,
}

/// What became of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Answer {
    lease: u64,
    /// Otherwise its lease is no longer good.
    taken: bool,
}

enum Event {
    Output(Option<Output>),
    Answered(Result<Answer, ServeError>),
}

impl<C, F> Submitting<C>
where
    C: Fn(v1::SubmitSampleRequest) -> F + Clone + Send + 'static,
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    pub(crate) fn new(
        call: C,
        worker: u64,
        run_id: &RunIdentity,
        in_flight: watch::Sender<usize>,
        leases: mpsc::Receiver<Held>,
        cancel: impl Fn(u64) + Send + 'static,
        progress: impl Fn(usize) + Send + 'static,
    ) -> Self {
        let (held, window) = (HashMap::new(), Window::default());
        let (cancel, progress) = (Box::new(cancel), Box::new(progress));
        let run_id = run_id.get().unwrap_or_default().to_owned();
        Self { call, worker, run_id, in_flight, leases, held, cancel, progress, patience: PATIENCE, window }
    }

    pub(crate) async fn run(mut self, mut outputs: mpsc::Receiver<Output>) -> Result<Infallible, ServeError> {
        loop {
            let event = tokio::select! {
                output = outputs.recv(), if self.window.len() < WINDOW => Event::Output(output),
                answer = self.window.next(), if self.window.len() > 0 => Event::Answered(answer),
            };
            match event {
                Event::Output(output) => self.take(output).await?,
                Event::Answered(answer) => self.settle(answer?),
            }
            (self.progress)(*self.in_flight.borrow());
        }
    }

    /// Takes what the engine says. Its final message follows the samples that it finished before.
    async fn take(&mut self, output: Option<Output>) -> Result<(), ServeError> {
        // Leases are announced before their samples can be finished.
        while let Ok(lease) = self.leases.try_recv() {
            self.held.insert(lease.lease, lease);
        }
        let last_word = match output {
            Some(Output::Finished(finished)) => {
                self.submit(*finished);
                return Ok(());
            }
            Some(Output::GivenUp { ticket, index, reason }) => {
                self.give_up(ticket, index, &reason);
                return Ok(());
            }
            Some(Output::Failed(problem)) => ServeError::Fatal(RolloutError::Engine(problem)),
            Some(Output::Refused(problem)) => ServeError::Fatal(RolloutError::Config(problem)),
            None => ServeError::Fatal(RolloutError::Engine("the engine ended without a word".into())),
        };
        while self.window.len() > 0 {
            let answer = self.window.next().await?;
            self.settle(answer);
        }
        Err(last_word)
    }

    fn submit(&mut self, finished: crate::Finished) {
        let Some(held) = self.held.get_mut(&finished.ticket) else { return };
        held.samples_left -= 1;
        let (lease, group_id, version) = (held.lease, held.group, finished.sample.version);
        if held.samples_left == 0 {
            self.held.remove(&finished.ticket);
        }
        let request = v1::SubmitSampleRequest {
            worker_id: self.worker,
            lease_id: lease,
            group_id,
            sample_index: finished.index,
            sample: Some(finished.sample.into()),
        };
        let context = TraceContext::of_group(&self.run_id, group_id);
        let (trace_id, sample, version) = (context.trace_id(), finished.index, version.0);
        let span = tracing::info_span!("sample", %trace_id, group = group_id, sample, lease, version);
        let delivered = deliver(self.call.clone(), request, self.patience);
        self.window.push(Box::pin(trace::within(context, span, delivered)));
    }

    /// Counts a sample that nobody will submit.
    fn give_up(&mut self, ticket: u64, index: u32, reason: &str) {
        let Some(held) = self.held.get_mut(&ticket) else { return };
        tracing::warn!(group = held.group, lease = ticket, sample = index, "a sample was given up: {reason}");
        held.samples_left -= 1;
        if held.samples_left == 0 {
            self.held.remove(&ticket);
        }
        self.in_flight.send_modify(|in_flight| *in_flight -= 1);
    }

    fn settle(&mut self, answer: Answer) {
        let mut settled = 1;
        // Where the lease lapsed nobody wants the rest of the group; what is on its way is answered on its own.
        if !answer.taken
            && let Some(held) = self.held.remove(&answer.lease)
        {
            (self.cancel)(answer.lease);
            settled += held.samples_left;
        }
        self.in_flight.send_modify(|in_flight| *in_flight -= settled);
    }
}

/// Hands one sample in, again and again until there is an answer.
async fn deliver<C, F>(call: C, request: v1::SubmitSampleRequest, patience: Duration) -> Result<Answer, ServeError>
where
    C: Fn(v1::SubmitSampleRequest) -> F,
    F: Future<Output = Result<(), Status>>,
{
    let lease = request.lease_id;
    let submitted = SUBMIT_SAMPLE.patience(patience).run(move || {
        let submitted = call(request.clone());
        async move { submitted.await.map(Response::new) }
    });
    let taken = match submitted.await {
        Ok(()) => {
            tracing::debug!("sample submitted");
            true
        }
        // The lease lapsed.
        Err(CallError::Refused { code: Code::FailedPrecondition, .. }) => false,
        Err(CallError::Refused { message, .. }) => {
            let problem = format!("the coordinator refused a sample: {message}");
            return Err(ServeError::Fatal(RolloutError::Engine(problem)));
        }
        Err(error) => return Err(error.into()),
    };
    Ok(Answer { lease, taken })
}

/// Futures that run side by side and give their results in the order in which they were put in.
struct Window<T> {
    slots: VecDeque<Slot<T>>,
}

enum Slot<T> {
    Running(Pin<Box<dyn Future<Output = T> + Send>>),
    Done(T),
}

impl<T> Default for Window<T> {
    fn default() -> Self {
        Self { slots: VecDeque::new() }
    }
}

impl<T> Window<T> {
    fn len(&self) -> usize {
        self.slots.len()
    }

    fn push(&mut self, future: Pin<Box<dyn Future<Output = T> + Send>>) {
        self.slots.push_back(Slot::Running(future));
    }

    /// The result of the oldest; all continue meanwhile, and none is lost when this is dropped before it is ready. Never
    /// ready without any.
    async fn next(&mut self) -> T {
        poll_fn(|context| {
            for slot in &mut self.slots {
                if let Slot::Running(future) = slot
                    && let Poll::Ready(result) = future.as_mut().poll(context)
                {
                    *slot = Slot::Done(result);
                }
            }
            match self.slots.pop_front() {
                Some(Slot::Done(result)) => Poll::Ready(result),
                Some(running) => {
                    self.slots.push_front(running);
                    Poll::Pending
                }
                None => Poll::Pending,
            }
        })
        .await
    }
}

#[cfg(test)]
mod tests;
