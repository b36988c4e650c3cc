//! `pacs run-id`: prints the id of a run, for launchers that start its processes one by one.

use std::fs;

use anyhow::Context;
use pacs_runtime::Exit;

use crate::arguments::RunId;
use crate::failure::Failure;
use crate::output;

pub(crate) fn run(arguments: &RunId) -> Result<Exit, Failure> {
    let folder = &arguments.run_dir;
    fs::create_dir_all(folder)
        .with_context(|| format!("create folder `{}`", folder.display()))
        .map_err(Failure::config)?;
    let id = pacs_coordinator::run_id(folder)
        .map_err(|error| Failure::with_exit(error.exit(), error).doing("identify the run"))?;
    output::line(id);
    Ok(Exit::Done)
}
