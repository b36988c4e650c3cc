use std::sync::Arc;

use pacs_data::{MeasuredSet, Problems};
use pacs_machine::{Event, GroupGrant, Reply, WantedSample, evaluation_problem};
use pacs_protocol::v1;
use pacs_protocol::v1::rollout_service_server::RolloutService;
use pacs_spec::JobSpec;
use pacs_types::{GroupId, LeaseId, MAX_SAMPLE_BYTES, Sample, SampleId, WorkerId};
use prost::Message;
use tonic::{Request, Response, Status};
use tracing::Span;

use super::{Services, required, wrong_answer};
use crate::driver::{Driver, KeptSample, Wait, known_versions, problem_of, purpose_of};
use crate::journal::{Frame, FrameKey};

#[tonic::async_trait]
impl RolloutService for Services {
    async fn lease_groups(
        &self,
        request: Request<v1::LeaseGroupsRequest>,
    ) -> Result<Response<v1::LeaseGroupsResponse>, Status> {
        let v1::LeaseGroupsRequest { worker_id, free_samples, wait_ms, request } = request.into_inner();
        Span::current().record("worker", worker_id);
        let attempt = |driver: &mut Driver| {
            let free_samples = free_samples.min(driver.most_free_samples());
            let event = Event::LeaseGroups { worker: WorkerId(worker_id), free_samples, request };
            let Reply::Groups(grants) = driver.call(event)? else { return Err(wrong_answer()) };
            let grants = driver.fit_groups(grants);
            Ok((!grants.is_empty()).then(|| (grants, Terms::of(driver))))
        };
        let granted = self.0.poll(Wait::Groups(WorkerId(worker_id)), wait_ms, attempt).await?;
        let groups: Vec<v1::GroupLease> = granted
            .map_or_else(Vec::new, |(grants, terms)| grants.into_iter().map(|grant| terms.lease(grant)).collect());
        for lease in &groups {
            let v1::GroupLease { lease_id, group_id, samples, .. } = lease;
            let (trace_id, samples) = (self.trace_id(*group_id), samples.len());
            tracing::debug!(%trace_id, group = group_id, lease = lease_id, samples, "group leased");
        }
        Ok(Response::new(v1::LeaseGroupsResponse { groups }))
    }

    async fn submit_sample(
        &self,
        request: Request<v1::SubmitSampleRequest>,
    ) -> Result<Response<v1::SubmitSampleResponse>, Status> {
        let v1::SubmitSampleRequest { worker_id, lease_id, group_id, sample_index, sample } = request.into_inner();
        let span = Span::current();
        span.record("worker", worker_id).record("group", group_id).record("sample", sample_index);
        span.record("lease", lease_id);
        let wire = required("sample", sample)?;
        let body = wire.encode_to_vec();
        if body.len() > MAX_SAMPLE_BYTES {
            let problem = format!("takes {} bytes, and a sample may take {MAX_SAMPLE_BYTES}", body.len());
            return Err(Status::invalid_argument(format!("field `sample`: {problem}")));
        }
        let sample: Sample = wire.try_into()?;
        let id = SampleId { group: GroupId(group_id), index: sample_index };
        self.0.door().sample(&sample, purpose_of(id.group))?;
        let (worker, lease) = (WorkerId(worker_id), LeaseId(lease_id));
        let event = Event::SubmitSample { worker, lease, sample: id, version: sample.version };
        let frame = Frame::new(FrameKey::Sample(id, lease), body);
        let kept = KeptSample::new(&sample, frame.stored());
        let (spans, answer, routes) = (sample.spans.clone(), sample.tokens.len(), sample.routes.len());
        // The journal has the content, so the message is freed before the driver is locked.
        drop(sample);
        let submit = |driver: &mut Driver| {
            known_versions(&spans, driver.machine.newest_version())?;
            driver.check_route_count(id.group, routes, answer)?;
            let (reply, effects) = driver.ask_with(event, None, Some(frame))?;
            if reply == (Reply::Accepted { fresh: true }) {
                driver.store.put_sample(id, kept);
                // The clock times the sampling phase, during which an evaluation may run concurrently.
                if evaluation_problem(id.group).is_none() {
                    driver.clock.sample_arrived(std::time::Instant::now());
                }
                driver.wake_own(worker);
            }
            driver.apply(effects);
            Ok(())
        };
        self.0.call(submit).await?;
        tracing::debug!("sample taken");
        Ok(Response::new(v1::SubmitSampleResponse {}))
    }

    async fn await_weights(
        &self,
        request: Request<v1::AwaitWeightsRequest>,
    ) -> Result<Response<v1::AwaitWeightsResponse>, Status> {
        let request = request.into_inner();
        let announced = |driver: &mut Driver| driver.announced(&request);
        let weights = self.0.poll(Wait::Weights, request.wait_ms, announced).await?;
        Ok(Response::new(v1::AwaitWeightsResponse { weights }))
    }

    async fn find_sources(
        &self,
        request: Request<v1::FindSourcesRequest>,
    ) -> Result<Response<v1::FindSourcesResponse>, Status> {
        let request = request.into_inner();
        let sources = self.0.call(|driver| driver.sources(&request)).await?;
        Ok(Response::new(v1::FindSourcesResponse { sources }))
    }
}

/// The common part of an answer's leases, so that they are built without the driver's lock.
struct Terms {
    spec: Arc<JobSpec>,
    problems: Arc<Problems>,
    /// Generation and version of the newest weights.
    weights: (u64, u64),
}

impl Terms {
    fn of(driver: &Driver) -> Self {
        let weights = driver.weights.as_ref().map_or((0, 0), |weights| (weights.generation, weights.version));
        Self { spec: Arc::clone(&driver.spec), problems: Arc::clone(&driver.problems), weights }
    }

    fn lease(&self, grant: GroupGrant) -> v1::GroupLease {
        let (generation, min_version) = self.weights;
        v1::GroupLease {
            lease_id: grant.lease.0,
            group_id: grant.group.0,
            purpose: v1::Purpose::from(grant.purpose).into(),
            prompt_tokens: problem_of(&self.problems, grant.group).prompt_tokens.clone(),
            sampling: Some(self.sampling(&grant)),
            samples: grant.samples.into_iter().map(wanted).collect(),
            generation,
            min_version,
        }
    }

    /// Sampling options of a group: those of the job for training, those of the set for an evaluation.
    fn sampling(&self, grant: &GroupGrant) -> v1::SamplingOptions {
        let rollout = &self.spec.rollout;
        let trained = v1::SamplingOptions {
            temperature: rollout.temperature as f32,
            top_p: rollout.top_p as f32,
            top_k: rollout.top_k,
            min_p: rollout.min_p as f32,
            max_new_tokens: rollout.max_new_tokens,
            stop: rollout.stop.clone(),
            seed: self.spec.seed,
            stream: 0,
        };
        let measured = evaluation_problem(grant.group).and_then(|number| self.problems.measured(number));
        let Some((MeasuredSet { set, .. }, _)) = measured else { return trained };
        v1::SamplingOptions {
            temperature: set.temperature as f32,
            top_p: set.top_p as f32,
            top_k: set.top_k,
            min_p: set.min_p as f32,
            max_new_tokens: set.max_new_tokens,
            stream: 1 + grant.policy_step,
            ..trained
        }
    }
}

fn wanted(sample: WantedSample) -> v1::WantedSample {
    v1::WantedSample { index: sample.index, attempt: sample.attempt }
}
