use std::sync::Arc;
use std::time::Duration;

use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, MAX_VERDICTS_BYTES, MOST_VERDICT_TEXT, MOST_VERDICTS, v1};
use pacs_runtime::net::{RunChannel, RunIdentity};
use pacs_runtime::trace::{self, TraceContext};
use pacs_runtime::{Activity, CallError, Membership, Policy};
use pacs_types::WorkerId;
use prost::Message;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::grading::Grading;

/// How long the coordinator may hold a request for work while there is none.
const WAIT: Duration = Duration::from_secs(5);

/// How long a call may take beyond what it is asked to wait.
const DEADLINE: Duration = Duration::from_secs(10);

const LEASE_SAMPLES: Policy = Policy::new("LeaseSamples", WAIT.saturating_add(DEADLINE));
const SUBMIT_VERDICTS: Policy = Policy::new("SubmitVerdicts", DEADLINE);

/// Samples that a worker holds, for each verification that runs at once: enough to hide a round trip, few enough that
/// a dying worker takes little with it.
const HELD_PER_THREAD: usize = 8;

/// The work of one membership.
pub(crate) struct Session {
    client: VerifierServiceClient<RunChannel>,
    worker: WorkerId,
    run_id: RunIdentity,
    activity: Activity,
    grading: Grading,
    /// Most samples that are held at once.
    capacity: usize,
}

impl Session {
    pub(crate) fn new(membership: &Membership, grading: Grading, threads: usize) -> Self {
        let client = VerifierServiceClient::new(membership.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        // Samples wait here and not at the coordinator only: a thread that is done has the next one at once.
        let capacity = threads.saturating_mul(HELD_PER_THREAD).min(Semaphore::MAX_PERMITS);
        let worker = membership.worker;
        let run_id = membership.run_id.clone();
        Self { client, worker, run_id, activity: membership.activity.clone(), grading, capacity }
    }

    /// Leases, grades and hands in, until a call fails for good.
    ///
    /// Leasing and submitting run concurrently: a slow verification holds back neither the verdicts of the others nor
    /// new work.
    pub(crate) async fn work(self) -> CallError {
        let Self { client, worker, run_id, activity, grading, capacity } = self;
        let room = Room { free: Arc::new(Semaphore::new(capacity)), capacity, activity };
        // Full only while a call is tried again; then the samples wait, and keep their room.
        let (verdicts, graded) = mpsc::channel(capacity);
        let leasing =
            Leasing { client: client.clone(), worker, run_id, grading, room: room.clone(), verdicts, answered: 0 };
        let submitting = Submitting { client, worker, room, graded };
        tokio::select! {
            failed = leasing.run() => failed,
            failed = submitting.run() => failed,
        }
    }
}

/// Room for samples, as much as is held at once.
#[derive(Clone)]
struct Room {
    free: Arc<Semaphore>,
    capacity: usize,
    activity: Activity,
}

impl Room {
    fn tell_activity(&self) {
        match self.capacity - self.free.available_permits() {
            0 => self.activity.set("idle"),
            1 => self.activity.set("grading 1 sample"),
            held => self.activity.set(format!("grading {held} samples")),
        }
    }
}

/// Asks for samples whenever half of the room is free, and has them graded.
struct Leasing {
    client: VerifierServiceClient<RunChannel>,
    worker: WorkerId,
    run_id: RunIdentity,
    grading: Grading,
    room: Room,
    verdicts: mpsc::Sender<v1::TaskVerdict>,
    /// Requests that were answered: one that is made again keeps its number, and gets the same samples.
    answered: u64,
}

impl Leasing {
    async fn run(mut self) -> CallError {
        // Bounded by the room. Dropped with this call, and running verifications are abandoned: their leases are issued again.
        let mut running = JoinSet::new();
        loop {
            self.wait_for_room().await;
            let tasks = match self.lease().await {
                Ok(tasks) => tasks,
                Err(failed) => return failed,
            };
            for task in tasks {
                let room = Arc::clone(&self.room.free).acquire_owned().await.expect("the semaphore is never closed");
                let grading = self.grading.clone();
                let verdicts = self.verdicts.clone();
                let context = TraceContext::of_group(self.run_id.get().unwrap_or_default(), task.group_id);
                let v1::VerifyTask { lease_id: lease, group_id: group, sample_index: sample, .. } = task;
                let trace_id = context.trace_id();
                let span = tracing::info_span!("verify", %trace_id, group, sample, lease);
                running.spawn(trace::within(context, span, async move {
                    let verdict = grading.grade(task).await;
                    let outcome = verdict.verdict.as_ref().map(|verdict| verdict.outcome().as_str_name());
                    tracing::debug!(outcome, "sample graded");
                    // Not received when the session has ended.
                    let _ = verdicts.send(verdict).await;
                    drop(room);
                }));
            }
            self.room.tell_activity();
            while running.try_join_next().is_some() {}
        }
    }

    async fn wait_for_room(&self) {
        // Half of the room per request: one request per free place would be one call per sample.
        let half = u32::try_from(self.room.capacity.div_ceil(2)).unwrap_or(u32::MAX);
        // Given back at once: only this loop takes room.
        drop(self.room.free.acquire_many(half).await.expect("the semaphore is never closed"));
    }

    async fn lease(&mut self) -> Result<Vec<v1::VerifyTask>, CallError> {
        let wait_ms = u32::try_from(WAIT.as_millis()).expect("a few seconds");
        let max_samples = u32::try_from(self.room.free.available_permits()).unwrap_or(u32::MAX);
        // Numbered, so that a request whose answer was lost gets the same samples again instead of leasing others.
        let request = self.answered + 1;
        let request = v1::LeaseSamplesRequest { worker_id: self.worker.0, max_samples, wait_ms, request };
        let call = || {
            let mut client = self.client.clone();
            async move { client.lease_samples(request).await }
        };
        let response = LEASE_SAMPLES.run(call).await?;
        self.answered += 1;
        Ok(response.tasks)
    }
}

/// Hands verdicts in as they come.
struct Submitting {
    client: VerifierServiceClient<RunChannel>,
    worker: WorkerId,
    room: Room,
    graded: mpsc::Receiver<v1::TaskVerdict>,
}

impl Submitting {
    async fn run(mut self) -> CallError {
        let mut verdicts = Vec::new();
        loop {
            self.room.tell_activity();
            // Never closed: the leasing side holds a sender.
            // All verdicts that are waiting go into one call: under load calls grow, and an idle worker submits each verdict at once.
            self.graded.recv_many(&mut verdicts, self.room.capacity).await;
            while !verdicts.is_empty() {
                let fitting = how_many_fit(&mut verdicts);
                let rest = verdicts.split_off(fitting);
                if let Err(failed) = self.submit(std::mem::replace(&mut verdicts, rest)).await {
                    return failed;
                }
            }
        }
    }

    async fn submit(&mut self, verdicts: Vec<v1::TaskVerdict>) -> Result<(), CallError> {
        let request = v1::SubmitVerdictsRequest { worker_id: self.worker.0, verdicts };
        let call = || {
            let mut client = self.client.clone();
            let request = request.clone();
            async move { client.submit_verdicts(request).await }
        };
        let response = SUBMIT_VERDICTS.run(call).await?;
        self.room.activity.served();
        if response.stale > 0 {
            tracing::info!(stale = response.stale, "verdicts came after their lease had lapsed");
        }
        Ok(())
    }
}

/// Bytes of verdicts in one call, so that one more fits below what the coordinator takes.
const CALL_BYTES: usize = MAX_VERDICTS_BYTES / 2;

/// How many of the verdicts go into one call, at least one; their texts are cut to what anybody would read.
fn how_many_fit(verdicts: &mut [v1::TaskVerdict]) -> usize {
    let mut room = CALL_BYTES;
    let fits = |verdict: &mut v1::TaskVerdict| {
        if let Some(verdict) = &mut verdict.verdict {
            let texts = verdict.extracted.iter_mut().chain([&mut verdict.rule]);
            texts.for_each(|text| text.truncate(text.floor_char_boundary(MOST_VERDICT_TEXT)));
        }
        let left = room.checked_sub(verdict.encoded_len() + FIELD_BYTES);
        room = left.unwrap_or(0);
        left.is_some()
    };
    // At least one, also when it alone is too large: the coordinator's refusal says so, and silence would hold up all after it.
    verdicts.iter_mut().take(MOST_VERDICTS).map(fits).take_while(|fits| *fits).count().max(1)
}

/// Tag and length of a message in a list.
const FIELD_BYTES: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_sent_in_bounded_calls_and_none_is_lost() {
        let verdict = |index: usize, text: usize| v1::TaskVerdict {
            sample_index: index as u32,
            verdict: Some(v1::Verdict {
                extracted: Some("ä".repeat(text)),
                rule: "x".repeat(text),
                ..v1::Verdict::default()
            }),
            ..v1::TaskVerdict::default()
        };
        let mut left: Vec<_> = (0..300).map(|index| verdict(index, index * 1000)).collect();
        let mut calls = Vec::new();
        while !left.is_empty() {
            let fitting = how_many_fit(&mut left);
            let rest = left.split_off(fitting);
            calls.push(std::mem::replace(&mut left, rest));
        }
        assert!(calls.len() > 1);
        for verdicts in &calls {
            let request = v1::SubmitVerdictsRequest { worker_id: 1, verdicts: verdicts.clone() };
            assert!(request.encoded_len() <= CALL_BYTES + 16, "{} bytes", request.encoded_len());
        }
        let indices = calls.iter().flatten().map(|verdict| verdict.sample_index);
        assert!(indices.eq(0..300));
    }
}
