//! Asking for groups, and giving them to the engine once it has the weights that they want.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use pacs_protocol::v1;
use pacs_protocol::v1::rollout_service_client::RolloutServiceClient;
use pacs_runtime::net::{RunChannel, RunIdentity};
use pacs_runtime::trace::TraceContext;
use pacs_runtime::{Activity, Policy};
use pacs_types::{GroupId, NoiseKey, SampleId};
use pacs_weights::VersionId;
use tokio::sync::{mpsc, watch};

use crate::submit::Held;
use crate::{CALL_DEADLINE, EngineGone, GroupJob, LeaseTerms, RolloutEngine, SamplingOptions, ServeError};

/// How long one lease call waits for work.
const LEASE_WAIT: Duration = Duration::from_secs(5);
const LEASE_GROUPS: Policy = Policy::new("LeaseGroups", LEASE_WAIT.saturating_add(CALL_DEADLINE));
/// How long a lease waits for the weights that it wants; receiving them has deadlines of its own, which are shorter.
const WEIGHTS_DEADLINE: Duration = Duration::from_secs(900);

/// Asks for groups whenever there is room.
pub(crate) struct Leasing<E> {
    pub(crate) client: RolloutServiceClient<RunChannel>,
    pub(crate) worker: u64,
    pub(crate) terms: LeaseTerms,
    /// Samples that the engine has room for.
    pub(crate) capacity: watch::Receiver<usize>,
    /// Samples on lease that were not handed in yet.
    pub(crate) in_flight: watch::Sender<usize>,
    pub(crate) changed: watch::Receiver<usize>,
    /// Full when the submitting side has not taken note of the leases yet: waits.
    pub(crate) leases: mpsc::Sender<Held>,
    pub(crate) engine: Arc<E>,
    /// The version that the engine uses for what it is given now.
    pub(crate) serves: watch::Receiver<Option<VersionId>>,
    pub(crate) run_id: RunIdentity,
    pub(crate) activity: Activity,
}

impl<E: RolloutEngine> Leasing<E> {
    pub(crate) async fn run(mut self) -> Result<Infallible, ServeError> {
        // The same number until there is an answer, so that leases whose answer was lost are given again.
        let mut number = 1;
        // Who comes late has the newest weights before it takes work from others. The learners may take their time.
        self.activity.set("waiting for weights");
        self.serves
            .wait_for(Option::is_some)
            .await
            .map_err(|_| ServeError::Rejoin("no thread follows the weights".into()))?;
        loop {
            let (in_flight, rows) = self.room().await?;
            if in_flight == 0 {
                self.activity.set("waiting for groups");
            }
            let request = v1::LeaseGroupsRequest {
                worker_id: self.worker,
                free_samples: (rows - in_flight) as u32,
                wait_ms: LEASE_WAIT.as_millis() as u32,
                request: number,
            };
            let call = || {
                let mut client = self.client.clone();
                async move { client.lease_groups(request).await }
            };
            let reply = LEASE_GROUPS.run(call).await?;
            number += 1;
            for lease in reply.groups {
                self.start(lease).await?;
            }
        }
    }

    /// Waits until the engine has room; returns the samples in flight, and how many there may be.
    async fn room(&mut self) -> Result<(usize, usize), ServeError> {
        loop {
            let rows = (*self.capacity.borrow_and_update()).min(self.terms.most_samples);
            let in_flight = *self.changed.borrow_and_update();
            if in_flight < rows {
                return Ok((in_flight, rows));
            }
            if rows == 0 && in_flight == 0 {
                self.activity.set("waiting for servers");
            }
            tokio::select! {
                changed = self.changed.changed() =>
                    changed.map_err(|_| ServeError::Rejoin("the submitting side ended".into()))?,
                changed = self.capacity.changed() => changed.map_err(|_| gone(EngineGone))?,
            }
        }
    }

    async fn start(&mut self, lease: v1::GroupLease) -> Result<(), ServeError> {
        let bad = |problem: &str| ServeError::Rejoin(format!("lease {} is malformed: {problem}", lease.lease_id));
        let sampling = lease.sampling.clone().ok_or_else(|| bad("no sampling options"))?;
        let oldest = VersionId::new(lease.generation, lease.min_version);
        self.wait_for_weights(oldest).await?;
        let key = |wanted: &v1::WantedSample| {
            let sample = SampleId { group: GroupId(lease.group_id), index: wanted.index };
            (wanted.index, NoiseKey::new(sampling.seed, sampling.stream, sample).attempt(wanted.attempt))
        };
        let records_routes = self.terms.records_routes && lease.purpose() == v1::Purpose::Train;
        let job = GroupJob {
            ticket: lease.lease_id,
            prompt: lease.prompt_tokens,
            samples: lease.samples.iter().map(key).collect(),
            options: SamplingOptions {
                temperature: f64::from(sampling.temperature),
                top_p: f64::from(sampling.top_p),
                top_k: sampling.top_k,
                min_p: f64::from(sampling.min_p),
                max_new_tokens: sampling.max_new_tokens,
                stop: sampling.stop,
            },
            records_routes,
        };
        let samples = job.samples.len();
        let trace_id = TraceContext::of_group(self.run_id.get().unwrap_or_default(), lease.group_id).trace_id();
        tracing::debug!(%trace_id, group = lease.group_id, lease = lease.lease_id, samples, "group leased");
        self.in_flight.send_modify(|in_flight| *in_flight += samples);
        let held = Held { lease: lease.lease_id, group: lease.group_id, samples_left: samples };
        self.leases.send(held).await.map_err(|_| ServeError::Rejoin("the submitting side ended".into()))?;
        self.engine.generate(job, oldest).map_err(gone)
    }

    async fn wait_for_weights(&mut self, wanted: VersionId) -> Result<(), ServeError> {
        let has = |serves: &Option<VersionId>| *serves >= Some(wanted);
        match tokio::time::timeout(WEIGHTS_DEADLINE, self.serves.wait_for(has)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ServeError::Rejoin("no thread follows the weights".into())),
            Err(_) => {
                let waited = WEIGHTS_DEADLINE.as_secs();
                Err(ServeError::Rejoin(format!("{wanted} was leased for and has not come for {waited} s")))
            }
        }
    }
}

fn gone(gone: EngineGone) -> ServeError {
    ServeError::Rejoin(gone.to_string())
}
