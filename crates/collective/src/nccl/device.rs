use std::ffi::c_void;
use std::sync::Arc;

use super::api::{Api, DeviceError, Event, Pointer, Stream, Versions};
use super::emulated::HostMemory;
use super::library;

/// One CUDA device of this process, with NCCL.
///
/// It uses the device's primary context, like libtorch. Clones are handles of the same device.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    api: Arc<dyn Api>,
}

impl CudaDevice {
    /// Opens the CUDA driver, visible device `index`, and NCCL.
    ///
    /// # Errors
    ///
    /// When one of them is missing; the error says which one, and how to fix it.
    pub fn open(index: usize) -> Result<Self, DeviceError> {
        Ok(Self { api: Arc::new(library::Library::open(index)?) })
    }

    /// Returns the versions of NCCL and CUDA.
    ///
    /// # Errors
    ///
    /// When a library call fails.
    pub fn versions(&self) -> Result<Versions, DeviceError> {
        self.api.versions()
    }

    /// Creates a fake device, whose memory is that of this process.
    pub(crate) fn emulated() -> Self {
        Self { api: Arc::new(HostMemory::default()) }
    }

    /// Returns the index among the visible devices; `None` for an emulated device.
    #[must_use]
    pub fn index(&self) -> Option<usize> {
        self.api.index()
    }

    /// Exposes memory with another owner to a collective operation, ordered after all work that `stream` holds now.
    ///
    /// # Errors
    ///
    /// When the event cannot be recorded.
    ///
    /// # Safety
    ///
    /// `pointer` must be the address of `bytes` bytes in the memory of this device, aligned for float32, and stay
    /// valid until the operation that takes the buffer has returned. Until then nothing else may access the memory,
    /// except work that `stream` holds already. `stream` must be a stream of this device's primary context, or null
    /// for the default stream.
    #[expect(unsafe_code, reason = "only the caller knows what lies at an address")]
    pub unsafe fn buffer(
        &self,
        pointer: *mut c_void,
        bytes: usize,
        stream: *mut c_void,
    ) -> Result<DeviceBuffer, DeviceError> {
        DeviceBuffer::new(&self.api, Pointer(pointer as u64), bytes, Stream(stream as usize))
    }

    /// Allocates memory on this device.
    ///
    /// # Errors
    ///
    /// When the device has not enough free memory.
    pub fn allocate(&self, bytes: usize) -> Result<DeviceMemory, DeviceError> {
        let pointer = self.api.allocate(bytes)?;
        Ok(DeviceMemory { api: Arc::clone(&self.api), pointer, bytes })
    }

    pub(crate) fn api(&self) -> &Arc<dyn Api> {
        &self.api
    }

    #[cfg(test)]
    pub(crate) fn with(api: Arc<dyn Api>) -> Self {
        Self { api }
    }
}

/// Device memory exposed to an operation, with the event in its owner's stream that the operation waits for.
#[derive(Debug)]
pub struct DeviceBuffer {
    api: Arc<dyn Api>,
    pub(crate) pointer: Pointer,
    pub(crate) bytes: usize,
    pub(crate) ready: Event,
}

impl DeviceBuffer {
    fn new(api: &Arc<dyn Api>, pointer: Pointer, bytes: usize, stream: Stream) -> Result<Self, DeviceError> {
        let ready = api.create_event()?;
        // Owned from here on, so that an error drops and destroys the event.
        let buffer = Self { api: Arc::clone(api), pointer, bytes, ready };
        api.record(ready, stream)?;
        Ok(buffer)
    }

    /// Index of its device, as [`CudaDevice::index`].
    pub(crate) fn index(&self) -> Option<usize> {
        self.api.index()
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        self.api.destroy_event(self.ready);
    }
}

/// Device memory that this process owns; freed on drop.
#[derive(Debug)]
pub struct DeviceMemory {
    api: Arc<dyn Api>,
    pointer: Pointer,
    bytes: usize,
}

impl DeviceMemory {
    /// Exposes the memory to operations in `run`; the mutable borrow excludes other uses meanwhile.
    ///
    /// # Errors
    ///
    /// When the event cannot be recorded.
    pub fn lend<T>(&mut self, run: impl FnOnce(&DeviceBuffer) -> T) -> Result<T, DeviceError> {
        let buffer = DeviceBuffer::new(&self.api, self.pointer, self.bytes, Stream(0))?;
        Ok(run(&buffer))
    }

    /// Copies `from` to the start of the memory.
    ///
    /// # Errors
    ///
    /// When the copy fails.
    ///
    /// # Panics
    ///
    /// When `from` is longer than the memory.
    pub fn upload(&mut self, from: &[u8]) -> Result<(), DeviceError> {
        assert!(from.len() <= self.bytes, "{} bytes do not fit {}", from.len(), self.bytes);
        self.api.upload(from, self.pointer)
    }

    /// Copies the start of the memory to `to`.
    ///
    /// # Errors
    ///
    /// When the copy fails.
    ///
    /// # Panics
    ///
    /// When `to` is longer than the memory.
    pub fn download(&self, to: &mut [u8]) -> Result<(), DeviceError> {
        assert!(to.len() <= self.bytes, "{} bytes are more than {}", to.len(), self.bytes);
        self.api.download(self.pointer, to)
    }

    /// Copies the first half of the memory to the second and waits, for measuring memory bandwidth.
    ///
    /// # Errors
    ///
    /// When the copy fails.
    pub fn copy_half(&mut self) -> Result<(), DeviceError> {
        let half = self.bytes / 2;
        let to = Pointer(self.pointer.0 + half as u64);
        self.api.copy(self.pointer, to, half, Stream(0))?;
        // The default stream orders this read after the copy, and the read blocks.
        self.api.download(to, &mut [0][..half.min(1)])
    }
}

#[cfg(test)]
impl DeviceMemory {
    pub(crate) fn pointer(&self) -> Pointer {
        self.pointer
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.api.free(self.pointer);
    }
}
