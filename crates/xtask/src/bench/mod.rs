//! `cargo xtask bench`: measurements of single components.

mod beside;
mod coordinator;
mod verify;

use anyhow::Result;
use clap::Subcommand;

/// Component to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Grades mathematical answers, compared with the Python package math-verify on the same pairs.
    Verify(verify::Arguments),
    /// Makes training steps, compared with hand-written PyTorch on the same work.
    Train(beside::Arguments),
    /// Takes samples from lease to batch through the coordinator and its journal, fills it, and starts it again.
    Coordinator(coordinator::Timed),
    /// Times steps with and without generation running ahead of training, with workers that wait instead of computing.
    Asynchrony(coordinator::Timed),
    /// Plays a step of a large job with made-up samples: the coordinator's memory, messages and waiting times.
    Step(coordinator::Step),
    /// Has thousands of workers join one coordinator over mutual TLS, work at a rate, and be lost at once.
    Fleet(coordinator::Fleet),
    /// Simulates clusters of thousands of GPUs: the run's state machine, with costs that `bench fleet` has measured.
    Scale(coordinator::Scale),
    /// Sends weights of a large model between hosts, while either end is killed or a bit is flipped.
    Transfer(coordinator::Transfer),
    /// Generates samples, compared with Hugging Face transformers on the same work.
    Rollout(beside::Arguments),
}

pub(crate) fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Verify(arguments) => verify::run(arguments),
        Bench::Train(arguments) => beside::run("train", arguments),
        Bench::Coordinator(arguments) => coordinator::timed("throughput", arguments),
        Bench::Asynchrony(arguments) => coordinator::timed("overlap", arguments),
        Bench::Step(arguments) => coordinator::step(arguments),
        Bench::Fleet(arguments) => coordinator::fleet(arguments),
        Bench::Scale(arguments) => coordinator::scale(arguments),
        Bench::Transfer(arguments) => coordinator::transfer(arguments),
        Bench::Rollout(arguments) => beside::run("rollout", arguments),
    }
}
