//! What has to be in the view for an interpreter to run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

/// Says of itself where its parts are.
const QUESTION: &str = "import json, os, sys, sysconfig; print(json.dumps({'executable': os.path.realpath(sys.executable), \
    'version': list(sys.version_info[:2]), 'prefixes': [sys.base_prefix, sys.base_exec_prefix], \
    'folders': [sysconfig.get_path('stdlib'), sysconfig.get_path('platstdlib'), sysconfig.get_config_var('LIBDIR') or '']}))";

/// Oldest version with what the forked side needs, `pidfd_open`.
const OLDEST: [u32; 2] = [3, 9];

/// Libraries of the system, as far as they are there.
pub(crate) const SYSTEM: [&str; 7] =
    ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/etc/ld.so.cache"];

/// A Python interpreter.
pub(crate) struct Interpreter {
    pub(crate) executable: PathBuf,
    /// Files and folders that it reads.
    pub(crate) paths: BTreeSet<PathBuf>,
}

#[derive(Deserialize)]
struct Answer {
    executable: PathBuf,
    version: [u32; 2],
    prefixes: Vec<PathBuf>,
    folders: Vec<PathBuf>,
}

impl Interpreter {
    /// Asks the interpreter at `python` what it needs.
    pub(crate) fn ask(python: &Path) -> Result<Self, String> {
        let shown = python.display();
        let answer = Command::new(python)
            .args(["-I", "-S", "-c", QUESTION])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .map_err(|error| format!("run `{shown}`: {error}"))?;
        if !answer.status.success() {
            return Err(format!("`{shown}` does not run: {}", answer.status));
        }
        let Answer { executable, version, prefixes, folders } = serde_json::from_slice(&answer.stdout)
            .map_err(|error| format!("`{shown}` is not a Python interpreter: {error}"))?;
        if version < OLDEST {
            return Err(format!("`{shown}` is Python {}.{}, expected 3.9 or newer", version[0], version[1]));
        }
        let mut paths: BTreeSet<PathBuf> = SYSTEM.iter().map(PathBuf::from).collect();
        paths.insert(executable.clone());
        paths.extend(folders.into_iter().filter(|folder| folder.is_absolute()));
        // A prefix of its own holds nothing else; that of the system holds the whole system.
        let shared = ["/", "/usr", "/usr/local"].map(Path::new);
        paths.extend(prefixes.into_iter().filter(|prefix| !shared.contains(&prefix.as_path())));
        Ok(Self { executable, paths })
    }
}
