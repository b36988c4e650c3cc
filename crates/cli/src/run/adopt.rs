//! Workers that an earlier `pacs run` of the same folder has left: when that was killed, they live on, hold the state of
//! the run, and wait for their coordinator.

use std::ffi::OsStr;
use std::path::Path;

use super::supervisor::WorkerCommand;
use super::workers::WORKER_PROGRAM;
use crate::process;

/// A process that is provably a worker of this run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Living {
    pid: u32,
    began: u64,
}

impl Living {
    /// The process, if `command` would start one like it: of this user, of this run, with this program and name. Its command line
    /// alone proves nothing, for the workers of all runs have the same names.
    fn prove(pid: u32, command: &WorkerCommand) -> Option<Self> {
        let living = Self { pid, began: process::began(pid)? };
        let program = process::program(pid)?;
        let is_worker = process::is_own(pid)
            && process::has_variable(pid, "PACS_RUN_ID", &command.run_id)
            && process::has_option(pid, "--name", &command.name)
            && is_program_of(&program, &command.program);
        // Last: its id may have become that of another process meanwhile.
        (is_worker && living.is_alive()).then_some(living)
    }

    pub(crate) fn pid(self) -> u32 {
        self.pid
    }

    /// Whether this process, and not another one of its id, still lives.
    pub(crate) fn is_alive(self) -> bool {
        process::began(self.pid) == Some(self.began)
    }
}

/// Whether `found` is executed when `program` is started, which may be a script that sets up libtorch first.
fn is_program_of(found: &Path, program: &Path) -> bool {
    let same_name =
        || found.file_name() == program.file_name() || found.file_name() == Some(OsStr::new(WORKER_PROGRAM));
    program.canonicalize().is_ok_and(|program| program == found) || same_name()
}

/// Notes in each command the process that does its work already.
pub(crate) fn adopt(commands: &mut [WorkerCommand], known: &[(String, String, u32)]) {
    let here = process::host();
    for command in commands {
        let of_slot = known.iter().find(|(name, host, _)| *name == command.name && *host == here);
        command.living = of_slot.and_then(|(.., pid)| Living::prove(*pid, command));
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// A shell that looks like the worker `rollout-7` of a run.
    fn worker(run_id: &str) -> Child {
        Command::new("/bin/sh")
            .args(["-c", "read -r line", "worker", "--name", "rollout-7"])
            .env("PACS_RUN_ID", run_id)
            .stdin(Stdio::piped())
            .spawn()
            .expect("a shell")
    }

    fn command(name: &str, run_id: &str, program: &str) -> WorkerCommand {
        WorkerCommand {
            name: name.to_owned(),
            program: program.into(),
            arguments: Vec::new(),
            run_id: run_id.to_owned(),
            living: None,
        }
    }

    #[test]
    fn only_workers_of_the_same_run_are_adopted() {
        let (mut ours, mut theirs) = (worker("one"), worker("two"));
        let here = process::host();
        let known = |name: &str, host: &str, pid| (name.to_owned(), host.to_owned(), pid);
        let all = |pid| ["rollout-7", "rollout-8"].map(|name| known(name, &here, pid)).to_vec();
        let adopted = |command: WorkerCommand, known: &[_]| {
            let mut commands = [command];
            adopt(&mut commands, known);
            commands[0].living.map(Living::pid)
        };
        let ours_is_adopted = || adopted(command("rollout-7", "one", "/bin/sh"), &all(ours.id()));
        // A process has its arguments a moment after it was started.
        let deadline = Instant::now() + Duration::from_secs(10);
        while ours_is_adopted().is_none() && Instant::now() < deadline {}
        assert_eq!(ours_is_adopted(), Some(ours.id()));
        assert_eq!(adopted(command("rollout-8", "one", "/bin/sh"), &all(ours.id())), None, "of another name");
        assert_eq!(adopted(command("rollout-7", "one", "/bin/cat"), &all(ours.id())), None, "another program");
        let elsewhere = [known("rollout-7", "another", ours.id())];
        assert_eq!(adopted(command("rollout-7", "one", "/bin/sh"), &elsewhere), None, "on another machine");
        while adopted(command("rollout-7", "two", "/bin/sh"), &all(theirs.id())).is_none() && Instant::now() < deadline
        {
        }
        assert_eq!(adopted(command("rollout-7", "one", "/bin/sh"), &all(theirs.id())), None, "of another run");
        let living = Living::prove(ours.id(), &command("rollout-7", "one", "/bin/sh")).expect("ours");
        for child in [&mut ours, &mut theirs] {
            drop(child.stdin.take());
            child.wait().expect("it ends");
        }
        assert!(!living.is_alive());
    }
}
