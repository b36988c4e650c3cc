use pacs_machine::{Event, Reply};
use pacs_protocol::v1;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_types::{GroupId, LeaseId, SampleId, Verdict, WorkerId};
use prost::Message;
use tonic::{Code, Request, Response, Status};
use tracing::Span;

use super::{Services, required, wrong_answer};
use crate::driver::{Driver, Verification, Wait};
use crate::journal::{Frame, FrameKey};

#[tonic::async_trait]
impl VerifierService for Services {
    async fn lease_samples(
        &self,
        request: Request<v1::LeaseSamplesRequest>,
    ) -> Result<Response<v1::LeaseSamplesResponse>, Status> {
        let v1::LeaseSamplesRequest { worker_id, max_samples, wait_ms, request } = request.into_inner();
        Span::current().record("worker", worker_id);
        let event = Event::LeaseSamples { worker: WorkerId(worker_id), max_samples, request };
        let attempt = |driver: &mut Driver| {
            let Reply::Samples(grants) = driver.call(event.clone())? else { return Err(wrong_answer()) };
            let tasks = grants.into_iter().map(|grant| task(driver, grant.lease, grant.sample)).collect();
            Ok(Some(tasks).filter(|tasks: &Vec<_>| !tasks.is_empty()))
        };
        let tasks: Vec<v1::VerifyTask> =
            self.0.poll(Wait::Samples(WorkerId(worker_id)), wait_ms, attempt).await?.unwrap_or_default();
        for task in &tasks {
            let v1::VerifyTask { lease_id: lease, group_id: group, sample_index: sample, .. } = task;
            tracing::debug!(trace_id = %self.trace_id(*group), group, sample, lease, "sample leased");
        }
        Ok(Response::new(v1::LeaseSamplesResponse { tasks }))
    }

    async fn submit_verdicts(
        &self,
        request: Request<v1::SubmitVerdictsRequest>,
    ) -> Result<Response<v1::SubmitVerdictsResponse>, Status> {
        let v1::SubmitVerdictsRequest { worker_id, verdicts } = request.into_inner();
        Span::current().record("worker", worker_id);
        for verdict in &verdicts {
            let v1::TaskVerdict { lease_id: lease, group_id: group, sample_index: sample, .. } = verdict;
            tracing::debug!(trace_id = %self.trace_id(*group), group, sample, lease, "verdict handed in");
        }
        let worker = WorkerId(worker_id);
        // All of them are read before one of them counts.
        let verdicts = verdicts.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let submit_all = |driver: &mut Driver| {
            let mut stale = 0;
            for handed_in in verdicts {
                match submit(driver, worker, handed_in) {
                    Ok(()) => {}
                    Err(status) if status.code() == Code::FailedPrecondition => stale += 1,
                    Err(status) => return Err(status),
                }
            }
            driver.wake_own(worker);
            Ok(stale)
        };
        let stale = self.0.call(submit_all).await?;
        Ok(Response::new(v1::SubmitVerdictsResponse { stale }))
    }
}

/// A verdict as it was handed in.
struct HandedIn {
    lease: LeaseId,
    sample: SampleId,
    verdict: Verdict,
    verifications: Vec<Verification>,
}

fn read(wire: v1::TaskVerdict) -> Result<HandedIn, Status> {
    let v1::TaskVerdict { lease_id, group_id, sample_index, verdict, verifications } = wire;
    Ok(HandedIn {
        lease: LeaseId(lease_id),
        sample: SampleId { group: GroupId(group_id), index: sample_index },
        verdict: required("verdict", verdict)?.try_into()?,
        verifications: verifications.into_iter().map(verification).collect::<Result<_, _>>()?,
    })
}

fn verification(wire: v1::Verification) -> Result<Verification, Status> {
    let outcome = wire.outcome().try_into()?;
    let v1::Verification { verifier, reward, elapsed_us, cached, .. } = wire;
    if !reward.is_finite() {
        return Err(Status::invalid_argument(format!("field `verifications.reward`: is {reward}")));
    }
    Ok(Verification { verifier, outcome, reward, elapsed_us, cached })
}

fn submit(driver: &mut Driver, worker: WorkerId, handed_in: HandedIn) -> Result<(), Status> {
    let HandedIn { lease, sample, verdict, verifications } = handed_in;
    let (outcome, label) = (verdict.outcome, verdict.label);
    let frame =
        Frame { key: FrameKey::Verdict(sample, lease), body: v1::Verdict::from(verdict.clone()).encode_to_vec() };
    let event = Event::SubmitVerdict { worker, lease, sample, outcome, label };
    let (reply, effects) = driver.ask_with(event, None, Some(frame))?;
    let fresh = reply == (Reply::Accepted { fresh: true });
    // A repeat was counted before.
    if fresh || !outcome.is_conclusive() {
        let name = driver.machine.worker_name(worker);
        verifications.iter().for_each(|verification| driver.verifications.note(&name, verification));
    }
    // Stored before the effects are applied: this may be the verdict that completes the batch.
    if fresh {
        driver.store.put_verdict(sample, verdict);
    } else if !outcome.is_conclusive() {
        tracing::warn!(%sample, outcome = outcome.name(), rule = verdict.rule, "a verification failed");
    }
    driver.apply(effects);
    Ok(())
}

fn task(driver: &Driver, lease: LeaseId, sample: SampleId) -> v1::VerifyTask {
    let problem = driver.problem(sample.group);
    let answer = driver.store.sample(sample);
    v1::VerifyTask {
        lease_id: lease.0,
        group_id: sample.group.0,
        sample_index: sample.index,
        response: answer.map(|sample| sample.text.clone()).unwrap_or_default(),
        gold: problem.answer.clone(),
        question: problem.question.clone(),
        answer_tokens: answer.map_or(0, |sample| u32::try_from(sample.tokens.len()).unwrap_or(u32::MAX)),
    }
}
