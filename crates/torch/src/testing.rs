//! What the tests of the kernels share.

use tch::{Device, Kind, Tensor};

pub(crate) fn random(size: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// Largest difference relative to the largest expected value, which counts as one at least.
pub(crate) fn difference(found: &Tensor, expected: &Tensor) -> f64 {
    let expected = expected.detach().to_kind(Kind::Double);
    let largest = expected.abs().max().double_value(&[]).max(1.0);
    (found.to_kind(Kind::Double) - expected).abs().max().double_value(&[]) / largest
}
