use std::fmt;

use thiserror::Error;

/// The calls to CUDA and NCCL that the backend needs; a trait, so that everything above it can be tested
/// without a device.
///
/// Handles are valid from the call that creates them to the call that destroys them; the types of `device` and
/// `communicator` own them and guarantee this. Methods may be called from any thread.
pub(crate) trait Api: fmt::Debug + Send + Sync {
    fn versions(&self) -> Result<Versions, DeviceError>;
    /// Index among the visible devices; `None` for emulated memory in this process.
    fn index(&self) -> Option<usize>;

    fn create_stream(&self) -> Result<Stream, DeviceError>;
    fn destroy_stream(&self, stream: Stream);
    fn create_event(&self) -> Result<Event, DeviceError>;
    fn destroy_event(&self, event: Event);
    /// Records the current end of `stream`'s work in `event`.
    fn record(&self, event: Event, stream: Stream) -> Result<(), DeviceError>;
    /// Makes later work of `stream` wait for `event`, on the device.
    fn wait_for(&self, stream: Stream, event: Event) -> Result<(), DeviceError>;
    /// Whether the device has reached the recorded point.
    fn is_reached(&self, event: Event) -> Result<bool, DeviceError>;

    fn allocate(&self, bytes: usize) -> Result<Pointer, DeviceError>;
    fn free(&self, memory: Pointer);
    /// Copies host memory to the device, and blocks until it is there.
    fn upload(&self, from: &[u8], to: Pointer) -> Result<(), DeviceError>;
    /// Copies device memory to the host, and blocks until it is there.
    fn download(&self, from: Pointer, to: &mut [u8]) -> Result<(), DeviceError>;
    /// Copies within the device, ordered by `stream`.
    fn copy(&self, from: Pointer, to: Pointer, bytes: usize, stream: Stream) -> Result<(), DeviceError>;

    fn unique_id(&self) -> Result<UniqueId, DeviceError>;
    /// Starts to form a communicator; it is formed once [`Api::is_settled`].
    fn begin(&self, id: &UniqueId, world_size: usize, rank: usize) -> Result<Comm, DeviceError>;
    /// Whether the last call on the communicator has done its part on the host. Also reports asynchronous
    /// errors of NCCL.
    fn is_settled(&self, comm: Comm) -> Result<bool, DeviceError>;
    /// Enqueues an operation; it is in `stream` once the communicator is settled.
    fn enqueue(&self, comm: Comm, launch: Launch, stream: Stream) -> Result<(), DeviceError>;
    /// Starts an orderly shutdown, which is complete once the communicator is settled.
    fn finalize(&self, comm: Comm) -> Result<(), DeviceError>;
    /// Frees a communicator that was finalized.
    fn destroy(&self, comm: Comm);
    /// Aborts operations that wait for lost ranks, and frees the communicator. NCCL joins its own threads in it, and has been seen
    /// not to come back.
    fn abort(&self, comm: Comm);
    /// Ends this process with exit code 75, so that its supervisor restarts it: operations of a communicator that
    /// cannot be ended may still write to memory that its owner wants back.
    fn leave(&self, why: &str);
}

/// One operation on device memory. Numbers are float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Launch {
    AllReduceSum {
        data: Pointer,
        numbers: usize,
    },
    /// `part` counts the numbers of one rank's part.
    ReduceScatterSum {
        data: Pointer,
        part: usize,
        rank: usize,
    },
    /// `part` counts the bytes of one rank's part.
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

/// A `CUstream`, as an integer; 0 is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream(pub(crate) usize);

/// A `CUevent`, as an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event(pub(crate) usize);

/// A device address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pointer(pub(crate) u64);

/// An `ncclComm_t`, as an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Comm(pub(crate) usize);

pub(crate) const UNIQUE_ID_BYTES: usize = 128;
/// An `ncclUniqueId`, made by rank 0 and broadcast to the others.
pub(crate) type UniqueId = [u8; UNIQUE_ID_BYTES];

/// Library versions, which must be the same on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    /// As `ncclGetVersion` returns it, for example 22809.
    pub nccl: i32,
    /// CUDA version of the driver, as `cuDriverGetVersion` returns it, for example 13000.
    pub cuda: i32,
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { nccl, cuda } = self;
        let nccl_major = nccl / 10_000;
        let nccl_minor = nccl / 100 % 100;
        let nccl_patch = nccl % 100;
        write!(f, "NCCL {nccl_major}.{nccl_minor}.{nccl_patch} and CUDA {}.{}", cuda / 1000, cuda / 10 % 100)
    }
}

/// Why CUDA or NCCL failed or cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// The CUDA driver library cannot be opened.
    #[error(
        "the CUDA driver `libcuda.so.1` cannot be opened: this machine has no NVIDIA driver, or the container was not \
         given it; the `host` backend needs none"
    )]
    NoDriver,
    /// The driver has no device of that index.
    #[error("there is no device {index}: the driver offers {count}")]
    NoDevice {
        /// Index that was asked for.
        index: usize,
        /// Number of devices that the driver offers.
        count: usize,
    },
    /// No NCCL library can be opened.
    #[error(
        "NCCL cannot be opened ({problems}): put the folder of `libnccl.so.2` on LD_LIBRARY_PATH; Python's torch brings \
         it in `nvidia/nccl/lib`"
    )]
    NoNccl {
        /// Errors of the loader, one for each file name.
        problems: String,
    },
    /// The NCCL library is older than 2.18.
    #[error("NCCL lacks `{symbol}`: version 2.18 or newer is needed")]
    OldNccl {
        /// Symbol that it lacks.
        symbol: &'static str,
    },
    /// An emulated device was asked for something that only CUDA or NCCL can do.
    #[error("an emulated device has memory and nothing else")]
    Emulated,
    /// A call to CUDA or NCCL returned an error.
    #[error("{call}: {message}")]
    Call {
        /// Name of the function.
        call: &'static str,
        /// The library's message, with its error code.
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
