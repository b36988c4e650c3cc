//! Finds the processes of a run through `/proc`.

use std::fs;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process of a run on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunProcess {
    /// Process id in the namespace of the tests.
    pub pid: i32,
    /// Worker name, for example `rollout-0`.
    pub name: String,
}

impl RunProcess {
    /// Returns the live workers of the run with this id, and the vLLM servers that it started, sorted by name.
    #[must_use]
    pub fn of(run_id: &str) -> Vec<Self> {
        let variable = format!("PACS_RUN_ID={run_id}");
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut found: Vec<Self> = processes
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let environment = fs::read(entry.path().join("environ")).ok()?;
                environment.split(|byte| *byte == 0).find(|word| *word == variable.as_bytes())?;
                let line = fs::read(entry.path().join("cmdline")).ok()?;
                let mut words = line.split(|byte| *byte == 0).skip_while(|word| *word != b"--name");
                // Children of a verifier inherit the variable, but have no `--name`.
                let name = words.nth(1).or_else(|| {
                    let is_server = line.split(|byte| *byte == 0).any(|word| word == b"--max-num-seqs");
                    let mut variables = environment.split(|byte| *byte == 0).filter(|_| is_server);
                    variables.find_map(|word| word.strip_prefix(b"PACS_SERVER="))
                })?;
                let name = String::from_utf8_lossy(name).into_owned();
                Some(Self { pid, name })
            })
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// Sends the process a signal.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid), signal).with_context(|| format!("signal {}", self.name))
    }
}
