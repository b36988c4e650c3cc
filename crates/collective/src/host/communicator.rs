use std::time::{Duration, Instant};

use bytemuck::cast_slice_mut;

use super::group::GroupConfig;
use super::join::join;
use super::link::{Call, FREE_LENGTH_LIMIT};
use super::listener::HostListener;
use super::ring::Ring;
use crate::error::Fault;
use crate::nccl::with_bytes;
use crate::{
    AbortHandle, Collective, CollectiveError, CudaDevice, DeviceBuffer, ErrorKind, HOST_BANDWIDTH_FLOOR, Limits,
    Operation,
};

/// The TCP communicator of one rank in one generation. Dropping it ends the communicator on the other ranks.
#[derive(Debug)]
pub struct HostCollective {
    rank: usize,
    world_size: usize,
    timeout: Duration,
    /// `None` in a world of one, where every operation is the identity.
    ring: Option<Ring>,
    abort: AbortHandle,
    calls: u64,
    /// Fake device for tests, with the number of operations on its memory.
    emulated: Option<(CudaDevice, usize)>,
}

impl HostCollective {
    /// Creates a communicator of a single rank, which needs no network.
    #[must_use]
    pub fn alone() -> Self {
        Self {
            rank: 0,
            world_size: 1,
            timeout: Duration::from_hours(1),
            ring: None,
            abort: AbortHandle::new(),
            calls: 0,
            emulated: None,
        }
    }

    /// Joins a generation, and returns when every rank has.
    ///
    /// A peer that is unreachable, or has not left its previous generation, is retried until the timeout. Connections
    /// from another job or generation are refused with a reason.
    ///
    /// # Errors
    ///
    /// When a rank does not join in time, or refuses this one.
    pub fn connect(listener: &HostListener, group: GroupConfig) -> Result<Self, CollectiveError> {
        Self::connect_abortable(listener, group, AbortHandle::new())
    }

    /// As [`HostCollective::connect`], with a handle that another thread holds, so that the wait for the other ranks
    /// can be aborted too. Each handle serves one communicator.
    ///
    /// # Errors
    ///
    /// As [`HostCollective::connect`], and when the handle was aborted.
    pub fn connect_abortable(
        listener: &HostListener,
        group: GroupConfig,
        abort: AbortHandle,
    ) -> Result<Self, CollectiveError> {
        let rank = group.rank;
        let world_size = group.world_size();
        let timeout = group.timeout;
        let mut communicator = Self { rank, world_size, timeout, ring: None, abort, calls: 0, emulated: None };
        let deadline = Instant::now() + timeout;
        if let Err(fault) = communicator.enter(listener, &group, deadline) {
            return Err(communicator.fail(Operation::Connect, fault));
        }
        tracing::debug!(rank, world_size, generation = %group.generation, "joined the ring");
        Ok(communicator)
    }

    /// Adds a fake device whose memory is this process's own, and runs operations on it over the ring. The code paths
    /// of GPU learners can then be tested without a GPU.
    #[must_use]
    pub fn with_emulated_device(mut self) -> Self {
        self.emulated = Some((CudaDevice::emulated(), 0));
        self
    }

    /// Returns the number of operations on emulated device memory so far.
    #[must_use]
    pub fn emulated_operations(&self) -> usize {
        self.emulated.as_ref().map_or(0, |(_, operations)| *operations)
    }

    /// Returns the deadline of an operation without bytes to move.
    pub(crate) fn base_timeout(&self) -> Duration {
        self.timeout
    }

    /// Returns a neighbour that has closed its connection: it left, failed, or gave up the generation.
    pub(crate) fn lost_neighbour(&self) -> Option<usize> {
        self.ring.as_ref().and_then(|ring| ring.link.lost_neighbour())
    }

    /// Returns why operations fail from now on, or `None` while the communicator is usable.
    pub(crate) fn reason(&self) -> Option<ErrorKind> {
        self.abort.reason()
    }

    fn enter(&mut self, listener: &HostListener, group: &GroupConfig, deadline: Instant) -> Result<(), Fault> {
        group.check().map_err(Fault::own)?;
        if let Some(kind) = self.abort.reason() {
            return Err(Fault::own(kind));
        }
        // An ordinary communicator all the same: callers have no case of their own for one rank.
        if self.world_size == 1 {
            return Ok(());
        }
        let link = join(listener, group, &self.abort, deadline)?;
        // From here an abort shuts these sockets down, which is the only way to wake a thread that is blocked in the kernel.
        self.abort.watch([link.next.stream(), link.previous.stream()]);
        let ring = self.ring.insert(Ring { link, rank: self.rank, world_size: self.world_size });
        let call = Call { operation: Operation::Connect, sequence: 0, elements: 0, deadline, timeout: self.timeout };
        // A rank that has its two links does not know whether the others have theirs. Without this, the first operation would take
        // the blame for a rank that never joined.
        ring.barrier(&call)
    }

    /// Runs one call. `bytes` is the length of its buffer, for the deadline; 0 for operations without one.
    fn call(
        &mut self,
        operation: Operation,
        elements: usize,
        bytes: usize,
        run: impl FnOnce(&Ring, &Call) -> Result<(), Fault>,
    ) -> Result<(), CollectiveError> {
        // Sent with every operation: ranks that are out of step fail at once, instead of adding gradients of different buckets.
        self.calls += 1;
        // A deadline for the bytes at hand. One fixed limit would either end large transfers or find a lost rank late.
        let timeout = self.limits().of(operation, bytes);
        let call = Call { operation, sequence: self.calls, elements, deadline: Instant::now() + timeout, timeout };
        let result = match (self.abort.reason(), &self.ring) {
            (Some(kind), _) => Err(Fault::own(kind)),
            (None, Some(ring)) => run(ring, &call),
            (None, None) => Ok(()),
        };
        result.map_err(|fault| self.fail(operation, fault))
    }

    /// Fails unless `length` divides into equal parts.
    pub(crate) fn check_parts(&self, operation: Operation, length: usize) -> Result<(), CollectiveError> {
        if length.is_multiple_of(self.world_size) {
            return Ok(());
        }
        let kind = ErrorKind::Invalid(format!("{length} elements do not fall into {} equal parts", self.world_size));
        Err(self.fail(operation, Fault::own(kind)))
    }

    /// Fails unless `root` is a rank.
    pub(crate) fn check_root(&self, root: usize) -> Result<(), CollectiveError> {
        if root < self.world_size {
            return Ok(());
        }
        let kind = ErrorKind::Invalid(format!("there is no rank {root} among {}", self.world_size));
        Err(self.fail(Operation::Broadcast, Fault::own(kind)))
    }

    /// Runs an operation on emulated device memory; this backend reaches no other.
    fn on_device(
        &mut self,
        operation: Operation,
        data: &DeviceBuffer,
        run: impl FnOnce(&mut Self, &mut [u8]) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some((_, operations)) = &mut self.emulated {
            *operations += 1;
            if let Some(result) = with_bytes(data, |bytes| run(self, bytes)) {
                return result;
            }
        }
        let problem = "the `host` backend cannot reach the memory of a device; copy it to the host, or use `nccl`";
        Err(self.fail(operation, Fault::own(ErrorKind::Invalid(problem.to_owned()))))
    }

    /// Ends the communicator with its first error. If it was aborted, the abort is reported instead of its effects
    /// on the sockets.
    pub(crate) fn fail(&self, operation: Operation, fault: Fault) -> CollectiveError {
        let Fault { peer, kind } = match self.abort.reason() {
            Some(kind) => Fault::own(kind),
            None => fault,
        };
        // The first error ends it for good: after a partial exchange the ranks' buffers differ, and a retry would hide that.
        let error = CollectiveError { operation, rank: self.rank, peer, kind };
        self.abort.fail(error.to_string());
        error
    }
}

impl Collective for HostCollective {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.call(Operation::AllReduceSum, data.len(), size_of_val(data), |ring, call| ring.all_reduce_sum(call, data))
    }

    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.check_parts(Operation::ReduceScatterSum, data.len())?;
        self.call(Operation::ReduceScatterSum, data.len(), size_of_val(data), |ring, call| {
            ring.reduce_scatter_sum(call, data)
        })
    }

    fn all_reduce_sum_i64(&mut self, data: &mut [i64]) -> Result<(), CollectiveError> {
        self.call(Operation::AllReduceSum, data.len(), size_of_val(data), |ring, call| ring.all_reduce_sum(call, data))
    }

    fn reduce_scatter_sum_i64(&mut self, data: &mut [i64]) -> Result<(), CollectiveError> {
        self.check_parts(Operation::ReduceScatterSum, data.len())?;
        self.call(Operation::ReduceScatterSum, data.len(), size_of_val(data), |ring, call| {
            ring.reduce_scatter_sum(call, data)
        })
    }

    fn all_gather(&mut self, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.check_parts(Operation::AllGather, data.len())?;
        self.call(Operation::AllGather, data.len(), data.len(), |ring, call| ring.all_gather(call, data))
    }

    fn all_gather_f64(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        // Lengths may differ between ranks here, so a peer's length is unknown until it arrives; the limit bounds what it can make us
        // allocate.
        if size_of_val(mine) > FREE_LENGTH_LIMIT {
            let kind = ErrorKind::Invalid(format!("{} numbers are too many to gather", mine.len()));
            return Err(self.fail(Operation::AllGatherF64, Fault::own(kind)));
        }
        let mut blocks = vec![Vec::new(); self.world_size];
        blocks[self.rank] = mine.to_vec();
        self.call(Operation::AllGatherF64, 0, size_of_val(mine), |ring, call| ring.all_gather_f64(call, &mut blocks))?;
        Ok(blocks)
    }

    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.check_root(root)?;
        self.call(Operation::Broadcast, data.len(), data.len(), |ring, call| ring.broadcast(call, root, data))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.call(Operation::Barrier, 0, 0, Ring::barrier)
    }

    fn limits(&self) -> Limits {
        Limits::new(self.timeout, HOST_BANDWIDTH_FLOOR, self.world_size)
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }

    fn device(&self) -> Option<&CudaDevice> {
        self.emulated.as_ref().map(|(device, _)| device)
    }

    fn all_reduce_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.on_device(Operation::AllReduceSum, data, |host, bytes| host.all_reduce_sum(cast_slice_mut(bytes)))
    }

    fn reduce_scatter_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.on_device(Operation::ReduceScatterSum, data, |host, bytes| host.reduce_scatter_sum(cast_slice_mut(bytes)))
    }

    fn all_gather_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.on_device(Operation::AllGather, data, |host, bytes| host.all_gather(bytes))
    }

    fn broadcast_device(&mut self, root: usize, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.on_device(Operation::Broadcast, data, |host, bytes| host.broadcast(root, bytes))
    }
}

impl Drop for HostCollective {
    fn drop(&mut self) {
        self.abort.close();
    }
}
