//! Tasks of this repository: `cargo xtask setup | demo | test | sim | chaos | dist | gpu-bundle | bench`.
#![forbid(unsafe_code)]

mod bench;
mod chaos;
mod demo;
mod dist;
mod gpu_bundle;
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
    /// Gets libtorch from the package registry and links it below `target/`; with `--cuda` its CUDA half, too.
    Setup(setup::Arguments),
    /// Sets up, builds, fetches the demo's model, and trains it.
    Demo(demo::Arguments),
    /// Sets up and runs every check: format, lints, all tests.
    Test(test::Arguments),
    /// Simulates the coordinator's state machine with faults of every kind, one run a seed.
    Sim(sim::Arguments),
    /// Kills, stops and ends the processes of two runs at random, and compares what they come to with undisturbed ones.
    Chaos(chaos::Arguments),
    /// Packs the programs for machines without Rust: an archive and a Python wheel.
    Dist(dist::Arguments),
    /// Packs what a machine with a GPU needs that has neither Rust nor a network.
    GpuBundle(gpu_bundle::Arguments),
    /// Measures one part by itself and prints JSON lines.
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().task {
        Task::Setup(arguments) => setup::run(&arguments),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Sim(arguments) => sim::run(&arguments),
        Task::Chaos(arguments) => chaos::run(&arguments),
        Task::Dist(arguments) => dist::run(&arguments),
        Task::GpuBundle(arguments) => gpu_bundle::run(&arguments),
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
