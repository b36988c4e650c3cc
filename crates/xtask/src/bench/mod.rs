//! `cargo xtask bench`: measurements of single parts.

mod verify;

use anyhow::Result;
use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Grades mathematical answers, beside the Python package math-verify on the same pairs.
    Verify(verify::Arguments),
}

pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Verify(arguments) => verify::run(arguments),
    }
}
