//! The verifier worker: leases samples from the coordinator, has them judged, hands in verdicts.
//!
//! Start at [`run`]. `session` is the loop of one membership, `grading` asks all verifiers of the job about one sample,
//! and `reward` makes one verdict of what they say. A [`Judge`] is one verifier:
//! a built-in `rule` on threads of this process, `code` programs in sandboxes, `exec` a pool of children, `grpc` a service; `cache` remembers what it said.
//!
//! How mathematical answers are compared is not decided here but in `pacs-verify`. A verification that fails is a
//! [`Fault`](fault::Fault) with a type, never a wrong answer.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod cache;
mod code;
mod error;
mod exec;
mod fault;
mod grading;
mod grpc;
mod judge;
mod opinion;
mod reward;
mod rule;
mod session;
mod worker;

pub use error::VerifierError;
pub use exec::{Entry, Guarded, run_guarded};
pub use judge::{Judge, Judgement, SANDBOX_COMMAND, Task};
pub use worker::{VerifierOptions, run};
