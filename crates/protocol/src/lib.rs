//! The wire format: generated messages and services of `proto/pacs/v1`, and conversions to and from [`pacs_types`].
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

/// Largest message that either side sends or accepts, in bytes.
///
/// Messages that grow with a job are divided: a batch is streamed, and an answer holds as many leases or verdicts as fit
/// into [`ANSWER_BYTES`]. A single sample cannot be divided, so [`pacs_types::MAX_SAMPLE_BYTES`] is below this.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Largest call that hands verdicts in, in bytes. It is small because a decoded message can take many times its encoded
/// size: 57 times if its verdicts are empty.
pub const MAX_VERDICTS_BYTES: usize = 256 << 10;
/// Bound on the verdicts in one call.
pub const MOST_VERDICTS: usize = 4096;
/// Bound on a text in a verdict, in bytes.
pub const MOST_VERDICT_TEXT: usize = 16 << 10;

/// Bound on the training signals in one report of a rank, that is, on its sequences of a step that are reported. A rank
/// with more sequences reports the first ones.
pub const MOST_SIGNALS: usize = 1 << 16;
/// Most bytes that a training signal takes in a message: tags, lengths, two varints and two floats.
const MOST_SIGNAL_BYTES: usize = 2 + 11 + 6 + 5 + 5;

/// Bytes of list items, such as leases, verdicts or workers, per message; a single item may take more.
pub const ANSWER_BYTES: usize = 4 << 20;

// A report is bounded like a list; metrics and announced weights take the rest.
const _: () = assert!(MOST_SIGNALS * MOST_SIGNAL_BYTES <= ANSWER_BYTES / 2);
// A sample shares a message with its question and reference answer, or with the prompt of its group.
const _: () = assert!(pacs_types::MAX_SAMPLE_BYTES + ANSWER_BYTES <= MAX_MESSAGE_BYTES);
