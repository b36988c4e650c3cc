//! `pacs-worker`: the commands that need libtorch (rollout and learner workers, model tools).
#![forbid(unsafe_code)]

mod bench;
mod bounds;
mod compute;
mod create;
mod devices;
mod generate;
mod hub;
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
    /// Converts a GGUF file of the llama, qwen2 or qwen3 family to a Hugging Face folder.
    Import(import::Arguments),
    /// Creates a small model with random weights and a character tokenizer.
    Create(create::Arguments),
    /// Generates samples with log-probs for the prompts of a JSONL file.
    Generate(generate::Arguments),
    /// Trains on recorded groups, without rollouts.
    Replay(replay::Arguments),
    /// Fine-tunes a model on given answers, or trains a small one from scratch.
    Sft(sft::Arguments),
    /// Computes the log-prob of every token of given answers.
    Score(score::Arguments),
}

fn main() -> ExitCode {
    if let Some(ended) = pacs_text::enter_renderer() {
        return ended;
    }
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
        Command::Generate(arguments) => generate::run(arguments),
        Command::Replay(arguments) => replay::run(&arguments),
        Command::Sft(arguments) => sft::run(arguments),
        Command::Score(arguments) => score::run(arguments),
    };
    let exit = match result {
        Ok(exit) => exit,
        Err(Failure { error, exit }) => {
            // `eprintln!` would panic if standard error is a file on a full disk, and lose the exit code.
            let line =
                format!("error: failed to {}\n", pacs_runtime::harmless_lines(&pacs_runtime::chain(error.as_ref())));
            let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
            exit
        }
    };
    if is_role {
        // The engine or trainer may be within a tensor operation, which cannot be interrupted.
        pacs_torch::end_process(exit.code());
    }
    exit.into()
}

/// Runs a role and catches its panics. A panic that unwound out of `main` would run libtorch's static destructors under
/// the engine or trainer, which would then panic too, with a misleading message.
fn in_role(role: impl FnOnce() -> Result<Exit, Failure>) -> Result<Exit, Failure> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(role)).unwrap_or_else(|_| {
        // The panic hook has already logged the message and place.
        Err(Failure { error: anyhow::anyhow!("continue after a panic"), exit: Exit::Bug })
    })
}

/// An error with the process exit code for it.
#[derive(Debug)]
struct Failure {
    error: anyhow::Error,
    exit: Exit,
}

impl Failure {
    fn config(error: anyhow::Error) -> Self {
        let exit = Exit::of_config(error.as_ref());
        Self { error, exit }
    }
}
