//! What the tests of the kernels share.
#![expect(unsafe_code, reason = "a section of the executable is named")]

use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

/// Runs before the tests: libtorch looks for its CUDA half once, whoever asks first, and tests come in any order.
#[used]
#[unsafe(link_section = ".init_array")]
static LOAD_CUDA: extern "C" fn() = {
    extern "C" fn load() {
        // libtorch itself has been loaded, and no other thread runs yet. Without the library nothing happens.
        let _ = crate::device::load_cuda();
    }
    load
};

/// The GPU of this machine, or why there is none.
pub(crate) fn gpu() -> &'static Result<Device, crate::DeviceError> {
    static GPU: OnceLock<Result<Device, crate::DeviceError>> = OnceLock::new();
    GPU.get_or_init(|| crate::init(true, 1))
}

pub(crate) fn random(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// In float64 and host memory.
pub(crate) fn wide(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu).to_kind(Kind::Double)
}

/// Largest difference relative to the largest expected value, which counts as one at least.
pub(crate) fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let expected = wide(&expected.detach());
    let largest = expected.abs().max().double_value(&[]).max(1.0);
    (wide(found) - expected).abs().max().double_value(&[]) / largest
}
