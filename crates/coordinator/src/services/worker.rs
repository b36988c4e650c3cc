use std::time::{Duration, Instant};

use pacs_machine::{Directive, End, Event, LogLevel, Reply};
use pacs_protocol::v1;
use pacs_protocol::v1::worker_service_server::WorkerService;
use pacs_runtime::HOLDER_MISSED_KEY;
use pacs_runtime::net::{Peer, PeerRole};
use pacs_types::{Role, WorkerId};
use tonic::{Code, Request, Response, Status};

use super::{Services, check_name, sentence, wrong_answer};
use crate::driver::Driver;

#[tonic::async_trait]
impl WorkerService for Services {
    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        let certified = certified(&request);
        let request = request.into_inner();
        let role: Role = request.role().try_into()?;
        must_be(certified, Some(role))?;
        if request.name.is_empty() {
            return Err(Status::invalid_argument("field `name` is empty"));
        }
        let names = [
            ("name", &request.name),
            ("host", &request.host),
            ("collective_address", &request.collective_address),
            ("version", &request.version),
            ("run_id", &request.run_id),
            ("attempt", &request.attempt),
        ];
        names.into_iter().try_for_each(|(field, value)| check_name(field, value))?;
        let ours = env!("CARGO_PKG_VERSION");
        if request.version != ours {
            let theirs = request.version;
            return Err(Status::failed_precondition(format!(
                "worker program has version {theirs}, the coordinator {ours}; install the same on all machines"
            )));
        }
        // The guard has compared the run in the metadata; a worker may name it in the request instead.
        let (ours, theirs) = (&*self.2, &request.run_id);
        if !theirs.is_empty() && ours != theirs {
            return Err(Status::aborted(format!("this is run {ours}, and the worker belongs to another one")));
        }
        let (ours, theirs) = (&*self.1, &request.attempt);
        if !ours.is_empty() && !theirs.is_empty() && ours != theirs {
            if let Some(times) = self.3.count(role, &request.name, Instant::now()) {
                let worker = &request.name;
                tracing::warn!(worker, times, "a worker of another start of the job was refused: {theirs}");
            }
            return Err(Status::aborted(format!(
                "the worker was started for attempt {theirs}, and this is attempt {ours}: its scheduler has abandoned it"
            )));
        }
        let v1::RegisterRequest { name, host, pid, started, collective_address, .. } = request;
        let event = Event::Register { role, name: name.clone(), host: host.clone(), pid, started, collective_address };
        let run_id = self.2.to_string();
        let refusals = &self.3;
        let register = |driver: &mut Driver| {
            let reply = driver.call(event).map_err(|refusal| {
                if let Some(times) = refusals.count(role, &name, Instant::now()) {
                    tracing::warn!(%role, name, host, pid, times, "a registration was refused: {}", refusal.message());
                }
                with_patience(refusal, driver.machine.heartbeat_timeout())
            });
            let Reply::Registered(worker) = reply? else { return Err(wrong_answer()) };
            tracing::info!(%role, name, host, pid, %worker, "worker registered");
            Ok(v1::RegisterResponse {
                worker_id: worker.0,
                job_spec: driver.job_toml.clone(),
                run_dir: driver.run_dir.display().to_string(),
                heartbeat_interval_ms: heartbeat_interval_ms(driver, role),
                run_id,
            })
        };
        Ok(Response::new(self.0.call(register).await?))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let certified = certified(&request);
        let v1::HeartbeatRequest { worker_id, activity, ending, servers } = request.into_inner();
        let mut driver = self.0.lock()?;
        let role = driver.machine.worker_role(WorkerId(worker_id));
        must_be(certified, role)?;
        if ending {
            driver.call(Event::Ending { worker: WorkerId(worker_id) })?;
        }
        let event = Event::Heartbeat { worker: WorkerId(worker_id), activity: sentence(activity) };
        let Reply::Directive(directive) = driver.call(event)? else { return Err(wrong_answer()) };
        if role == Some(Role::Rollout) {
            driver.note_servers(WorkerId(worker_id), servers);
        }
        let log_level = driver.machine.position().log_level;
        let heartbeat_interval_ms = role.map_or(0, |role| heartbeat_interval_ms(&driver, role));
        let is_stopped = driver.machine.ended() == Some(&End::Stopped);
        // The answer is built without the lock.
        drop(driver);
        let directive = match directive {
            Directive::Continue => v1::Directive::Continue,
            Directive::Leave if is_stopped => v1::Directive::LeaveForNow,
            Directive::Leave => v1::Directive::Leave,
            Directive::LeaveForNow => v1::Directive::LeaveForNow,
            Directive::Register => v1::Directive::Register,
            Directive::Restart => v1::Directive::Restart,
            Directive::Replaced => v1::Directive::Replaced,
        };
        let log_level = match log_level {
            None => v1::LogLevel::Unspecified,
            Some(LogLevel::Error) => v1::LogLevel::Error,
            Some(LogLevel::Warn) => v1::LogLevel::Warn,
            Some(LogLevel::Info) => v1::LogLevel::Info,
            Some(LogLevel::Debug) => v1::LogLevel::Debug,
            Some(LogLevel::Trace) => v1::LogLevel::Trace,
        };
        let (directive, log_level) = (directive.into(), log_level.into());
        Ok(Response::new(v1::HeartbeatResponse { directive, log_level, heartbeat_interval_ms }))
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        let certified = certified(&request);
        let v1::LeaveRequest { worker_id, error } = request.into_inner();
        let error = Some(sentence(error)).filter(|error| !error.is_empty());
        let event = Event::Leave { worker: WorkerId(worker_id), error };
        let leave = |driver: &mut Driver| {
            must_be(certified, driver.machine.worker_role(WorkerId(worker_id)))?;
            driver.call(event)?;
            Ok(())
        };
        self.0.call(leave).await?;
        Ok(Response::new(v1::LeaveResponse {}))
    }
}

/// Heartbeats per second that a coordinator asks for: over TLS each takes it up to 0.2 ms of a processor (`cargo xtask bench fleet`).
const MOST_HEARTBEATS: f64 = 500.0;
/// Heartbeats within the timeout, however many members there are: three in a row may be lost.
const HEARTBEATS_PER_TIMEOUT: u32 = 4;

/// Longest wait of a member until its next heartbeat, in milliseconds. It is told with every heartbeat, so it follows
/// the number of members.
fn heartbeat_interval_ms(driver: &Driver, role: Role) -> u32 {
    let members = [Role::Rollout, Role::Verifier].into_iter().map(|role| driver.machine.member_count(role)).sum();
    let interval = interval_for(role, members, driver.heartbeat_interval, driver.machine.heartbeat_timeout());
    u32::try_from(interval.as_millis()).unwrap_or(u32::MAX).max(1)
}

/// The wait of a worker of `role` when there are `members` other than learners. Learners always use the shortest one,
/// because heartbeats tell them of the end of a generation.
///
/// Other calls are no sign of life: in the fleets that this is for, a worker makes fewer of them than heartbeats, and
/// their answers hold no directive.
fn interval_for(role: Role, members: usize, shortest: Duration, timeout: Duration) -> Duration {
    let of_many = match role {
        Role::Learner => Duration::ZERO,
        Role::Rollout | Role::Verifier => Duration::from_secs_f64(members as f64 / MOST_HEARTBEATS),
    };
    shortest.max(of_many).min(timeout / HEARTBEATS_PER_TIMEOUT)
}

/// Adds the holder's timeout to the refusal of a held name, which is how long the worker asks again.
fn with_patience(mut refusal: Status, heartbeat_timeout: Duration) -> Status {
    if refusal.code() == Code::AlreadyExists {
        let milliseconds = u64::try_from(heartbeat_timeout.as_millis()).unwrap_or(u64::MAX);
        refusal.metadata_mut().insert(HOLDER_MISSED_KEY, milliseconds.into());
    }
    refusal
}

/// Role in the caller's certificate; `None` in plain text.
fn certified<T>(request: &Request<T>) -> Option<PeerRole> {
    request.extensions().get::<Peer>().and_then(|peer| peer.role)
}

/// Refuses a caller that acts for a worker of another role. An unknown worker has no role.
fn must_be(certified: Option<PeerRole>, role: Option<Role>) -> Result<(), Status> {
    match (certified, role.map(PeerRole::from)) {
        (Some(certified), Some(role)) if certified != role => {
            tracing::warn!(%certified, %role, "a worker spoke for one of another role");
            Err(Status::permission_denied(format!("the certificate is one of the {certified}, not of the {role}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_become_rare_in_a_large_fleet_but_three_may_always_be_lost() {
        let (second, timeout) = (Duration::from_secs(1), Duration::from_secs(10));
        let of = |role, members| interval_for(role, members, second, timeout).as_millis();
        assert_eq!([1, 500, 750, 5000, 10_000].map(|n| of(Role::Rollout, n)), [1000, 1000, 1500, 2500, 2500]);
        assert_eq!(of(Role::Verifier, 10_000), 2500);
        assert_eq!(of(Role::Learner, 10_000), 1000);
        // A timeout that is short for the interval shortens it.
        for role in Role::ALL {
            assert_eq!(interval_for(role, 1, second, Duration::from_secs(2)), Duration::from_millis(500));
        }
    }
}
