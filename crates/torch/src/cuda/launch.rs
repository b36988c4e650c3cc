use std::fmt;

use tch::{Device, Tensor};

use super::KernelError;

/// Runs launches of the kernels that it was made for, one after the other, in the order of libtorch's work.
pub(crate) trait Machine: fmt::Debug + Send + Sync {
    /// Where the tensors have to be.
    fn device(&self) -> Device;

    /// Multiprocessors, of which each should have something to do.
    fn processors(&self) -> u32;

    /// # Safety
    ///
    /// The arguments must be those that the kernel declares, in kind and order, and every pointer that of memory of
    /// [`Machine::device`] as large as the kernel, with these numbers, reads or writes, until the work has been done.
    #[expect(unsafe_code, reason = "only the caller knows what lies at an address")]
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), KernelError>;
}

/// One launch of a kernel.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) kernel: &'static str,
    /// Blocks in each direction.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    pub(crate) arguments: &'a [Argument],
}

/// An argument of a kernel, in the first bytes of eight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Argument(pub(crate) u64);

impl From<&Tensor> for Argument {
    fn from(tensor: &Tensor) -> Self {
        Self(tensor.data_ptr() as u64)
    }
}

impl From<Option<&Tensor>> for Argument {
    /// The null pointer for none.
    fn from(tensor: Option<&Tensor>) -> Self {
        tensor.map_or(Self(0), Self::from)
    }
}

impl From<i64> for Argument {
    fn from(value: i64) -> Self {
        Self(value.cast_unsigned())
    }
}

impl From<i32> for Argument {
    fn from(value: i32) -> Self {
        Self(u64::from(value.cast_unsigned()))
    }
}

impl From<f32> for Argument {
    fn from(value: f32) -> Self {
        Self(u64::from(value.to_bits()))
    }
}

// Small numbers lie in the first bytes.
const _: () = assert!(cfg!(target_endian = "little"));
