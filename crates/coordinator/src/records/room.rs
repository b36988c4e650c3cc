//! Waiting for space on a full disk, without a time limit.
//!
//! A full disk loses nothing and is fixed by people, so no timeout applies to it; other disk errors have one, because
//! they may be permanent. Writers report here what found no space, and the driver stops the run's clock meanwhile.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;

/// Interval at which the log repeats that there is no space.
const REMIND: Duration = Duration::from_secs(60);

/// Waits for space on the disk of a run folder; clones share the state.
#[derive(Clone, Debug)]
pub(crate) struct Room(Arc<Waits>);

#[derive(Debug)]
struct Waits {
    folder: PathBuf,
    /// Current waits, by name of the waiting writer.
    waits: Mutex<BTreeMap<&'static str, Wait>>,
}

#[derive(Debug)]
struct Wait {
    sentence: String,
    since: Instant,
    told: Instant,
}

impl Room {
    pub(crate) fn of(run_dir: &Path) -> Self {
        Self(Arc::new(Waits { folder: run_dir.to_owned(), waits: Mutex::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Wait>> {
        // Every change under the lock is complete, so a poisoned lock is usable.
        self.0.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports that `who` has no space for `bytes` of `what`; 0 if the size is not known.
    pub(crate) fn missing(&self, who: &'static str, what: &str, bytes: u64, error: &dyn std::fmt::Display) {
        let free = free_bytes(&self.0.folder).map(|free| format!(", {} are free", megabytes(free))).unwrap_or_default();
        let wanted = if bytes > 0 { format!("{} for {what}", megabytes(bytes)) } else { what.to_owned() };
        let folder = self.0.folder.display();
        let sentence = format!("room on the disk of `{folder}`: it does not take {wanted}{free} ({error})");
        let now = Instant::now();
        let mut waits = self.lock();
        let is_new = !waits.contains_key(who);
        let wait = waits.entry(who).or_insert_with(|| Wait { sentence: String::new(), since: now, told: now });
        if is_new || now.duration_since(wait.told) >= REMIND {
            wait.told = now;
            tracing::warn!("the run waits for {sentence}; it resumes by itself when there is room");
        }
        wait.sentence = sentence;
    }

    /// Reports that `who` no longer waits.
    pub(crate) fn found(&self, who: &'static str) {
        if let Some(wait) = self.lock().remove(who) {
            tracing::info!("there is room for the {who} again, after {:.0} s", wait.since.elapsed().as_secs_f64());
        }
    }

    /// What the run waits for, as part of a sentence; `None` while there is space.
    pub(crate) fn wanted(&self) -> Option<String> {
        self.lock().values().next().map(|wait| wait.sentence.clone())
    }

    /// Checks that `bytes` more fit on the disk.
    ///
    /// # Errors
    /// The error that writing them would return.
    pub(crate) fn must_take(&self, bytes: u64) -> io::Result<()> {
        match free_bytes(&self.0.folder) {
            Some(free) if free < bytes => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

/// Free space for this user; `None` if the system does not say.
fn free_bytes(folder: &Path) -> Option<u64> {
    let about = statvfs(folder).ok()?;
    Some(about.blocks_available() * about.fragment_size())
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Whether an error means that the disk is full, also when a library has wrapped it.
pub(crate) fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return true;
        }
        if let Some(rusqlite::Error::SqliteFailure(failure, _)) = error.downcast_ref()
            && failure.code == rusqlite::ErrorCode::DiskFull
        {
            return true;
        }
        // `io::Error::source` skips the wrapped error itself, so that is followed first.
        next = io.and_then(io::Error::get_ref).map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source());
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_known_however_it_is_wrapped() {
        let full = || io::Error::from_raw_os_error(28);
        assert!(is_full(&full()) && is_full(&io::Error::other(full())));
        assert!(is_full(&io::Error::other(parquet::errors::ParquetError::External(Box::new(full())))));
        let database = |code| rusqlite::Error::SqliteFailure(rusqlite::ffi::Error::new(code), None);
        assert!(is_full(&database(rusqlite::ffi::SQLITE_FULL)));
        // A quota counts as a full disk; a file size limit and a broken device do not.
        assert!(is_full(&io::Error::from_raw_os_error(122)));
        assert!(!is_full(&io::Error::from_raw_os_error(27)) && !is_full(&io::Error::from_raw_os_error(5)));
        assert!(!is_full(&database(rusqlite::ffi::SQLITE_IOERR)));
    }

    #[test]
    fn a_waiting_process_reports_what_for_until_there_is_room() {
        let folder = tempfile::tempdir().unwrap();
        let room = Room::of(folder.path());
        assert_eq!(room.wanted(), None);
        room.missing("journal", "12 records", 5_000_000, &"no space");
        room.missing("run folder", "a line", 0, &"no space");
        let wanted = room.wanted().unwrap();
        let folder = folder.path().display();
        assert!(
            wanted.starts_with(&format!("room on the disk of `{folder}`: it does not take 5.0 MB for 12 records, "))
        );
        assert!(wanted.ends_with(" are free (no space)"), "{wanted}");
        room.found("journal");
        assert!(room.wanted().unwrap().contains("it does not take a line"));
        room.found("run folder");
        assert_eq!(room.wanted(), None);
        assert!(room.must_take(1).is_ok());
        assert_eq!(room.must_take(u64::MAX).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
