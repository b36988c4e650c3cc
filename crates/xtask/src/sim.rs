//! `cargo xtask sim`: seeded runs of the coordinator's state machine in a simulated world.

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// Print every event with what follows from it; for a single seed.
    #[arg(long)]
    trace: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut command = cargo(&["test", "--release", "-p", "pacs-machine", "--test", "simulation", "runs_finish"]);
    command.env("PACS_SEEDS", arguments.seeds.to_string()).env("PACS_FIRST_SEED", arguments.first_seed.to_string());
    if arguments.trace {
        command.env("PACS_TRACE", "1");
    }
    check("simulate (a failing seed is named above; --first-seed N --seeds 1 replays it)", &mut command)
}
