//! The wire: generated messages and services of `proto/pacs/v1`, and their conversion to and from [`pacs_types`].
#![forbid(unsafe_code)]

mod convert;

/// Generated code of package `pacs.v1`; the `.proto` files document every message and field.
#[allow(missing_docs, clippy::all, unreachable_pub, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("pacs.v1");
}

pub use convert::WireError;

/// Largest message that either side accepts. A batch shard of long answers is the biggest message there is.
pub const MAX_MESSAGE_BYTES: usize = 256 << 20;
