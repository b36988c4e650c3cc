use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tonic::service::Interceptor;
use tonic::{Request, Status};

use super::run::{CalledPath, other_run, run_in};
use super::{Peer, PeerRole, RunIdentity};

/// Decides who may call a service.
#[derive(Clone, Debug)]
pub struct Guard {
    service: &'static str,
    allowed: &'static [PeerRole],
    gate: Option<RunGate>,
}

impl Guard {
    /// Admits peers of these roles to `service`; in plain text, which stays within one machine, admits everybody.
    #[must_use]
    pub fn new(service: &'static str, allowed: &'static [PeerRole]) -> Self {
        Self { service, allowed, gate: None }
    }

    /// Admits only callers that name the run of `gate`. A registration may leave it out, because
    /// its answer tells the worker.
    #[must_use]
    pub fn of_run(mut self, gate: &RunGate) -> Self {
        self.gate = Some(gate.clone());
        self
    }
}

impl Interceptor for Guard {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        // Only our own listener attaches a peer; a connection without one was admitted by mistake.
        let peer = request.extensions().get::<Peer>();
        let peer = peer.ok_or_else(|| Status::internal("the connection has no peer"))?;
        if let Some(role) = peer.role.filter(|role| !self.allowed.contains(role)) {
            tracing::warn!(service = self.service, %role, peer = ?peer.address, "a call was refused");
            return Err(Status::permission_denied(format!("a {role} may not call the {} service", self.service)));
        }
        if let Some(gate) = &self.gate {
            gate.check(&request, peer)?;
        }
        peer.settle();
        Ok(request)
    }
}

/// Compares the run of callers with the process's own. Clones share the memory of strangers, so that all services of a
/// process log each stranger once.
#[derive(Clone, Debug)]
pub struct RunGate {
    run: RunIdentity,
    strangers: Arc<Mutex<Strangers>>,
}

impl RunGate {
    /// The gate of a process of this run.
    #[must_use]
    pub fn new(run: RunIdentity) -> Self {
        Self { run, strangers: Arc::default() }
    }

    /// The run that this process belongs to.
    #[must_use]
    pub fn run(&self) -> &RunIdentity {
        &self.run
    }

    fn check(&self, request: &Request<()>, peer: &Peer) -> Result<(), Status> {
        let ours = self.run.get().ok_or_else(|| Status::unavailable("this process is not a member of a run yet"))?;
        let theirs = match run_in(request.metadata()) {
            Ok(Some(theirs)) if theirs == ours => return Ok(()),
            Ok(None) if request.extensions().get::<CalledPath>().is_some_and(CalledPath::is_registration) => {
                return Ok(());
            }
            Ok(Some(theirs)) => format!("run {theirs}"),
            Ok(None) => "no run".to_owned(),
            Err(_) => "no valid run".to_owned(),
        };
        self.note(peer, &theirs, ours);
        Err(other_run(ours, format!("this is run {ours}, and the call names {theirs}")))
    }

    /// Logs a caller of another run, once.
    fn note(&self, peer: &Peer, theirs: &str, ours: &str) {
        let host = peer.address.map(|address| address.ip());
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(untold) = strangers.meet((host, theirs.to_owned()), Instant::now()) {
            tracing::warn!(peer = ?peer.address, untold, "a caller of {theirs} was refused: this is run {ours}");
        }
    }
}

/// Bound on remembered strangers; the oldest is forgotten first.
const MOST_STRANGERS: usize = 64;
/// Time after which a stranger that is still there is logged again.
const REMIND: Duration = Duration::from_secs(600);
/// Bound on log lines about strangers per [`WINDOW`], because runs can be made up.
const MOST_LINES: u32 = 20;
const WINDOW: Duration = Duration::from_secs(60);

/// Address of a caller and the run that it names.
type Stranger = (Option<IpAddr>, String);

#[derive(Debug, Default)]
struct Strangers {
    known: VecDeque<(Stranger, Instant)>,
    /// Start of the current window, and number of lines in it.
    window: Option<(Instant, u32)>,
    untold: u64,
}

impl Strangers {
    /// Whether to log a stranger; if so, the number of strangers that were not logged before.
    fn meet(&mut self, stranger: Stranger, now: Instant) -> Option<u64> {
        if self.known.iter().any(|(known, told)| *known == stranger && now.duration_since(*told) < REMIND) {
            return None;
        }
        let (_, lines) = match &mut self.window {
            Some(window) if now.duration_since(window.0) < WINDOW => window,
            window => window.insert((now, 0)),
        };
        if *lines >= MOST_LINES {
            self.untold += 1;
            return None;
        }
        *lines += 1;
        self.known.retain(|(known, _)| *known != stranger);
        if self.known.len() >= MOST_STRANGERS {
            self.known.pop_front();
        }
        self.known.push_back((stranger, now));
        Some(std::mem::take(&mut self.untold))
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic::metadata::MetadataValue;

    use super::super::run::{RUN_ID_KEY, with_called_path};
    use super::*;

    const RUN: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "ffffffffffffffffffffffffffffffff";

    fn gate(run: &str) -> RunGate {
        RunGate::new(RunIdentity::told(run).expect("a run"))
    }

    fn call(gate: &RunGate, method: &str, run: Option<&str>) -> Result<(), Status> {
        let http = tonic::codegen::http::Request::builder().uri(format!("http://host{method}")).body(());
        let mut request = Request::from_http(with_called_path(http.expect("a request")));
        request.extensions_mut().insert(Peer::new(Some(([127, 0, 0, 1], 4).into()), None));
        if let Some(run) = run {
            request.metadata_mut().insert(RUN_ID_KEY, MetadataValue::try_from(run).expect("a value"));
        }
        Guard::new("worker", &[PeerRole::Rollout]).of_run(gate).call(request).map(drop)
    }

    #[test]
    fn callers_of_another_run_are_refused_and_told_whose_this_is() {
        const HEARTBEAT: &str = "/pacs.v1.WorkerService/Heartbeat";
        const REGISTER: &str = "/pacs.v1.WorkerService/Register";
        let gate = gate(RUN);
        for (method, run, lets_in) in [
            (HEARTBEAT, Some(RUN), true),
            (HEARTBEAT, Some(OTHER), false),
            (HEARTBEAT, Some("nonsense"), false),
            (HEARTBEAT, None, false),
            (REGISTER, Some(RUN), true),
            (REGISTER, Some(OTHER), false),
            (REGISTER, None, true),
        ] {
            match call(&gate, method, run) {
                Ok(()) => assert!(lets_in, "{method} {run:?}"),
                Err(status) => {
                    assert!(!lets_in, "{method} {run:?}: {status}");
                    assert_eq!(status.code(), Code::Aborted, "{method} {run:?}");
                    assert_eq!(run_in(status.metadata()), Ok(Some(RUN)));
                    assert!(status.message().starts_with(&format!("this is run {RUN}, and the call names ")));
                }
            }
        }
    }

    #[test]
    fn a_process_without_a_run_admits_no_caller() {
        let status = call(&gate(""), "/pacs.v1.WeightService/FetchWeights", Some(RUN)).expect_err("not yet");
        assert_eq!(status.code(), Code::Unavailable);
    }

    #[test]
    fn a_stranger_is_logged_once_and_many_are_counted() {
        let (mut strangers, now) = (Strangers::default(), Instant::now());
        let stranger = |n: u32| (None, format!("run {n}"));
        assert_eq!(strangers.meet(stranger(0), now), Some(0));
        assert_eq!(strangers.meet(stranger(0), now + WINDOW), None, "it is known");
        assert_eq!(strangers.meet(stranger(0), now + REMIND), Some(0), "it is still there");
        let told = (1..1000).filter(|n| strangers.meet(stranger(*n), now + REMIND).is_some()).count();
        assert_eq!(told as u32, MOST_LINES - 1);
        assert_eq!(strangers.meet(stranger(1000), now + REMIND + WINDOW), Some(1000 - u64::from(MOST_LINES)));
        for n in 0..100 {
            strangers.meet(stranger(n), now + REMIND + (n + 2) * WINDOW);
        }
        assert_eq!(strangers.known.len(), MOST_STRANGERS);
    }
}
