//! `pacs rollout`: the rollout worker that drives vLLM servers.

use anyhow::Context;
use pacs_runtime::launch::Placement;
use pacs_runtime::net::PeerRole;
use pacs_runtime::{Exit, LogFormat, Shutdown, init_logging, run_role};
use pacs_vllm::{VllmOptions, VllmWorkerOptions};

use crate::arguments::Rollout;
use crate::failure::Failure;
use crate::verifier::misplaced;

pub(crate) fn run(arguments: &Rollout) -> Result<Exit, Failure> {
    init_logging(if arguments.log_json { LogFormat::Json } else { LogFormat::Human });
    let Rollout { worker, endpoints, weights_dir, api_key, bind, .. } = arguments;
    let vllm = VllmOptions {
        endpoints: endpoints.clone(),
        weights_dir: weights_dir.clone(),
        key: api_key.clone(),
        ..VllmOptions::default()
    };
    let (worker, bind) = (worker.clone(), bind.clone());
    let ended = run_role(Shutdown::new(), |shutdown| async move {
        let Placement { link, name } = worker.place(PeerRole::Rollout).await.map_err(misplaced)?;
        let bind = worker.own_address(bind.as_deref(), &link.coordinator).await.map_err(misplaced)?;
        let options = VllmWorkerOptions { link, name, bind, vllm };
        pacs_vllm::run(options, shutdown)
            .await
            .map_err(|error| Failure::with_exit(error.exit(), error).doing("generate samples"))
    });
    let ended = ended.context("start the runtime and its signal handlers").map_err(Failure::bug);
    ended.unwrap_or_else(Err)
}
