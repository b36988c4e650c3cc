use std::time::Duration;

use pacs_types::Generation;

use crate::ErrorKind;

/// Longest job name that fits the greeting, in bytes.
const JOB_LIMIT: usize = 1024;

/// One membership of the learner group, as the coordinator announces it to a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    /// The job; a peer of another job is refused.
    pub job: String,
    /// The generation; a peer of another generation is refused.
    pub generation: Generation,
    /// This rank.
    pub rank: usize,
    /// `host:port` of every rank's listener, by rank; as many as there are ranks.
    pub addresses: Vec<String>,
    /// How long connecting, and then each operation, may take, the time of its bytes apart: an operation also gets what
    /// its bytes take at [`crate::HOST_BANDWIDTH_FLOOR`], or at [`crate::DEVICE_BANDWIDTH_FLOOR`] between devices.
    pub timeout: Duration,
}

impl GroupConfig {
    pub(crate) fn world_size(&self) -> usize {
        self.addresses.len()
    }

    /// The rank that this one sends to.
    pub(crate) fn next(&self) -> usize {
        (self.rank + 1) % self.world_size()
    }

    /// The rank that this one receives from.
    pub(crate) fn previous(&self) -> usize {
        (self.rank + self.world_size() - 1) % self.world_size()
    }

    pub(crate) fn check(&self) -> Result<(), ErrorKind> {
        if self.rank >= self.world_size() {
            let (rank, world_size) = (self.rank, self.world_size());
            return Err(ErrorKind::Invalid(format!("rank {rank} has no address in a group of {world_size}")));
        }
        if self.job.len() > JOB_LIMIT {
            return Err(ErrorKind::Invalid(format!("the job name is longer than {JOB_LIMIT} bytes")));
        }
        Ok(())
    }
}
