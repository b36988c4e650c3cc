//! `pacs`: what operators run. Starts jobs with their coordinator, shows and stops them, checks specs, grades answers.
//!
//! Never links libtorch: whatever needs tensors is a `pacs-worker` process. One file per command; `run` is the only
//! one with parts of its own.
#![forbid(unsafe_code)]

mod arguments;
mod data;
mod failure;
mod format;
mod job;
mod memory;
mod model_folder;
mod output;
mod plan;
mod run;
mod status;
mod target;
mod verifier;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::{Arguments, Command, DataCommand, JobCommand};

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Verifier(arguments) => verifier::run(&arguments),
        Command::Status(arguments) => status::status(&arguments),
        Command::Stop(arguments) => status::stop(&arguments),
        Command::Verify { command } => verify::run(&command),
        Command::Data { command: DataCommand::Check(arguments) } => data::check(&arguments),
        Command::Job { command: JobCommand::Check(arguments) } => job::check(&arguments),
        Command::Job { command: JobCommand::Init(arguments) } => job::init(&arguments),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(failure) => {
            output::error(&failure);
            failure.exit.into()
        }
    }
}
