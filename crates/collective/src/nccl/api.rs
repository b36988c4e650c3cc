use std::fmt;

use thiserror::Error;

/// What CUDA and NCCL are asked for, so that everything above them can be tested without a device.
///
/// Handles are valid from the call that makes them to the call that destroys them; the types of `device` and
/// `communicator` own them and see to it. Methods may be called from any thread.
pub(crate) trait Api: fmt::Debug + Send + Sync {
    fn versions(&self) -> Result<Versions, DeviceError>;
    /// Which of the visible devices it is; none when its memory is this process's own.
    fn index(&self) -> Option<usize>;

    fn create_stream(&self) -> Result<Stream, DeviceError>;
    fn destroy_stream(&self, stream: Stream);
    fn create_event(&self) -> Result<Event, DeviceError>;
    fn destroy_event(&self, event: Event);
    /// Marks the end of what `stream` holds now.
    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError>;
    /// Makes what is added to `stream` from now on wait for `event`, on the device.
    fn wait_for(&self, stream: Stream, event: Event) -> Result<(), DeviceError>;
    /// Whether the device has come to the mark.
    fn is_reached(&self, event: Event) -> Result<bool, DeviceError>;

    fn allocate(&self, bytes: usize) -> Result<Pointer, DeviceError>;
    fn free(&self, memory: Pointer);
    /// Copies host memory to the device and waits for it.
    fn upload(&self, from: &[u8], to: Pointer) -> Result<(), DeviceError>;
    /// Copies device memory to the host and waits for it.
    fn download(&self, from: Pointer, to: &mut [u8]) -> Result<(), DeviceError>;
    /// Copies between two places of the device, in the order of `stream`.
    fn copy(&self, from: Pointer, to: Pointer, bytes: usize, stream: Stream) -> Result<(), DeviceError>;

    fn unique_id(&self) -> Result<UniqueId, DeviceError>;
    /// Begins to form a communicator; [`Api::is_settled`] says when it is formed.
    fn begin(&self, id: &UniqueId, world_size: usize, rank: usize) -> Result<Comm, DeviceError>;
    /// Whether the last call on the communicator has done its part on the host.
    fn is_settled(&self, comm: Comm) -> Result<bool, DeviceError>;
    /// Adds an operation to `stream`; it is there once the communicator is settled.
    fn enqueue(&self, comm: Comm, launch: Launch, stream: Stream) -> Result<(), DeviceError>;
    /// Begins an orderly end; the communicator is settled when everything has left it.
    fn finalize(&self, comm: Comm) -> Result<(), DeviceError>;
    /// Frees a communicator that was finalized.
    fn destroy(&self, comm: Comm);
    /// Ends operations that wait for lost ranks, and frees the communicator. NCCL joins its own threads in it, and has been seen
    /// not to come back.
    fn abort(&self, comm: Comm);
    /// Ends this process with exit code 75, so that whoever started it starts it again: operations of a communicator that
    /// cannot be ended may still write to memory that its owner wants back.
    fn leave(&self, why: &str);
}

/// One operation on the memory of a device; numbers are float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Launch {
    AllReduceSum {
        data: Pointer,
        numbers: usize,
    },
    /// `part`: numbers of one rank's part.
    ReduceScatterSum {
        data: Pointer,
        part: usize,
        rank: usize,
    },
    /// `part`: bytes of one rank's part.
    AllGather {
        data: Pointer,
        part: usize,
        rank: usize,
    },
    Broadcast {
        data: Pointer,
        bytes: usize,
        root: usize,
    },
}

/// A CUDA stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream(pub(crate) usize);

/// A CUDA event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event(pub(crate) usize);

/// An address in the memory of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pointer(pub(crate) u64);

/// An NCCL communicator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Comm(pub(crate) usize);

pub(crate) const UNIQUE_ID_BYTES: usize = 128;
/// What the ranks of one communicator have in common.
pub(crate) type UniqueId = [u8; UNIQUE_ID_BYTES];

/// The libraries that ranks must have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// As `ncclGetVersion` gives it, for example 22809.
    pub nccl: i32,
    /// The CUDA version of the driver, as `cuDriverGetVersion` gives it, for example 13000.
    pub cuda: i32,
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nccl, cuda } = self;
        let (nccl_major, nccl_minor, nccl_patch) = (nccl / 10_000, nccl / 100 % 100, nccl % 100);
        write!(f, "NCCL {nccl_major}.{nccl_minor}.{nccl_patch} and CUDA {}.{}", cuda / 1000, cuda / 10 % 100)
    }
}

/// Why a device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// There is no CUDA driver.
    #[error(
        "the CUDA driver `libcuda.so.1` cannot be opened: this machine has no NVIDIA driver, or the container was not \
         given it; the `host` backend needs none"
    )]
    NoDriver,
    /// There is no such device.
    #[error("there is no device {index}: the driver offers {count}")]
    NoDevice {
        /// The one that was asked for.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// NCCL is missing.
    #[error(
        "NCCL cannot be opened ({problems}): put the folder of `libnccl.so.2` on LD_LIBRARY_PATH; Python's torch brings \
         it in `nvidia/nccl/lib`"
    )]
    NoNccl {
        /// What the loader said of each name.
        problems: String,
    },
    /// NCCL is too old.
    #[error("NCCL lacks `{symbol}`: version 2.18 or newer is needed")]
    OldNccl {
        /// What is missing.
        symbol: &'static str,
    },
    /// There is no device, and no NCCL, behind an emulated one.
    #[error("an emulated device has memory and nothing else")]
    Emulated,
    /// A call failed.
    #[error("{call}: {message}")]
    Call {
        /// The function.
        call: &'static str,
        /// What the library says.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read_as_their_makers_write_them() {
        assert_eq!(Versions { nccl: 22809, cuda: 13000 }.to_string(), "NCCL 2.28.9 and CUDA 13.0");
        assert_eq!(Versions { nccl: 21805, cuda: 12080 }.to_string(), "NCCL 2.18.5 and CUDA 12.8");
    }
}
