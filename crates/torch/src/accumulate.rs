//! Adding gradients of the compute kind to a float32 buffer, without a float32 copy in between.

use half::bf16;
use tch::{Device, Kind, Tensor, no_grad};

use crate::softmax::bf16_to_f32;
use crate::view::{ViewError, bf16_ref, f32_mut};

/// Adds `values` to `sum`, element by element.
///
/// `sum`: float32, contiguous; `values`: any float kind, as many elements, on the same device.
///
/// # Errors
/// When a tensor of the host is not contiguous.
///
/// # Panics
/// When the numbers of elements differ.
pub fn accumulate(sum: &mut Tensor, values: &Tensor) -> Result<(), ViewError> {
    assert_eq!(sum.numel(), values.numel(), "buffers differ in length");
    if sum.device() != Device::Cpu || values.kind() != Kind::BFloat16 {
        let values = values.view_as(sum);
        no_grad(|| {
            let _ = sum.g_add_(&values);
        });
        return Ok(());
    }
    let (sum, values) = (f32_mut(sum)?, bf16_ref(values)?);
    let threads = usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1);
    let chunk = sum.len().div_ceil(threads).max(1 << 16);
    if sum.len() <= chunk {
        // Starting a thread would cost more than the addition.
        add(sum, values);
        return Ok(());
    }
    std::thread::scope(|scope| {
        for (sum, values) in sum.chunks_mut(chunk).zip(values.chunks(chunk)) {
            scope.spawn(move || add(sum, values));
        }
    });
    Ok(())
}

fn add(sum: &mut [f32], values: &[bf16]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += bf16_to_f32(*value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_every_kind() {
        for kind in [Kind::BFloat16, Kind::Float] {
            let values = Tensor::randn([300, 701], (Kind::Float, Device::Cpu)).to_kind(kind);
            let mut sum = Tensor::ones([300 * 701], (Kind::Float, Device::Cpu));
            accumulate(&mut sum, &values).expect("host tensors");
            let expected = values.to_kind(Kind::Float).view([-1]) + 1.0;
            assert!(sum.equal(&expected));
        }
    }
}
