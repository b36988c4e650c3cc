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
    pub(crate) host: String,
    pub(crate) pid: u32,
    pub(crate) collective_address: String,
    pub(crate) activity: String,
    /// Since when it does that.
    pub(crate) active_since: Duration,
    pub(crate) heard: Duration,
    /// Its newest request for work that was answered with some, and the loans that it got.
    pub(crate) answered: Option<(u64, Vec<LeaseId>)>,
    /// It gets no new work and is to leave.
    pub(crate) draining: Option<Drain>,
    /// Learners: it has asked for a place in the next generation.
    pub(crate) joining: bool,
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
    /// The loans that a request got when it was asked first.
    pub(crate) fn given(&self, request: u64) -> &[LeaseId] {
        match &self.answered {
            Some((answered, given)) if *answered == request && request != 0 => given,
            _ => &[],
        }
    }
}

/// Orders `learner-2` before `learner-10`.
pub(crate) fn name_order(name: &str) -> (usize, &str) {
    (name.len(), name)
}
