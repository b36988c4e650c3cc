//! Logging of `pacs run`: everything to a file, errors also to standard error.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use pacs_runtime::HarmlessLines;
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, registry};

use crate::arguments::LogFormat;

/// Installs logging to `file`, filtered by `PACS_LOG` (default `info`), and of errors to standard error.
pub(crate) fn init(file: &Path, format: LogFormat) -> Result<()> {
    let output = File::options().create(true).append(true).open(file);
    let output = Arc::new(output.with_context(|| format!("open log `{}`", file.display()))?);
    let filter = EnvFilter::try_from_env("PACS_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Lines that a full disk does not take are dropped: reporting that on standard error could panic for the same reason.
    let layer = || fmt::layer().log_internal_errors(false).with_ansi(false).with_target(false);
    let to_file = layer().with_writer(HarmlessLines(output));
    let to_terminal = layer().with_writer(HarmlessLines(std::io::stderr)).without_time();
    let layers = match format {
        LogFormat::Human => [to_file.with_filter(filter).boxed(), to_terminal.with_filter(LevelFilter::ERROR).boxed()],
        LogFormat::Json => {
            [to_file.json().with_filter(filter).boxed(), to_terminal.json().with_filter(LevelFilter::ERROR).boxed()]
        }
    };
    registry().with(Vec::from(layers)).try_init().context("start logging")
}
