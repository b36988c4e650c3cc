//! Tasks of this repository: `cargo xtask setup | demo | test | sim | chaos | bench`.
#![forbid(unsafe_code)]

mod bench;
mod chaos;
mod demo;
mod process;
mod setup;
mod sim;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of the PACS trainer's repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Gets libtorch from the package registry and links it below `target/`.
    Setup,
    /// Sets up, builds, fetches the demo's model, and trains it.
    Demo(demo::Arguments),
    /// Sets up and runs every check: format, lints, all tests.
    Test,
    /// Simulates the coordinator's state machine with faults of every kind, one run a seed.
    Sim(sim::Arguments),
    /// Kills, stops and ends the processes of two runs at random, and compares what they come to with undisturbed ones.
    Chaos(chaos::Arguments),
    /// Measures one part by itself and prints JSON lines.
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup => setup::libtorch(),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Test => test::run(),
        Task::Sim(arguments) => sim::run(&arguments),
        Task::Chaos(arguments) => chaos::run(&arguments),
        Task::Bench(bench) => bench::run(&bench),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: failed to {error:#}");
            ExitCode::FAILURE
        }
    }
}
