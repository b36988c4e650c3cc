//! Executes the runs of a study as processes of this machine, several at once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pacs_runtime::{Exit, Shutdown};
use tokio::process::Command;
use tokio::task::JoinSet;

use super::folder::Folder;
use super::spec::Run;
use crate::output;

/// Deadline for a run to save and end after SIGTERM.
const GOODBYE: Duration = Duration::from_secs(120);

/// Starts in a row without progress after which a run counts as failed. The wait doubles with each start, because a coordinator that
/// outlived a killed study holds the run folder until it is done.
const MOST_STARTS: u32 = 8;

/// Text in the last line of a run that ended because its labels no longer differed.
const NOTHING_LEFT: &str = "nothing left to learn";

/// How training one run ended.
enum End {
    Finished,
    /// It ended before its last step, for this reason.
    Early(String),
    Interrupted,
}

/// How the runs ended: failures as (id, reason), and whether the study was interrupted.
#[derive(Debug, Default)]
pub(super) struct Ends {
    pub(super) failed: Vec<(String, String)>,
    pub(super) interrupted: bool,
}

/// Trains the unfinished runs, `parallel` at a time, and stores each run's numbers as soon as it is finished.
pub(super) async fn execute(
    runs: Vec<Run>,
    folder: &Folder,
    parallel: usize,
    worker: Option<&Path>,
    shutdown: &Shutdown,
) -> Result<Ends> {
    let program = std::env::current_exe().context("find this program")?;
    let total = runs.len();
    let (mut ends, mut left, mut living) = (Ends::default(), runs.into_iter(), JoinSet::new());
    let mut done = 0;
    loop {
        while living.len() < parallel && !ends.interrupted {
            let Some(run) = left.next() else { break };
            let one =
                One { place: folder.run(&run.id), program: program.clone(), worker: worker.map(Path::to_owned), run };
            let shutdown = shutdown.clone();
            living.spawn(async move { (one.train(&shutdown).await, one.run) });
        }
        let Some(joined) = living.join_next().await else { break };
        let (end, run) = joined.context("follow a run")?;
        done += 1;
        let said = match end {
            Ok(End::Interrupted) => {
                ends.interrupted = true;
                "interrupted".to_owned()
            }
            Ok(End::Finished) => kept(folder, &run, None)?,
            Ok(End::Early(reason)) => kept(folder, &run, Some(reason))?,
            Err(error) => {
                let why = format!("{error:#}");
                ends.failed.push((run.id.clone(), why.clone()));
                format!("failed: {why}")
            }
        };
        output::line(format_args!("{done}/{total}  {}  {said}", run.id));
    }
    Ok(ends)
}

fn kept(folder: &Folder, run: &Run, early: Option<String>) -> Result<String> {
    let record =
        folder.collect(run, early)?.with_context(|| format!("{} ended without its last evaluation", run.id))?;
    let ended = if record.ended_early.is_some() { ", ended early" } else { "" };
    Ok(format!("pass@1 {:.1} %{ended}", 100.0 * record.last().unwrap_or(f64::NAN)))
}

/// How to run one run of the study as a process.
struct One {
    run: Run,
    place: PathBuf,
    program: PathBuf,
    worker: Option<PathBuf>,
}

impl One {
    /// Starts the run, and again after every exit that asks for a restart, until it is done.
    async fn train(&self, shutdown: &Shutdown) -> Result<End> {
        fs::create_dir_all(&self.place).with_context(|| format!("create `{}`", self.place.display()))?;
        let log = self.place.join("log");
        let (mut starts, mut reached) = (0, self.reached());
        loop {
            if shutdown.is_requested() {
                return Ok(End::Interrupted);
            }
            let status = self.start(&log, shutdown).await?;
            let Some(status) = status else { return Ok(End::Interrupted) };
            let said = last_words(&log);
            match status.code() {
                Some(0) => return Ok(End::Finished),
                Some(code) if code == i32::from(Exit::Bug.code()) && said.contains(NOTHING_LEFT) => {
                    return Ok(End::Early(said));
                }
                // Killed by a signal, or exit code 75: start again.
                code if code.is_none() || code == Some(i32::from(Exit::Again.code())) => {}
                _ => return Err(anyhow!("{status}: {said}")),
            }
            let now = self.reached();
            starts = if now > reached { 0 } else { starts + 1 };
            reached = now;
            if starts == MOST_STARTS {
                return Err(anyhow!("{MOST_STARTS} starts made no progress; the last one ended with {status}: {said}"));
            }
            tokio::select! {
                () = tokio::time::sleep(Duration::from_secs(1 << starts)) => {}
                () = shutdown.requested() => return Ok(End::Interrupted),
            }
        }
    }

    /// Runs the process once; `None` when this program itself was asked to end.
    async fn start(&self, log: &Path, shutdown: &Shutdown) -> Result<Option<ExitStatus>> {
        let file = File::options().create(true).append(true).open(log).context("open the log")?;
        let mut command = Command::new(&self.program);
        command.arg("run").arg(self.place.join("job.toml")).arg("--run-dir").arg(self.place.join("run"));
        if let Some(worker) = &self.worker {
            command.arg("--worker-binary").arg(worker);
        }
        // A process group of its own: otherwise Ctrl-C would reach the run twice, and the second signal skips the save.
        command.process_group(0).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let mut child = command.spawn().context("start the run")?;
        tokio::select! {
            status = child.wait() => Ok(Some(status?)),
            () = shutdown.requested() => {
                if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
                    // The run may have ended meanwhile, so a failure is ignored.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
                }
                let _ = tokio::time::timeout(GOODBYE, child.wait()).await;
                Ok(None)
            }
        }
    }

    /// Returns the size of the metrics file, which grows with every step and so measures progress.
    fn reached(&self) -> u64 {
        fs::metadata(self.place.join("run/metrics.jsonl")).map_or(0, |metadata| metadata.len())
    }
}

/// Returns the last line of a log that is not empty.
fn last_words(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines().rev().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("hint:"));
    lines.next().unwrap_or("it said nothing").to_owned()
}
