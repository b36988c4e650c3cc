//! The starts of a run and the progress each of them made: `starts.jsonl` in the run folder.
//!
//! Launchers restart runs that were preempted, lost their node or ran out of time. A run that made no progress in several
//! starts will make none in the next. Progress is a newer checkpoint, a later step, or more samples in the journal, so a run
//! that is killed five times between two checkpoints is still restarted.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

const FILE: &str = "starts.jsonl";

/// One start of the coordinator: a line of `starts.jsonl`.
#[derive(Debug, Serialize, Deserialize)]
struct Attempt {
    /// Unix time of the start, in seconds.
    time: u64,
    /// Step of the newest checkpoint that this start found; 0 when there was none.
    step: u64,
    /// Progress beyond that checkpoint; zeros where the line has none.
    #[serde(default)]
    mark: Mark,
    /// What the launcher calls this start, for example `slurm 17 restart 2`.
    launch: String,
}

/// Progress of a run after its newest checkpoint; equal marks mean that a start achieved nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    /// Step of the last line of `metrics.jsonl`.
    step: u64,
    /// Bytes of the journal's sample segments.
    samples: u64,
}

/// Why a start is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttemptError {
    #[error("{action} `{}`: {error}", path.display())]
    File { action: &'static str, path: std::path::PathBuf, error: io::Error },
    #[error(
        "the last {starts} starts found the same newest checkpoint (step {step}) and no new step or sample: the run makes no \
         progress; its logs say why. Remove `{}` to try again", path.display()
    )]
    Fruitless { starts: usize, step: u64, path: std::path::PathBuf },
}

/// Refuses the start when the last `limit` starts found the same checkpoint and mark as this one; 0 disables the check.
pub(crate) fn check(run_dir: &Path, limit: usize) -> Result<(), AttemptError> {
    let path = run_dir.join(FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(AttemptError::File { action: "read", path, error }),
    };
    let (step, mark) = (newest_checkpoint(run_dir), mark(run_dir));
    let earlier: Vec<Attempt> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let starts = earlier.iter().rev().take_while(|attempt| (attempt.step, attempt.mark) == (step, mark)).count();
    if limit > 0 && starts >= limit { Err(AttemptError::Fruitless { starts, step, path }) } else { Ok(()) }
}

/// Appends this start to the file. The caller must hold the lock of the run folder.
pub(crate) fn note(run_dir: &Path, launch: &str) -> Result<(), AttemptError> {
    let path = run_dir.join(FILE);
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (step, mark) = (newest_checkpoint(run_dir), mark(run_dir));
    let attempt = Attempt { time, step, mark, launch: launch.to_owned() };
    let line = serde_json::to_string(&attempt).expect("numbers and a string are JSON");
    let file = File::options().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| writeln!(file, "{line}").and_then(|()| file.sync_all()));
    written.map_err(|error| AttemptError::File { action: "write", path, error })
}

/// Names this start after the launcher that made it (Slurm job, Kubernetes pod), or else after the process id.
pub(crate) fn launch(variable: impl Fn(&str) -> Option<String>) -> String {
    if let Some(job) = variable("SLURM_JOB_ID") {
        return format!("slurm {job} restart {}", variable("SLURM_RESTART_COUNT").as_deref().unwrap_or("0"));
    }
    match (variable("KUBERNETES_SERVICE_HOST"), variable("HOSTNAME")) {
        (Some(_), Some(pod)) => format!("pod {pod}"),
        _ => format!("pid {}", std::process::id()),
    }
}

/// Returns the step of the newest checkpoint with a manifest, or 0.
fn newest_checkpoint(run_dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(run_dir.join("checkpoints")) else { return 0 };
    let finished = entries.flatten().filter(|entry| entry.path().join("manifest.json").exists());
    let steps = finished.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("step-")?.parse().ok());
    steps.max().unwrap_or(0)
}

/// Bytes read from the end of `metrics.jsonl`; a line takes a few kilobytes.
const LAST_LINES: u64 = 256 << 10;

fn mark(run_dir: &Path) -> Mark {
    let metrics = last_line(&run_dir.join("metrics.jsonl")).and_then(|line| serde_json::from_str::<Value>(&line).ok());
    let step = metrics.and_then(|line| line["step"].as_u64()).unwrap_or(0);
    let files = fs::read_dir(run_dir.join("journal")).into_iter().flatten().flatten();
    let segments = files.filter(|file| file.path().extension().is_some_and(|extension| extension == "seg"));
    let samples = segments.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum();
    Mark { step, samples }
}

fn last_line(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_LINES))).ok()?;
    let mut bytes = Vec::new();
    file.take(LAST_LINES).read_to_end(&mut bytes).ok()?;
    String::from_utf8_lossy(&bytes).lines().next_back().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_without_a_new_checkpoint_run_out() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let start = || check(dir.path(), 3).and_then(|()| note(dir.path(), "test"));
        (0..3).for_each(|_| start().expect("may start"));
        let error = start().expect_err("no progress");
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
    fn steps_and_samples_in_the_journal_are_progress() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let start = || check(dir.path(), 2).and_then(|()| note(dir.path(), "test"));
        fs::create_dir_all(dir.path().join("journal")).expect("created");
        for step in 1..5 {
            let lines: String = (1..=step).map(|step| format!("{{\"step\": {step}}}\n")).collect();
            fs::write(dir.path().join("metrics.jsonl"), lines).expect("written");
            start().expect("another step");
            fs::write(dir.path().join("journal/samples-000001.seg"), "x".repeat(step)).expect("written");
            start().expect("another sample");
        }
        start().expect("the same for the second time");
        assert!(matches!(start(), Err(AttemptError::Fruitless { starts: 2, step: 0, .. })));
        fs::write(dir.path().join("journal/samples-000002.seg"), "x").expect("written");
        start().expect("another sample");
    }

    #[test]
    fn starts_are_named_after_the_launcher() {
        let slurm = [("SLURM_JOB_ID", "17"), ("SLURM_RESTART_COUNT", "2")];
        let find = |name: &str| slurm.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        assert_eq!(launch(find), "slurm 17 restart 2");
    }
}
