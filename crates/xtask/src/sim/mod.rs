//! `cargo xtask sim`: seeded runs of the coordinator's state machine in a simulated world.

mod bugs;

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask sim --seeds 10000
  cargo xtask sim --first-seed 9823 --seeds 1 --trace    replays one
  cargo xtask sim --bugs                                 plants bugs and counts the seeds that find each
  cargo xtask sim --bugs --only lag-off-by-one --json")]
pub(crate) struct Arguments {
    /// How many seeds to run [default: 10000; 1000 for each bug].
    #[arg(long)]
    seeds: Option<u64>,
    /// First seed to run.
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// Print every event and its effects; for a single seed.
    #[arg(long)]
    trace: bool,
    /// Plant known bugs in a copy of the machine, one at a time, and count the seeds that detect each. Fails if one
    /// is not detected.
    #[arg(long, conflicts_with = "trace")]
    bugs: bool,
    /// Plant only this bug.
    #[arg(long, requires = "bugs", value_name = "NAME")]
    only: Option<String>,
    /// Print one line of JSON per bug.
    #[arg(long, requires = "bugs")]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.bugs {
        return bugs::run(arguments);
    }
    let seeds = arguments.seeds.unwrap_or(10_000);
    let mut command = cargo(&["test", "--release", "-p", "pacs-machine", "--test", "simulation", "runs_finish"]);
    command.env("PACS_SEEDS", seeds.to_string()).env("PACS_FIRST_SEED", arguments.first_seed.to_string());
    if arguments.trace {
        command.env("PACS_TRACE", "1");
    }
    check("simulate (a failing seed is named above; --first-seed N --seeds 1 replays it)", &mut command)
}
