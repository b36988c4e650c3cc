//! What a sandbox is asked for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Layer;

/// How programs are kept apart from the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The Python interpreter, by its name or path.
    pub python: PathBuf,
    /// Further files and folders that programs may read and execute, at the same place as outside.
    pub paths: Vec<PathBuf>,
    /// Folders of further Python modules, readable and on the path of modules.
    pub libraries: Vec<PathBuf>,
    /// Size of the scratch folder, which is memory.
    pub scratch_bytes: u64,
    /// Memory of the whole tree, where there is a control group.
    pub tree_memory_bytes: u64,
    /// Processes and threads of the whole tree, where there is a control group.
    pub tree_processes: u64,
    /// Layers that are left out on purpose, to measure what they cost. They count as missing, so a sandbox that runs programs nobody
    /// trusts has to allow that, too.
    pub without: Vec<Layer>,
    /// Layers that may be missing.
    pub allow_missing: Vec<Layer>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            python: PathBuf::from("python3"),
            paths: Vec::new(),
            libraries: Vec::new(),
            scratch_bytes: 32 << 20,
            tree_memory_bytes: 1 << 30,
            tree_processes: 64,
            without: Vec::new(),
            allow_missing: Vec::new(),
        }
    }
}
