//! `cargo xtask bench coordinator`: throughput, memory and restart of the coordinator; `cargo xtask bench asynchrony`:
//! the gain of generation ahead of training; `cargo xtask bench step`: the cost of a step of a large job; `cargo xtask
//! bench fleet`: thousands of workers over mutual TLS.

use anyhow::Result;
use clap::Args;

use crate::process::{cargo, check};

#[derive(Debug, Args)]
pub(crate) struct Timed {
    /// Seconds that each throughput takes if it meets its target, or that the steps take altogether.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cargo xtask bench step\n  cargo xtask bench step -- --mean-tokens 8192 --equal --ranks 8\n  \
                  cargo xtask bench step -- --help"
)]
pub(crate) struct Step {
    /// Options of the benchmark: prompts, samples, their lengths, and learner ranks.
    #[arg(last = true)]
    options: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cargo xtask bench fleet\n  cargo xtask bench fleet -- --workers 2000 --rate 1000 --lost 200\n  \
                  cargo xtask bench fleet -- --processors 0,1      (where there are more than two)\n\nIt takes two file \
                  descriptors a worker, one in each process: `ulimit -Hn` of 10,800 for 10,000 workers."
)]
pub(crate) struct Fleet {
    /// Options of the benchmark: workers, samples a second, losses.
    #[arg(last = true)]
    options: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cargo xtask bench scale -- --sample-us 150 --heartbeat-us 70\n  cargo xtask bench scale -- --help"
)]
pub(crate) struct Scale {
    /// Options of the simulation: the measured costs, and what is assumed of GPUs.
    #[arg(last = true)]
    options: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  cargo xtask bench transfer\n  cargo xtask bench transfer -- --gigabytes 3.1\n\nIt needs root, \
                  and three times the size of the model in shared memory, or in --folder."
)]
pub(crate) struct Transfer {
    /// Options of the benchmark: the size of the model, and the rate of a sender.
    #[arg(last = true)]
    options: Vec<String>,
}

pub(crate) fn timed(bench: &str, arguments: &Timed) -> Result<()> {
    run(bench, &["--seconds".to_owned(), arguments.seconds.to_string()])
}

pub(crate) fn step(arguments: &Step) -> Result<()> {
    run("step", &arguments.options)
}

/// Runs the coordinator as the real program, in a process of its own.
pub(crate) fn fleet(arguments: &Fleet) -> Result<()> {
    check("build the program", &mut cargo(&["build", "--quiet", "--release", "--workspace", "--bin", "pacs"]))?;
    run("fleet", &arguments.options)
}

pub(crate) fn scale(arguments: &Scale) -> Result<()> {
    run("scale", &arguments.options)
}

/// Sends weights between hosts whose processes are killed.
pub(crate) fn transfer(arguments: &Transfer) -> Result<()> {
    check("build the program", &mut cargo(&["build", "--quiet", "--release", "--workspace", "--bin", "pacs"]))?;
    run("transfer", &arguments.options)
}

/// Builds and starts a benchmark. Features unify over what is built, so that the packages of the workspace are built together, as
/// elsewhere.
fn run(bench: &str, options: &[String]) -> Result<()> {
    let mut command = vec!["bench", "--quiet", "--workspace", "--bench", bench, "--"];
    command.extend(options.iter().map(String::as_str));
    check(&format!("measure with the benchmark {bench}"), &mut cargo(&command))
}
