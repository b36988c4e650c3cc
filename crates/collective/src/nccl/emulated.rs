//! A device that is none: its memory is this process's own, and what NCCL would do on it goes over the `host` ring
//! ([`crate::HostCollective::with_emulated_device`]).

use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::api::{Api, Comm, DeviceError, Event, Launch, Pointer, Stream, UniqueId, Versions};
use super::device::DeviceBuffer;

/// Memory of this process. Nothing is asynchronous there: what was recorded has been reached.
#[derive(Debug, Default)]
pub(crate) struct HostMemory {
    events: AtomicUsize,
}

const EMULATED: DeviceError = DeviceError::Emulated;

impl Api for HostMemory {
    fn versions(&self) -> Result<Versions, DeviceError> {
        Err(EMULATED)
    }

    fn index(&self) -> Option<usize> {
        None
    }

    fn create_stream(&self) -> Result<Stream, DeviceError> {
        Err(EMULATED)
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
        Err(EMULATED)
    }

    fn free(&self, _: Pointer) {}

    fn upload(&self, _: &[u8], _: Pointer) -> Result<(), DeviceError> {
        Err(EMULATED)
    }

    fn download(&self, _: Pointer, _: &mut [u8]) -> Result<(), DeviceError> {
        Err(EMULATED)
    }

    fn copy(&self, _: Pointer, _: Pointer, _: usize, _: Stream) -> Result<(), DeviceError> {
        Err(EMULATED)
    }

    fn unique_id(&self) -> Result<UniqueId, DeviceError> {
        Err(EMULATED)
    }

    fn begin(&self, _: &UniqueId, _: usize, _: usize) -> Result<Comm, DeviceError> {
        Err(EMULATED)
    }

    fn is_settled(&self, _: Comm) -> Result<bool, DeviceError> {
        Err(EMULATED)
    }

    fn enqueue(&self, _: Comm, _: Launch, _: Stream) -> Result<(), DeviceError> {
        Err(EMULATED)
    }

    fn finalize(&self, _: Comm) -> Result<(), DeviceError> {
        Err(EMULATED)
    }

    fn destroy(&self, _: Comm) {}

    fn abort(&self, _: Comm) {}
}

/// The memory of a buffer that is lent by an emulated device; `None` of any other.
#[expect(unsafe_code, reason = "the owner of the memory has vouched for it when it was lent")]
pub(crate) fn with_bytes<T>(data: &DeviceBuffer, run: impl FnOnce(&mut [u8]) -> T) -> Option<T> {
    // SAFETY: `CudaDevice::buffer` was promised that so many bytes lie there, and that nothing else touches them until
    // the operation that takes the buffer has returned; the memory of a device without an index is this process's.
    let bytes = || unsafe { slice::from_raw_parts_mut(data.pointer.0 as *mut u8, data.bytes) };
    data.index().is_none().then(|| run(bytes()))
}
