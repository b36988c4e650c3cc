use std::ffi::c_void;
use std::ptr;

use pacs_collective::{CudaDevice, DeviceBuffer, DeviceError};
use tch::{Device, Tensor};

use crate::stream::{StreamError, Streams};

/// The memory of a tensor, exposed to an operation among ranks.
#[derive(Debug)]
pub struct Exposed {
    buffer: DeviceBuffer,
    /// Keeps the memory from being given to another tensor.
    _owner: Tensor,
}

impl Exposed {
    /// What the operations of a communicator take.
    #[must_use]
    pub fn buffer(&self) -> &DeviceBuffer {
        &self.buffer
    }
}

/// Why a tensor cannot be exposed to a collective.
#[derive(Debug, thiserror::Error)]
pub enum ExposeError {
    /// Its numbers do not lie side by side.
    #[error("a {device:?} tensor that is not contiguous cannot be exchanged with other ranks")]
    Scattered {
        /// Where it is.
        device: Device,
    },
    /// The device did not mark its stream.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// libtorch did not say which stream it computes in.
    #[error("{0}")]
    Stream(String),
}

impl From<StreamError> for ExposeError {
    fn from(error: StreamError) -> Self {
        Self::Stream(error.to_string())
    }
}

/// Exposes a contiguous tensor in the memory of `device` as it will be after the work that was given to the device so far; `None`
/// when it is somewhere else. The tensor must not be used, through whatever handle, until the operation is over.
///
/// # Errors
/// See [`ExposeError`].
pub fn expose(tensor: &Tensor, device: &CudaDevice) -> Result<Option<Exposed>, ExposeError> {
    if tensor.device() != device.index().map_or(Device::Cpu, Device::Cuda) {
        return Ok(None);
    }
    if !tensor.is_contiguous() {
        return Err(ExposeError::Scattered { device: tensor.device() });
    }
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    let pointer = tensor.data_ptr().cast::<c_void>();
    let stream = match device.index() {
        Some(index) => Streams::of(index)?.current()?.as_ptr(),
        None => ptr::null_mut(),
    };
    // SAFETY: the tensor is contiguous, so its `bytes` bytes lie at `pointer`, in the memory of this device, aligned for its
    // elements; `Exposed` keeps them. As for the views of tensors, their owner does not use other handles meanwhile.
    let buffer = unsafe { device.buffer(pointer, bytes, stream) }?;
    Ok(Some(Exposed { buffer, _owner: tensor.shallow_clone() }))
}
