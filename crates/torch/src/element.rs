//! Elements that the CPU kernels read and write; they compute in float32.

use std::cell::Cell;
use std::thread::LocalKey;

use half::bf16;
use tch::{Device, Kind, Tensor};

use crate::view::{ViewError, bf16_mut, bf16_ref, f32_mut, f32_ref};

/// A float32 or bfloat16 element.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    fn read(self) -> f32;
    /// Rounds to the nearest, ties to even.
    fn write(value: f32) -> Self;
    fn slice(tensor: &Tensor) -> Result<&[Self], ViewError>;
    fn slice_mut(tensor: &mut Tensor) -> Result<&mut [Self], ViewError>;
}

impl Element for f32 {
    #[inline(always)]
    fn read(self) -> f32 {
        self
    }

    #[inline(always)]
    fn write(value: f32) -> Self {
        value
    }

    fn slice(tensor: &Tensor) -> Result<&[Self], ViewError> {
        f32_ref(tensor)
    }

    fn slice_mut(tensor: &mut Tensor) -> Result<&mut [Self], ViewError> {
        f32_mut(tensor)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn read(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// Without the branches of `bf16::from_f32`, so that loops become vector code.
    #[inline(always)]
    fn write(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        bf16::from_bits(if value.is_nan() { 0x7fc0 } else { rounded as u16 })
    }

    fn slice(tensor: &Tensor) -> Result<&[Self], ViewError> {
        bf16_ref(tensor)
    }

    fn slice_mut(tensor: &mut Tensor) -> Result<&mut [Self], ViewError> {
        bf16_mut(tensor)
    }
}

/// Whether the fused kernels of this crate work on such a tensor: float32 or bfloat16 in host memory, and not within
/// [`plain`].
#[must_use]
pub fn has_kernels(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && matches!(tensor.kind(), Kind::Float | Kind::BFloat16) && !is_plain()
}

thread_local! {
    static PLAIN: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is within [`plain`].
pub(crate) fn is_plain() -> bool {
    PLAIN.get()
}

/// Does `work` with libtorch's own operations, one sequence at a time: on this thread [`has_kernels`] and
/// [`crate::has_flash_attention`] say no meanwhile.
pub fn plain<T>(work: impl FnOnce() -> T) -> T {
    with_flag(&PLAIN, work)
}

/// Does `work` while a flag of this thread is set.
pub(crate) fn with_flag<T>(flag: &'static LocalKey<Cell<bool>>, work: impl FnOnce() -> T) -> T {
    /// Sets the flag back, also when `work` panics.
    struct Before(&'static LocalKey<Cell<bool>>, bool);
    impl Drop for Before {
        fn drop(&mut self) {
            self.0.set(self.1);
        }
    }
    let _before = Before(flag, flag.replace(true));
    work()
}

/// Calls a function that is generic over [`Element`] with the one of a tensor's kind.
macro_rules! by_kind {
    ($tensor:expr, $function:ident($($argument:expr),* $(,)?)) => {
        match $tensor.kind() {
            tch::Kind::BFloat16 => $function::<half::bf16>($($argument),*),
            _ => $function::<f32>($($argument),*),
        }
    };
}
pub(crate) use by_kind;

/// Compiles a function once per instruction set, and calls the widest that the processor has. All give the same result.
macro_rules! for_each_instruction_set {
    ($visibility:vis $name:ident = $plain:ident $(<$element:ident>)? ($($argument:ident: $kind:ty),* $(,)?) $(-> $result:ty)?) => {
        $visibility fn $name $(<$element: $crate::element::Element>)? ($($argument: $kind),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
                fn avx512 $(<$element: $crate::element::Element>)? ($($argument: $kind),*) $(-> $result)? {
                    $plain($($argument),*)
                }

                #[target_feature(enable = "avx2")]
                fn avx2 $(<$element: $crate::element::Element>)? ($($argument: $kind),*) $(-> $result)? {
                    $plain($($argument),*)
                }

                if $crate::element::has_avx512() {
                    // SAFETY: the processor has the instructions.
                    return unsafe { avx512($($argument),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has the instructions.
                    return unsafe { avx2($($argument),*) };
                }
            }
            $plain($($argument),*)
        }
    };
}
pub(crate) use for_each_instruction_set;

#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_work_has_no_kernels() {
        let tensor = Tensor::zeros([1], (Kind::Float, Device::Cpu));
        assert!(has_kernels(&tensor) && !plain(|| plain(|| has_kernels(&tensor)) || has_kernels(&tensor)));
        assert!(has_kernels(&tensor));
    }

    #[test]
    fn rounding_is_that_of_the_library() {
        for bits in (0..=u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (<bf16 as Element>::write(value), bf16::from_f32(value));
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{value}: {ours} against {theirs}");
        }
    }
}
