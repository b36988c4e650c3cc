//! Processes and what they have started.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Passes over the processes of the machine until those that fork are all stopped. One more stops at least as many as were
/// started during the pass before; a limit on processes, or a control group, bounds a program that outruns this.
const PASSES: usize = 32;

/// When the process began, in clock ticks since the machine did: ids are used again.
pub(in super::super) fn began(pid: i32) -> Option<u64> {
    Process::read(pid).filter(|process| !process.is_dead).map(|process| process.began)
}

/// Kills what the process has started, and what that has; not the process itself. How many are found.
pub(in super::super) fn kill_tree(root: i32) -> usize {
    let mut found = BTreeSet::new();
    // Stopped first: a running one could start another unnoticed.
    for _ in 0..PASSES {
        let new: Vec<i32> = descendants(root).into_iter().filter(|pid| !found.contains(pid)).collect();
        if new.is_empty() {
            break;
        }
        new.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
        found.extend(new);
    }
    found.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
    found.len()
}

fn signal(pid: i32, signal: Signal) {
    // It may have ended by itself in this moment.
    let _ = kill(Pid::from_raw(pid), signal);
}

/// All that live and descend from the process.
fn descendants(root: i32) -> Vec<i32> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    let mut dead = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let Some((pid, process)) = pid.and_then(|pid| Some((pid, Process::read(pid)?))) else { continue };
        children.entry(process.parent).or_default().push(pid);
        if process.is_dead {
            dead.insert(pid);
        }
    }
    let mut found = children.remove(&root).unwrap_or_default();
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        found.extend(children.remove(pid).unwrap_or_default());
        next += 1;
    }
    found.retain(|pid| !dead.contains(pid));
    found
}

/// What the system says of a process.
struct Process {
    parent: i32,
    began: u64,
    /// Ended, and not asked how.
    is_dead: bool,
}

impl Process {
    fn read(pid: i32) -> Option<Self> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        // The name of the program comes before, and may hold anything.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        // proc_pid_stat(5) counts the parent as field 4 and the start as field 22.
        let began = fields.nth(17)?.parse().ok()?;
        Some(Self { parent, began, is_dead: matches!(state, "Z" | "X") })
    }
}
