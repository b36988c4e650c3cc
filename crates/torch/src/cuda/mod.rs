//! The kernels of a GPU, for decoding and for training: CUDA C++ that NVRTC compiles when a program starts, for the very model that it runs.
//!
//! The text is in `kernels/`, one file a group; `source.rs` puts it together, `nvrtc.rs` compiles it, `driver.rs` launches it, and
//! [`DeviceKernels`] is the safe side: it checks shapes, makes outputs and knows the launch geometry. A machine (`launch.rs`) runs
//! launches: a GPU, or the emulator, which runs the same text on a processor, so that text and geometry can be checked
//! where no GPU is.

mod attention;
mod drawing;
mod driver;
mod emulator;
mod error;
mod inputs;
mod launch;
mod layer;
mod library;
mod nvrtc;
mod source;
#[cfg(test)]
mod tests;
mod train;
#[cfg(test)]
mod train_tests;

use std::cell::RefCell;
use std::sync::Arc;

use tch::{Device, Kind};

pub use attention::{DecodeSlots, DecodeTable};
pub use drawing::{DrawTable, RowDraw};
pub(crate) use driver::compute_capability;
use emulator::Emulator;
pub use error::KernelError;
pub use inputs::{DecodeInputs, DecodePass, DecodeRow};
pub(crate) use launch::{Argument, Launch, Machine};
pub use source::KernelShape;
pub use train::{RowCopies, TargetScores};

/// The kernels for one model on one machine.
#[derive(Debug)]
pub struct DeviceKernels {
    machine: Box<dyn Machine>,
    shape: KernelShape,
}

impl DeviceKernels {
    /// Compiles the kernels for a model on a GPU, which [`crate::init`] has returned.
    ///
    /// # Errors
    /// When the driver or NVRTC is missing, or the kernels do not compile.
    pub fn load(shape: KernelShape, device: Device) -> Result<Self, KernelError> {
        shape.check()?;
        let machine = Box::new(driver::Gpu::load(&shape, device)?);
        Ok(Self { machine, shape })
    }

    /// The same on a processor, which is slow: for checks.
    ///
    /// # Errors
    /// When there is no C++ compiler, or the kernels do not compile.
    pub fn emulated(shape: KernelShape) -> Result<Self, KernelError> {
        shape.check()?;
        let machine = Box::new(Emulator::load(&shape)?);
        Ok(Self { machine, shape })
    }

    /// What they were compiled for.
    #[must_use]
    pub fn shape(&self) -> KernelShape {
        self.shape
    }

    fn kind(&self) -> Kind {
        self.shape.kind
    }
}

thread_local! {
    static ACTIVE: RefCell<Option<Arc<DeviceKernels>>> = const { RefCell::new(None) };
}

/// Does `work` with these kernels: on this thread [`device_kernels`] gives them meanwhile, and [`crate::has_kernels`] says
/// no.
pub fn with_device_kernels<T>(kernels: &Arc<DeviceKernels>, work: impl FnOnce() -> T) -> T {
    /// Puts back what was there, also when `work` panics.
    struct Before(Option<Arc<DeviceKernels>>);
    impl Drop for Before {
        fn drop(&mut self) {
            ACTIVE.set(self.0.take());
        }
    }
    let _before = Before(ACTIVE.replace(Some(Arc::clone(kernels))));
    crate::plain(work)
}

/// The kernels that [`with_device_kernels`] has put in place on this thread.
#[must_use]
pub fn device_kernels() -> Option<Arc<DeviceKernels>> {
    ACTIVE.with_borrow(Clone::clone)
}
