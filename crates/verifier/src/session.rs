use std::time::Duration;

use pacs_protocol::v1::verifier_service_client::VerifierServiceClient;
use pacs_protocol::{MAX_MESSAGE_BYTES, v1};
use pacs_runtime::{Activity, Membership};
use pacs_types::WorkerId;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::grading::Grading;
use crate::rpc::{Failed, call};

/// How long the coordinator may hold a request for work while there is none.
const WAIT: Duration = Duration::from_secs(5);

/// How long a call may take beyond what it is asked to wait.
const DEADLINE: Duration = Duration::from_secs(10);

/// Samples that are leased at once, for each thread: enough to hide a round trip, few enough that a dying worker
/// takes little with it.
const LEASED_PER_THREAD: usize = 8;

/// The work of one membership.
pub(crate) struct Session {
    client: VerifierServiceClient<Channel>,
    worker: WorkerId,
    activity: Activity,
    grading: Grading,
    max_samples: u32,
}

impl Session {
    pub(crate) fn new(membership: &Membership, grading: Grading, threads: usize) -> Self {
        let client = VerifierServiceClient::new(membership.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let max_samples = u32::try_from(threads.saturating_mul(LEASED_PER_THREAD)).unwrap_or(u32::MAX);
        Self { client, worker: membership.worker, activity: membership.activity.clone(), grading, max_samples }
    }

    /// Leases, grades and hands in, until a call fails for good.
    pub(crate) async fn work(&mut self) -> Failed {
        loop {
            self.activity.set("idle");
            let tasks = match self.lease().await {
                Ok(tasks) => tasks,
                Err(failed) => return failed,
            };
            if let Err(failed) = self.grade(tasks).await {
                return failed;
            }
        }
    }

    async fn lease(&mut self) -> Result<Vec<v1::VerifyTask>, Failed> {
        let wait_ms = u32::try_from(WAIT.as_millis()).expect("a few seconds");
        let request = v1::LeaseSamplesRequest { worker_id: self.worker.0, max_samples: self.max_samples, wait_ms };
        let response = call("LeaseSamples", WAIT + DEADLINE, async || self.client.lease_samples(request).await).await?;
        Ok(response.tasks)
    }

    /// Grades the tasks, and hands verdicts in as they come: a slow verification does not hold back the others.
    async fn grade(&mut self, tasks: Vec<v1::VerifyTask>) -> Result<(), Failed> {
        // Bounded by the size of a lease; the threads are bounded by `Grading`.
        let mut running = JoinSet::new();
        for task in tasks {
            let grading = self.grading.clone();
            running.spawn(async move { grading.grade(task).await });
        }
        while !running.is_empty() {
            let left = running.len();
            self.activity.set(format!("grading {left} sample{}", if left == 1 { "" } else { "s" }));
            let mut verdicts = Vec::new();
            verdicts.extend(running.join_next().await);
            verdicts.extend(std::iter::from_fn(|| running.try_join_next()));
            let verdicts = verdicts.into_iter().map(|graded| graded.expect("grading neither panics nor is aborted"));
            let verdicts = verdicts.collect();
            self.submit(verdicts).await?;
        }
        Ok(())
    }

    async fn submit(&mut self, verdicts: Vec<v1::TaskVerdict>) -> Result<(), Failed> {
        let request = v1::SubmitVerdictsRequest { worker_id: self.worker.0, verdicts };
        let response =
            call("SubmitVerdicts", DEADLINE, async || self.client.submit_verdicts(request.clone()).await).await?;
        if response.stale > 0 {
            tracing::info!(stale = response.stale, "verdicts came after their lease had lapsed");
        }
        Ok(())
    }
}
