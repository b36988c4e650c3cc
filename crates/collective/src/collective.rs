use crate::{AbortHandle, CollectiveError, CudaDevice, DeviceBuffer, Limits};

/// Operations that every rank of a generation calls together, in the same order and with matching sizes.
///
/// Every operation has a deadline. The first error ends the communicator: later operations fail at once, and the
/// other ranks fail as soon as they wait for this one. What an operation that failed leaves in its buffer is undefined.
///
/// The plain operations work on host memory, those that end in `_device` on the memory of a device. Numbers of the host
/// travel over TCP with either backend. Nothing has a default, so that no wrapper forgets to pass an operation on.
pub trait Collective: Send {
    /// This rank, `0..world_size`.
    fn rank(&self) -> usize;

    /// How many ranks there are; at least one.
    fn world_size(&self) -> usize;

    /// Replaces `data` by its sum over all ranks. The order of the additions depends on sizes alone, and every rank
    /// ends with the same bits.
    ///
    /// # Errors
    ///
    /// When a rank is lost or late, calls something else, or the communicator was aborted.
    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// Adds up `data` over all ranks and leaves the `r`-th of `world_size` equal parts of the sum with rank `r`; its
    /// other parts are undefined afterwards.
    ///
    /// The part has the same bits as [`Collective::all_reduce_sum`] of the same buffer would give it on the `host`
    /// backend. NCCL promises that for no two operations; there it is equal up to rounding.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`], and when the length is no multiple of the world size.
    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;

    /// [`Collective::all_reduce_sum`] of integers in host memory, which wrap around: the sum depends on no order, and so on
    /// no number of ranks either.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`].
    fn all_reduce_sum_i64(&mut self, data: &mut [i64]) -> Result<(), CollectiveError>;

    /// [`Collective::reduce_scatter_sum`] of integers in host memory, as [`Collective::all_reduce_sum_i64`] adds them.
    ///
    /// # Errors
    ///
    /// As [`Collective::reduce_scatter_sum`].
    fn reduce_scatter_sum_i64(&mut self, data: &mut [i64]) -> Result<(), CollectiveError>;

    /// Fills in the other ranks' parts of `data`: the `r`-th of `world_size` equal parts is rank `r`'s. Only this rank's
    /// part has to be valid before, all of them are afterwards.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`], and when the length is no multiple of the world size.
    fn all_gather(&mut self, data: &mut [u8]) -> Result<(), CollectiveError>;

    /// Returns what each rank passed, by rank. Lengths may differ.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`].
    fn all_gather_f64(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError>;

    /// Replaces `data` by what rank `root` holds. The length is the same on every rank.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`], and when there is no rank `root`.
    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`].
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// How long operations may take, whichever memory they work on; they fail by themselves when they take longer.
    fn limits(&self) -> Limits;

    /// A handle with which any thread can end the communicator.
    fn abort_handle(&self) -> AbortHandle;

    /// The device whose memory the `_device` operations work on; makes [`DeviceBuffer`]s. None when the backend has none.
    fn device(&self) -> Option<&CudaDevice>;

    /// [`Collective::all_reduce_sum`] of float32 numbers in the memory of a device.
    ///
    /// It begins when the work is done that the buffer's stream held when the buffer was made, and returns when the
    /// result is there for every stream.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum`], and when the backend cannot reach the memory: only NCCL can.
    fn all_reduce_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError>;

    /// [`Collective::reduce_scatter_sum`] of float32 numbers in the memory of a device.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum_device`] and [`Collective::reduce_scatter_sum`].
    fn reduce_scatter_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError>;

    /// [`Collective::all_gather`] in the memory of a device.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum_device`] and [`Collective::all_gather`].
    fn all_gather_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError>;

    /// [`Collective::broadcast`] in the memory of a device.
    ///
    /// # Errors
    ///
    /// As [`Collective::all_reduce_sum_device`] and [`Collective::broadcast`].
    fn broadcast_device(&mut self, root: usize, data: &DeviceBuffer) -> Result<(), CollectiveError>;
}
