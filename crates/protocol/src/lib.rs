//! The wire: generated messages and services of `proto/pacs/v1`, and their conversion to and from [`pacs_types`].
#![forbid(unsafe_code)]

mod convert;

/// Generated code of package `pacs.v1`; the `.proto` files document every message and field.
#[allow(missing_docs, clippy::all, unreachable_pub, reason = "generated code")]
pub mod v1 {
    tonic::include_proto!("pacs.v1");
}

/// The encoded `FileDescriptorSet` of `proto/pacs/v1`, for reflection.
pub const DESCRIPTORS: &[u8] = tonic::include_file_descriptor_set!("pacs.v1");

pub use convert::{HIGHEST_LOGPROB, LOWEST_LOGPROB, MOST_REWARD, WireError};

/// Largest message that either side sends or accepts.
///
/// Whatever grows with a job comes in pieces: a batch as a stream, leases and verdicts as far as they fit into
/// [`ANSWER_BYTES`]. What cannot be divided is one sample, so [`pacs_types::MAX_SAMPLE_BYTES`] is below this.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Most bytes of a call that hands verdicts in. A message in memory takes many times what it takes on the wire, 57 times where
/// the verdicts in it are empty; so this is small.
pub const MAX_VERDICTS_BYTES: usize = 256 << 10;
/// Most verdicts in one call, and most bytes of a text in one of them.
pub const MOST_VERDICTS: usize = 4096;
/// See [`MOST_VERDICTS`].
pub const MOST_VERDICT_TEXT: usize = 16 << 10;

/// Bytes of list items, such as leases, verdicts or workers, that are put into one message; one item alone may take more.
pub const ANSWER_BYTES: usize = 4 << 20;

// A sample travels with its question and its reference answer, or with the prompt of its group.
const _: () = assert!(pacs_types::MAX_SAMPLE_BYTES + ANSWER_BYTES <= MAX_MESSAGE_BYTES);
