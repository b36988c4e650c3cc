//! The coordinator as a service: real connections, the real journal, and workers that make up what they submit.
//!
//! One program, because what it is linked from takes longer to compile than the tests.
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod any_call;
mod calls;
mod dashboard;
mod end_to_end;
mod hostile;
#[path = "../../../../tests/fuzz/src/mutate.rs"]
mod mutate;
mod probe;
#[path = "../../../../tests/fuzz/src/run_folder.rs"]
mod run_folder;
mod samples;
mod support;
