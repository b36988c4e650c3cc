//! A control group (version 2) for the tree of one sandbox: what each process may take is bounded by its limits, what all take together
//! only here.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Policy;

const NEEDED: [&str; 2] = ["memory", "pids"];

/// A control group that this process has made; dropping it removes it, as soon as it is empty.
pub(crate) struct Group(PathBuf);

impl Group {
    /// Makes one below that of this process.
    ///
    /// # Errors
    /// Why there can be none.
    pub(crate) fn new(policy: &Policy) -> Result<Self, String> {
        Self::below(&own_control_group()?, policy)
    }

    fn below(parent: &Path, policy: &Policy) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let said = |what: &str, error: std::io::Error| format!("{what} `{}`: {error}", parent.display());
        let present = fs::read_to_string(parent.join("cgroup.controllers")).map_err(|error| said("read", error))?;
        if let Some(lacks) = NEEDED.iter().find(|needed| !present.split_whitespace().any(|name| name == **needed)) {
            return Err(format!("`{}` has no controller `{lacks}`", parent.display()));
        }
        fs::write(parent.join("cgroup.subtree_control"), "+memory +pids").map_err(|error| match error.kind() {
            ErrorKind::ResourceBusy => {
                format!(
                    "`{}` holds processes itself; start the worker in a control group below a delegated one",
                    parent.display()
                )
            }
            _ => said("hand on the controllers of", error),
        })?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let group = Self(parent.join(format!("pacs-sandbox-{}-{number}", std::process::id())));
        fs::create_dir(&group.0).map_err(|error| said("make a group below", error))?;
        for (file, value) in [
            ("memory.max", policy.tree_memory_bytes.to_string()),
            ("memory.swap.max", "0".to_owned()),
            ("pids.max", policy.tree_processes.to_string()),
        ] {
            match fs::write(group.0.join(file), value) {
                // Kernels without swap accounting have no such file.
                Err(error) if file == "memory.swap.max" && error.kind() == ErrorKind::NotFound => {}
                written => written.map_err(|error| said(&format!("set {file} below"), error))?,
            }
        }
        Ok(group)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// How often the kernel has killed a process of the group for want of memory.
    pub(crate) fn kills(&self) -> u64 {
        let events = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok());
        count.unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Ends what is left; without this file the processes were ended one by one.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let _ = fs::remove_dir(&self.0);
    }
}

/// Folder of this process's control group (version 2). Systems that mount both versions have it at another place than
/// `/sys/fs/cgroup`, where a folder of any name can be made that is no group.
///
/// # Errors
/// Why there is none.
pub fn own_control_group() -> Result<PathBuf, String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
    let mount = mount_of(&mounts).ok_or("no control groups of version 2 are mounted")?;
    let groups = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let own = own.ok_or("the process is in no control group of version 2")?;
    Ok(mount.join(own.trim_start_matches('/')))
}

/// Mount point of control groups of version 2: the newest one, which an older one at the same place cannot hide.
fn mount_of(mounts: &str) -> Option<PathBuf> {
    mounts.lines().rev().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let path = place.split(' ').nth(4)?;
        kind.starts_with("cgroup2 ").then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_of(mounts), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(mount_of("30 23 0:26 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"), None);
    }

    #[test]
    fn a_group_says_why_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |controllers: &str| {
            fs::write(folder.path().join("cgroup.controllers"), controllers).unwrap();
            Group::below(folder.path(), &Policy::default()).err()
        };
        assert!(refused("cpu io\n").is_some_and(|why| why.ends_with("has no controller `memory`")));
        assert!(refused("cpu memory\n").is_some_and(|why| why.ends_with("has no controller `pids`")));
    }

    #[test]
    fn limits_are_written_and_kills_are_read() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("cgroup.controllers"), "cpu memory pids\n").unwrap();
        let group = Group::below(folder.path(), &Policy::default()).unwrap();
        let read = |file: &str| fs::read_to_string(group.path().join(file)).unwrap();
        assert_eq!((read("memory.max"), read("pids.max")), ("1073741824".to_owned(), "64".to_owned()));
        assert_eq!(fs::read_to_string(folder.path().join("cgroup.subtree_control")).unwrap(), "+memory +pids");
        fs::write(group.path().join("memory.events"), "low 0\nhigh 0\nmax 3\noom 1\noom_kill 2\n").unwrap();
        assert_eq!(group.kills(), 2);
    }
}
