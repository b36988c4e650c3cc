//! Which versions servers were given, and by which label.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use pacs_weights::VersionId;

/// Labels that are remembered: of many more versions than any answer spans.
const REMEMBERED: usize = 1024;

/// The labels of the versions that this process has given to servers.
#[derive(Debug, Default)]
pub(crate) struct Installed(Mutex<VecDeque<(String, VersionId)>>);

impl Installed {
    pub(crate) fn add(&self, label: &str, id: VersionId) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.iter().any(|(other, _)| other == label) {
            return;
        }
        if known.len() == REMEMBERED {
            known.pop_front();
        }
        known.push_back((label.to_owned(), id));
    }

    /// The version with a label; `None` for what was never given.
    pub(crate) fn version_of(&self, label: &str) -> Option<VersionId> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().rev().find(|(other, _)| other == label).map(|(_, id)| *id)
    }
}
