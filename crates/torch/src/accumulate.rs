//! Adding gradients of the compute kind to a float32 buffer, without a float32 copy in between.

use half::bf16;
use tch::{Device, Kind, Tensor, no_grad};

use crate::element::{Element, for_each_instruction_set};
use crate::exact::accumulate_exact;
use crate::parallel;
use crate::view::{ViewError, bf16_ref, f32_mut};

/// Fewest elements that are worth a thread.
const SMALLEST_PART: usize = 1 << 15;

/// Adds `values` to `sum`, element by element.
///
/// `sum`: float32, contiguous; `values`: any float kind, as many elements, on the same device. Or `sum` is int64 in host
/// memory: then it holds sums that do not depend on their order ([`exact_to_f32`](crate::exact_to_f32)), and `values` are
/// float32 or bfloat16.
///
/// # Errors
/// When a tensor of the host is not contiguous.
///
/// # Panics
/// When the numbers of elements differ.
pub fn accumulate(sum: &mut Tensor, values: &Tensor) -> Result<(), ViewError> {
    assert_eq!(sum.numel(), values.numel(), "buffers differ in length");
    if sum.kind() == Kind::Int64 {
        return accumulate_exact(sum, &values.contiguous());
    }
    if sum.device() != Device::Cpu || values.kind() != Kind::BFloat16 {
        let values = values.view_as(sum);
        no_grad(|| {
            let _ = sum.g_add_(&values);
        });
        return Ok(());
    }
    let sum = f32_mut(sum)?;
    let values = bf16_ref(values)?;
    let part = parallel::part_length(sum.len(), SMALLEST_PART);
    parallel::map(sum.chunks_mut(part).zip(values.chunks(part)).collect(), |(sum, values)| add(sum, values));
    Ok(())
}

for_each_instruction_set!(add = add_plain(sum: &mut [f32], values: &[bf16]));

#[inline(always)]
fn add_plain(sum: &mut [f32], values: &[bf16]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value.read();
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
