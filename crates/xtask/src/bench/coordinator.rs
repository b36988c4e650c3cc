//! `cargo xtask bench coordinator`: samples a second, memory, and restart of the coordinator; `cargo xtask bench
//! asynchrony`: what it is worth that generation runs ahead.

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Seconds that each throughput takes if it meets its target, or that the steps take altogether.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
}

/// `what` names the measurement.
pub(crate) fn run(what: &str, arguments: &Arguments) -> Result<()> {
    let seconds = arguments.seconds.to_string();
    let measure =
        ["run", "--release", "--quiet", "-p", "pacs-coordinator", "--example", "measure", "--", what, &seconds];
    check("measure the coordinator", &mut cargo(&measure))
}
