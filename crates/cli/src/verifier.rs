//! `pacs verifier`.

use std::time::Duration;

use anyhow::Context;
use pacs_runtime::{Exit, JoinError, LogFormat, Shutdown, init_logging};
use pacs_verifier::{VerifierError, VerifierOptions};

use crate::arguments::Verifier;
use crate::failure::Failure;

pub(crate) fn run(arguments: &Verifier) -> Result<Exit, Failure> {
    init_logging(if arguments.log_json { LogFormat::Json } else { LogFormat::Human });
    let options = VerifierOptions {
        coordinator: arguments.coordinator.clone(),
        name: arguments.name.clone(),
        threads: arguments.threads,
        join_timeout: Duration::from_secs(arguments.join_timeout),
    };
    // Grading has threads of its own; these carry heartbeats and calls.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    let result = runtime.block_on(async {
        let shutdown = Shutdown::new();
        shutdown.on_signals().context("install signal handlers").map_err(Failure::bug)?;
        pacs_verifier::run(options, shutdown).await.map_err(failure)
    });
    runtime.shutdown_background();
    result
}

fn failure(error: VerifierError) -> Failure {
    let exit = match &error {
        VerifierError::Join(JoinError::Address { .. }) => Exit::Usage,
        VerifierError::Join(JoinError::Unreachable { .. }) => Exit::Again,
        VerifierError::Join(JoinError::Refused(_)) | VerifierError::Spec(_) => Exit::Config,
        VerifierError::Refused { .. } => Exit::Bug,
    };
    Failure::with_exit(exit, error).doing("grade answers")
}
