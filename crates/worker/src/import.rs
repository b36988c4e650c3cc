//! `pacs-worker import`: GGUF files to Hugging Face folders.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use pacs_runtime::Exit;

use crate::Failure;

/// File to import, and destination.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  pacs-worker import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2-135m-instruct")]
pub(crate) struct Arguments {
    /// GGUF file to read.
    gguf: PathBuf,
    /// Folder to write: model.safetensors, config.json, tokenizer.json, chat template.
    out: PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    let report = pacs_model::import::import_gguf(&arguments.gguf, &arguments.out)
        .with_context(|| format!("import `{}`", arguments.gguf.display()))
        .map_err(Failure::config)?;
    println!("{} parameters written to {}", report.parameters, arguments.out.display());
    Ok(Exit::Done)
}
