//! `[verifier.code]`: how programs are run and compared; `[verifier.sandbox]`: the sandbox around a verifier program.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How programs are run and compared; kind `code` only. Programs run in a sandbox (docs/VERIFIERS.md), whose layers all have to hold
/// on the verifiers' machines unless `allow_missing` names those that may not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CodeSpec {
    /// The Python interpreter, by name or path, 3.9 or newer: it is kept warm and runs Python programs. Default `python3`.
    pub python: PathBuf,
    /// Folders of further Python modules that programs may import; absolute, at most 16. Default none: the standard library alone.
    pub libraries: Vec<PathBuf>,
    /// Further files and folders that programs may read and execute, such as a compiler; absolute, at most 64. Default none.
    pub paths: Vec<PathBuf>,
    /// Another language: absolute path and arguments of what runs a program, in the folder that holds it; at most 64 strings.
    /// Default none: Python.
    pub command: Vec<String>,
    /// Absolute path and arguments of what compiles a program before its first case; at most 64 strings. Default none. With `command`.
    pub compile: Vec<String>,
    /// Name of the file that holds the program. Default `main.txt`; a name of letters, digits, `.`, `-` and `_`. With `command`.
    pub file: String,
    /// What ends a verification. Default `first_failure`.
    pub stop: CodeStop,
    /// Two numbers in an output, one of them with a decimal point or an exponent, are equal when they differ by no more than this,
    /// absolutely or relative to the expected one. Default 0.000001, 0 to 1. Assertions compare as they say themselves.
    pub float_tolerance: f64,
    /// Seconds that one case may take, by the clock and of processor time. Default 5, above 0, at most 3600. All cases together have
    /// `timeout_seconds` of the verifier.
    pub case_seconds: f64,
    /// Address space of each process, in MiB. Default 512, 64 to 1,048,576.
    pub memory_mib: u64,
    /// What a case may write to its standard streams together, in KiB. Default 1024, 1 to 65,536.
    pub output_kib: u64,
    /// Size of the folder that a program may write to, which is memory, in MiB. Default 32, 1 to 65,536.
    pub scratch_mib: u64,
    /// Processes that a program may have at once; at 1 it cannot start another. Default 1, at most 1024. Threads count apart, 16 of
    /// them.
    pub processes: u32,
    /// Most cases that are run, the first ones of a problem. Default 100, 1 to 10,000.
    pub max_cases: u32,
    /// Layers that may be missing, by name: `user`, `mount`, `pid`, `net`, `ipc`, `uts`, `no_new_privs`, `capabilities`, `landlock`,
    /// `seccomp`, `rlimits`, `cgroup`. `pacs doctor` shows which of them hold on a machine. Default none.
    pub allow_missing: Vec<String>,
}

impl Default for CodeSpec {
    fn default() -> Self {
        Self {
            python: PathBuf::from("python3"),
            libraries: Vec::new(),
            paths: Vec::new(),
            command: Vec::new(),
            compile: Vec::new(),
            file: "main.txt".to_owned(),
            stop: CodeStop::FirstFailure,
            float_tolerance: 1e-6,
            case_seconds: 5.0,
            memory_mib: 512,
            output_kib: 1024,
            scratch_mib: 32,
            processes: 1,
            max_cases: 100,
            allow_missing: Vec::new(),
        }
    }
}

/// What ends the verification of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CodeStop {
    /// The first case that fails.
    FirstFailure,
    /// The last case: the rule says how many passed. The answer is correct when all did, either way.
    Count,
}

/// The sandbox around a verifier program; kind `exec` only. The table puts the program into it, `sandbox = {}` with the defaults: it has no
/// network, sees the system's programs and libraries and the files that `command` names, read-only, and has a `/tmp` of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecSandboxSpec {
    /// Further files and folders that the program may read and execute; absolute, at most 64. Default none.
    pub paths: Vec<PathBuf>,
    /// Size of the program's `/tmp`, which is memory, in MiB. Default 64, 1 to 65,536.
    pub scratch_mib: u64,
    /// Layers that may be missing, by name, as for `code`. There is no layer `cgroup` here. Default none.
    pub allow_missing: Vec<String>,
}

impl Default for ExecSandboxSpec {
    fn default() -> Self {
        Self { paths: Vec::new(), scratch_mib: 64, allow_missing: Vec::new() }
    }
}

/// Names of the layers of a sandbox, as `allow_missing` has them.
pub const SANDBOX_LAYERS: [&str; 12] = [
    "user",
    "mount",
    "pid",
    "net",
    "ipc",
    "uts",
    "no_new_privs",
    "capabilities",
    "landlock",
    "seccomp",
    "rlimits",
    "cgroup",
];
