//! `pacs`, the operator's program: starts jobs with their coordinator, shows and stops them, checks specs, grades answers.
//!
//! It never links libtorch: whatever needs tensors is a `pacs-worker` process. One file per command, with a folder of the same
//! name where a command has parts.
#![forbid(unsafe_code)]

mod arguments;
mod attempts;
mod certs;
mod client;
mod coordinator;
mod data;
mod demo;
mod doctor;
mod ending;
mod eval;
mod failure;
mod format;
mod hub;
mod job;
mod launch;
mod live;
mod look;
mod memory;
mod model;
mod model_folder;
mod operate;
mod output;
mod plan;
mod preflight;
mod process;
mod rollout;
mod run;
mod run_id;
mod servers;
mod status;
mod study;
mod supervise;
mod target;
mod traces;
mod verifier;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use crate::arguments::{Arguments, Command, DataCommand, JobCommand, LaunchCommand, ModelCommand};

fn main() -> ExitCode {
    if let Some(ended) = pacs_text::enter_renderer() {
        return ended;
    }
    let result = match Arguments::parse().command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Run(arguments) => run::run(&arguments),
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Coordinator(arguments) => coordinator::run(&arguments),
        Command::Supervise(arguments) => supervise::run(&arguments),
        Command::Certs(arguments) => certs::run(&arguments),
        Command::Launch { command: LaunchCommand::Slurm(arguments) } => launch::slurm(&arguments),
        Command::Launch { command: LaunchCommand::Kubernetes(arguments) } => launch::kubernetes(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        // Before anything that makes a thread.
        Command::SandboxInit(arguments) => return pacs_sandbox::run_init(&arguments.order),
        Command::ExecChild(arguments) => return verifier::exec_child(arguments),
        Command::Verifier(arguments) => verifier::run(&arguments),
        Command::Rollout(arguments) => rollout::run(&arguments),
        Command::Servers(arguments) => servers::run(&arguments),
        Command::RunId(arguments) => run_id::run(&arguments),
        Command::Status(arguments) => status::status(&arguments),
        Command::Top(arguments) => look::top::run(&arguments),
        Command::Dashboard(arguments) => look::dashboard::run(&arguments),
        Command::Report(arguments) => look::report::run(&arguments),
        Command::Watch(arguments) => look::watch::run(&arguments),
        Command::Samples(arguments) => look::samples::run(&arguments),
        Command::Compare(arguments) => look::compare::run(&arguments),
        Command::Logs(arguments) => look::logs::run(&arguments),
        Command::Runs(arguments) => look::runs::run(&arguments),
        Command::Stop(arguments) => operate::stop(&arguments),
        Command::Pause(arguments) => operate::pause(&arguments),
        Command::Resume(arguments) => operate::resume(&arguments),
        Command::Checkpoint(arguments) => operate::checkpoint(&arguments),
        Command::Drain(arguments) => operate::drain(&arguments),
        Command::Set(arguments) => operate::set(&arguments),
        Command::Study { command } => study::run(&command),
        Command::Verify { command } => verify::run(&command),
        Command::Fetch(arguments) => hub::fetch(&arguments),
        Command::Push(arguments) => hub::push(&arguments),
        Command::Data { command: DataCommand::Check(arguments) } => data::check(&arguments),
        Command::Model { command: ModelCommand::Check(arguments) } => model::check(&arguments),
        Command::Model { command: ModelCommand::Untie(arguments) } => model::untie(&arguments),
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
