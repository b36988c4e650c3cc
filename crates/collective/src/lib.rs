//! Collective operations among the learner ranks of one generation.
//!
//! [`Collective`] is the interface of the learner. [`HostCollective`] implements it as a TCP ring between CPUs;
//! [`NcclCollective`] adds operations on device memory. A communicator lives for one generation: the first error
//! ends it on every rank, and the remaining ranks connect again under the next generation. Addresses come from the
//! coordinator, or from a [`Meeting`] where there is none. There is no other discovery, and no retry of an
//! operation. Ranks authenticate by certificates if their [`HostListener`] has credentials; NCCL's own connections
//! have no authentication.
//!
//! Start with [`HostCollective::connect`].
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod abort;
mod collective;
mod error;
mod host;
mod nccl;
mod timeout;

pub use abort::AbortHandle;
pub use collective::Collective;
pub use error::{CollectiveError, ErrorKind, ListenError, Operation};
pub use host::{CredentialSource, Credentials, GroupConfig, HostCollective, HostListener, Meeting, meet};
pub use nccl::{CudaDevice, DeviceBuffer, DeviceError, DeviceMemory, NcclCollective, Versions};
pub use timeout::{DEVICE_BANDWIDTH_FLOOR, HOST_BANDWIDTH_FLOOR, Limits};

#[cfg(target_endian = "big")]
compile_error!("numbers travel as they lie in memory, and every rank expects them little-endian");
