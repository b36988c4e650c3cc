//! `pacs-worker bench`: measurements that print one JSON object per line.

mod collective;
mod decode;
mod ranks;
mod rollout;
mod save;
mod shape;
mod train;
mod weights;
mod work;

use clap::Subcommand;
use pacs_runtime::Exit;

use crate::Failure;

/// Measurement to make.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Training steps on made-up groups: forward, backward, clipping, AdamW.
    Train(train::Arguments),
    /// Checkpoints of a training state, in the foreground and during training, and resuming from them.
    Save(save::Arguments),
    /// Generation of made-up groups through the engine: prefill, decode, sampling, log-probs.
    Rollout(rollout::Arguments),
    /// Decode steps of full batches, compared with the time that memory takes for the bytes.
    Decode(decode::DecodeArguments),
    /// Prefill passes over prompts.
    Prefill(decode::PrefillArguments),
    /// Bandwidth between learner ranks, by operation and size; names slow ranks.
    Collective(collective::Arguments),
    /// Delivery of a weight version to rollout workers: bytes and seconds of each transport, and the pause of decoding.
    Weights(weights::Arguments),
}

pub(crate) fn run(command: &Command) -> Result<Exit, Failure> {
    let result = match command {
        Command::Train(arguments) => train::run(arguments),
        Command::Save(arguments) => save::run(arguments),
        Command::Rollout(arguments) => rollout::run(arguments),
        Command::Decode(arguments) => decode::decode(arguments),
        Command::Prefill(arguments) => decode::prefill(arguments),
        Command::Collective(arguments) => collective::run(arguments),
        Command::Weights(arguments) => weights::run(arguments),
    };
    result.map_err(Failure::config)?;
    Ok(Exit::Done)
}

/// Prints one measurement as a JSON line.
fn print(line: &serde_json::Value) {
    println!("{line}");
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}
