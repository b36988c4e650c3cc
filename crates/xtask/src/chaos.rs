//! `cargo xtask chaos`: two concurrent runs under random faults, for a given time, in all modes.

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};
use crate::setup;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Minutes that it lasts.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Seed of the faults; the same seed repeats them. Default: a new seed each time.
    #[arg(long)]
    seed: Option<u64>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::libtorch()?;
    check("build the programs", &mut cargo(&["build", "--release", "--workspace", "--bins", "--test", "chaos"]))?;
    let mut command = cargo(&["test", "--release", "--workspace", "--test", "chaos", "--", "--nocapture"]);
    command.env("PACS_CHAOS_SECONDS", (60 * arguments.minutes).to_string());
    if let Some(seed) = arguments.seed {
        command.env("PACS_CHAOS_SEED", seed.to_string());
    }
    check("survive chaos (its seed is above; --seed N takes it)", &mut command)
}
