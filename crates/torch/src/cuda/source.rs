//! The text of the kernels.

use tch::Kind;

use super::KernelError;
use crate::BLOCK_TOKENS;

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelShape {
    /// Kind of weights and cache: float32 or bfloat16.
    pub kind: Kind,
    /// Query heads of a layer; a multiple of the key heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// Names of the kernels.
pub(crate) const KERNELS: [&str; 13] = [
    "add_rms_norm",
    "silu_gate",
    "rotate_store",
    "attend_blocks",
    "combine_splits",
    "draw",
    "rms_norm_backward",
    "add_column_sums",
    "silu_gate_backward",
    "rotate",
    "sum_copies",
    "target_scores",
    "adamw",
];

/// Most query heads that one block computes: what they sum has to fit into registers.
const MOST_TOGETHER: usize = 8;
/// The widest head: what a block shares of it has to fit into 48 KiB.
const MOST_WIDTH: usize = 256;

impl KernelShape {
    /// Query heads that are computed together: all of a key head, or the largest equal parts of them that fit.
    #[must_use]
    pub fn together(&self) -> usize {
        let group = self.heads / self.kv_heads;
        (1..=MOST_TOGETHER.min(group)).rev().find(|part| group.is_multiple_of(*part)).unwrap_or(1)
    }

    pub(crate) fn check(&self) -> Result<(), KernelError> {
        let Self { kind, heads, kv_heads, head_dim } = *self;
        let refused = |what: String| Err(KernelError::Shape { what });
        if !matches!(kind, Kind::Float | Kind::BFloat16) {
            return refused(format!("{kind:?}"));
        }
        if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
            return refused(format!("{heads} query heads of {kv_heads} key heads"));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MOST_WIDTH {
            return refused(format!("heads of width {head_dim}, which is not even or above {MOST_WIDTH}"));
        }
        Ok(())
    }

    /// The text of all kernels for this shape.
    pub(crate) fn text(&self) -> String {
        let parts = [
            include_str!("kernels/norm.cu"),
            include_str!("kernels/gate.cu"),
            include_str!("kernels/rotary.cu"),
            include_str!("kernels/attention.cu"),
            include_str!("kernels/draw.cu"),
            include_str!("kernels/backward.cu"),
            include_str!("kernels/update.cu"),
        ];
        self.head() + &parts.concat()
    }

    /// That of attention alone.
    #[cfg(test)]
    pub(super) fn attention_text(&self) -> String {
        self.head() + include_str!("kernels/attention.cu")
    }

    /// What all kernels share.
    fn head(&self) -> String {
        let bf16 = u8::from(self.kind == Kind::BFloat16);
        let constants =
            format!("#define BF16 {bf16}\n#define HEAD_DIM {}\n#define GROUP {}\n", self.head_dim, self.together());
        constants + include_str!("kernels/common.cuh")
    }
}

// The text has it as a number.
const _: () = assert!(BLOCK_TOKENS == 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_heads_are_computed_together_in_equal_parts() {
        let together = |heads, kv_heads| KernelShape { kind: Kind::Float, heads, kv_heads, head_dim: 64 }.together();
        assert_eq!([together(14, 2), together(32, 8), together(9, 3), together(16, 16)], [7, 4, 3, 1]);
        assert_eq!([together(64, 4), together(71, 1), together(24, 2)], [8, 1, 6]);
    }

    #[test]
    fn what_no_kernel_computes_is_refused() {
        let fits = KernelShape { kind: Kind::BFloat16, heads: 8, kv_heads: 2, head_dim: 128 };
        assert_eq!(fits.check(), Ok(()));
        for shape in [
            KernelShape { kind: Kind::Double, ..fits },
            KernelShape { kv_heads: 3, ..fits },
            KernelShape { kv_heads: 0, ..fits },
            KernelShape { head_dim: 63, ..fits },
            KernelShape { head_dim: 512, ..fits },
        ] {
            assert!(matches!(shape.check(), Err(KernelError::Shape { .. })), "{shape:?}");
        }
    }

    #[test]
    fn every_kernel_is_in_the_text() {
        let text = KernelShape { kind: Kind::Float, heads: 4, kv_heads: 2, head_dim: 16 }.text();
        assert_eq!(text.matches("__global__").count(), KERNELS.len());
        for kernel in KERNELS {
            assert!(text.contains(&format!("__global__ void {kernel}(")), "{kernel}");
        }
    }
}
