use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::write_atomically;
use crate::StartError;

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

/// Coordinators that have worked in the folder before.
pub(crate) fn starts_so_far(run_dir: &Path) -> u64 {
    CoordinatorRecord::read(run_dir).map_or(0, |record| record.starts)
}
