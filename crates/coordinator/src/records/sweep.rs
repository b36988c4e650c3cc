use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Archive, Checkpoints};

/// Work after which the thread rests as long as it has worked, so that others get at least half of the disk.
const SLICE: Duration = Duration::from_millis(10);
/// Longest rest: a disk that is slow for another reason is not waited for twice.
const LONGEST_REST: Duration = Duration::from_millis(200);

/// Background work in the run folder: reads large checkpoints back, removes discarded folders and merges archive files.
///
/// It has no queue. Except for a checkpoint to be read, its work is found in the folders, so work that a crash
/// interrupts is found at the next start.
#[derive(Debug)]
pub(crate) struct Sweeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    wishes: Mutex<Wishes>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct Wishes {
    /// Whether there may be new work.
    look: bool,
    end: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wishes> {
        self.wishes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sweeper {
    /// Starts the thread, which looks for work at once.
    pub(crate) fn start(checkpoints: Checkpoints, archive: Option<Arc<Archive>>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let told = Arc::clone(&shared);
        // Ends when the handle is dropped, even in the middle of its work.
        let span = tracing::info_span!("sweeper");
        let thread = std::thread::Builder::new().name("sweeper".into()).spawn(move || {
            let _span = span.entered();
            let mut broom = Broom { shared: &told, worked: Duration::ZERO };
            while !broom.is_to_end() {
                if let Err(error) = broom.sweep(&checkpoints, archive.as_deref()) {
                    tracing::warn!("the run folder was not cleared up: {error}");
                }
                let mut wishes = told.lock();
                while !wishes.look && !wishes.end {
                    wishes = told.changed.wait(wishes).unwrap_or_else(PoisonError::into_inner);
                }
                wishes.look = false;
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Tells the thread that there may be new work.
    pub(crate) fn look(&self) {
        self.shared.lock().look = true;
        self.shared.changed.notify_one();
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        self.shared.lock().end = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the sweeper's thread panicked");
        }
    }
}

/// State of the working thread.
struct Broom<'s> {
    shared: &'s Shared,
    /// Work since the last rest.
    worked: Duration,
}

impl Broom<'_> {
    fn is_to_end(&self) -> bool {
        self.shared.lock().end
    }

    fn sweep(&mut self, checkpoints: &Checkpoints, archive: Option<&Archive>) -> io::Result<()> {
        checkpoints.read_back();
        for folder in checkpoints.discarded()? {
            // A rank may still be writing there; the next look removes the folder.
            if let Err(error) = self.remove(&folder) {
                tracing::warn!(folder = %folder.display(), "a discarded folder stays for now: {error}");
            }
        }
        while let Some(archive) = archive
            && !self.is_to_end()
        {
            let began = Instant::now();
            if !archive.merge_some()? {
                break;
            }
            self.rest(began.elapsed());
        }
        Ok(())
    }

    /// Removes a folder file by file. Unlinking does not affect processes that have a file open, or links elsewhere.
    fn remove(&mut self, folder: &Path) -> io::Result<()> {
        for entry in fs::read_dir(folder)? {
            if self.is_to_end() {
                return Ok(());
            }
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                self.remove(&entry.path())?;
            } else {
                let began = Instant::now();
                fs::remove_file(entry.path())?;
                self.rest(began.elapsed());
            }
        }
        if self.is_to_end() { Ok(()) } else { fs::remove_dir(folder) }
    }

    fn rest(&mut self, worked: Duration) {
        self.worked += worked;
        if self.worked < SLICE {
            return;
        }
        let until = Instant::now() + std::mem::take(&mut self.worked).min(LONGEST_REST);
        let mut wishes = self.shared.lock();
        while let Some(left) = until.checked_duration_since(Instant::now())
            && !wishes.end
            && !left.is_zero()
        {
            let (woken, _) = self.shared.changed.wait_timeout(wishes, left).unwrap_or_else(PoisonError::into_inner);
            wishes = woken;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait_for(what: &str, is_so: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_so() {
            assert!(Instant::now() < deadline, "no {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn leftovers_of_an_earlier_start_are_removed_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        let discarded = checkpoints.folder().join(".discarded-step-000001-0");
        fs::create_dir_all(discarded.join("model")).unwrap();
        for file in 0..2000 {
            fs::write(discarded.join(format!("model/{file}")), "x").unwrap();
        }
        let outside = folder.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, discarded.join("link")).unwrap();
        let kept = checkpoints.path(2);
        fs::create_dir(&kept).unwrap();
        let sweeper = Sweeper::start(checkpoints.clone(), None).unwrap();
        wait_for("end of the folder", || !discarded.exists());
        assert!(kept.exists() && outside.join("precious").exists());
        checkpoints.create(3, 1).unwrap();
        checkpoints.create(3, 2).unwrap();
        sweeper.look();
        wait_for("end of the next one", || checkpoints.discarded().unwrap().is_empty());
    }

    #[test]
    fn an_interrupted_removal_resumes_at_the_next_start() {
        let folder = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(folder.path()).unwrap();
        let discarded = checkpoints.folder().join(".discarded-step-000001-0");
        fs::create_dir(&discarded).unwrap();
        for file in 0..3000 {
            fs::write(discarded.join(format!("{file}")), "x").unwrap();
        }
        // Dropped at any point of its work.
        drop(Sweeper::start(checkpoints.clone(), None).unwrap());
        let sweeper = Sweeper::start(checkpoints, None).unwrap();
        wait_for("end of the folder", || !discarded.exists());
        drop(sweeper);
    }
}
