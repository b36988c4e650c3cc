//! The shell of a worker process around its role.

use std::io;

use crate::{Exit, Shutdown};

/// Runs a role on its own runtime, until it ends, must end at once, or exceeds its time after a shutdown request.
///
/// The role is a separate task, so that one that is stuck in a driver or on a dead disk does not keep the process
/// alive. Neither do its threads, which are not joined; the caller ends the process.
///
/// # Errors
/// When the runtime or the signal handlers cannot be set up. The inner error is the role's.
pub fn run_role<E, F>(shutdown: Shutdown, role: impl FnOnce(Shutdown) -> F) -> io::Result<Result<Exit, E>>
where
    E: Send + 'static,
    F: Future<Output = Result<Exit, E>> + Send + 'static,
{
    // Several threads, so that heartbeats wait neither for a message that is being decoded nor for a
    // role that sets up its device.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build()?;
    let result = runtime.block_on(async {
        shutdown.on_signals()?;
        let role = tokio::spawn(role(shutdown.clone()));
        Ok(tokio::select! {
            ended = role => ended.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic())),
            exit = shutdown.at_once() => Ok(exit),
            // Also covers a process that is still looking for the coordinator or for its own address.
            () = shutdown.given_up() => Ok(Exit::Again),
        })
    });
    runtime.shutdown_background();
    result
}
