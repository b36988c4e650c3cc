//! A device that is none: its memory is this process's own, and what NCCL would do on it goes over the `host` ring. So the
//! paths of a learner on GPUs run, and are tested, where there is no GPU.

use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::api::{Api, Comm, DeviceError, Event, Launch, Pointer, Stream, UniqueId, Versions};
use super::device::{CudaDevice, DeviceBuffer};
use crate::{AbortHandle, Collective, CollectiveError, HostCollective, Limits};

/// Memory of this process. Nothing is asynchronous there: what was recorded has been reached.
#[derive(Debug, Default)]
pub(crate) struct HostMemory {
    events: AtomicUsize,
}

const NO_NCCL: DeviceError = DeviceError::Unsupported { what: "an emulated device" };

impl Api for HostMemory {
    fn versions(&self) -> Result<Versions, DeviceError> {
        Err(NO_NCCL)
    }

    fn index(&self) -> Option<usize> {
        None
    }

    fn create_stream(&self) -> Result<Stream, DeviceError> {
        Err(NO_NCCL)
    }

    fn destroy_stream(&self, _: Stream) {}

    fn create_event(&self) -> Result<Event, DeviceError> {
        Ok(Event(self.events.fetch_add(1, Ordering::Relaxed)))
    }

    fn destroy_event(&self, _: Event) {}

    fn record(&self, _: Event, _: Stream) -> Result<(), DeviceError> {
        Ok(())
    }

    fn wait_for(&self, _: Stream, _: Event) -> Result<(), DeviceError> {
        Ok(())
    }

    fn is_reached(&self, _: Event) -> Result<bool, DeviceError> {
        Ok(true)
    }

    fn allocate(&self, _: usize) -> Result<Pointer, DeviceError> {
        Err(NO_NCCL)
    }

    fn free(&self, _: Pointer) {}

    fn upload(&self, _: &[u8], _: Pointer) -> Result<(), DeviceError> {
        Err(NO_NCCL)
    }

    fn download(&self, _: Pointer, _: &mut [u8]) -> Result<(), DeviceError> {
        Err(NO_NCCL)
    }

    fn copy(&self, _: Pointer, _: Pointer, _: usize, _: Stream) -> Result<(), DeviceError> {
        Err(NO_NCCL)
    }

    fn unique_id(&self) -> Result<UniqueId, DeviceError> {
        Err(NO_NCCL)
    }

    fn begin(&self, _: &UniqueId, _: usize, _: usize) -> Result<Comm, DeviceError> {
        Err(NO_NCCL)
    }

    fn is_settled(&self, _: Comm) -> Result<bool, DeviceError> {
        Err(NO_NCCL)
    }

    fn enqueue(&self, _: Comm, _: Launch, _: Stream) -> Result<(), DeviceError> {
        Err(NO_NCCL)
    }

    fn finalize(&self, _: Comm) -> Result<(), DeviceError> {
        Err(NO_NCCL)
    }

    fn destroy(&self, _: Comm) {}

    fn abort(&self, _: Comm) {}
}

/// Ranks whose devices are emulated.
#[derive(Debug)]
pub struct EmulatedCollective {
    ring: HostCollective,
    device: CudaDevice,
    operations: usize,
}

impl EmulatedCollective {
    /// Lets the operations on devices of these ranks go over their ring.
    #[must_use]
    pub fn over(ring: HostCollective) -> Self {
        Self { ring, device: CudaDevice::emulated(), operations: 0 }
    }

    /// Operations on the memory of the device so far.
    #[must_use]
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// Runs an operation of the ring on memory of the device.
    #[expect(unsafe_code, reason = "the owner of the memory has vouched for it when it was lent")]
    fn on_bytes<T>(&mut self, data: &DeviceBuffer, run: impl FnOnce(&mut HostCollective, &mut [u8]) -> T) -> T {
        self.operations += 1;
        // SAFETY: `CudaDevice::buffer` was promised that so many bytes lie there, and that nothing else touches them
        // until the operation that takes the buffer has returned. The device is an emulated one, whose memory is that
        // of this process.
        let bytes = unsafe { slice::from_raw_parts_mut(data.pointer.0 as *mut u8, data.bytes) };
        run(&mut self.ring, bytes)
    }

    fn on_numbers<T>(&mut self, data: &DeviceBuffer, run: impl FnOnce(&mut HostCollective, &mut [f32]) -> T) -> T {
        self.on_bytes(data, |ring, bytes| run(ring, bytemuck::cast_slice_mut(bytes)))
    }
}

impl Collective for EmulatedCollective {
    fn rank(&self) -> usize {
        self.ring.rank()
    }

    fn world_size(&self) -> usize {
        self.ring.world_size()
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.ring.all_reduce_sum(data)
    }

    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.ring.reduce_scatter_sum(data)
    }

    fn all_gather(&mut self, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.ring.all_gather(data)
    }

    fn all_gather_f64(&mut self, mine: &[f64]) -> Result<Vec<Vec<f64>>, CollectiveError> {
        self.ring.all_gather_f64(mine)
    }

    fn broadcast(&mut self, root: usize, data: &mut [u8]) -> Result<(), CollectiveError> {
        self.ring.broadcast(root, data)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.ring.barrier()
    }

    fn limits(&self) -> Limits {
        self.ring.limits()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.ring.abort_handle()
    }

    fn device(&self) -> Option<&CudaDevice> {
        Some(&self.device)
    }

    fn all_reduce_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.on_numbers(data, |ring, data| ring.all_reduce_sum(data))
    }

    fn reduce_scatter_sum_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.on_numbers(data, |ring, data| ring.reduce_scatter_sum(data))
    }

    fn all_gather_device(&mut self, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.on_bytes(data, |ring, data| ring.all_gather(data))
    }

    fn broadcast_device(&mut self, root: usize, data: &DeviceBuffer) -> Result<(), CollectiveError> {
        self.on_bytes(data, |ring, data| ring.broadcast(root, data))
    }
}
