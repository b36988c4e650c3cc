//! The NCCL backend: operations on the memory of one device a rank, over whatever joins the devices.
//!
//! A ring of the `host` backend stands beside every NCCL communicator. It is connected first, under the generation, so
//! that it fences NCCL, too: the unique id travels over it, and a rank of another generation never sees one. Its sockets
//! tell within milliseconds that a neighbour is gone, which NCCL itself does not. Host memory travels over it.
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
