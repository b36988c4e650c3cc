use std::time::Duration;

use pacs_types::{LeaseId, Role};
use serde::{Deserialize, Serialize};

/// Ids of workers that are no members any more, and are told something else than to register again, that are remembered.
pub(crate) const MOST_REMEMBERED: usize = 1024;

/// A member of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Worker {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) process: Process,
    pub(crate) collective_address: String,
    pub(crate) activity: String,
    /// Since when it does that.
    pub(crate) active_since: Duration,
    pub(crate) heard: Duration,
    /// Its newest request for work that was answered with some, and the leases that it got.
    pub(crate) answered: Option<(u64, Vec<LeaseId>)>,
    /// It gets no new work and is to leave. Set by the roster, which counts it.
    draining: Option<Drain>,
    /// Learners: it has asked for a place in the next generation.
    pub(crate) joining: bool,
    /// Nothing was heard of it since the coordinator was started again: if it is gone, it may have gone with the coordinator.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) unheard: bool,
}

/// One process, told apart from the others that were or are started under its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// When its supervisor started it, in microseconds since 1970, after it had seen the end of all processes that it had
    /// started under this name before. 0: nobody vouches for that.
    pub(crate) started: u64,
}

impl Process {
    /// Whether this is one process with `holder`, which registers again.
    pub(crate) fn is(&self, holder: &Self) -> bool {
        // In containers, a host name and a process id may both be those of an earlier process.
        let is_older = self.started > 0 && self.started < holder.started;
        self.host == holder.host && self.pid == holder.pid && !is_older
    }

    /// Whether a supervisor vouches that `holder` has ended: only one that has seen it end starts a later one.
    pub(crate) fn outlives(&self, holder: &Self) -> bool {
        holder.started > 0 && self.started > holder.started
    }
}

/// Why a worker is to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Drain {
    /// An operator wants it: it is not to be started again.
    Operator,
    /// Its process was asked to end and goes on for a while. Whoever asked may start another one.
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

    /// The leases that a request got when it was asked first.
    pub(crate) fn given(&self, request: u64) -> &[LeaseId] {
        match &self.answered {
            Some((answered, given)) if *answered == request && request != 0 => given,
            Some(_) | None => &[],
        }
    }
}

/// Orders `learner-2` before `learner-10`.
pub(crate) fn name_order(name: &str) -> (usize, &str) {
    (name.len(), name)
}
