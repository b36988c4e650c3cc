//! What the fuzzer gives to the project, target by target. Tests of the crates include the same files and try a bounded number
//! of inputs each (`mutate::each`).
#![allow(missing_docs, reason = "a target is one function of bytes")]

#[cfg(feature = "coordinator")]
use nix::sys::signal::{SigSet, Signal};

#[cfg(feature = "coordinator")]
#[path = "../../../crates/coordinator/tests/service/calls.rs"]
mod calls;
#[cfg(feature = "data")]
pub mod data_file;
#[cfg(feature = "torch")]
pub mod gguf;
pub mod job_spec;
#[cfg(feature = "data")]
pub mod model_folder;
pub mod mutate;
#[cfg(feature = "coordinator")]
pub mod run_folder;
#[cfg(feature = "torch")]
pub mod safetensors;
#[cfg(feature = "coordinator")]
#[path = "../../../crates/coordinator/tests/service/support.rs"]
#[allow(dead_code, reason = "other tests use more of it")]
mod support;

/// Calls that an input makes at most.
#[cfg(feature = "coordinator")]
const MOST_CALLS: usize = 400;

/// Makes writes to a closed connection an error, as the runtime of a Rust program does before `main`: the fuzzer's `main` is none, so the first
/// coordinator that is killed would end it.
#[cfg(feature = "coordinator")]
pub fn ignore_broken_pipes() {
    // Threads inherit the mask of the one that starts them.
    let pipe: SigSet = [Signal::SIGPIPE].into_iter().collect();
    pipe.thread_block().expect("the mask of this thread can be changed");
}

/// Makes the calls that an input says against a coordinator of its own, and starts another one in what they leave.
#[cfg(feature = "coordinator")]
pub fn any_calls(bytes: &[u8]) {
    let runtime = run_folder::runtime();
    runtime.block_on(async {
        let job = support::Job::new();
        let coordinator = job.start(2, "").await.expect("a fresh folder");
        let services = coordinator.services();
        let (mut any, mut known) = (calls::Any::Bytes(bytes.to_vec(), 0), calls::Known::default());
        for _ in 0..MOST_CALLS {
            if any.is_over() {
                break;
            }
            let call = calls::call(&services, &mut any, &mut known);
            tokio::time::timeout(std::time::Duration::from_secs(20), call).await.expect("an answer in time");
        }
        drop(services);
        drop(coordinator);
        job.start(2, "").await.expect("another start resumes the run");
    });
}
