use std::ffi::c_void;
use std::ptr;

use pacs_collective::{CudaDevice, DeviceBuffer, DeviceError};
use tch::{Device, Tensor};

/// The memory of a tensor on loan to an operation among ranks.
#[derive(Debug)]
pub struct Lent {
    buffer: DeviceBuffer,
    /// Keeps the memory from being given to another tensor.
    _owner: Tensor,
}

impl Lent {
    /// What the operations of a communicator take.
    #[must_use]
    pub fn buffer(&self) -> &DeviceBuffer {
        &self.buffer
    }
}

/// Why a tensor cannot be lent.
#[derive(Debug, thiserror::Error)]
pub enum LendError {
    /// Its numbers do not lie side by side.
    #[error("a {device:?} tensor that is not contiguous cannot be exchanged with other ranks")]
    Scattered {
        /// Where it is.
        device: Device,
    },
    /// The device did not mark its stream.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Lends a contiguous tensor in the memory of `device` as it will be after the work that was given to the device so far; `None`
/// when it is somewhere else. Nobody may use the tensor, through whatever handle, until the operation is over.
///
/// # Errors
/// See [`LendError`].
pub fn lend(tensor: &Tensor, device: &CudaDevice) -> Result<Option<Lent>, LendError> {
    if tensor.device() != device.index().map_or(Device::Cpu, Device::Cuda) {
        return Ok(None);
    }
    if !tensor.is_contiguous() {
        return Err(LendError::Scattered { device: tensor.device() });
    }
    let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
    // Everything here computes in libtorch's default stream.
    let (pointer, stream) = (tensor.data_ptr().cast::<c_void>(), ptr::null_mut());
    // SAFETY: the tensor is contiguous, so its `bytes` bytes lie at `pointer`, in the memory of this device, aligned for its
    // elements; `Lent` keeps them. As for the views of tensors, their owner does not use other handles meanwhile.
    let buffer = unsafe { device.buffer(pointer, bytes, stream) }?;
    Ok(Some(Lent { buffer, _owner: tensor.shallow_clone() }))
}
