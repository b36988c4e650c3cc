//! The door to libtorch: `tch` itself, process set-up, raw views of tensors, and the fused optimizer kernel.
//!
//! This crate and `pacs-collective` are the only ones that may hold `unsafe`. Everything here has a safe signature.

mod adamw;
mod device;
mod view;

pub use adamw::{AdamW, Decay, adamw, sum_of_squares};
pub use device::{DeviceError, init, multiplies_bf16, prepare_allocator};
pub use tch;
pub use view::{ViewError, bf16_mut, bytes, bytes_mut, f32_mut, f32_ref};
