//! Rounding master weights to bfloat16 so that small updates are not lost.
//!
//! A bfloat16 weight of 0.05 has neighbours 2e-4 away, twenty updates at a learning rate of 1e-5. Published checkpoints
//! are bfloat16, so their master weights start exactly on that grid: rounded to the nearest, the model that computes
//! would not move for the first ten updates or more, all weights at once. Here every element has a rounding threshold
//! of its own, fixed for good and spread evenly over the elements: a change of a tenth of the spacing moves a tenth of
//! the weights. The mean change is that of the master weights from the first update on, weights on the grid stay where
//! they are, and the same master weights always give the same model.

use half::bf16;
use tch::{Kind, Tensor};

/// The golden ratio in 32 bits: multiples of it, modulo 2^32, are as evenly spread as multiples of anything can be.
const STRIDE: u32 = 0x9e37_79b9;

/// Rounds away from zero when the part that is cut off exceeds the threshold of the element at `index`.
#[inline(always)]
pub(crate) fn to_bf16(value: f32, index: usize) -> bf16 {
    let threshold = (index as u32).wrapping_mul(STRIDE) >> 16;
    bf16::from_bits((value.to_bits().wrapping_add(threshold) >> 16) as u16)
}

/// The bfloat16 weights that belong to flat float32 master weights, on any device.
///
/// `master`: `[n]` float32, finite; `first`: index of its first element among all weights. Returns `[n]` bfloat16.
pub fn dithered_bf16(master: &Tensor, first: usize) -> Tensor {
    let n = master.size()[0];
    let first = first as i64;
    let device = master.device();
    // 64-bit integers hold the product of two 32-bit ones; only its low 32 bits count.
    let index = Tensor::arange_start(first, first + n, (Kind::Int64, device)).bitwise_and(0xffff_ffff_i64);
    let threshold = (index * i64::from(STRIDE)).bitwise_and(0xffff_ffff_i64).bitwise_right_shift_tensor_scalar(16);
    let bits = master.view_dtype(Kind::Int).to_kind(Kind::Int64).bitwise_and(0xffff_ffff_i64);
    let rounded = (bits + threshold).bitwise_right_shift_tensor_scalar(16).bitwise_and(0xffff_i64);
    // To the signed 16-bit integer of the same bits.
    let signed = (rounded + 0x8000_i64).bitwise_and(0xffff_i64) - 0x8000_i64;
    signed.to_kind(Kind::Int16).view_dtype(Kind::BFloat16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16_ref;
    use tch::Device;

    #[test]
    fn weights_on_the_grid_stay_there() {
        for (index, value) in [0.05f32, -3.0, 1e-20, 0.0, -0.0].into_iter().cycle().take(1000).enumerate() {
            let on_grid = bf16::from_f32(value);
            assert_eq!(to_bf16(on_grid.to_f32(), index).to_bits(), on_grid.to_bits());
        }
    }

    #[test]
    fn the_mean_change_is_that_of_the_master_weights() {
        let n = 1 << 16;
        let start = bf16::from_f32(0.05).to_f32();
        for change in [1e-5f32, -1e-5, 3e-5, 1e-4] {
            let moved: f64 = (0..n).map(|index| f64::from(to_bf16(start + change, index).to_f32() - start)).sum();
            let mean = moved / f64::from(n as u32);
            assert!((mean / f64::from(change) - 1.0).abs() < 0.02, "{change} became {mean}");
        }
    }

    #[test]
    fn tensors_round_as_elements_do() {
        let master = Tensor::randn([70_000], (Kind::Float, Device::Cpu)) * 0.1;
        let rounded = dithered_bf16(&master, 11);
        let master = Vec::<f32>::try_from(&master).expect("float32");
        for (index, (rounded, value)) in bf16_ref(&rounded).expect("host").iter().zip(master).enumerate() {
            assert_eq!(rounded.to_bits(), to_bf16(value, 11 + index).to_bits());
        }
    }
}
