use std::time::Duration;

use pacs_types::Generation;

use crate::ErrorKind;

/// Longest job name in a greeting (bytes).
const JOB_LIMIT: usize = 1024;

/// One rank's membership in a generation, as the coordinator announces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupConfig {
    /// Name of the job; peers of another job are refused.
    pub job: String,
    /// Generation to join; peers of another one are refused.
    pub generation: Generation,
    /// This rank, an index of `addresses`.
    pub rank: usize,
    /// `host:port` of every rank's listener, by rank; its length is the world size.
    pub addresses: Vec<String>,
    /// Time to connect, and base deadline of each operation. An operation also gets the time of its bytes at
    /// [`crate::HOST_BANDWIDTH_FLOOR`], or at [`crate::DEVICE_BANDWIDTH_FLOOR`] between devices.
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
            let rank = self.rank;
            let world_size = self.world_size();
            return Err(ErrorKind::Invalid(format!("rank {rank} has no address in a group of {world_size}")));
        }
        if self.job.len() > JOB_LIMIT {
            return Err(ErrorKind::Invalid(format!("the job name is longer than {JOB_LIMIT} bytes")));
        }
        Ok(())
    }
}
