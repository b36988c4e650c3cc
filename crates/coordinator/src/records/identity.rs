use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use pacs_runtime::net::is_run_id;
use serde::{Deserialize, Serialize};

use super::write_atomically;
use crate::{FileError, StartError};

/// Exclusive use of a run folder, until it is dropped or the process ends.
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

/// Where a run's coordinator listens: `coordinator.json` in the run folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoordinatorRecord {
    /// host:port, reachable from the coordinator's machine.
    pub address: String,
    /// The coordinator's machine.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// Name of the job.
    pub job: String,
    /// Coordinators that have worked in this folder, this one included.
    pub starts: u64,
}

impl CoordinatorRecord {
    /// Name of the file in the run folder.
    pub const FILE: &str = "coordinator.json";

    /// Reads the record of a run folder.
    ///
    /// # Errors
    /// When there is no such file, or it is not such a record.
    pub fn read(run_dir: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(run_dir.join(Self::FILE))?;
        serde_json::from_str(&text).map_err(io::Error::from)
    }

    pub(crate) fn write(&self, run_dir: &Path) -> Result<(), StartError> {
        let path = run_dir.join(Self::FILE);
        let text = serde_json::to_string_pretty(self).expect("a record of strings and numbers is JSON");
        write_atomically(&path, |file| file.write_all(text.as_bytes())).map_err(StartError::file("write", &path))
    }
}

/// The file of a run folder that says which run it is.
const RUN_ID_FILE: &str = "run_id";

/// The random identifier of the run in a folder, made when the first coordinator starts there, and kept.
pub(crate) fn run_id(run_dir: &Path) -> Result<String, StartError> {
    let path = run_dir.join(RUN_ID_FILE);
    match fs::read_to_string(&path) {
        Ok(text) if is_run_id(text.trim_end()) => return Ok(text.trim_end().to_owned()),
        Ok(_) => {
            let problem = "it is not 32 lower-case hexadecimal digits";
            return Err(FileError::damaged(&path, problem).into());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(StartError::file("read", &path)(error)),
    }
    let mut random = [0; 16];
    let source = Path::new("/dev/urandom");
    let read = File::open(source).and_then(|mut file| file.read_exact(&mut random));
    read.map_err(StartError::file("read", source))?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    write_atomically(&path, |file| writeln!(file, "{id}")).map_err(StartError::file("write", &path))?;
    Ok(id)
}

/// Coordinators that have worked in the folder before.
pub(crate) fn starts_so_far(run_dir: &Path) -> u64 {
    CoordinatorRecord::read(run_dir).map_or(0, |record| record.starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_one_identifier_for_ever() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = run_id(folder.path()).unwrap();
        assert!(is_run_id(&id), "{id}");
        assert_eq!(run_id(folder.path()).unwrap(), id);
        assert_ne!(run_id(other.path()).unwrap(), id);
        fs::write(folder.path().join(RUN_ID_FILE), "else").unwrap();
        assert!(run_id(folder.path()).is_err(), "a damaged identifier is not made anew");
    }
}
