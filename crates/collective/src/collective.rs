use crate::{AbortHandle, CollectiveError, CudaDevice, DeviceBuffer, Limits};

/// Collective operations: every rank of a generation calls them together, in the same order and with matching sizes.
///
/// Every operation has a deadline. The first error ends the communicator: later operations fail at once, and the other
/// ranks fail as soon as they wait for this one. A failed operation leaves undefined data in its buffer.
///
/// Plain operations work on host memory, which travels over TCP with either backend; those that end in `_device` work
/// on device memory. No method has a default, so a wrapper cannot forget to forward one.
pub trait Collective: Send {
    /// Returns this rank, in `0..world_size`.
    fn rank(&self) -> usize;

    /// Returns the number of ranks, at least 1.
    fn world_size(&self) -> usize;

    /// Replaces `data` by its sum over all ranks. The order of additions depends on sizes alone, and every rank ends
    /// with the same bits.
    ///
    /// # Errors
    ///
    /// When a rank is lost, late, or calls a different operation, or when the communicator was aborted.
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// Sums `data` over all ranks and leaves the `r`-th of `world_size` equal parts with rank `r`. The other parts of
    /// the buffer are undefined afterwards.
    ///
    /// On the `host` backend, the part has the same bits as in [`Collective::all_reduce_sum`] of the same buffer. NCCL
    /// guarantees that for no two operations; there it is equal up to rounding.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`], and when the length is not a multiple of the world size.
    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// [`Collective::all_reduce_sum`] of wrapping integers in host memory. The sum is the same for any order of
    /// additions, and so for any number of ranks.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`].
    fn all_reduce_sum_i64(&mut self, data: &mut [i64]) -> Result<(), CollectiveError>;

    /// [`Collective::reduce_scatter_sum`] of wrapping integers in host memory.
    ///
    /// # Errors
    ///
    /// As [`Collective::reduce_scatter_sum`].
    fn reduce_scatter_sum_i64(&mut self, data: &mut [i64]) -> Result<(), CollectiveError>;

    /// Gathers `data` from all ranks: the `r`-th of `world_size` equal parts comes from rank `r`. Before the call only
    /// this rank's part has to be valid.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`], and when the length is not a multiple of the world size.
    fn all_gather(&mut self, data: &mut [u8]) -> Result<(), CollectiveError>;

    /// Returns the numbers that each rank passed, by rank. Lengths may differ.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`].
    fn all_gather_f64(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError>;

    /// Replaces `data` by that of rank `root`. The length is the same on every rank.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`], and when `root` is not a rank.
    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError>;

    /// Returns once every rank has called it.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`].
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Returns the deadlines of operations, on host and device memory; an operation fails by itself
    /// beyond its deadline.
    fn limits(&self) -> Limits;

    /// Returns a handle by which any thread can end the communicator.
    fn abort_handle(&self) -> AbortHandle;

    /// Returns the device that the `_device` operations work on, for making [`DeviceBuffer`]s; `None` if the backend
    /// has no device.
    fn device(&self) -> Option<&CudaDevice>;

    /// [`Collective::all_reduce_sum`] of float32 numbers in device memory.
    ///
    /// It starts after the work that the buffer's stream held when the buffer was made, and returns when every stream
    /// can read the result.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`], and when the backend cannot reach device memory; only NCCL can.
    fn all_reduce_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError>;

    /// [`Collective::reduce_scatter_sum`] of float32 numbers in device memory.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum_device`] and [`Collective::reduce_scatter_sum`].
    fn reduce_scatter_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError>;

    /// [`Collective::all_gather`] in device memory.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum_device`] and [`Collective::all_gather`].
    fn all_gather_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError>;

    /// [`Collective::broadcast`] in device memory.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum_device`] and [`Collective::broadcast`].
    fn broadcast_device(&mut self, root: usize, data: &DeviceBuffer) -> Result<(), CollectiveError>;
}
