//! The NCCL backend: collectives on the memory of one device per rank, over whatever connects the devices.
//!
//! Every NCCL communicator has a ring of the `host` backend alongside. The ring is connected first, within the
//! generation, and so fences NCCL too: the unique id travels over it, and a rank of another generation never receives
//! one. Its sockets report a lost neighbour within milliseconds, which NCCL does not. Host memory also travels over it.
//!
//! NCCL and the CUDA driver are opened at run time; nothing links them.

mod api;
mod communicator;
mod device;
mod emulated;
#[cfg(test)]
mod fake;
mod library;
#[cfg(test)]
mod tests;

pub use api::{DeviceError, Versions};
pub use communicator::NcclCollective;
pub use device::{CudaDevice, DeviceBuffer, DeviceMemory};
pub(crate) use emulated::with_bytes;
