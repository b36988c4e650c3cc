//! Adopts workers and vLLM servers that a killed `pacs run` of the same folder left. They stay alive, hold the state of the run, and wait
//! for a coordinator to come back.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::Path;

use nix::sys::signal::Signal;

use super::gpus::VISIBLE;
use super::supervisor::{COORDINATOR, RUN_ID, WorkerCommand, signal_group};
use super::workers::{PLAINTEXT, TLS_DIR, WORKER_PROGRAM};
use crate::process;

/// Variables of a server: its name, its port, and the folder of the run that it belongs to. Its command line is that of another program,
/// which knows none of them.
pub(super) const SERVER_NAME: &str = "PACS_SERVER";
pub(super) const SERVER_PORT: &str = "PACS_SERVER_PORT";
pub(super) const SERVER_OF: &str = "PACS_SERVER_OF";

/// Option by which a rollout worker is told a server.
pub(super) const ENDPOINT: &str = "--endpoint";

/// A process that was proved to be a worker of this run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Living {
    pid: u32,
    began: u64,
}

impl Living {
    /// Accepts the process if `command` would start one like it: same user, run id, program, name and run folder (a copied folder has
    /// the same id). The command line alone is no proof, because workers of all runs have the same names.
    fn prove(pid: u32, command: &WorkerCommand) -> Option<Self> {
        let living = Self { pid, began: process::began(pid)? };
        if command.gate.is_some() {
            let is_server = is_server(pid)
                && command
                    .environment
                    .iter()
                    .all(|(name, value)| !name.starts_with(SERVER_NAME) || process::has_variable(pid, name, value))
                && process::has_variable(pid, RUN_ID, &command.run_id);
            return (is_server && living.is_alive()).then_some(living);
        }
        let program = process::program(pid)?;
        let is_worker = process::is_own(pid)
            && process::has_variable(pid, RUN_ID, &command.run_id)
            && process::has_option(pid, "--name", &command.name)
            && command.coordinator().is_none_or(|folder| process::has_option(pid, COORDINATOR, folder))
            && is_program_of(&program, &command.program);
        // Checked last: the id may have been reused by another process during the checks above.
        (is_worker && living.is_alive()).then_some(living)
    }

    /// Returns whether this very process, and not another one with its id, is still alive.
    pub(crate) fn is_alive(self) -> bool {
        process::began(self.pid) == Some(self.began)
    }

    /// Sends the signal to the process group of the worker.
    pub(crate) fn signal(self, signal: Signal) {
        // Process ids are reused, and this one was read a moment ago.
        if self.is_alive() {
            signal_group(self.pid, signal);
        }
    }

    /// Kills what is left of the process group of a server that has ended.
    pub(crate) fn sweep(self) {
        // Its id is not given to another process as long as its group has members.
        if process::began(self.pid).is_none() {
            signal_group(self.pid, Signal::SIGKILL);
        }
    }
}

/// Whether a process of this user is a server itself, and not one of the processes that a server has started, which inherit its variables.
fn is_server(pid: u32) -> bool {
    process::is_own(pid) && process::leads_its_group(pid) && process::variable(pid, SERVER_NAME).is_some()
}

/// The live servers of the run with this folder and id: the port of each, by name.
pub(crate) fn server_ports(run_dir: &str, run_id: &str) -> BTreeMap<String, u16> {
    let of_run = |pid: &u32| {
        is_server(*pid)
            && process::has_variable(*pid, RUN_ID, run_id)
            && process::has_variable(*pid, SERVER_OF, run_dir)
    };
    let named = |pid: u32| {
        let port = process::variable(pid, SERVER_PORT)?.parse().ok()?;
        Some((process::variable(pid, SERVER_NAME)?, port))
    };
    process::all().into_iter().filter(of_run).filter_map(named).collect()
}

/// Returns whether starting `program` executes `found`; the program may be a script that sets up libtorch first.
fn is_program_of(found: &Path, program: &Path) -> bool {
    let same_name =
        || found.file_name() == program.file_name() || found.file_name() == Some(OsStr::new(WORKER_PROGRAM));
    program.canonicalize().is_ok_and(|program| program == found) || same_name()
}

/// Returns whether the process was started as `command` would start it: a worker with the same TLS settings, since with others it could
/// never register, and with the same servers; a server with the same options and GPUs.
fn speaks_alike(pid: u32, command: &WorkerCommand) -> bool {
    if command.gate.is_some() {
        let same_gpus = command.gpu.as_ref().is_none_or(|gpu| process::has_variable(pid, VISIBLE, gpu));
        return same_gpus && process::ends_with_words(pid, &command.arguments);
    }
    let endpoints: Vec<&String> = options(&command.arguments, ENDPOINT).collect();
    let given = options(&command.arguments, TLS_DIR).next();
    let same_tls = match given {
        Some(folder) => process::has_option(pid, TLS_DIR, folder),
        None => process::has_word(pid, PLAINTEXT),
    };
    same_tls && process::values_of(pid, ENDPOINT).iter().eq(endpoints)
}

/// The values of an option in a command line.
fn options<'a>(arguments: &'a [String], option: &str) -> impl Iterator<Item = &'a String> {
    arguments.windows(2).filter(move |pair| pair[0] == option).map(|pair| &pair[1])
}

/// Sets `living` in each command for which a live process already does the work.
///
/// All processes are scanned, not only the members in the journal, because a worker that was started just before its coordinator
/// was killed has never registered. Of several processes with one name the member stays, or else the one started last. The others
/// would be refused at registration, so they are killed. So are servers of the run in the folder `run_dir` that no command starts any more,
/// because they hold GPUs.
pub(crate) fn adopt(
    commands: &mut [WorkerCommand],
    members: &[(String, String, u32)],
    (run_dir, run_id): (&Path, &str),
) {
    let (here, processes) = (process::host(), process::all());
    let run_dir = run_dir.canonicalize().unwrap_or_else(|_| run_dir.to_owned()).display().to_string();
    let is_wanted = |name: &str| commands.iter().any(|command| command.gate.is_some() && command.name == name);
    let of_run = |pid: &&u32| {
        process::has_variable(**pid, RUN_ID, run_id)
            && process::has_variable(**pid, SERVER_OF, &run_dir)
            && is_server(**pid)
    };
    for pid in processes.iter().filter(of_run) {
        let name = process::variable(*pid, SERVER_NAME).unwrap_or_default();
        if !is_wanted(&name) {
            tracing::warn!("process {pid} is server {name} of this run, which the job has no more; it is killed");
            signal_group(*pid, Signal::SIGKILL);
        }
    }
    for command in commands {
        let mut found: Vec<Living> = processes.iter().filter_map(|pid| Living::prove(*pid, command)).collect();
        let is_member = |living: &Living| {
            members.iter().any(|(name, host, pid)| *name == command.name && *host == here && *pid == living.pid)
        };
        found.sort_by_key(|living| (speaks_alike(living.pid, command), is_member(living), living.began));
        command.living = found.pop_if(|living| speaks_alike(living.pid, command));
        for surplus in found {
            let why = match command.living {
                Some(_) => "is a second one",
                None if command.gate.is_some() => "was started with other options than the job asks for now",
                None => "does not protect its connections as this start does, or has other servers",
            };
            tracing::warn!("process {} is {} of this run and {why}; it is killed", surplus.pid, command.name);
            surplus.signal(Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// Starts a shell that looks like the worker `rollout-7` of a run.
    fn worker(run_id: &str) -> Child {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "read -r line", "worker", "--name", "rollout-7", "--coordinator", "/run", PLAINTEXT]);
        command.env("PACS_RUN_ID", run_id).stdin(Stdio::piped()).process_group(0).spawn().expect("a shell")
    }

    fn command(name: &str, run_id: &str, program: &str, folder: &str) -> WorkerCommand {
        WorkerCommand {
            name: name.to_owned(),
            program: program.into(),
            arguments: ["rollout", "--coordinator", folder].map(str::to_owned).to_vec(),
            run_id: run_id.to_owned(),
            gpu: None,
            environment: Vec::new(),
            gate: None,
            living: None,
        }
    }

    /// Returns the id of the process adopted for `command`.
    fn adopted(command: WorkerCommand, members: &[(String, String, u32)]) -> Option<u32> {
        let mut commands = [command];
        adopt(&mut commands, members, (Path::new("/run"), "no-such-run"));
        commands[0].living.map(|living| living.pid)
    }

    /// Waits until the process shows its arguments, which takes a moment after the start.
    fn wait_for(process: &Child, command: &WorkerCommand) -> Living {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match Living::prove(process.id(), command) {
                Some(living) => return living,
                None => assert!(Instant::now() < deadline, "no proof of process {}", process.id()),
            }
        }
    }

    fn end(mut process: Child) {
        drop(process.stdin.take());
        process.wait().expect("it ends");
    }

    #[test]
    fn only_workers_of_the_same_run_are_adopted() {
        // Unique run ids, because other tests scan the processes of the same machine.
        let (one, two) = (format!("one-{}", std::process::id()), format!("two-{}", std::process::id()));
        let ours = worker(&one);
        let wanted = || command("rollout-7", &one, "/bin/sh", "/run");
        let living = wait_for(&ours, &wanted());
        assert_eq!(adopted(wanted(), &[]), Some(ours.id()));
        assert_eq!(adopted(command("rollout-8", &one, "/bin/sh", "/run"), &[]), None, "of another name");
        assert_eq!(adopted(command("rollout-7", &one, "/bin/cat", "/run"), &[]), None, "another program");
        assert_eq!(adopted(command("rollout-7", &one, "/bin/sh", "/copy"), &[]), None, "of a copy of the folder");
        assert_eq!(adopted(command("rollout-7", &two, "/bin/sh", "/run"), &[]), None, "of another run");
        end(ours);
        assert!(!living.is_alive());
        assert_eq!(adopted(wanted(), &[]), None, "it has ended");
    }

    #[test]
    fn a_worker_that_could_not_register_is_not_adopted() {
        let run_id = format!("four-{}", std::process::id());
        let mut plain = worker(&run_id);
        let wanted = command("rollout-7", &run_id, "/bin/sh", "/run");
        let living = wait_for(&plain, &wanted);
        let mut protected = wanted;
        protected.arguments.extend([TLS_DIR, "/run/certificates"].map(str::to_owned));
        assert_eq!(adopted(protected, &[]), None);
        plain.wait().expect("it was killed");
        assert!(!living.is_alive());
    }

    #[test]
    fn of_several_processes_of_one_name_the_member_stays() {
        let run_id = format!("three-{}", std::process::id());
        let wanted = || command("rollout-7", &run_id, "/bin/sh", "/run");
        let [mut unknown, member] = [worker(&run_id), worker(&run_id)];
        let living = [&unknown, &member].map(|process| wait_for(process, &wanted()));
        let members = [("rollout-7".to_owned(), process::host(), member.id())];
        assert_eq!(adopted(wanted(), &members), Some(member.id()));
        unknown.wait().expect("it was killed");
        assert_eq!(living.map(Living::is_alive), [false, true]);
        end(member);
    }
}
