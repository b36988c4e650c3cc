use std::ffi::c_void;
use std::sync::Arc;

use super::api::{Api, DeviceError, Event, Pointer, Stream, Versions};
use super::emulated::HostMemory;
use super::library;

/// One CUDA device of this process, and NCCL for it.
///
/// It works in the device's primary context, the one that libtorch uses. Clones are handles of the same device.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    api: Arc<dyn Api>,
}

impl CudaDevice {
    /// Opens the CUDA driver, device `index` of those that are visible, and NCCL.
    ///
    /// # Errors
    ///
    /// When one of them is missing; the error says which, and what to do.
    pub fn open(index: usize) -> Result<Self, DeviceError> {
        Ok(Self { api: Arc::new(library::Library::open(index)?) })
    }

    /// The versions of NCCL and CUDA.
    ///
    /// # Errors
    ///
    /// When a library does not answer.
    pub fn versions(&self) -> Result<Versions, DeviceError> {
        self.api.versions()
    }

    /// A device whose memory is this process's own.
    pub(crate) fn emulated() -> Self {
        Self { api: Arc::new(HostMemory::default()) }
    }

    /// Which of the visible devices it is; none when it is emulated, and its memory this process's own.
    #[must_use]
    pub fn index(&self) -> Option<usize> {
        self.api.index()
    }

    /// Memory that somebody else owns, in the state that `stream` will leave it in after all work that it holds now.
    ///
    /// # Errors
    ///
    /// When the stream cannot be marked.
    ///
    /// # Safety
    ///
    /// `pointer` must be the address of `bytes` bytes in the memory of this device, aligned for float32, and stay so
    /// until the operation that takes the buffer has returned. Until then nothing else may touch the memory, work apart
    /// that `stream` holds already. `stream` must be a stream of this device's primary context, or null for the default
    /// stream.
    #[expect(unsafe_code, reason = "only the caller knows what lies at an address")]
    pub unsafe fn buffer(
        &self,
        pointer: *mut c_void,
        bytes: usize,
        stream: *mut c_void,
    ) -> Result<DeviceBuffer, DeviceError> {
        DeviceBuffer::new(&self.api, Pointer(pointer as u64), bytes, Stream(stream as usize))
    }

    /// Memory of this device.
    ///
    /// # Errors
    ///
    /// When there is not enough.
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

/// Memory of a device on loan to an operation, and the mark in its owner's stream from which on it may be used.
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
        // Owned from here on, so that an error below destroys the event.
        let buffer = Self { api: Arc::clone(api), pointer, bytes, ready };
        api.record(ready, stream)?;
        Ok(buffer)
    }

    /// As [`CudaDevice::index`].
    pub(crate) fn index(&self) -> Option<usize> {
        self.api.index()
    }

    /// Its length in bytes.
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

/// Memory of a device that this process owns; freed when dropped.
#[derive(Debug)]
pub struct DeviceMemory {
    api: Arc<dyn Api>,
    pointer: Pointer,
    bytes: usize,
}

impl DeviceMemory {
    /// Lends the memory to operations; the borrow lasts as long as nothing else may use it.
    ///
    /// # Errors
    ///
    /// When the default stream cannot be marked.
    pub fn lend<T>(&mut self, run: impl FnOnce(&DeviceBuffer) -> T) -> Result<T, DeviceError> {
        let buffer = DeviceBuffer::new(&self.api, self.pointer, self.bytes, Stream(0))?;
        Ok(run(&buffer))
    }

    /// Fills the memory from its beginning.
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

    /// Reads the memory from its beginning.
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

    /// Copies the first half of the memory onto its second, and waits: a measure of the device's memory.
    ///
    /// # Errors
    ///
    /// When the copy fails.
    pub fn copy_half(&mut self) -> Result<(), DeviceError> {
        let half = self.bytes / 2;
        let to = Pointer(self.pointer.0 + half as u64);
        self.api.copy(self.pointer, to, half, Stream(0))?;
        // A read of the copy comes after it in the default stream, and returns when it is done.
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
