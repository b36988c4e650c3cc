use std::sync::Arc;

use pacs_data::Problems;
use pacs_machine::{Event, Reply, SampleGrant, evaluation_problem};
use pacs_protocol::v1;
use pacs_protocol::v1::verifier_service_server::VerifierService;
use pacs_protocol::{MOST_VERDICTS, WireError};
use pacs_types::{GroupId, LeaseId, SampleId, Verdict, WorkerId};
use prost::Message;
use tonic::{Code, Request, Response, Status};
use tracing::Span;

use super::{Services, required, wrong_answer};
use crate::driver::{ContentError, Door, Driver, KeptSample, Verification, Wait, problem_of};
use crate::journal::{Frame, FrameKey};

#[tonic::async_trait]
impl VerifierService for Services {
    async fn lease_samples(
        &self,
        request: Request<v1::LeaseSamplesRequest>,
    ) -> Result<Response<v1::LeaseSamplesResponse>, Status> {
        let v1::LeaseSamplesRequest { worker_id, max_samples, wait_ms, request } = request.into_inner();
        Span::current().record("worker", worker_id);
        let attempt = |driver: &mut Driver| {
            let max_samples = max_samples.min(driver.most_samples_to_judge());
            let event = Event::LeaseSamples { worker: WorkerId(worker_id), max_samples, request };
            let Reply::Samples(grants) = driver.call(event)? else { return Err(wrong_answer()) };
            let grants = driver.fit_samples(grants);
            let problems = Arc::clone(&driver.problems);
            let kept = |grant: SampleGrant| Some((grant, driver.store.sample(grant.sample)?.clone()));
            let leased: Vec<_> = grants.into_iter().filter_map(kept).collect();
            Ok((!leased.is_empty()).then_some((leased, problems)))
        };
        // The samples are durable when this returns.
        let wait = Wait::Samples(WorkerId(worker_id));
        let Some((leased, problems)) = self.0.poll(wait, wait_ms, attempt).await? else {
            return Ok(Response::new(v1::LeaseSamplesResponse { tasks: Vec::new() }));
        };
        for (grant, _) in &leased {
            let SampleGrant { lease, sample } = grant;
            tracing::debug!(trace_id = %self.trace_id(sample.group.0), %sample, %lease, "sample leased");
        }
        // Blocking: reads the disk.
        let read = move || -> Vec<_> {
            leased.into_iter().map(|(grant, sample)| (grant.sample, task(&problems, grant, &sample))).collect()
        };
        let read = tokio::task::spawn_blocking(read).await.map_err(|panic| Status::internal(panic.to_string()))?;
        let mut tasks = Vec::with_capacity(read.len());
        for (sample, task) in read {
            match task {
                Ok(task) => tasks.push(task),
                Err(error) => self.0.content_lost(sample, &error),
            }
        }
        Ok(Response::new(v1::LeaseSamplesResponse { tasks }))
    }

    async fn submit_verdicts(
        &self,
        request: Request<v1::SubmitVerdictsRequest>,
    ) -> Result<Response<v1::SubmitVerdictsResponse>, Status> {
        let v1::SubmitVerdictsRequest { worker_id, verdicts } = request.into_inner();
        Span::current().record("worker", worker_id);
        if verdicts.len() > MOST_VERDICTS {
            let problem = format!("has {} entries, expected at most {MOST_VERDICTS}", verdicts.len());
            return Err(WireError::new("verdicts", problem).into());
        }
        for verdict in &verdicts {
            let v1::TaskVerdict { lease_id: lease, group_id: group, sample_index: sample, .. } = verdict;
            tracing::debug!(trace_id = %self.trace_id(*group), group, sample, lease, "verdict submitted");
        }
        let worker = WorkerId(worker_id);
        // All verdicts are parsed before the first one counts.
        let verdicts = verdicts.into_iter().map(|wire| read(wire, self.0.door())).collect::<Result<Vec<_>, _>>()?;
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

/// A parsed verdict with its lease.
struct HandedIn {
    lease: LeaseId,
    sample: SampleId,
    verdict: Verdict,
    verifications: Vec<Verification>,
}

fn read(wire: v1::TaskVerdict, door: &Door) -> Result<HandedIn, Status> {
    let v1::TaskVerdict { lease_id, group_id, sample_index, verdict, verifications } = wire;
    let verdict = required("verdict", verdict)?.try_into()?;
    door.verdict(&verdict)?;
    door.verifications(&verifications)?;
    Ok(HandedIn {
        lease: LeaseId(lease_id),
        sample: SampleId { group: GroupId(group_id), index: sample_index },
        verdict,
        verifications: verifications.into_iter().map(verification).collect::<Result<_, _>>()?,
    })
}

fn verification(wire: v1::Verification) -> Result<Verification, Status> {
    let outcome = wire.outcome().try_into()?;
    let v1::Verification { verifier, reward, elapsed_us, cached, .. } = wire;
    Ok(Verification { verifier, outcome, reward, elapsed_us, cached })
}

fn submit(driver: &mut Driver, worker: WorkerId, handed_in: HandedIn) -> Result<(), Status> {
    let HandedIn { lease, sample, verdict, verifications } = handed_in;
    let (outcome, label, reward) = (verdict.outcome, verdict.label, Some(verdict.reward));
    let frame = Frame::new(FrameKey::Verdict(sample, lease), v1::Verdict::from(verdict.clone()).encode_to_vec());
    let event = Event::SubmitVerdict { worker, lease, sample, outcome, label, reward };
    let (reply, effects) = driver.ask_with(event, None, Some(frame))?;
    let fresh = reply == (Reply::Accepted { fresh: true });
    // A repeat was counted the first time.
    if fresh || !outcome.is_conclusive() {
        let (name, measured) = (driver.machine.worker_name(worker), evaluation_problem(sample.group).is_some());
        verifications.iter().for_each(|verification| driver.verifications.note(&name, verification, measured));
    }
    // Stored before the effects are applied, because this may be the verdict that completes the batch.
    if fresh {
        driver.store.put_verdict(sample, verdict);
    } else if !outcome.is_conclusive() {
        tracing::warn!(%sample, outcome = outcome.name(), rule = verdict.rule, "a verification failed");
    }
    driver.apply(effects);
    Ok(())
}

fn task(problems: &Problems, grant: SampleGrant, kept: &KeptSample) -> Result<v1::VerifyTask, ContentError> {
    let SampleGrant { lease, sample } = grant;
    let problem = problem_of(problems, sample.group);
    Ok(v1::VerifyTask {
        lease_id: lease.0,
        group_id: sample.group.0,
        sample_index: sample.index,
        response: kept.text()?,
        gold: problem.answer.clone(),
        question: problem.question.clone(),
        answer_tokens: kept.tokens,
        verifier: problem.verifier.as_deref().unwrap_or_default().to_owned(),
    })
}
