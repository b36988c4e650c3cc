//! Operator actions on a running job: `pacs pause | resume | checkpoint | drain | set | stop`.

use anyhow::anyhow;
use clap::Args;
use pacs_protocol::v1::operate_request::Command;
use pacs_protocol::v1::{Checkpoint, Drain, LogLevel, OperateRequest, Pause, Resume, StopMode, StopRunRequest};
use pacs_runtime::Exit;

use crate::client::{block_on, connect, in_time};
use crate::failure::Failure;
use crate::output;
use crate::target;

/// Arguments of commands that take a run and nothing else.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs pause                            the run on this machine
  pacs resume runs/demo                 the run in that folder
  pacs checkpoint 10.0.0.5:7700         the run of that coordinator")]
pub(crate) struct OnRun {
    /// The run: its folder, coordinator (host:port), job, or the first digits of its id. Default: the live run of this machine.
    pub(crate) target: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs drain rollout-1                  a worker of the run on this machine
  pacs drain verifier-0 runs/demo       a worker of the run in that folder

A worker that holds a group finishes it first. A learner leaves when its step is saved, if resources.min_learners others
stay.")]
pub(crate) struct DrainWorker {
    /// Name of the worker, as `pacs status` shows it.
    pub(crate) worker: String,
    /// The run: its folder, coordinator (host:port), job, or the first digits of its id. Default: the live run of this machine.
    pub(crate) target: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs set learning_rate=2e-6           from the next step on
  pacs set slots=96 runs/demo           room for groups in flight, within the bound of asynchrony.max_lag
  pacs set log_level=debug              error, warn, info, debug or trace; workers hear of it within a second or two

What was set is in the status and in the journal, with who did it. It holds until it is set again, also for a run that is
resumed from a later checkpoint; the job spec stays as it is.")]
pub(crate) struct SetValue {
    /// `learning_rate=VALUE`, `slots=N` or `log_level=LEVEL`.
    #[arg(value_name = "NAME=VALUE")]
    pub(crate) setting: String,
    /// The run: its folder, coordinator (host:port), job, or the first digits of its id. Default: the live run of this machine.
    pub(crate) target: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  pacs stop                             the run on this machine, at the next safe point
  pacs stop --after-step runs/demo      the run in that folder, when its step is done
  pacs stop --now                       at once; what is not saved yet is lost")]
pub(crate) struct Stop {
    /// The run: its folder, coordinator (host:port), job, or the first digits of its id. Default: the live run of this machine.
    pub(crate) target: Option<String>,
    /// Finish the current step first.
    #[arg(long)]
    pub(crate) after_step: bool,
    /// End at once, without writing a checkpoint.
    #[arg(long, conflicts_with = "after_step")]
    pub(crate) now: bool,
}

pub(crate) fn pause(arguments: &OnRun) -> Result<Exit, Failure> {
    let address = operate(arguments.target.as_deref(), Command::Pause(Pause {}), "pause the run")?;
    output::line(format_args!("the run at {address} leases no new work; `pacs resume` continues it"));
    Ok(Exit::Done)
}

pub(crate) fn resume(arguments: &OnRun) -> Result<Exit, Failure> {
    let address = operate(arguments.target.as_deref(), Command::Resume(Resume {}), "resume the run")?;
    output::line(format_args!("the run at {address} continues"));
    Ok(Exit::Done)
}

pub(crate) fn checkpoint(arguments: &OnRun) -> Result<Exit, Failure> {
    let address = operate(arguments.target.as_deref(), Command::Checkpoint(Checkpoint {}), "save the run")?;
    output::line(format_args!(
        "the run at {address} writes a checkpoint as soon as its learners are between two tasks"
    ));
    Ok(Exit::Done)
}

pub(crate) fn drain(arguments: &DrainWorker) -> Result<Exit, Failure> {
    let worker = arguments.worker.clone();
    let command = Command::Drain(Drain { worker: worker.clone() });
    operate(arguments.target.as_deref(), command, "drain the worker")?;
    output::line(format_args!("{worker} gets no new work, and leaves when it has done what it holds"));
    Ok(Exit::Done)
}

pub(crate) fn set(arguments: &SetValue) -> Result<Exit, Failure> {
    let command = setting(&arguments.setting)?;
    let address = operate(arguments.target.as_deref(), command, "change the run")?;
    output::line(format_args!("the run at {address} continues with {}", arguments.setting));
    Ok(Exit::Done)
}

pub(crate) fn stop(arguments: &Stop) -> Result<Exit, Failure> {
    let target = target::one(arguments.target.as_deref())?;
    let (mode, what) = match (arguments.after_step, arguments.now) {
        (true, _) => (StopMode::AfterStep, "finishes its step, writes a checkpoint and ends"),
        (_, true) => (StopMode::Now, "ends at once"),
        _ => (StopMode::Save, "writes a checkpoint and ends"),
    };
    block_on(async {
        let mut client = connect(&target).await?;
        let request = StopRunRequest { mode: mode.into(), operator: operator() };
        in_time(client.stop_run(request)).await.map_err(|failure| failure.doing("stop the run"))
    })?;
    output::line(format_args!("the run at {} {what}; `pacs run` with the same job resumes from there", target.address));
    Ok(Exit::Done)
}

fn setting(text: &str) -> Result<Command, Failure> {
    let wrong = |problem: String| {
        let hint = "`learning_rate=2e-6`, `slots=96` and `log_level=debug` are such settings; the others are fixed while a \
                    job runs";
        Failure::with_exit(Exit::Usage, anyhow!("{problem}")).doing(format!("read the setting `{text}`")).hint(hint)
    };
    let (name, value) = text.split_once('=').ok_or_else(|| wrong("expected NAME=VALUE".to_owned()))?;
    let (name, value) = (name.trim(), value.trim());
    match name {
        "learning_rate" => value.parse().map(Command::LearningRate).map_err(|error| wrong(error.to_string())),
        "log_level" => log_level(value).map(|level| Command::LogLevel(level.into())).map_err(wrong),
        "slots" => value.parse().map(Command::Slots).map_err(|error| wrong(error.to_string())),
        _ => Err(wrong(format!("there is no setting `{name}` that can be changed"))),
    }
}

fn log_level(name: &str) -> Result<LogLevel, String> {
    match name {
        "error" => Ok(LogLevel::Error),
        "warn" => Ok(LogLevel::Warn),
        "info" => Ok(LogLevel::Info),
        "debug" => Ok(LogLevel::Debug),
        "trace" => Ok(LogLevel::Trace),
        _ => Err(format!("`{name}` is not a log level: expected error, warn, info, debug or trace")),
    }
}

fn operate(target: Option<&str>, command: Command, doing: &'static str) -> Result<String, Failure> {
    let target = target::one(target)?;
    block_on(async {
        let mut client = connect(&target).await?;
        let request = OperateRequest { operator: operator(), command: Some(command) };
        in_time(client.operate(request)).await.map_err(|failure| failure.doing(doing))
    })?;
    Ok(target.address)
}

/// Returns who gives the command, for the audit record in status and journal.
fn operator() -> String {
    let user = std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_else(|_| "somebody".to_owned());
    let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    format!("{user}@{host}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_or_refused() {
        assert!(matches!(setting("learning_rate=2e-6"), Ok(Command::LearningRate(rate)) if rate == 2e-6));
        assert!(matches!(setting("slots = 96"), Ok(Command::Slots(96))));
        let debug = i32::from(LogLevel::Debug);
        assert!(matches!(setting("log_level=debug"), Ok(Command::LogLevel(level)) if level == debug));
        for (text, expected) in [
            ("slots", "expected NAME=VALUE"),
            ("log_level=loud", "expected error, warn, info, debug or trace"),
            ("slots=-1", "invalid digit"),
            ("batch.steps=7", "no setting `batch.steps`"),
        ] {
            let failure = setting(text).expect_err("refused");
            assert!(failure.to_string().contains(expected) && failure.exit == Exit::Usage, "{failure}");
        }
    }
}
