use std::time::Duration;

use pacs_types::Role;

/// A member of the run.
#[derive(Clone, Debug)]
pub(crate) struct Worker {
    pub(crate) role: Role,
    pub(crate) name: String,
    pub(crate) host: String,
    pub(crate) pid: u32,
    pub(crate) collective_address: String,
    pub(crate) activity: String,
    pub(crate) heard: Duration,
    /// Learners: it has asked for a place in the next generation.
    pub(crate) joining: bool,
}

/// Orders `learner-2` before `learner-10`.
pub(crate) fn name_order(name: &str) -> (usize, &str) {
    (name.len(), name)
}
