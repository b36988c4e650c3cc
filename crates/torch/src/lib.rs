//! The door to libtorch: `tch` itself, process set-up, raw views of tensors, operators that `tch` lacks, the fused kernels
//! of the CPU path, and those of a GPU.
//!
//! This crate and `pacs-collective` are the only ones that may hold `unsafe`. Everything here has a safe signature.

mod accumulate;
mod adamw;
mod blocks;
mod cuda;
mod device;
mod dispatch;
mod dither;
mod dot;
mod draw;
mod element;
mod exact;
mod expose;
mod fixed;
mod flash;
mod gate;
mod graph;
mod guard;
mod keep;
mod norm;
mod parallel;
mod place;
mod product;
mod report;
mod rotary;
mod softmax;
mod stream;
#[cfg(test)]
mod testing;
mod view;

pub use accumulate::accumulate;
pub use adamw::{AdamW, adamw, sum_of_squares};
pub use blocks::{BLOCK_TOKENS, BlockRow, BlockRun, attend_blocks, store_blocks};
pub use cuda::{
    DecodeInputs, DecodePass, DecodeRow, DecodeSlots, DecodeTable, DeviceKernels, DrawTable, KernelError, KernelShape,
    RowCopies, RowDraw, TargetScores, device_kernels, with_device_kernels,
};
pub use device::{
    DeviceError, device_memory, end_process, init, memory_bytes, multiplies_bf16, prepare_allocator, release_memory,
};
pub use dither::dithered_bf16;
pub use draw::{DrawOptions, Drawn, can_draw, draw};
pub use element::{has_kernels, plain};
pub use exact::{add_rows_exact, exact_squares, exact_squares_to_f64, exact_to_f32, is_within_range, take_bound};
pub use expose::{ExposeError, Exposed, expose};
pub use fixed::{
    Units, add_column_sums, add_weight_gradient, by_rows, fixed_units, linear, matmul, multiply_alone, one_thread_each,
    wide_linear, with_units,
};
pub use flash::{
    FlashOutput, FlashSequences, flash_attention, flash_backward, flash_forward, has_flash_attention,
    with_emulated_flash,
};
pub use gate::{silu_gate, silu_gate_backward};
pub use graph::{Graph, GraphError, Graphs};
pub use keep::Filters;
pub use norm::{add_rms_norm, rms_norm, rms_norm_backward};
pub use product::{add_product, linear_float32};
pub use report::{GpuParts, GpuReport, gpu_report};
pub use rotary::rotate;
pub use softmax::{TargetScore, target_gradient};
pub use tch;
pub use view::{ViewError, bf16_mut, bf16_ref, bytes, bytes_mut, f32_mut, f32_ref, i64_mut, i64_ref};
