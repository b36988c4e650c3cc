//! `pacs supervise`: restarts one worker, for launchers that do not restart processes themselves.

use std::process::ExitStatus;
use std::time::Instant;

use anyhow::Context;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pacs_runtime::{Exit, LogFormat, init_logging};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::arguments::Supervise;
use crate::failure::Failure;
use crate::run::restarts::{Next, Restarts, describe};
use crate::run::supervisor::{STARTED, started};

pub(crate) fn run(arguments: &Supervise) -> Result<Exit, Failure> {
    init_logging(LogFormat::Human);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")
        .map_err(Failure::bug)?;
    runtime.block_on(async {
        let mut signals = signals().context("install signal handlers").map_err(Failure::bug)?;
        supervise(&arguments.command, arguments.crashes_only, &[], &mut signals).await
    })
}

/// Runs a worker with these variables until its end is one that no restart follows. `signals` are passed on to it.
pub(crate) async fn supervise(
    command: &[String],
    crashes_only: bool,
    environment: &[(&str, String)],
    signals: &mut mpsc::UnboundedReceiver<Signal>,
) -> Result<Exit, Failure> {
    let (began, mut restarts) = (Instant::now(), Restarts::new());
    loop {
        let started = Instant::now();
        let mut child = spawn(command, environment)?;
        let (status, asked) = watch(&mut child, signals).await?;
        if let Some(exit) = final_exit(status, asked, crashes_only) {
            return Ok(exit);
        }
        match restarts.after(status, began.elapsed(), started.elapsed()) {
            Next::GiveUp(exit) => {
                let error = anyhow::anyhow!("`{}` {}, as it did before", command.join(" "), describe(status));
                return Err(Failure::with_exit(exit, error).doing("keep a worker running"));
            }
            Next::Restart(wait) => {
                let seconds = wait.as_secs_f64();
                tracing::warn!("`{}` {}; it is started again in {seconds:.1} s", command.join(" "), describe(status));
                tokio::select! {
                    () = sleep(wait) => {}
                    _ = signals.recv() => return Ok(Exit::Again),
                }
            }
        }
    }
}

/// Returns the exit code to end with after the worker's end; `None` when the worker is to be restarted.
fn final_exit(status: ExitStatus, asked_to_leave: bool, crashes_only: bool) -> Option<Exit> {
    let known = [Exit::Done, Exit::Usage, Exit::Bug, Exit::Again, Exit::Config];
    let exit = status.code().and_then(|code| known.into_iter().find(|exit| i32::from(exit.code()) == code));
    match exit {
        Some(Exit::Bug) if !crashes_only => asked_to_leave.then_some(Exit::Again),
        None => asked_to_leave.then_some(Exit::Again),
        Some(exit) => Some(exit),
    }
}

/// Receives the signals that are forwarded to the worker.
pub(crate) fn signals() -> std::io::Result<mpsc::UnboundedReceiver<Signal>> {
    // Unbounded is safe here: a launcher sends a handful of signals in the life of a process.
    let (sender, receiver) = mpsc::unbounded_channel();
    let kinds = [
        (SignalKind::terminate(), Signal::SIGTERM),
        (SignalKind::interrupt(), Signal::SIGINT),
        (SignalKind::user_defined1(), Signal::SIGUSR1),
    ];
    for (kind, name) in kinds {
        let (mut stream, sender) = (signal(kind)?, sender.clone());
        tokio::spawn(async move { while stream.recv().await.is_some() && sender.send(name).is_ok() {} });
    }
    Ok(receiver)
}

fn spawn(command: &[String], environment: &[(&str, String)]) -> Result<Child, Failure> {
    let (program, arguments) = command.split_first().expect("the command line requires a command");
    // A process group of its own: if a launcher signals this process's group, the worker must not get the signal a second time by
    // forwarding, because a second SIGTERM skips the save.
    let mut command = Command::new(program);
    command.args(arguments).envs(environment.iter().map(|(name, value)| (name, value)));
    command.env(STARTED, started().to_string()).process_group(0).kill_on_drop(true);
    command.spawn().map_err(|error| Failure::config(error).doing(format!("start `{program}`")))
}

/// Waits for the end of the worker and forwards signals; the flag says whether it was asked to leave.
async fn watch(
    child: &mut Child,
    signals: &mut mpsc::UnboundedReceiver<Signal>,
) -> Result<(ExitStatus, bool), Failure> {
    let mut asked = false;
    loop {
        tokio::select! {
            status = child.wait() => {
                let status = status.context("wait for the worker").map_err(Failure::bug)?;
                return Ok((status, asked));
            }
            Some(signal) = signals.recv() => {
                asked |= signal != Signal::SIGUSR1;
                if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                    // The worker may have ended at this moment, so a failure is ignored.
                    let _ = killpg(Pid::from_raw(pid), signal);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn only_deaths_are_followed_by_a_restart() {
        let exited = |code: i32| ExitStatus::from_raw(code << 8);
        for (code, exit) in [(0, Exit::Done), (2, Exit::Usage), (75, Exit::Again), (78, Exit::Config)] {
            assert_eq!(final_exit(exited(code), false, false), Some(exit));
        }
        assert_eq!(final_exit(exited(70), false, false), None);
        assert_eq!(final_exit(exited(70), false, true), Some(Exit::Bug), "a run that cannot continue");
        assert_eq!(final_exit(exited(101), false, true), None);
        assert_eq!(final_exit(ExitStatus::from_raw(9), false, true), None);
        assert_eq!(final_exit(ExitStatus::from_raw(15), true, false), Some(Exit::Again));
    }

    #[test]
    fn a_dead_worker_process_is_restarted() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let script =
            format!("if [ -e {0} ]; then exit 75; fi; touch {0}; kill -9 $$", dir.path().join("second").display());
        let command = ["/bin/sh", "-c", &script].map(str::to_owned).to_vec();
        let exit = run(&Supervise { command, crashes_only: false });
        assert_eq!(exit.expect("the second one ends in order"), Exit::Again);
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let failure =
            run(&Supervise { command: vec!["/no/such/program".into()], crashes_only: false }).expect_err("not there");
        assert_eq!(failure.exit, Exit::Config);
    }
}
