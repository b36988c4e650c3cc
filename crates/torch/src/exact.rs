//! Sums of gradients that do not depend on their order: integers, of which each counts 2^-40.
//!
//! Floating-point additions round, so their sum depends on how they are grouped, and ranks group them otherwise than passes
//! do. A tree over fixed units would fix the grouping, but it ties units to ranks in aligned sub-trees, for each number of ranks
//! others; integers add up to the same in any order, over any number of ranks, and at any time.
//!
//! What is added is rounded to a multiple of 2^-40, which is 1e-12: a ten-thousandth of the epsilon that AdamW divides by.
//! A sum may reach 2^23. Whether it does is known from a bound that is a sum of integers itself ([`take_bound`]).

use std::cell::Cell;

use half::bf16;
use tch::{Kind, Tensor};

use crate::element::{Element, for_each_instruction_set};
use crate::parallel;
use crate::view::{ViewError, bf16_ref, f32_ref, i64_mut, i64_ref};

/// What a float is multiplied by.
const SCALE: f64 = (1u64 << 40) as f64;
/// Adding and subtracting 1.5 * 2^52 rounds a float64 below 2^51 to an integer, in vector registers.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// Elements that are looked at together.
const BLOCK: usize = 1024;
/// Blocks up to here take the fast way: 2^10 times the scale is below 2^51.
const SMALL: f32 = 1024.0;
/// Fewest elements that are worth a thread.
const SMALLEST_PART: usize = 1 << 15;
/// Bounds are integers, each of which counts 2^-20.
const BOUND_SCALE: f64 = (1u64 << 20) as f64;
/// The largest bound of sums that are known to fit: half of their range.
const LARGEST_BOUND: u64 = 1 << (22 + 20);

thread_local! {
    static BOUND: Cell<u64> = const { Cell::new(0) };
}

/// Notes that numbers up to `largest` were added on this thread since [`take_bound`].
pub(crate) fn note_bound(largest: f32) {
    let units = if largest.is_finite() { (f64::from(largest) * BOUND_SCALE).ceil() as u64 } else { u64::MAX };
    BOUND.set(BOUND.get().saturating_add(units));
}

/// A bound on the size of every sum that this thread has added to since the last call, as an integer that can be added
/// up over ranks; it saturates where a number was not finite.
#[must_use]
pub fn take_bound() -> u64 {
    BOUND.replace(0)
}

/// Whether sums within a bound are right. The answer is the same for any order of additions.
#[must_use]
pub fn is_within_range(bound: u64) -> bool {
    bound <= LARGEST_BOUND
}

/// Adds numbers to sums; returns the largest size among them, infinite if one is not finite.
pub(crate) fn add_exact<T: Element>(sums: &mut [i64], values: &[T]) -> f32 {
    assert_eq!(sums.len(), values.len(), "buffers differ in length");
    let blocks = sums.chunks_mut(BLOCK).zip(values.chunks(BLOCK));
    blocks.fold(0.0, |largest, (sums, values)| add_block(sums, values).max(largest))
}

for_each_instruction_set!(add_block = add_plain<T>(sums: &mut [i64], values: &[T]) -> f32);

#[inline(always)]
fn add_plain<T: Element>(sums: &mut [i64], values: &[T]) -> f32 {
    // Sizes compare as their bits do, and what is no number is larger than all numbers.
    let size = |value: &T| value.read().to_bits() & 0x7fff_ffff;
    let largest = values.iter().fold(0, |largest, value| size(value).max(largest));
    if largest < SMALL.to_bits() {
        for (sum, value) in sums.iter_mut().zip(values) {
            let rounded = f64::from(value.read()) * SCALE + ROUND;
            *sum = sum.wrapping_add((rounded.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64));
        }
    } else if largest < f32::INFINITY.to_bits() {
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum = sum.wrapping_add((f64::from(value.read()) * SCALE).round_ties_even() as i64);
        }
    } else {
        return f32::INFINITY;
    }
    f32::from_bits(largest)
}

/// Adds `values`, contiguous float32 or bfloat16, to `sums`, contiguous int64 of as many elements, both in host memory.
pub(crate) fn accumulate_exact(sums: &mut Tensor, values: &Tensor) -> Result<(), ViewError> {
    let sums = i64_mut(sums)?;
    let part = parallel::part_length(sums.len(), SMALLEST_PART);
    let largest = match values.kind() {
        Kind::BFloat16 => {
            let values: &[bf16] = bf16_ref(values)?;
            parallel::map(sums.chunks_mut(part).zip(values.chunks(part)).collect(), |(sum, add)| add_exact(sum, add))
        }
        _ => {
            let values = f32_ref(values)?;
            parallel::map(sums.chunks_mut(part).zip(values.chunks(part)).collect(), |(sum, add)| add_exact(sum, add))
        }
    };
    note_bound(largest.into_iter().fold(0.0, f32::max));
    Ok(())
}

/// Adds rows to rows of a matrix of sums: row `i` of `values` to row `index[i]`.
///
/// `sums`: `[V, D]` int64; `values`: `[T, D]` float32 or bfloat16; both contiguous in host memory.
///
/// # Errors
/// When a tensor cannot be viewed.
///
/// # Panics
/// When the shapes do not fit, or a row does not exist.
pub fn add_rows_exact(sums: &mut Tensor, index: &Tensor, values: &Tensor) -> Result<(), ViewError> {
    let (rows, width) = values.size2().expect("values are a matrix");
    assert_eq!(sums.size2().expect("sums are a matrix").1, width, "rows differ in length");
    let index = i64_ref(index)?;
    assert_eq!(index.len(), rows as usize, "every row of values has a place");
    let sums = i64_mut(sums)?;
    match values.kind() {
        Kind::BFloat16 => add_rows(sums, index, bf16_ref(values)?, width as usize),
        _ => add_rows(sums, index, f32_ref(values)?, width as usize),
    }
    Ok(())
}

fn add_rows<T: Element>(sums: &mut [i64], index: &[i64], values: &[T], width: usize) {
    for (&row, values) in index.iter().zip(values.chunks_exact(width)) {
        let start = usize::try_from(row).expect("a row is an index") * width;
        note_bound(add_exact(&mut sums[start..start + width], values));
    }
}

/// The floats that sums stand for.
///
/// # Panics
/// When the lengths differ.
pub fn exact_to_f32(sums: &[i64], values: &mut [f32]) {
    assert_eq!(sums.len(), values.len(), "buffers differ in length");
    convert(sums, values);
}

for_each_instruction_set!(convert = convert_plain(sums: &[i64], values: &mut [f32]));

#[inline(always)]
fn convert_plain(sums: &[i64], values: &mut [f32]) {
    for (value, sum) in values.iter_mut().zip(sums) {
        *value = (*sum as f64 * (1.0 / SCALE)) as f32;
    }
}

/// The sum of the squares of sums, itself in a form whose order does not matter: an integer, of which each counts 2^-64.
///
/// It saturates where the norm is beyond 2^32.
#[must_use]
pub fn exact_squares(sums: &[i64]) -> u128 {
    let part = parallel::part_length(sums.len(), SMALLEST_PART).next_multiple_of(BLOCK);
    let squares = |part: &[i64]| part.chunks(BLOCK).fold(0u128, |total, block| total.saturating_add(squares(block)));
    let parts = parallel::map(sums.chunks(part).collect(), squares);
    parts.into_iter().fold(0, u128::saturating_add)
}

/// The number that [`exact_squares`] stands for.
#[must_use]
pub fn exact_squares_to_f64(squares: u128) -> f64 {
    if squares == u128::MAX { f64::INFINITY } else { squares as f64 * 2f64.powi(-64) }
}

for_each_instruction_set!(squares = squares_plain(block: &[i64]) -> u128);

#[inline(always)]
fn squares_plain(block: &[i64]) -> u128 {
    let largest = block.iter().fold(0, |largest, sum| sum.unsigned_abs().max(largest));
    let square = |sum: &i64| {
        let value = *sum as f64 * (1.0 / SCALE);
        value * value
    };
    // Below 2^10, so that the whole part of a square times 2^20 is below 2^41, and the rest of it times 2^44 below 2^44:
    // 1,024 of each fit into 64 bits.
    if largest < (SMALL as u64) << 40 {
        let mut high = 0i64;
        let mut low = 0i64;
        for sum in block {
            let scaled = square(sum) * (1u64 << 20) as f64;
            let rounded = scaled + ROUND;
            let rest = (scaled - (rounded - ROUND)) * (1u64 << 44) as f64 + ROUND;
            high += (rounded.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
            low += (rest.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
        }
        return ((i128::from(high) << 44) + i128::from(low)) as u128;
    }
    let exact = |sum: &i64| (square(sum) * 2f64.powi(64)).round_ties_even() as u128;
    block.iter().fold(0, |total, sum| total.saturating_add(exact(sum)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of all sizes, of both signs.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let number = |i: usize| {
            let mixed = (i as u32).wrapping_mul(0x9e37_79b9) ^ seed.wrapping_mul(0x85eb_ca6b);
            let size = 2f32.powi((mixed >> 8) as i32 % 40 - 34);
            (f64::from(mixed % 1000) / 500.0 - 1.0) as f32 * size
        };
        (0..count).map(number).collect()
    }

    #[test]
    fn sums_are_the_same_in_any_order_and_right() {
        let parts: Vec<Vec<f32>> = (0..7).map(|seed| numbers(3000, seed)).collect();
        let sum = |order: &[usize]| {
            let mut sums = vec![0; 3000];
            order.iter().for_each(|part| _ = add_exact(&mut sums, &parts[*part]));
            sums
        };
        let sums = sum(&[0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(sums, sum(&[6, 2, 4, 0, 5, 1, 3]));
        let mut floats = vec![0.0; 3000];
        exact_to_f32(&sums, &mut floats);
        for (place, float) in floats.iter().enumerate() {
            let exact: f64 = parts.iter().map(|part| f64::from(part[place])).sum();
            let tolerance = exact.abs() * 6e-8 + 7.0 * 2f64.powi(-41);
            assert!((f64::from(*float) - exact).abs() <= tolerance, "{float} for {exact}");
        }
        assert!(floats.iter().any(|float| *float != 0.0));
    }

    #[test]
    fn both_ways_of_rounding_are_one() {
        for value in numbers(5000, 9) {
            let (mut alone, mut beside) = ([0], [0, 0]);
            add_exact(&mut alone, &[value]);
            add_exact(&mut beside, &[value, 5000.0]);
            assert_eq!(alone[0], beside[0], "{value}");
            assert_eq!(exact_squares(&alone) + exact_squares(&beside[1..]), exact_squares(&beside), "{value}");
        }
    }

    #[test]
    fn squares_are_right_and_do_not_depend_on_where_they_are_cut() {
        let mut sums = vec![0; 10_000];
        let values = numbers(10_000, 3);
        add_exact(&mut sums, &values);
        let whole = exact_squares(&sums);
        for cut in [1, 1023, 1024, 5000, 9999] {
            assert_eq!(exact_squares(&sums[..cut]) + exact_squares(&sums[cut..]), whole);
        }
        let exact: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
        assert!((exact_squares_to_f64(whole) / exact - 1.0).abs() < 1e-9);
        assert_eq!(exact_squares_to_f64(exact_squares(&vec![i64::MIN; 1 << 20])), f64::INFINITY);
    }

    #[test]
    fn what_does_not_fit_is_known() {
        let _ = take_bound();
        let mut sums = Tensor::zeros([4], (Kind::Int64, tch::Device::Cpu));
        let mut add = |values: [f32; 4]| {
            accumulate_exact(&mut sums, &Tensor::from_slice(&values)).expect("host");
            take_bound()
        };
        assert!(is_within_range(add([1e-3, -1e6, 0.0, 7.0])));
        assert!(!is_within_range(add([1e7, 0.0, 0.0, 0.0])));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(add([0.0, 0.0, bad, 0.0]), u64::MAX);
        }
        assert_eq!(take_bound(), 0);
    }

    #[test]
    fn rows_go_where_they_belong() {
        let mut sums = Tensor::zeros([3, 2], (Kind::Int64, tch::Device::Cpu));
        let values = Tensor::from_slice(&[1.0f32, 2.0, 4.0, 8.0, 16.0, 32.0]).view([3, 2]);
        for values in [values.shallow_clone(), values.to_kind(Kind::BFloat16)] {
            add_rows_exact(&mut sums, &Tensor::from_slice(&[2i64, 0, 2]), &values).expect("host");
        }
        let mut floats = vec![0.0; 6];
        exact_to_f32(i64_ref(&sums).expect("host"), &mut floats);
        assert_eq!(floats, [8.0, 16.0, 0.0, 0.0, 34.0, 68.0]);
    }
}
