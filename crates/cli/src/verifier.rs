//! `pacs verifier`: the verifier role, and the guard process of verifier programs.

use std::process::ExitCode;

use anyhow::Context;
use pacs_runtime::launch::{PlaceError, Placement};
use pacs_runtime::net::PeerRole;
use pacs_runtime::{Exit, LogFormat, Shutdown, init_logging, run_role};
use pacs_verifier::{Entry, VerifierError, VerifierOptions, run_guarded};

use crate::arguments::{ExecChild, Verifier};
use crate::failure::Failure;

pub(crate) fn run(arguments: &Verifier) -> Result<Exit, Failure> {
    init_logging(if arguments.log_json { LogFormat::Json } else { LogFormat::Human });
    let (worker, threads) = (arguments.worker.clone(), threads(arguments.threads));
    // Grading has its own threads, so that slow answers cannot delay heartbeats and calls on the runtime's.
    let ended = run_role(Shutdown::new(), |shutdown| async move {
        let Placement { link, name } = worker.place(PeerRole::Verifier).await.map_err(misplaced)?;
        let options = VerifierOptions { link, name, threads, guard: Some(guard()) };
        pacs_verifier::run(options, shutdown).await.map_err(failure)
    });
    let ended = ended.context("start the runtime and its signal handlers").map_err(Failure::bug);
    ended.unwrap_or_else(Err)
}

/// Returns the command line with which this program becomes the guard of a verifier program.
pub(crate) fn guard() -> Entry {
    Entry::new(&["exec-child"])
}

/// Runs as that guard; called before anything else has happened in the process.
pub(crate) fn exec_child(arguments: ExecChild) -> ExitCode {
    run_guarded(arguments.guarded, &arguments.command)
}

/// Returns the number of threads asked for; 0 means one per core.
pub(crate) fn threads(asked: usize) -> usize {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// Maps an error of placement (name, coordinator address, certificates) to a failure with the error's own exit code.
pub(crate) fn misplaced(error: PlaceError) -> Failure {
    Failure::with_exit(error.exit(), error).doing("find the place of this process in a run")
}

fn failure(error: VerifierError) -> Failure {
    Failure::with_exit(error.exit(), error).doing("grade answers")
}
