//! The verifier worker: leases samples from the coordinator, grades them on threads of its own, hands in verdicts.
//!
//! Start at [`run`]. `session` is the loop of one membership, `grading` runs a verification with its time limit, and
//! `rpc` tries transient failures again. How answers are judged is not decided here but in `pacs-verify`.
#![forbid(unsafe_code)]

mod error;
mod grading;
mod rpc;
mod session;
mod worker;

pub use error::VerifierError;
pub use worker::{VerifierOptions, run};
