use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use pacs_runtime::net::is_run_id;
use serde::{Deserialize, Serialize};

use super::atomic::sync_folder;
use super::write_atomically;
use crate::{FileError, StartError};

/// Exclusive lock on a run folder, held until it is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct RunLock(#[expect(dead_code, reason = "held for its drop")] Flock<File>);

impl RunLock {
    pub(crate) fn take(run_dir: &Path) -> Result<Self, StartError> {
        let path = run_dir.join("lock");
        let open = File::options().create(true).write(true).truncate(false).open(&path);
        let file = open.map_err(StartError::file("open lock file", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err((_, Errno::EWOULDBLOCK)) => Err(StartError::Busy { run_dir: run_dir.to_owned() }),
            Err((_, error)) => Err(StartError::file("lock", &path)(error.into())),
        }
    }
}

/// Address of a run's coordinator: `coordinator.json` in the run folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorRecord {
    /// host:port, reachable from the coordinator's machine.
    pub address: String,
    /// Host name of the coordinator.
    pub host: String,
    /// Process id on that host.
    pub pid: u32,
    /// Name of the job.
    pub job: String,
    /// Id of the run (see [`run_id`]).
    #[serde(default)]
    pub run_id: String,
    /// Folder of the certificates, relative to the run folder if it lies inside, so that a moved folder is found.
    /// `None`: the coordinator serves plain text.
    #[serde(default)]
    pub tls_dir: Option<PathBuf>,
    /// Number of coordinators that have worked in this folder, including this one.
    pub starts: u64,
}

impl CoordinatorRecord {
    /// Name of the file in the run folder.
    pub const FILE: &str = "coordinator.json";

    /// Reads the record of a run folder.
    ///
    /// # Errors
    /// When the file is missing or malformed.
    pub fn read(run_dir: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(run_dir.join(Self::FILE))?;
        serde_json::from_str(&text).map_err(io::Error::from)
    }

    /// The folder of the certificates as a path for this process.
    #[must_use]
    pub fn tls_dir(&self, run_dir: &Path) -> Option<PathBuf> {
        self.tls_dir.as_ref().map(|folder| run_dir.join(folder))
    }

    pub(crate) fn write(&self, run_dir: &Path) -> Result<(), StartError> {
        let path = run_dir.join(Self::FILE);
        let text = serde_json::to_string_pretty(self).expect("a record of strings and numbers is JSON");
        write_atomically(&path, |file| file.write_all(text.as_bytes())).map_err(StartError::file("write", &path))
    }
}

/// Name of the file with the run id.
const RUN_ID_FILE: &str = "run_id";

/// Length of a run id in hexadecimal digits.
const RUN_ID_DIGITS: usize = 32;

/// Returns the id of the run in this folder, 32 lower-case hexadecimal digits. Creates it if there is none, and never
/// changes it: whatever carries another id belongs to another run, whichever port or name it uses.
///
/// # Errors
/// When the file cannot be read or written, or contains no id. A damaged file is not replaced, because workers of the
/// run may still be alive and would no longer be recognized.
pub fn run_id(run_dir: &Path) -> Result<String, StartError> {
    identify(run_dir, "")
}

/// Like [`run_id`], with an id that a launcher has chosen: a folder without one takes `given`, unless that is empty.
///
/// # Errors
/// As for [`run_id`], and when `given` is malformed or differs from the id of the folder.
pub fn identify(run_dir: &Path, given: &str) -> Result<String, StartError> {
    if !given.is_empty() && !is_run_id(given) {
        return Err(StartError::RunId { given: given.to_owned() });
    }
    let path = run_dir.join(RUN_ID_FILE);
    let found = match read_run_id(&path)? {
        Some(id) => id,
        None => {
            let id = match CoordinatorRecord::read(run_dir) {
                // The file was lost, but the record repeats the id.
                Ok(record) if is_run_id(&record.run_id) => record.run_id,
                _ if given.is_empty() => random_id().map_err(StartError::file("make a run id for", &path))?,
                _ => given.to_owned(),
            };
            write_once(&path, &id).map_err(StartError::file("write", &path))?;
            // Read back, because another process may have been first.
            let lost = || FileError::damaged(&path, "it was written and is not there");
            read_run_id(&path)?.ok_or_else(lost)?
        }
    };
    if given.is_empty() || found == given {
        return Ok(found);
    }
    Err(StartError::OtherRun { run_dir: run_dir.to_owned(), found, given: given.to_owned() })
}

fn read_run_id(path: &Path) -> Result<Option<String>, StartError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StartError::file("read", path)(error)),
    };
    let id = String::from_utf8(bytes).ok().map(|text| text.trim_end().to_owned()).filter(|id| is_run_id(id));
    id.map(Some).ok_or_else(|| {
        let problem = format!(
            "it holds no run id ({RUN_ID_DIGITS} lower-case hexadecimal digits); write `run_id` of {} into it, or remove it \
             when no worker of this run is alive",
            CoordinatorRecord::FILE
        );
        FileError::damaged(path, problem).into()
    })
}

fn random_id() -> io::Result<String> {
    let mut bytes = [0; RUN_ID_DIGITS / 2];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Creates a file atomically; leaves an existing one unchanged.
fn write_once(path: &Path, id: &str) -> io::Result<()> {
    let temporary = path.with_file_name(format!(".{RUN_ID_FILE}.{id}.tmp"));
    write_synced(File::create(&temporary)?, id)?;
    // A hard link fails if the name exists; a rename would replace the id of a process that was first.
    let linked = fs::hard_link(&temporary, path);
    fs::remove_file(&temporary)?;
    match linked {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            // Some file systems have no hard links. A crash in between then leaves a damaged file, which is refused.
            match File::create_new(path) {
                Ok(file) => write_synced(file, id)?,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        _ => {}
    }
    path.parent().map_or(Ok(()), sync_folder)
}

fn write_synced(mut file: File, id: &str) -> io::Result<()> {
    writeln!(file, "{id}")?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;

    fn record(run_id: &str, starts: u64) -> CoordinatorRecord {
        let (address, host, job) = ("127.0.0.1:1".to_owned(), "here".to_owned(), "tiny".to_owned());
        CoordinatorRecord { address, host, pid: 1, job, run_id: run_id.to_owned(), tls_dir: None, starts }
    }

    #[test]
    fn a_folder_keeps_its_id() {
        let dir = tempfile::tempdir().unwrap();
        let id = run_id(dir.path()).unwrap();
        assert!(is_run_id(&id), "{id}");
        assert_eq!(run_id(dir.path()).unwrap(), id);
        assert_eq!(identify(dir.path(), &id).unwrap(), id);
        assert_eq!(fs::read_to_string(dir.path().join(RUN_ID_FILE)).unwrap(), format!("{id}\n"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left of the writing");
        let other = tempfile::tempdir().unwrap();
        assert_ne!(run_id(other.path()).unwrap(), id);
    }

    #[test]
    fn processes_that_ask_at_once_get_the_same_id() {
        for _ in 0..20 {
            let dir = tempfile::tempdir().unwrap();
            let barrier = Barrier::new(8);
            let ids: Vec<String> = thread::scope(|scope| {
                let ask = || {
                    barrier.wait();
                    run_id(dir.path()).unwrap()
                };
                let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        }
    }

    #[test]
    fn a_launcher_may_choose_the_id_of_a_new_folder_only() {
        let (first, second) = ("0123456789abcdef".repeat(2), "f".repeat(32));
        let dir = tempfile::tempdir().unwrap();
        for wrong in ["x", "0123456789ABCDEF0123456789ABCDEF", "../../etc/passwd"] {
            assert!(matches!(identify(dir.path(), wrong), Err(StartError::RunId { .. })), "{wrong}");
        }
        assert_eq!(identify(dir.path(), &first).unwrap(), first);
        let error = identify(dir.path(), &second).unwrap_err();
        assert_eq!(error.exit().code(), 78);
        assert!(error.to_string().contains(&first) && error.to_string().contains(&second), "{error}");
        assert_eq!(run_id(dir.path()).unwrap(), first);
    }

    #[test]
    fn a_damaged_id_is_refused_and_a_lost_one_comes_from_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let id = run_id(dir.path()).unwrap();
        record(&id, 3).write(dir.path()).unwrap();
        for damage in ["", "0123", "\u{0}\u{0}\u{0}"] {
            fs::write(dir.path().join(RUN_ID_FILE), damage).unwrap();
            let error = run_id(dir.path()).unwrap_err();
            assert!(error.to_string().contains("holds no run id"), "{error}");
            assert_eq!(error.exit().code(), 78);
            assert_eq!(fs::read_to_string(dir.path().join(RUN_ID_FILE)).unwrap(), damage, "it is left as it is");
        }
        fs::remove_file(dir.path().join(RUN_ID_FILE)).unwrap();
        assert_eq!(run_id(dir.path()).unwrap(), id);
    }
}
