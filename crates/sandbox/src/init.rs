//! The process between a worker and the warm interpreter: isolates itself, starts the interpreter, and ends with it.
//!
//! It is a program of its own because a user namespace takes a single-threaded process, and because what a process does between
//! `fork` and `exec` cannot be checked by the compiler. Root and ordinary users take different ways to the same end. Root builds
//! the view with its own rights, for only they reach an interpreter below a folder like `/root`, becomes `nobody` for good, and then
//! makes the user namespace, so that no user but `nobody` exists in it. An ordinary user makes the user namespace first, for it has
//! no other way to mount.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use caps::{CapSet, Capability, CapsHashSet};
use nix::fcntl::{OFlag, openat};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, getegid, geteuid, setgroups, sethostname, setresgid, setresuid};
use serde::{Deserialize, Serialize};

use crate::interpreter::Interpreter;
use crate::job::WrittenLimits;
use crate::{Layer, Limits, Policy, filter, view};

/// Id of the user and group `nobody` on Linux.
const NOBODY: u32 = 65534;

/// The forked side.
const WARM: &str = include_str!("warm.py");

/// What most programs import; an interpreter without one goes without.
const MODULES: [&str; 27] = [
    "array",
    "bisect",
    "cmath",
    "collections",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "functools",
    "heapq",
    "io",
    "itertools",
    "json",
    "math",
    "operator",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "textwrap",
    "typing",
    "unicodedata",
];

/// Where the stewards of programs mount their scratch folders.
const SCRATCH: &str = "/tmp";

/// Instructions to the process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) policy: Policy,
    /// The control group that it joins, or why there is none.
    pub(crate) group: Result<PathBuf, String>,
}

/// Instructions to the warm interpreter.
#[derive(Serialize)]
struct Plan<'a> {
    layers: [Layer; 12],
    missing: &'a BTreeMap<Layer, String>,
    libraries: &'a [PathBuf],
    readable: Vec<PathBuf>,
    warm: [&'static str; 27],
    filters: Vec<String>,
    scratch_bytes: u64,
    limits: WrittenLimits,
}

/// Isolates this process as `order` says, and runs a warm interpreter until it ends. The process has to have one thread.
///
/// The exit code is that of the interpreter; what goes wrong before is on standard error.
#[must_use]
pub fn run_init(order: &str) -> ExitCode {
    let order: Order = match serde_json::from_str(order) {
        Ok(order) => order,
        Err(error) => return failed(&format!("its order is none: {error}")),
    };
    match start(&order) {
        Ok(code) => code,
        Err(problem) => failed(&problem),
    }
}

fn failed(problem: &str) -> ExitCode {
    // There is no other place to report to when standard error is gone.
    let _ = writeln!(std::io::stderr(), "{problem}");
    ExitCode::from(70)
}

fn start(Order { policy, group }: &Order) -> Result<ExitCode, String> {
    let mut missing: BTreeMap<Layer, String> =
        policy.without.iter().map(|layer| (*layer, "left out".to_owned())).collect();
    match group {
        Ok(path) => join(path)?,
        Err(why) => drop(missing.insert(Layer::Cgroup, why.clone())),
    }
    let mut interpreter = Interpreter::ask(&policy.python)?;
    interpreter.paths.extend(policy.paths.iter().chain(&policy.libraries).cloned());
    if let Some(path) = policy.paths.iter().chain(&policy.libraries).find(|path| !path.exists()) {
        return Err(format!("`{}`, which programs are to read, is not there", path.display()));
    }
    let filters = filter::programs()?;
    if geteuid().is_root() {
        isolate_root(&interpreter.paths, Path::new(SCRATCH), &mut missing)?;
    } else {
        isolate_user(&interpreter.paths, Path::new(SCRATCH), &mut missing);
    }
    let readable = match missing.contains_key(&Layer::Mount) {
        true => interpreter.paths.iter().filter(|path| path.exists()).cloned().collect(),
        false => vec![PathBuf::from("/")],
    };
    let plan = Plan {
        layers: Layer::ALL,
        missing: &missing,
        libraries: &policy.libraries,
        readable,
        warm: MODULES,
        filters,
        scratch_bytes: policy.scratch_bytes,
        limits: Limits::default().into(),
    };
    let plan = serde_json::to_string(&plan).expect("texts and numbers are JSON");
    let status = Command::new(&interpreter.executable)
        // Neither the site's modules nor the folder of the script: what is imported is the standard library.
        .args(["-s", "-S", "-B", "-c", WARM, &plan])
        .env_clear()
        // The order of sets is the same in every run, so a program has one verdict.
        .env("PYTHONHASHSEED", "0")
        .env("LC_CTYPE", "C.UTF-8")
        .status()
        .map_err(|error| format!("start `{}` in the sandbox: {error}", interpreter.executable.display()))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

fn join(group: &Path) -> Result<(), String> {
    // 0 is whoever writes.
    fs::write(group.join("cgroup.procs"), "0")
        .map_err(|error| format!("join the control group `{}`: {error}", group.display()))
}

/// The namespaces besides those of users and mounts.
const OTHERS: [(Layer, CloneFlags); 4] = [
    (Layer::Net, CloneFlags::CLONE_NEWNET),
    (Layer::Ipc, CloneFlags::CLONE_NEWIPC),
    (Layer::Uts, CloneFlags::CLONE_NEWUTS),
    (Layer::Pid, CloneFlags::CLONE_NEWPID),
];

/// Makes the namespaces and the view with root's rights, and becomes nobody.
pub(crate) fn isolate_root(
    paths: &BTreeSet<PathBuf>,
    scratch: &Path,
    missing: &mut BTreeMap<Layer, String>,
) -> Result<(), String> {
    // Opened while the old root is there; the new one has no /proc.
    let proc = proc_self();
    make(Layer::Mount, CloneFlags::CLONE_NEWNS, missing);
    make_others(missing);
    see_only(paths, scratch, missing);
    let nobody = |error: nix::Error| format!("become nobody: {}", error.desc());
    setgroups(&[]).map_err(nobody)?;
    let uid = Uid::from_raw(NOBODY);
    let gid = Gid::from_raw(NOBODY);
    setresgid(gid, gid, gid).map_err(nobody)?;
    setresuid(uid, uid, uid).map_err(nobody)?;
    // Else the files that map the namespace's users belong to root from here on.
    prctl::set_dumpable(true).map_err(nobody)?;
    make_users(proc.as_ref(), missing);
    Ok(())
}

/// Makes the namespaces and the view with the rights that a user namespace gives.
pub(crate) fn isolate_user(paths: &BTreeSet<PathBuf>, scratch: &Path, missing: &mut BTreeMap<Layer, String>) {
    let proc = proc_self();
    make_users(proc.as_ref(), missing);
    make(Layer::Mount, CloneFlags::CLONE_NEWNS, missing);
    make_others(missing);
    see_only(paths, scratch, missing);
}

fn make_others(missing: &mut BTreeMap<Layer, String>) {
    for (layer, flag) in OTHERS {
        make(layer, flag, missing);
    }
    if !missing.contains_key(&Layer::Uts)
        && let Err(error) = sethostname("sandbox")
    {
        missing.insert(Layer::Uts, format!("set the host's name: {}", error.desc()));
    }
}

fn make(layer: Layer, flag: CloneFlags, missing: &mut BTreeMap<Layer, String>) {
    if !missing.contains_key(&layer)
        && let Err(error) = unshare(flag)
    {
        missing.insert(layer, format!("a namespace is refused: {}", error.desc()));
    }
}

fn see_only(paths: &BTreeSet<PathBuf>, scratch: &Path, missing: &mut BTreeMap<Layer, String>) {
    if !missing.contains_key(&Layer::Mount)
        && let Err(problem) = view::enter(paths, scratch)
    {
        missing.insert(Layer::Mount, problem);
    }
}

fn proc_self() -> std::io::Result<File> {
    fs::OpenOptions::new().read(true).custom_flags(OFlag::O_DIRECTORY.bits()).open("/proc/self")
}

/// Makes a user namespace that has the present user alone, and keeps its privileges, which are none outside, for the interpreter.
fn make_users(proc: Result<&File, &std::io::Error>, missing: &mut BTreeMap<Layer, String>) {
    if !missing.contains_key(&Layer::User)
        && let Err(why) = try_users(proc)
    {
        missing.insert(Layer::User, why);
    }
}

fn try_users(proc: Result<&File, &std::io::Error>) -> Result<(), String> {
    let proc = proc.map_err(|error| format!("open /proc/self: {error}"))?;
    let uid = geteuid();
    let gid = getegid();
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|error| format!("a namespace is refused: {}", error.desc()))?;
    // Without `deny` groups cannot be mapped; kernels before 3.19 have no such file.
    for (file, text) in
        [("setgroups", "deny".to_owned()), ("uid_map", format!("{uid} {uid} 1")), ("gid_map", format!("{gid} {gid} 1"))]
    {
        let said = |error: String| format!("write /proc/self/{file}: {error}");
        let handle = openat(proc, file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
        let mut handle = File::from(handle.map_err(|error| said(error.desc().to_owned()))?);
        handle.write_all(text.as_bytes()).map_err(|error| said(error.to_string()))?;
    }
    let kept = CapsHashSet::from([Capability::CAP_SYS_ADMIN, Capability::CAP_SETPCAP]);
    for set in [CapSet::Inheritable, CapSet::Ambient] {
        caps::set(None, set, &kept).map_err(|error| format!("keep the privileges of the namespace: {error}"))?;
    }
    Ok(())
}
