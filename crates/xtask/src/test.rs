//! `cargo xtask test`: all checks of the repository.

mod pool;

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};
use crate::setup;

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cargo xtask test\n  cargo xtask test --jobs 1      (one test program after the other)"
)]
pub(crate) struct Arguments {
    /// Test programs that run at a time [default: one more than there are cores, since many tests wait for processes and timeouts]
    #[arg(long)]
    jobs: Option<std::num::NonZeroUsize>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::libtorch()?;
    check("pass the format check (run `cargo fmt --all`)", &mut cargo(&["fmt", "--all", "--check"]))?;
    // Process-level tests start the real programs. They are built together with the tests, because features unify over
    // what is built: alone, half of the workspace would be compiled twice.
    check("build the programs", &mut cargo(&["build", "--release", "--workspace", "--bins", "--tests"]))?;
    let lints = ["clippy", "--release", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    check("pass the lints", &mut cargo(&lints))?;
    pool::run(pool::programs()?, arguments.jobs)?;
    check("pass the documentation's tests", &mut cargo(&["test", "--quiet", "--release", "--workspace", "--doc"]))
}
