use std::time::Duration;

use crate::Operation;

/// Lowest bandwidth that deadlines allow for TCP between hosts (bytes/s). It is far below any network worth training
/// on, so only a fault is slower.
pub const HOST_BANDWIDTH_FLOOR: u64 = 32 << 20;
/// Lowest bandwidth that deadlines allow between devices (bytes/s).
pub const DEVICE_BANDWIDTH_FLOOR: u64 = 256 << 20;

/// Deadlines of a communicator's operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    base: Duration,
    bandwidth_floor: u64,
    world_size: usize,
}

impl Limits {
    /// Creates deadlines for `world_size` ranks whose lag is at most `base`, on a network of at
    /// least `bandwidth_floor` (bytes/s).
    #[must_use]
    pub fn new(base: Duration, bandwidth_floor: u64, world_size: usize) -> Self {
        Self { base, bandwidth_floor, world_size }
    }

    /// Returns the deadline of `operation` on a buffer of `bytes`, from its start.
    #[must_use]
    pub fn of(&self, operation: Operation, bytes: usize) -> Duration {
        timeout(self.base, moved_bytes(operation, bytes, self.world_size), self.bandwidth_floor)
    }
}

/// Deadline of an operation that moves `bytes` through this rank: the base, plus the time of the
/// bytes at the lowest bandwidth.
pub(crate) fn timeout(base: Duration, bytes: u64, bandwidth_floor: u64) -> Duration {
    base.saturating_add(Duration::from_secs_f64(bytes as f64 / bandwidth_floor as f64))
}

/// Upper bound of the bytes that `operation` moves through one rank, for a buffer of `bytes`.
pub(crate) fn moved_bytes(operation: Operation, bytes: usize, world_size: usize) -> u64 {
    use Operation::{AllGather, AllGatherF64, AllReduceSum, Barrier, Broadcast, Connect, ReduceScatterSum};
    let bytes = bytes as u64;
    match operation {
        // Once around the ring to reduce, once more to gather.
        AllReduceSum => 2 * bytes,
        ReduceScatterSum | AllGather | Broadcast => bytes,
        // Lengths of other ranks are unknown here, and usually similar.
        AllGatherF64 => bytes * world_size as u64,
        Connect | Barrier => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_grow_with_the_bytes() {
        let base = Duration::from_secs(5);
        let of = |operation, bytes| {
            Limits::new(base, HOST_BANDWIDTH_FLOOR, 4).of(operation, bytes).saturating_sub(base).as_secs()
        };
        assert_eq!(of(Operation::Barrier, 0), 0);
        assert_eq!(of(Operation::AllReduceSum, 320 << 20), 20);
        assert_eq!(of(Operation::ReduceScatterSum, 320 << 20), 10);
        assert_eq!(of(Operation::AllGather, 320 << 20), 10);
        assert_eq!(of(Operation::Broadcast, 320 << 20), 10);
        assert_eq!(of(Operation::AllGatherF64, 320 << 20), 40);
        assert_eq!(timeout(Duration::MAX, 1 << 40, 1), Duration::MAX, "an endless base stays one");
    }
}
