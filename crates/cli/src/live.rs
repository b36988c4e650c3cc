//! The registry of this user's live runs: one small file per run, which its coordinator writes when it begins to serve and removes
//! when it ends.
//!
//! The folder is `$XDG_STATE_HOME/pacs/runs`, else `~/.local/state/pacs/runs`, else `$XDG_RUNTIME_DIR/pacs/runs`. The last is a
//! fallback: it is removed with the user's session, which a run outlives, and batch jobs have none. Machines may share a home
//! directory, so an entry names the machine of its process.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use pacs_coordinator::{Coordinator, CoordinatorRecord};
use serde::{Deserialize, Serialize};

use crate::process;

/// A registry entry: a coordinator that serves, or did when its entry was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LiveRun {
    pub(crate) run_id: String,
    pub(crate) job: String,
    pub(crate) run_dir: PathBuf,
    /// Address that operators dial, host:port.
    pub(crate) address: String,
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// Start time of the process in clock ticks (see [`process::began`]); with the process id it identifies the process.
    pub(crate) began: u64,
    /// Unix time at which the coordinator was started, in seconds.
    pub(crate) started: u64,
}

impl LiveRun {
    fn of(coordinator: &Coordinator, run_dir: &Path) -> io::Result<Self> {
        let run_dir = run_dir.canonicalize()?;
        let CoordinatorRecord { address, host, pid, job, .. } = CoordinatorRecord::read(&run_dir)?;
        let began = process::began(pid).ok_or_else(|| io::Error::other("/proc does not show this process"))?;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let run_id = coordinator.run_id().to_owned();
        Ok(Self { run_id, job, run_dir, address, host, pid, began, started })
    }

    pub(crate) fn is_here(&self) -> bool {
        self.host == process::host()
    }

    /// Returns whether the run is over: its process is gone, or another coordinator serves from its folder.
    fn is_stale(&self) -> bool {
        let is_gone = self.is_here() && process::began(self.pid) != Some(self.began);
        let record = CoordinatorRecord::read(&self.run_dir);
        is_gone || record.is_ok_and(|record| (record.pid, &record.host) != (self.pid, &self.host))
    }

    fn file_name(&self) -> String {
        // The name includes the process id, so that removing a dead coordinator's entry cannot hit its successor's.
        format!("{}-{}.json", self.run_id, self.pid)
    }
}

/// Guard of a registry entry; dropping it removes the entry.
#[derive(Debug)]
pub(crate) struct Listed(Option<PathBuf>);

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // On failure the next command that reads the folder removes the stale entry.
            let _ = fs::remove_file(path);
        }
    }
}

/// Registers a run. A failure is a warning only: the run works without an entry.
pub(crate) fn list(coordinator: &Coordinator, run_dir: &Path) -> Listed {
    let folders = folders(|name| std::env::var_os(name));
    let listed = LiveRun::of(coordinator, run_dir).and_then(|run| {
        remember(&run, &folders);
        write(&run, &folders)
    });
    match listed {
        Ok(path) => Listed(Some(path)),
        Err(error) => {
            tracing::warn!("`pacs status` will not find this run by itself: {error}; name its folder");
            Listed(None)
        }
    }
}

/// Returns all runs of this user that are not known to be over, oldest first. Runs on other machines are included, because
/// nothing can be found out about their processes.
pub(crate) fn all() -> Vec<LiveRun> {
    read(&folders(|name| std::env::var_os(name)))
}

/// Limit of remembered past runs.
const MOST_PAST: usize = 200;

/// Returns the remembered runs of this user, live or not, oldest first: those started on this machine, or on another one that
/// shares its home directory.
pub(crate) fn past() -> Vec<LiveRun> {
    past_in(&folders(|name| std::env::var_os(name)))
}

fn past_in(folders: &[PathBuf]) -> Vec<LiveRun> {
    let folders = folders.iter().map(|folder| folder.with_file_name(PAST));
    let entries =
        folders.filter(|folder| folder.is_dir()).flat_map(|folder| fs::read_dir(folder).into_iter().flatten());
    let texts = entries.flatten().filter_map(|entry| fs::read_to_string(entry.path()).ok());
    let mut runs: Vec<LiveRun> = texts.filter_map(|text| serde_json::from_str(&text).ok()).collect();
    runs.sort_by(|a, b| (a.started, &a.run_id).cmp(&(b.started, &b.run_id)));
    runs
}

/// Subfolder for past runs, next to the entries of live ones.
const PAST: &str = "past";

/// Records a run for `pacs runs` and drops the oldest beyond [`MOST_PAST`]. Best effort: nothing relies on it.
fn remember(run: &LiveRun, folders: &[PathBuf]) {
    let of_run = |run: &LiveRun| format!("{}.json", run.run_id);
    let is_there = |folder: &&PathBuf| {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.is_ok() && is_private(folder)
    };
    let past: Vec<PathBuf> = folders.iter().map(|folder| folder.with_file_name(PAST)).collect();
    let Some(folder) = past.iter().find(is_there) else { return };
    let text = serde_json::to_string_pretty(run).expect("strings and numbers are JSON");
    if let Err(error) = fs::write(folder.join(of_run(run)), text) {
        tracing::debug!("the run is not remembered: {error}");
    }
    let known = past_in(std::slice::from_ref(&folder.with_file_name("runs")));
    for oldest in known.iter().take(known.len().saturating_sub(MOST_PAST)) {
        let _ = fs::remove_file(folder.join(of_run(oldest)));
    }
}

/// Returns the folders that may hold entries, the preferred one first.
fn folders(variable: impl Fn(&str) -> Option<OsString>) -> Vec<PathBuf> {
    // The XDG specification declares relative paths invalid.
    let folder = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = folder("XDG_STATE_HOME").or_else(|| folder("HOME").map(|home| home.join(".local/state")));
    let found = [state, folder("XDG_RUNTIME_DIR")];
    found.into_iter().flatten().map(|folder| folder.join("pacs/runs")).collect()
}

fn write(run: &LiveRun, folders: &[PathBuf]) -> io::Result<PathBuf> {
    let mut problem = io::Error::new(ErrorKind::NotFound, "neither HOME nor XDG_STATE_HOME nor XDG_RUNTIME_DIR is set");
    for folder in folders {
        match write_in(run, folder) {
            Ok(path) => return Ok(path),
            Err(error) => problem = io::Error::new(error.kind(), format!("write in `{}`: {error}", folder.display())),
        }
    }
    Err(problem)
}

fn write_in(run: &LiveRun, folder: &Path) -> io::Result<PathBuf> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    if !is_private(folder) {
        return Err(io::Error::other("it is not this user's own"));
    }
    let path = folder.join(run.file_name());
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, serde_json::to_string_pretty(run).expect("strings and numbers are JSON"))?;
    fs::rename(&temporary, &path)?;
    Ok(path)
}

/// Returns whether this user owns the folder, and makes it accessible to this user only.
fn is_private(folder: &Path) -> bool {
    let owner = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.uid());
    owner(folder).is_some_and(|uid| Some(uid) == owner(Path::new("/proc/self")))
        && fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).is_ok()
}

/// Reads the entries of these folders, and removes stale ones.
fn read(folders: &[PathBuf]) -> Vec<LiveRun> {
    let mut runs = Vec::new();
    for folder in folders.iter().filter(|folder| folder.is_dir() && is_private(folder)) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            // An entry that was removed meanwhile belongs to a run that is over.
            let Ok(text) = fs::read_to_string(&path) else { continue };
            match serde_json::from_str::<LiveRun>(&text) {
                Ok(run) if !run.is_stale() => runs.push(run),
                _ => drop(fs::remove_file(&path)),
            }
        }
    }
    runs.sort_by(|a, b| (a.started, &a.run_id).cmp(&(b.started, &b.run_id)));
    runs.dedup();
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(run_dir: &Path, pid: u32) -> LiveRun {
        LiveRun {
            run_id: "a".repeat(32),
            job: "tiny".into(),
            run_dir: run_dir.into(),
            address: "127.0.0.1:1".into(),
            host: process::host(),
            pid,
            began: process::began(pid).unwrap_or_default(),
            started: 1,
        }
    }

    #[test]
    fn folders_are_those_of_the_user() {
        let variables = |set: &'static [(&str, &str)]| {
            folders(move |name| set.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value)))
        };
        assert_eq!(variables(&[("HOME", "/h")]), [Path::new("/h/.local/state/pacs/runs")]);
        assert_eq!(
            variables(&[("HOME", "/h"), ("XDG_STATE_HOME", "/s"), ("XDG_RUNTIME_DIR", "/r")]),
            [Path::new("/s/pacs/runs"), Path::new("/r/pacs/runs")]
        );
        assert_eq!(variables(&[("HOME", ""), ("XDG_STATE_HOME", "relative")]), Vec::<PathBuf>::new());
    }

    #[test]
    fn what_is_stale_is_removed() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (folder, run_dir) = (dir.path().join("state/pacs/runs"), dir.path().join("run"));
        let folders = [folder.clone()];
        assert_eq!(read(&folders), []);
        let live = run(&run_dir, std::process::id());
        let path = write(&live, &folders).expect("written");
        assert_eq!(fs::metadata(&folder).expect("made").permissions().mode() & 0o777, 0o700);
        assert_eq!(read(&folders), std::slice::from_ref(&live));

        // Three stale entries: a reused process id, a process that is gone, and a damaged file.
        write(&LiveRun { began: live.began + 1, run_id: "b".repeat(32), ..live.clone() }, &folders).expect("written");
        write(&run(&run_dir, u32::MAX), &folders).expect("written");
        fs::write(folder.join("x.json"), "{").expect("written");
        // An entry of another machine is kept: its process cannot be checked.
        let elsewhere = LiveRun { host: "elsewhere".into(), started: 2, pid: 7, ..live.clone() };
        write(&elsewhere, &folders).expect("written");
        assert_eq!(read(&folders), [live.clone(), elsewhere]);
        assert_eq!(fs::read_dir(&folder).expect("listed").count(), 2);

        // The run folder names another coordinator now.
        fs::create_dir(&run_dir).expect("made");
        let record = r#"{"address": "h:9", "host": "h", "pid": 1, "job": "tiny", "run_id": "", "starts": 1}"#;
        fs::write(run_dir.join(CoordinatorRecord::FILE), record).expect("written");
        assert_eq!(read(&folders), []);
        assert!(!path.exists());
    }

    #[test]
    fn runs_are_remembered_up_to_a_number() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folders = [dir.path().join("pacs/runs")];
        assert_eq!(past_in(&folders), []);
        let one = run(dir.path(), 1);
        for started in 0..MOST_PAST as u64 + 3 {
            remember(&LiveRun { started, run_id: format!("{started:032}"), ..one.clone() }, &folders);
        }
        let past = past_in(&folders);
        assert_eq!((past.len(), past[0].started), (MOST_PAST, 3));
        // A resumed run keeps its id and counts once.
        remember(&LiveRun { started: 1000, ..past[0].clone() }, &folders);
        assert_eq!(past_in(&folders).len(), MOST_PAST);
        assert_eq!(fs::metadata(dir.path().join("pacs/past")).expect("made").permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_passed_over() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::write(dir.path().join("file"), "").expect("written");
        let folders = ["file/pacs/runs", "second"].map(|name| dir.path().join(name));
        let run = run(dir.path(), std::process::id());
        let path = write(&run, &folders).expect("the second one");
        assert!(path.starts_with(&folders[1]));
        assert!(write(&run, &folders[..1]).is_err() && write(&run, &[]).is_err());
        drop(Listed(Some(path.clone())));
        assert!(!path.exists());
    }
}
