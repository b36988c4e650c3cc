//! `cargo xtask test`: all checks of the repository.

use anyhow::Result;

use crate::process::{cargo, check};
use crate::setup;

pub(crate) fn run() -> Result<()> {
    setup::libtorch()?;
    check("pass the format check (run `cargo fmt --all`)", &mut cargo(&["fmt", "--all", "--check"]))?;
    // Process-level tests start the real programs. They are built together with the tests, because features unify over
    // what is built: alone, half of the workspace would be compiled twice.
    check("build the programs", &mut cargo(&["build", "--release", "--workspace", "--bins", "--tests"]))?;
    let lints = ["clippy", "--release", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    check("pass the lints", &mut cargo(&lints))?;
    check("pass the tests", &mut cargo(&["test", "--release", "--workspace"]))
}
