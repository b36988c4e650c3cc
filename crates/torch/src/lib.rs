//! The door to libtorch: `tch` itself, process set-up, raw views of tensors, and the fused kernels of the CPU path.
//!
//! This crate and `pacs-collective` are the only ones that may hold `unsafe`. Everything here has a safe signature.

mod accumulate;
mod adamw;
mod device;
mod dither;
mod draw;
mod softmax;
mod view;

pub use accumulate::accumulate;
pub use adamw::{AdamW, Decay, adamw, sum_of_squares};
pub use device::{DeviceError, init, multiplies_bf16, prepare_allocator};
pub use dither::dithered_bf16;
pub use draw::{DrawOptions, Drawn, can_draw, draw};
pub use softmax::{TargetScore, target_gradient};
pub use tch;
pub use view::{ViewError, bf16_mut, bf16_ref, bytes, bytes_mut, f32_mut, f32_ref};
