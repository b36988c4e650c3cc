//! What a run waits for when its disk is full: room, however long that takes.
//!
//! A full disk loses nothing and is put right by people, so no patience ends with it; other refusals of a disk have a limit,
//! for they may be for good. Whoever writes says here what found no room, and the driver lets the run stand still meanwhile.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;

/// How often the log says that there is no room.
const REMIND: Duration = Duration::from_secs(60);

/// Whether the disk of a run folder has room; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Room(Arc<Waits>);

#[derive(Debug)]
struct Waits {
    folder: PathBuf,
    /// By who waits.
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
        // Every change of it is a whole one.
        self.0.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `who` finds no room for so many bytes of `what`; 0 where nobody knows how many.
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

    /// `who` waits no longer.
    pub(crate) fn found(&self, who: &'static str) {
        if let Some(wait) = self.lock().remove(who) {
            tracing::info!("there is room for the {who} again, after {:.0} s", wait.since.elapsed().as_secs_f64());
        }
    }

    /// What the run waits for: "room on the disk of ...".
    pub(crate) fn wanted(&self) -> Option<String> {
        self.lock().values().next().map(|wait| wait.sentence.clone())
    }

    /// Whether `bytes` more fit.
    ///
    /// # Errors
    /// As writing them would end, when they do not.
    pub(crate) fn must_take(&self, bytes: u64) -> io::Result<()> {
        match free_bytes(&self.0.folder) {
            Some(free) if free < bytes => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }
}

/// Room for this user; `None` when the system does not say.
fn free_bytes(folder: &Path) -> Option<u64> {
    let about = statvfs(folder).ok()?;
    Some(about.blocks_available() * about.fragment_size())
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// Whether it is room that is missing. Libraries wrap what the system has said.
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
        // The source of an `io::Error` is that of what it wraps, which would be left out.
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
        // A quota is room; a limit of a file's size and a broken device are not.
        assert!(is_full(&io::Error::from_raw_os_error(122)));
        assert!(!is_full(&io::Error::from_raw_os_error(27)) && !is_full(&io::Error::from_raw_os_error(5)));
        assert!(!is_full(&database(rusqlite::ffi::SQLITE_IOERR)));
    }

    #[test]
    fn who_waits_says_what_for_until_there_is_room() {
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
