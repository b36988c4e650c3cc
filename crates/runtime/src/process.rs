//! What `main` of a worker process does around its role.

use std::io;

use crate::{Exit, Shutdown};

/// Runs a role on a runtime of its own, until it ends, has to end at once, or has not ended in time after a request.
///
/// The role is a task of its own: one that is stuck, in a driver or on a dead disk, does not keep the process from ending.
/// Nor do its threads, which nobody waits for; the caller ends the process.
///
/// # Errors
/// When there can be no runtime or signal handler. The inner error is the role's.
pub fn run_role<E, F>(shutdown: Shutdown, role: impl FnOnce(Shutdown) -> F) -> io::Result<Result<Exit, E>>
where
    E: Send + 'static,
    F: Future<Output = Result<Exit, E>> + Send + 'static,
{
    // Two threads: the heartbeat must not wait for a message that is being decoded.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(async {
        shutdown.on_signals()?;
        let role = tokio::spawn(role(shutdown.clone()));
        Ok(tokio::select! {
            ended = role => ended.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic())),
            exit = shutdown.at_once() => Ok(exit),
            // Also while the coordinator is still looked for, or the place of the process.
            () = shutdown.given_up() => Ok(Exit::Again),
        })
    });
    runtime.shutdown_background();
    result
}
