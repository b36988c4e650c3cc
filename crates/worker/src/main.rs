//! `pacs-worker`: the programs that need libtorch (rollout and learner workers, model tools).
#![forbid(unsafe_code)]

mod bench;
mod bounds;
mod compute;
mod create;
mod devices;
mod generate;
mod import;
mod prompting;
mod replay;
mod role;
mod score;
mod sft;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pacs_runtime::{Exit, LogFormat, init_logging};

/// Rollout and learner workers of the PACS trainer, and tools for models.
///
/// Operators rarely start workers by hand: `pacs run` does it on one machine.
#[derive(Debug, Parser)]
#[command(name = "pacs-worker", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Write log lines as JSON.
    #[arg(long, global = true)]
    log_json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Generates samples for a coordinator.
    Rollout(role::RolloutArguments),
    /// Computes gradients for a coordinator, as one learner rank.
    Learner(role::LearnerArguments),
    /// Says what this machine has of what `--device cuda` needs.
    Devices(devices::Arguments),
    /// Measures training, generation, and the network between ranks; prints JSON lines.
    #[command(subcommand)]
    Bench(bench::Command),
    /// Turns a GGUF file of the llama, qwen2 or qwen3 family into a Hugging Face folder.
    Import(import::Arguments),
    /// Makes a small model of random weights, with a tokenizer of characters.
    Create(create::Arguments),
    /// Generates samples for prompts of a JSONL file, with log-probs.
    Generate(generate::Arguments),
    /// Trains on recorded groups.
    Replay(replay::Arguments),
    /// Fine-tunes a model on written answers, or trains a small one from scratch.
    Sft(sft::Arguments),
    /// Writes the log-prob of every token of given answers.
    Score(score::Arguments),
}

fn main() -> ExitCode {
    pacs_torch::prepare_allocator();
    let arguments = Arguments::parse();
    init_logging(if arguments.log_json { LogFormat::Json } else { LogFormat::Human });
    let is_role = matches!(arguments.command, Command::Rollout(_) | Command::Learner(_));
    let result = match arguments.command {
        Command::Rollout(arguments) => in_role(|| role::rollout(arguments)),
        Command::Learner(arguments) => in_role(|| role::learner(arguments)),
        Command::Devices(arguments) => devices::run(&arguments),
        Command::Bench(command) => bench::run(&command),
        Command::Import(arguments) => import::run(&arguments),
        Command::Create(arguments) => create::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::Sft(arguments) => sft::run(&arguments),
        Command::Score(arguments) => score::run(&arguments),
    };
    let exit = match result {
        Ok(exit) => exit,
        Err(Failure { error, exit }) => {
            // Not `eprintln!`, which panics where standard error is a file on a full disk: the exit code has to stay.
            let line =
                format!("error: failed to {}\n", pacs_runtime::harmless_lines(&pacs_runtime::chain(error.as_ref())));
            let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
            exit
        }
    };
    if is_role {
        // Its engine or trainer may be in the middle of a tensor operation, which cannot be interrupted.
        pacs_torch::end_process(exit.code());
    }
    exit.into()
}

/// Runs a role. A panic that unwound out of `main` would run the static destructors of libtorch under the engine or trainer,
/// which then panics, too, for a reason that means nothing.
fn in_role(role: impl FnOnce() -> Result<Exit, Failure>) -> Result<Exit, Failure> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(role)).unwrap_or_else(|_| {
        // The hook has said where and why.
        Err(Failure { error: anyhow::anyhow!("go on after a panic"), exit: Exit::Bug })
    })
}

/// An error and the exit code that fits.
#[derive(Debug)]
struct Failure {
    error: anyhow::Error,
    exit: Exit,
}

impl Failure {
    fn config(error: anyhow::Error) -> Self {
        Self { error, exit: Exit::Config }
    }
}
