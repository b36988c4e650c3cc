//! Two processes between a verifier and a program that judges for it, so that the program has limits and leaves nothing.
//!
//! The guard starts the program and stays. It is the subreaper of all that the program starts: what a daemon's double fork detaches
//! becomes the guard's child, so no descendant gets out of its sight. It ends them all when the program ends, when the verifier says
//! so (SIGTERM), and when the verifier is gone. A process group would not do: `setsid` leaves it.
//!
//! The starter is the program before it is itself: it takes the limits, asks to die with the guard, and then executes the program in
//! its own place. Where the program has a sandbox, the starter isolates itself, and a third process, which is in the sandbox, becomes the
//! program. All are this very executable, run again with [`Guarded`] as an argument: a function between fork and exec would
//! have to be `unsafe`.

mod cgroup;
mod tree;

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, dup2_stdin, dup2_stdout, getpid, getppid};
use pacs_sandbox::{Enclosed, Enclosure, Isolated, Layer};
use pacs_spec::{ExecLimits, ExecSandboxSpec, ExecSpec};
use serde::{Deserialize, Serialize};

use self::cgroup::Cgroup;
pub(super) use self::tree::{began, kill_tree};

/// This executable, whatever became of its file.
const THIS: &str = "/proc/self/exe";

/// How often the guard looks whether the verifier lives.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How long the guard tries to end what the program has started.
const END_LIMIT: Duration = Duration::from_secs(10);

/// How the program could not be executed: as shells say it.
const NOT_EXECUTED: u8 = 127;

/// Where this executable becomes the guard of a program: the arguments that have it call [`run_guarded`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry(Vec<String>);

impl Entry {
    /// Followed by what [`run_guarded`] takes.
    #[must_use]
    pub fn new(arguments: &[&str]) -> Self {
        Self(arguments.iter().map(|argument| (*argument).to_owned()).collect())
    }

    /// The command that guards the program of `spec` for this process.
    pub(super) fn command(&self, spec: &ExecSpec) -> Command {
        let (entry, parent) = (self.0.clone(), getpid().as_raw());
        let enclosure = spec.sandbox.as_ref().map(enclosure);
        let guarded = Guarded { part: Part::Guard, entry, limits: spec.limits, parent, cgroup: None, enclosure };
        self.step(Path::new(THIS), &guarded, &spec.command)
    }

    fn step(&self, executable: &Path, guarded: &Guarded, command: &[impl AsRef<std::ffi::OsStr>]) -> Command {
        let mut step = Command::new(executable);
        step.args(&self.0)
            .arg(serde_json::to_string(guarded).expect("texts and numbers are JSON"))
            .arg("--")
            .args(command);
        step
    }
}

/// What a process on the way to the program has to know; it travels as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Guarded {
    part: Part,
    entry: Vec<String>,
    limits: ExecLimits,
    /// The process that has started this one.
    parent: i32,
    /// The group that the program and all that it starts are in.
    cgroup: Option<Cgroup>,
    /// The sandbox of the program.
    enclosure: Option<Enclosure>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Part {
    Guard,
    Starter,
    /// Process 1 of the sandbox that the starter has prepared.
    Enclosed(Isolated),
}

/// The sandbox that a spec describes, which has checked the names.
fn enclosure(spec: &ExecSandboxSpec) -> Enclosure {
    let ExecSandboxSpec { paths, scratch_mib, allow_missing } = spec;
    let allow_missing = allow_missing.iter().filter_map(|name| Layer::named(name)).collect();
    Enclosure { paths: paths.clone(), scratch_bytes: scratch_mib << 20, allow_missing }
}

impl std::str::FromStr for Guarded {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

/// Does the part of this process, which has done nothing else: guards the program `command`, or becomes it.
#[must_use]
pub fn run_guarded(guarded: Guarded, command: &[OsString]) -> ExitCode {
    let done = match guarded.part.clone() {
        Part::Guard => guard(guarded, command),
        Part::Starter => start(&guarded, command),
        Part::Enclosed(isolated) => become_enclosed(isolated, command).map(|never| match never {}),
    };
    done.unwrap_or_else(|error| {
        let program = command.first().map(|program| program.to_string_lossy().into_owned()).unwrap_or_default();
        // The verifier quotes it.
        let _ = io::Write::write_all(&mut io::stderr(), format!("execute `{program}`: {error}\n").as_bytes());
        ExitCode::from(NOT_EXECUTED)
    })
}

fn guard(mut guarded: Guarded, command: &[OsString]) -> io::Result<ExitCode> {
    // They are read from a descriptor; the standard library unblocks them again for the program.
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD].into_iter().collect();
    signals.thread_block()?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    prctl::set_child_subreaper(true)?;
    let verifier = Pid::from_raw(guarded.parent);
    let cgroup = Cgroup::create();
    guarded = Guarded { part: Part::Starter, parent: getpid().as_raw(), cgroup: cgroup.clone(), ..guarded };
    let program = Entry(guarded.entry.clone()).step(Path::new(THIS), &guarded, command).spawn()?;
    let program = Pid::from_raw(i32::try_from(program.id()).map_err(io::Error::other)?);
    // Its ends of the pipes are the program's alone, so that the verifier sees when it closes them.
    let_go_of_pipes()?;
    let status = watch(&signals, verifier, program)?;
    let deadline = Instant::now() + END_LIMIT;
    loop {
        if let Some(cgroup) = &cgroup {
            cgroup.kill();
        }
        let left = kill_tree(getpid().as_raw());
        reap(program)?;
        if left == 0 || Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if let Some(cgroup) = cgroup {
        cgroup.remove();
    }
    Ok(leave(status))
}

/// Gives up standard input and output, whose other ends the verifier holds.
fn let_go_of_pipes() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    Ok(())
}

/// Waits until the program ends, and says how; `None` when it has to be ended.
fn watch(signals: &SignalFd, verifier: Pid, program: Pid) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = reap(program)? {
            return Ok(Some(status));
        }
        if getppid() != verifier {
            return Ok(None);
        }
        let mut waited = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waited, PollTimeout::try_from(LOOK_AGAIN).unwrap_or(PollTimeout::MAX)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        while let Some(signal) = signals.read_signal()? {
            if signal.ssi_signo != Signal::SIGCHLD as u32 {
                return Ok(None);
            }
        }
    }
}

/// Reads how children have ended; the status of the program when it is among them.
fn reap(program: Pid) -> io::Result<Option<ExitStatus>> {
    let mut found = None;
    loop {
        let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(status) => status,
            Err(Errno::ECHILD) => return Ok(found),
            Err(error) => return Err(error.into()),
        };
        match status {
            WaitStatus::Exited(pid, code) if pid == program => found = Some(ExitStatus::from_raw((code & 0xff) << 8)),
            WaitStatus::Signaled(pid, signal, _) if pid == program => found = Some(ExitStatus::from_raw(signal as i32)),
            WaitStatus::StillAlive => return Ok(found),
            _ => {}
        }
    }
}

/// Ends as the program has.
fn leave(status: Option<ExitStatus>) -> ExitCode {
    let Some(status) = status else { return ExitCode::SUCCESS };
    if let Some(signal) = status.signal().and_then(|signal| Signal::try_from(signal).ok()) {
        // No second core.
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
        let _ = SigSet::from_iter([signal]).thread_unblock();
        // The first of some signals only takes the standard library's handler away, which looks for overflowing stacks.
        let _ = raise(signal).and_then(|()| raise(signal));
    }
    // As shells tell it of one that is ignored here.
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(NOT_EXECUTED))
}

/// Takes the limits, and executes the program; or else isolates itself, and waits for the process that becomes the program in the sandbox.
fn start(guarded: &Guarded, command: &[OsString]) -> io::Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The guard may have ended before.
    if getppid().as_raw() != guarded.parent {
        return Err(io::Error::other("its guard has ended"));
    }
    if let Some(cgroup) = &guarded.cgroup {
        cgroup.enter()?;
    }
    // A program that became another user could not be ended.
    prctl::set_no_new_privs()?;
    let ExecLimits { memory_bytes, cpu_seconds, file_bytes, open_files, processes } = guarded.limits;
    for (resource, limit) in [
        (Resource::RLIMIT_CORE, Some(0)),
        (Resource::RLIMIT_AS, memory_bytes),
        (Resource::RLIMIT_CPU, cpu_seconds),
        (Resource::RLIMIT_FSIZE, file_bytes),
        (Resource::RLIMIT_NOFILE, open_files),
        (Resource::RLIMIT_NPROC, processes),
    ] {
        // A child cannot have more than the process that starts it.
        let (_, most) = getrlimit(resource)?;
        let limit = limit.unwrap_or(RLIM_INFINITY).min(most);
        setrlimit(resource, limit, limit)?;
    }
    match &guarded.enclosure {
        Some(enclosure) => enclose(enclosure, guarded, command),
        None => Err(execute(command, None)),
    }
}

/// Becomes the program; in a sandbox the file and the folders are those that are there.
fn execute(command: &[OsString], enclosed: Option<&Enclosed>) -> io::Error {
    let [program, arguments @ ..] = command else { return io::ErrorKind::InvalidInput.into() };
    let program = enclosed.map_or(program.as_os_str(), |enclosed| enclosed.program.as_os_str());
    let folders = ["HOME", "TMPDIR", "TMP", "TEMP"].into_iter().filter_map(|name| Some((name, &enclosed?.scratch)));
    Command::new(program).args(arguments).envs(folders).exec()
}

/// Starts process 1 of the program's sandbox, and ends as it does.
fn enclose(enclosure: &Enclosure, guarded: &Guarded, command: &[OsString]) -> io::Result<ExitCode> {
    // There is no `/proc` in the sandbox, so the executable has to have a name there.
    let executable = std::env::current_exe()?;
    let isolated = enclosure.isolate(&executable, command).map_err(io::Error::other)?;
    // Becoming another user has cleared it.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let enclosed = Guarded { part: Part::Enclosed(isolated), enclosure: None, cgroup: None, ..guarded.clone() };
    let mut process = Entry(guarded.entry.clone()).step(&executable, &enclosed, command).spawn()?;
    let_go_of_pipes()?;
    Ok(leave(Some(process.wait()?)))
}

/// Locks this process into its sandbox, and executes the program.
fn become_enclosed(isolated: Isolated, command: &[OsString]) -> io::Result<Infallible> {
    // Ends with the starter, and with this process, which is process 1 of its namespace, all that the program starts.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let enclosed = isolated.lock().map_err(io::Error::other)?;
    Err(execute(command, Some(&enclosed)))
}
