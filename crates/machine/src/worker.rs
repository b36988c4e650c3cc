use std::time::Duration;

use pacs_types::{LeaseId, Role};
use serde::{Deserialize, Serialize};

/// Bound on the remembered ids of former workers that are told something else than to register again.
pub(crate) const MOST_REMEMBERED: usize = 1024;

/// A member of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Worker {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) process: Process,
    pub(crate) collective_address: String,
    pub(crate) activity: String,
    /// When that activity began.
    pub(crate) active_since: Duration,
    pub(crate) heard: Duration,
    /// Its newest request for work that was granted leases, and those leases.
    pub(crate) answered: Option<(u64, Vec<LeaseId>)>,
    /// Why it gets no new work and has to leave; `None`: it stays. Set by the roster, which counts it.
    draining: Option<Drain>,
    /// Learners: whether it has asked for a rank in the next generation.
    pub(crate) joining: bool,
    /// Not heard since the coordinator was restarted. If it is dead, it may have died of the same cause.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) unheard: bool,
}

/// Identity of a process, to tell it from others that were or will be started under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// When its supervisor started it, in microseconds since 1970, having seen the end of all processes that it started
    /// under this name before. 0: there is no such supervisor.
    pub(crate) started: u64,
}

impl Process {
    /// Whether this is the same process as `holder`, registering again.
    pub(crate) fn is(&self, holder: &Self) -> bool {
        // In containers, host name and process id may both equal those of an earlier process.
        let is_older = self.started > 0 && self.started < holder.started;
        self.host == holder.host && self.pid == holder.pid && !is_older
    }

    /// Whether a supervisor vouches that `holder` has ended: it starts the next process only after it has seen that.
    pub(crate) fn outlives(&self, holder: &Self) -> bool {
        holder.started > 0 && self.started > holder.started
    }
}

/// Why a worker has to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Drain {
    /// An operator drains it: its supervisor must not restart it.
    Operator,
    /// Its process was asked to end and continues for a grace period. Its supervisor may start another one.
    Ending,
}

impl Worker {
    pub(crate) fn new(role: Role, name: String, process: Process, collective_address: String, now: Duration) -> Self {
        Self {
            role,
            name,
            process,
            collective_address,
            activity: "registered".to_owned(),
            active_since: now,
            heard: now,
            answered: None,
            draining: None,
            joining: false,
            unheard: false,
        }
    }

    pub(crate) fn draining(&self) -> Option<Drain> {
        self.draining
    }

    pub(crate) fn drain(&mut self, why: Drain) {
        self.draining = Some(why);
    }

    /// The leases that the first try of a request was granted.
    pub(crate) fn given(&self, request: u64) -> &[LeaseId] {
        match &self.answered {
            Some((answered, given)) if *answered == request && request != 0 => given,
            Some(_) | None => &[],
        }
    }
}

/// Sort key that orders `learner-2` before `learner-10`.
pub(crate) fn name_order(name: &str) -> (usize, &str) {
    (name.len(), name)
}
