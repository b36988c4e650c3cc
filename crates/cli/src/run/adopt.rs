//! Workers that an earlier `pacs run` of the same folder has left: when that was killed, they live on, hold the state of
//! the run, and wait for their coordinator.

use std::fs;

use super::supervisor::WorkerCommand;

/// Notes in each command the process that does its work already.
pub(crate) fn adopt(commands: &mut [WorkerCommand], known: &[(String, String, u32)]) {
    let here = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    for command in commands {
        let of_slot = known.iter().find(|(name, host, _)| *name == command.name && *host == here);
        command.living = of_slot.map(|(.., pid)| *pid).filter(|pid| is_worker(*pid, &command.name));
    }
}

/// Whether the process lives and is the worker of this name: process ids are used again.
pub(crate) fn is_worker(pid: u32, name: &str) -> bool {
    let Ok(arguments) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let mut arguments = arguments.split(|byte| *byte == 0);
    arguments.any(|argument| argument == b"--name") && arguments.next() == Some(name.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_living_worker_is_known_by_its_arguments() {
        let mut child = Command::new("sh")
            .args(["-c", "read -r line", "worker", "--name", "rollout-7"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("a shell");
        let here = nix::unistd::gethostname().expect("a name").into_string().expect("text");
        let known = |name: &str, host: &str, pid| (name.to_owned(), host.to_owned(), pid);
        let command = |name: &str| WorkerCommand {
            name: name.to_owned(),
            program: PathBuf::new(),
            arguments: Vec::new(),
            living: None,
        };
        let mut commands = [command("rollout-7"), command("rollout-8"), command("rollout-9")];
        let all = [
            known("rollout-7", &here, child.id()),
            known("rollout-8", &here, child.id()),
            known("rollout-9", "another", child.id()),
        ];
        // A process has its arguments a moment after it was started.
        let deadline = Instant::now() + Duration::from_secs(10);
        while commands[0].living.is_none() && Instant::now() < deadline {
            adopt(&mut commands, &all);
        }
        assert_eq!(commands.map(|command| command.living), [Some(child.id()), None, None]);
        drop(child.stdin.take());
        child.wait().expect("it ends");
        assert!(!is_worker(child.id(), "rollout-7"));
    }
}
