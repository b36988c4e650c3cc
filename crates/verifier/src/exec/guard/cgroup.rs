//! A control group of a program's own, where the system lets this process make one: what is in it ends with one write, however
//! fast it forks. Users of a login node mostly may not; then the guard looks for descendants alone.

use std::fs;
use std::io;
use std::path::PathBuf;

use pacs_sandbox::own_control_group;
use serde::{Deserialize, Serialize};

/// A control group (version 2) below that of this process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Cgroup(PathBuf);

impl Cgroup {
    /// `None` where that is not to be had.
    pub(super) fn create() -> Option<Self> {
        let path = own_control_group().ok()?.join(format!("pacs-exec-{}", std::process::id()));
        // One of an earlier process of this id, whose guard was killed.
        let _ = fs::remove_dir(&path);
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        // The kernel is too old to kill a group.
        if !group.0.join("cgroup.kill").exists() || !group.0.join("cgroup.procs").exists() {
            group.remove();
            return None;
        }
        Some(group)
    }

    /// Moves this process into the group.
    pub(super) fn enter(&self) -> io::Result<()> {
        match fs::write(self.0.join("cgroup.procs"), "0") {
            // The group was made, but the system does not let this process move (a container's root that is none).
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            written => written,
        }
    }

    pub(super) fn kill(&self) {
        // What it does not end, the look for descendants does.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
    }

    pub(super) fn remove(&self) {
        // A group of which a process is left stays, empty of anything else.
        let _ = fs::remove_dir(&self.0);
    }
}
