//! `cargo xtask storm`: two runs at once under a storm of signals, as long as you like.

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};
use crate::setup;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How long it lasts.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Decides what is done to whom; that of a storm before does the same again. Default: another one each time.
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::libtorch()?;
    check("build the programs", &mut cargo(&["build", "--release", "--workspace", "--bins"]))?;
    let mut command = cargo(&["test", "--release", "-p", "pacs-tests", "--test", "storm", "--", "--nocapture"]);
    command.env("PACS_STORM_SECONDS", (60 * arguments.minutes).to_string());
    if let Some(seed) = arguments.seed {
        command.env("PACS_STORM_SEED", seed.to_string());
    }
    check("weather the storm (its seed is above; --seed N takes it)", &mut command)
}
