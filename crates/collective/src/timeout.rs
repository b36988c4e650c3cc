use std::time::Duration;

use crate::Operation;

/// The least bandwidth that a deadline counts on, in bytes a second, over TCP between hosts: far below any network that
/// is worth training on, so that only a fault is slower.
pub const HOST_BANDWIDTH_FLOOR: u64 = 32 << 20;
/// The least bandwidth that a deadline counts on, in bytes a second, between devices.
pub const DEVICE_BANDWIDTH_FLOOR: u64 = 256 << 20;

/// How long the operations of a communicator may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    base: Duration,
    bandwidth_floor: u64,
    world_size: usize,
}

impl Limits {
    /// Of `world_size` ranks that lag behind each other by no more than `base`, on a network that moves
    /// `bandwidth_floor` bytes a second.
    #[must_use]
    pub fn new(base: Duration, bandwidth_floor: u64, world_size: usize) -> Self {
        Self { base, bandwidth_floor, world_size }
    }

    /// How long `operation` may take on a buffer of `bytes`.
    #[must_use]
    pub fn of(&self, operation: Operation, bytes: usize) -> Duration {
        timeout(self.base, moved_bytes(operation, bytes, self.world_size), self.bandwidth_floor)
    }
}

/// How long an operation may take that moves `bytes` through this rank: the base, and the time of the bytes at the least
/// bandwidth.
pub(crate) fn timeout(base: Duration, bytes: u64, bandwidth_floor: u64) -> Duration {
    base.saturating_add(Duration::from_secs_f64(bytes as f64 / bandwidth_floor as f64))
}

/// Bytes that `operation` moves through one rank at most, for a buffer of `bytes`.
pub(crate) fn moved_bytes(operation: Operation, bytes: usize, world_size: usize) -> u64 {
    use Operation::{AllGather, AllGatherF64, AllReduceSum, Barrier, Broadcast, Connect, ReduceScatterSum};
    let bytes = bytes as u64;
    match operation {
        // Once around to add up, once more to share.
        AllReduceSum => 2 * bytes,
        ReduceScatterSum | AllGather | Broadcast => bytes,
        // The other ranks' lengths are not known here; as a rule they are like this one's.
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
