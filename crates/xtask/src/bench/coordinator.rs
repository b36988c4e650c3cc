//! `cargo xtask bench coordinator`: samples a second, memory, and restart of the coordinator.

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Seconds that each throughput takes if it meets its target.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let seconds = arguments.seconds.to_string();
    let measure = ["run", "--release", "--quiet", "-p", "pacs-coordinator", "--example", "measure", "--", &seconds];
    check("measure the coordinator", &mut cargo(&measure))
}
