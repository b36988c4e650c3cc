use pacs_machine::{Event, Reply};
use pacs_protocol::v1;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_types::{GroupId, LeaseId, SampleId, Verdict, WorkerId};
use tonic::{Code, Request, Response, Status};

use super::{Services, required, wrong_answer};
use crate::driver::Driver;

#[tonic::async_trait]
impl VerifierService for Services {
    async fn lease_samples(
        &self,
        request: Request<v1::LeaseSamplesRequest>,
    ) -> Result<Response<v1::LeaseSamplesResponse>, Status> {
        let v1::LeaseSamplesRequest { worker_id, max_samples, wait_ms } = request.into_inner();
        let event = Event::LeaseSamples { worker: WorkerId(worker_id), max_samples };
        let attempt = |driver: &mut Driver| {
            let Reply::Samples(grants) = driver.call(event.clone())? else { return Err(wrong_answer()) };
            let tasks = grants.into_iter().map(|grant| task(driver, grant.lease, grant.sample)).collect();
            Ok(Some(tasks).filter(|tasks: &Vec<_>| !tasks.is_empty()))
        };
        let tasks = self.0.poll(wait_ms, attempt).await?.unwrap_or_default();
        Ok(Response::new(v1::LeaseSamplesResponse { tasks }))
    }

    async fn submit_verdicts(
        &self,
        request: Request<v1::SubmitVerdictsRequest>,
    ) -> Result<Response<v1::SubmitVerdictsResponse>, Status> {
        let v1::SubmitVerdictsRequest { worker_id, verdicts } = request.into_inner();
        let worker = WorkerId(worker_id);
        // All of them are read before one of them counts.
        let verdicts = verdicts.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let mut stale = 0;
        let mut driver = self.0.lock();
        for (lease, sample, verdict) in verdicts {
            match submit(&mut driver, worker, lease, sample, verdict) {
                Ok(()) => {}
                Err(status) if status.code() == Code::FailedPrecondition => stale += 1,
                Err(status) => return Err(status),
            }
        }
        driver.notify();
        Ok(Response::new(v1::SubmitVerdictsResponse { stale }))
    }
}

fn read(wire: v1::TaskVerdict) -> Result<(LeaseId, SampleId, Verdict), Status> {
    let v1::TaskVerdict { lease_id, group_id, sample_index, verdict } = wire;
    let sample = SampleId { group: GroupId(group_id), index: sample_index };
    Ok((LeaseId(lease_id), sample, required("verdict", verdict)?.try_into()?))
}

fn submit(
    driver: &mut Driver,
    worker: WorkerId,
    lease: LeaseId,
    sample: SampleId,
    verdict: Verdict,
) -> Result<(), Status> {
    let (outcome, label) = (verdict.outcome, verdict.label);
    let (reply, effects) = driver.ask(Event::SubmitVerdict { worker, lease, sample, outcome, label })?;
    // Stored before the effects are applied: this may be the verdict that completes the batch.
    if reply == (Reply::Accepted { fresh: true }) {
        driver.store.put_verdict(sample, verdict);
    } else if !outcome.is_conclusive() {
        tracing::warn!(%sample, outcome = outcome.name(), rule = verdict.rule, "a verification failed");
    }
    driver.apply(effects);
    Ok(())
}

fn task(driver: &Driver, lease: LeaseId, sample: SampleId) -> v1::VerifyTask {
    v1::VerifyTask {
        lease_id: lease.0,
        group_id: sample.group.0,
        sample_index: sample.index,
        response: driver.store.sample(sample).map(|sample| sample.text.clone()).unwrap_or_default(),
        gold: driver.problem(sample.group).answer.clone(),
    }
}
