//! Fake device for tests. Its memory is that of this process, and collectives on it run over the `host` ring
//! ([`crate::HostCollective::with_emulated_device`]).

use std::collections::BTreeMap;
use std::slice;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::api::{Api, Comm, DeviceError, Event, Launch, Pointer, Stream, UniqueId, Versions};
use super::device::DeviceBuffer;

/// Memory of this process. Nothing in it is asynchronous, so every recorded event has been reached.
#[derive(Debug, Default)]
pub(crate) struct HostMemory {
    events: AtomicUsize,
    /// Allocations by address.
    allocated: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl HostMemory {
    fn allocated(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

    fn allocate(&self, bytes: usize) -> Result<Pointer, DeviceError> {
        // At least one byte, so that addresses differ.
        let mut memory = vec![0; bytes.max(1)];
        let pointer = memory.as_mut_ptr() as u64;
        self.allocated().insert(pointer, memory);
        Ok(Pointer(pointer))
    }

    fn free(&self, pointer: Pointer) {
        self.allocated().remove(&pointer.0);
    }

    fn upload(&self, from: &[u8], to: Pointer) -> Result<(), DeviceError> {
        self.allocated().get_mut(&to.0).ok_or(EMULATED)?[..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn download(&self, from: Pointer, to: &mut [u8]) -> Result<(), DeviceError> {
        to.copy_from_slice(&self.allocated().get(&from.0).ok_or(EMULATED)?[..to.len()]);
        Ok(())
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

    fn leave(&self, _: &str) {}
}

/// Runs `run` on the memory of a buffer of an emulated device; `None` for any other buffer.
#[expect(unsafe_code, reason = "the owner of the memory vouched for it when it was exposed")]
pub(crate) fn with_bytes<T>(data: &DeviceBuffer, run: impl FnOnce(&mut [u8]) -> T) -> Option<T> {
    // SAFETY: the caller of `CudaDevice::buffer` guarantees that `bytes` bytes lie there and that nothing else
    // accesses them until the operation that takes the buffer has returned. The memory of a device without an index
    // is this process's.
    let bytes = || unsafe { slice::from_raw_parts_mut(data.pointer.0 as *mut u8, data.bytes) };
    data.index().is_none().then(|| run(bytes()))
}
