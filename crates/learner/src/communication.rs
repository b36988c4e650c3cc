//! How much ranks tell each other, and how long that takes.

use std::time::Instant;

use pacs_collective::{Collective, CollectiveError};

/// A communicator that counts.
pub(crate) struct Metered<'a> {
    inner: &'a mut dyn Collective,
    /// Bytes of the buffers that this rank has handed over; what a rank alone says to itself is not counted.
    pub(crate) bytes: f64,
    /// Time within the operations, waiting for slower ranks included.
    pub(crate) seconds: f64,
}

impl<'a> Metered<'a> {
    pub(crate) fn new(inner: &'a mut dyn Collective) -> Self {
        Self { inner, bytes: 0.0, seconds: 0.0 }
    }

    fn count<T>(&mut self, bytes: usize, operation: impl FnOnce(&mut dyn Collective) -> T) -> T {
        let started = Instant::now();
        let result = operation(self.inner);
        self.seconds += started.elapsed().as_secs_f64();
        if self.inner.world_size() > 1 {
            self.bytes += bytes as f64;
        }
        result
    }
}

impl Collective for Metered<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.count(size_of_val(data), |inner| inner.all_reduce_sum(data))
    }

    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.count(size_of_val(data), |inner| inner.reduce_scatter_sum(data))
    }

    fn all_gather(&mut self, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.count(size_of_val(data), |inner| inner.all_gather(data))
    }

    fn all_gather_f64(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        self.count(size_of_val(mine), |inner| inner.all_gather_f64(mine))
    }

    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.count(size_of_val(data), |inner| inner.broadcast(root, data))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.count(0, |inner| inner.barrier())
    }
}
