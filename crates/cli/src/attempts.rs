//! How often a run was started, and whether that came to anything: `starts.jsonl` in the run folder.
//!
//! Launchers start again what was preempted, lost its node or ran out of time. A run that has come no further after several
//! starts will not by another.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

const FILE: &str = "starts.jsonl";

/// One start.
#[derive(Debug, Serialize, Deserialize)]
struct Attempt {
    /// Seconds since 1970.
    time: u64,
    /// Newest checkpoint that there was; 0: none.
    step: u64,
    /// The launcher's name of this start, for example `slurm 17 restart 2`.
    launch: String,
}

/// Why a run is not started once more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttemptError {
    #[error("{action} `{}`: {error}", path.display())]
    File { action: &'static str, path: std::path::PathBuf, error: io::Error },
    #[error(
        "the last {starts} starts found the same newest checkpoint (step {step}): the run comes no further; its logs say why. \
         Remove `{}` to try again, or save more often than it is interrupted (checkpoint.every_steps)", path.display()
    )]
    Fruitless { starts: usize, step: u64, path: std::path::PathBuf },
}

/// Refuses to start when `limit` starts found what this one finds; 0: no limit.
pub(crate) fn check(run_dir: &Path, limit: usize) -> Result<(), AttemptError> {
    let path = run_dir.join(FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(AttemptError::File { action: "read", path, error }),
    };
    let step = newest_checkpoint(run_dir);
    let earlier: Vec<Attempt> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let starts = earlier.iter().rev().take_while(|attempt| attempt.step == step).count();
    if limit > 0 && starts >= limit { Err(AttemptError::Fruitless { starts, step, path }) } else { Ok(()) }
}

/// Notes a start; only a coordinator that has the folder to itself may.
pub(crate) fn note(run_dir: &Path, launch: &str) -> Result<(), AttemptError> {
    let path = run_dir.join(FILE);
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let attempt = Attempt { time, step: newest_checkpoint(run_dir), launch: launch.to_owned() };
    let line = serde_json::to_string(&attempt).expect("numbers and a string are JSON");
    let file = File::options().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| writeln!(file, "{line}").and_then(|()| file.sync_all()));
    written.map_err(|error| AttemptError::File { action: "write", path, error })
}

/// What the launcher calls this start.
pub(crate) fn launch(variable: impl Fn(&str) -> Option<String>) -> String {
    if let Some(job) = variable("SLURM_JOB_ID") {
        return format!("slurm {job} restart {}", variable("SLURM_RESTART_COUNT").as_deref().unwrap_or("0"));
    }
    match (variable("KUBERNETES_SERVICE_HOST"), variable("HOSTNAME")) {
        (Some(_), Some(pod)) => format!("pod {pod}"),
        _ => format!("pid {}", std::process::id()),
    }
}

/// Step of the newest finished checkpoint; 0: there is none.
fn newest_checkpoint(run_dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(run_dir.join("checkpoints")) else { return 0 };
    let finished = entries.flatten().filter(|entry| entry.path().join("manifest.json").exists());
    let steps = finished.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok());
    steps.max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_without_a_new_checkpoint_run_out() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let start = || check(dir.path(), 3).and_then(|()| note(dir.path(), "test"));
        (0..3).for_each(|_| start().expect("may start"));
        let error = start().expect_err("comes no further");
        assert!(matches!(error, AttemptError::Fruitless { starts: 3, step: 0, .. }), "{error}");
        let checkpoint = dir.path().join("checkpoints/step-000004");
        fs::create_dir_all(&checkpoint).expect("created");
        assert!(start().is_err(), "an unfinished checkpoint is none");
        fs::write(checkpoint.join("manifest.json"), "{}").expect("written");
        (0..3).for_each(|_| start().expect("may start"));
        assert!(matches!(start(), Err(AttemptError::Fruitless { step: 4, .. })));
        assert!(check(dir.path(), 0).is_ok(), "no limit");
    }

    #[test]
    fn starts_are_named_after_the_launcher() {
        let slurm = [("SLURM_JOB_ID", "17"), ("SLURM_RESTART_COUNT", "2")];
        let find = |name: &str| slurm.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        assert_eq!(launch(find), "slurm 17 restart 2");
    }
}
