//! The folder in which the processes of a run on one host share versions of the weights.
//!
//! A file under its final name was verified by the process that wrote it and is never written again, so others map it
//! as it is. `<name>.part` is a version on its way: the holder of its lock (flock, which the kernel releases when the
//! holder dies) brings it, the others wait for the file. Every process holds a shared lock on `lock`; a folder without
//! holders is a leftover, and the next process of this user removes it. Rejected: a memfd, which needs a broker that
//! passes the descriptor to processes that start later.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, statvfs};
use rustix::io::Errno;

use crate::description::{id_of_file, piece_bytes};
use crate::{Adapted, Description, Digest, VersionId, WeightKind};

/// Lock file that shows whether a folder is in use.
const LOCK: &str = "lock";
/// How long to wait for a folder that another process is about to remove.
const FOLDER_DEADLINE: Duration = Duration::from_secs(10);
/// Bytes that are digested and written while they are in a core's cache.
pub(crate) const CHUNK: usize = 256 << 10;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder belongs to another user, or others may enter it.
    #[error(
        "`{}` is {found}, and a folder of user {} that only this user may enter (mode 0700) is needed; remove it, or name another \
         place with PACS_WEIGHTS_DIR", path.display(), user()
    )]
    NotOurs {
        /// Path of the folder.
        path: PathBuf,
        /// Owner and mode that it has instead.
        found: String,
    },
    /// No folder has room for the version.
    #[error("{needed} bytes of weights do not fit into `{}`, which has {free} bytes left", path.display())]
    NoRoom {
        /// The folder that was tried last.
        path: PathBuf,
        /// Size of the version in bytes.
        needed: u64,
        /// Bytes left in that folder.
        free: u64,
    },
    /// The run id is not a valid folder name.
    #[error("run `{}` cannot be the name of a folder", .0.escape_debug())]
    Run(String),
    /// A file operation failed.
    #[error("{doing} `{}`: {error}", path.display())]
    File {
        /// The operation, as a verb.
        doing: &'static str,
        /// Path of the file or folder.
        path: PathBuf,
        /// Error of the system.
        error: io::Error,
    },
}

fn file_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |error| StoreError::File { doing, path: path.to_owned(), error }
}

/// Versions of the weights on this host. Dropping the last store of a run on a host removes them.
#[derive(Debug)]
pub struct HostStore {
    folders: Vec<Folder>,
    /// Whether the lack of room was logged.
    told: AtomicBool,
}

impl HostStore {
    /// Opens the store of a run in shared memory, with the temporary folder for what does not fit; in
    /// `PACS_WEIGHTS_DIR` alone if that is set. Removes leftovers of this user's runs.
    ///
    /// # Errors
    /// [`StoreError::Run`] for an id that is no name of a folder, [`StoreError::NotOurs`] for a folder that others can enter.
    pub fn open(run: &str) -> Result<Self, StoreError> {
        if let Some(chosen) = std::env::var_os("PACS_WEIGHTS_DIR").filter(|chosen| !chosen.is_empty()) {
            return Self::open_in(run, &[PathBuf::from(chosen)]);
        }
        let places = [PathBuf::from("/dev/shm"), std::env::temp_dir()];
        Self::open_in(run, &places.into_iter().filter(|place| place.is_dir()).collect::<Vec<_>>())
    }

    /// Opens the store of a run in existing folders; each version goes to the first one with room.
    ///
    /// # Errors
    /// As [`HostStore::open`], and [`StoreError::File`] when a folder cannot be made.
    pub fn open_in(run: &str, places: &[PathBuf]) -> Result<Self, StoreError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if run.is_empty() || run.len() > 64 || !run.bytes().all(plain) {
            return Err(StoreError::Run(run.to_owned()));
        }
        let folders = places.iter().map(|place| Folder::open(place, run)).collect::<Result<_, _>>()?;
        Ok(Self { folders, told: AtomicBool::new(false) })
    }

    /// Returns the version if this host has all of it.
    ///
    /// # Errors
    /// When the file is there but cannot be read.
    pub fn find(&self, description: &Description) -> Result<Option<Whole>, StoreError> {
        let found = self.folders.iter().find_map(|folder| folder.find(description).transpose());
        found.transpose()
    }

    /// Writes a version, so that the processes of this host find it.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`] when no folder has room, [`StoreError::File`] when writing fails.
    pub fn publish(&self, id: VersionId, kind: WeightKind, content: &[u8]) -> Result<Whole, StoreError> {
        self.with_room(content.len() as u64, |folder| folder.publish(id, kind, None, content))
    }

    /// Writes a version that is adapters of another model.
    ///
    /// # Errors
    /// As [`HostStore::publish`].
    pub fn publish_adapters(
        &self,
        id: VersionId,
        kind: WeightKind,
        adapted: &Adapted,
        content: &[u8],
    ) -> Result<Whole, StoreError> {
        self.with_room(content.len() as u64, |folder| folder.publish(id, kind, Some(adapted.clone()), content))
    }

    /// Claims the task of bringing a version to this host, unless it is here or on its way.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn claim(&self, description: &Description) -> Result<Claim, StoreError> {
        if let Some(whole) = self.find(description)? {
            return Ok(Claim::Whole(whole));
        }
        // It may be on its way in a later folder, because the first had no room then.
        let name = format!("{}.part", description.file_name());
        if let Some(folder) = self.folders.iter().find(|folder| folder.path.join(&name).exists()) {
            return folder.claim(description);
        }
        self.with_room(description.bytes(), |folder| folder.claim(description))
    }

    /// The newest whole version before `id`.
    pub(crate) fn newest_before(&self, id: VersionId) -> Option<VersionId> {
        let entries = self.folders.iter().filter_map(|folder| fs::read_dir(&folder.path).ok()).flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let whole = names.filter(|name| !name.ends_with(".part")).filter_map(|name| id_of_file(&name));
        whole.filter(|other| *other < id).max()
    }

    /// Removes the versions before `oldest`. Processes that have one open or mapped keep its content.
    pub fn retire_before(&self, oldest: VersionId) {
        self.folders.iter().for_each(|folder| folder.retire_before(oldest));
    }

    /// Releases the store, and removes it if no other process holds it. For processes that end while a thread still has
    /// it; later operations fail.
    pub fn leave(&self) {
        self.folders.iter().for_each(Folder::leave);
    }

    fn with_room<T>(
        &self,
        bytes: u64,
        mut make: impl FnMut(&Folder) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut last = None;
        for folder in &self.folders {
            match folder.check_room(bytes).and_then(|()| make(folder)) {
                Err(error @ StoreError::NoRoom { .. }) => last = Some(error),
                made => {
                    if let (Some(error), Ok(_)) = (&last, &made)
                        && !self.told.swap(true, Ordering::Relaxed)
                    {
                        tracing::warn!("{error}; they are kept in `{}`, which is slower", folder.path.display());
                    }
                    return made;
                }
            }
        }
        let none = || StoreError::NoRoom { path: PathBuf::new(), needed: bytes, free: 0 };
        Err(last.unwrap_or_else(none))
    }
}

/// Result of claiming a version.
#[derive(Debug)]
pub enum Claim {
    /// It is on this host already.
    Whole(Whole),
    /// The caller has to bring it.
    Ours(Part),
    /// Another process brings it; ask again soon.
    Theirs,
}

/// A version on this host that is verified and does not change.
#[derive(Clone, Debug)]
pub struct Whole {
    description: Description,
    file: Arc<File>,
}

impl Whole {
    /// Description of the version.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The file with its bytes, valid even after the version was retired.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// A path at which this process can open the bytes while this value lives, even after the version was retired.
    #[must_use]
    pub fn open_name(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/self/fd/{}", self.file.as_raw_fd())
    }
}

/// A version that this process is bringing to the host.
#[derive(Debug)]
pub struct Part {
    description: Description,
    /// Open file, which holds the lock.
    file: Arc<File>,
    part: PathBuf,
    whole: PathBuf,
    /// Serializes writes. The kernel allows one per file at a time, and waiting threads would spin, which costs a host
    /// with few cores a fifth of its rate.
    writes: Mutex<()>,
}

impl Part {
    /// Description of the version.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The file with the bytes so far.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Pieces that an interrupted process has left in the file, found by their digests.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn verified(&self) -> Result<Vec<bool>, StoreError> {
        let present = self.file.metadata().map_err(file_error("look at", &self.part))?.len();
        let mut chunk = vec![0; CHUNK];
        let pieces = 0..self.description.pieces();
        pieces
            .map(|index| {
                let piece = self.description.piece(index);
                if piece.end > present {
                    return Ok(false);
                }
                let found = digest_file(&self.file, piece.start, piece.end, &mut chunk);
                let found = found.map_err(file_error("read", &self.part))?;
                Ok(self.description.is_piece(index, &found))
            })
            .collect()
    }

    /// Writes bytes of a piece, which count only once the piece is verified.
    ///
    /// # Errors
    /// Mostly when there is no room.
    pub fn write(&self, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        let _one = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        write_at(&self.file, &self.part, bytes, offset, self.description.bytes())
    }

    /// Discards what was brought so far.
    pub fn abandon(self) {
        // The next claim creates a new file.
        let _ = fs::remove_file(&self.part);
    }

    /// Publishes the version under its final name, once all pieces are verified.
    ///
    /// # Errors
    /// When the file cannot be renamed.
    pub fn finish(self) -> Result<Whole, StoreError> {
        fs::rename(&self.part, &self.whole).map_err(file_error("rename", &self.part))?;
        // Renamed before the lock is released, so that waiting processes find the final name.
        let file = open_readable(&self.whole).map_err(file_error("open", &self.whole))?;
        Ok(Whole { description: self.description, file: Arc::new(file) })
    }
}

/// Effective user of this process.
fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn write_at(file: &File, path: &Path, bytes: &[u8], offset: u64, needed: u64) -> Result<(), StoreError> {
    file.write_all_at(bytes, offset).map_err(|error| {
        let full = [Errno::NOSPC, Errno::DQUOT, Errno::FBIG].map(|errno| Some(errno.raw_os_error()));
        if full.contains(&error.raw_os_error()) {
            return StoreError::NoRoom { path: path.to_owned(), needed, free: free_bytes(path) };
        }
        file_error("write", path)(error)
    })
}

fn digest_file(file: &File, mut begin: u64, end: u64, chunk: &mut [u8]) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    while begin < end {
        let length = chunk.len().min(usize::try_from(end - begin).unwrap_or(usize::MAX));
        file.read_exact_at(&mut chunk[..length], begin)?;
        hasher.update(&chunk[..length]);
        begin += length as u64;
    }
    Ok(*hasher.finalize().as_bytes())
}

fn free_bytes(path: &Path) -> u64 {
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    statvfs(folder).map_or(u64::MAX, |about| about.f_bavail * about.f_frsize)
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).mode(0o600).custom_flags(OFlags::NOFOLLOW.bits() as i32);
    options
}

fn open_readable(path: &Path) -> io::Result<File> {
    options().open(path)
}

fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// One folder of a store.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    lock: File,
}

impl Folder {
    fn open(place: &Path, run: &str) -> Result<Self, StoreError> {
        let prefix = format!("pacs-{}-", user());
        let path = place.join(format!("{prefix}{run}"));
        sweep(place, &prefix, &path);
        let started = Instant::now();
        loop {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(file_error("create", &path)(error));
                }
                _ => {}
            }
            match check_folder(&path).and_then(|()| hold(&path)) {
                Ok(Some(lock)) => return Ok(Self { path, lock }),
                // Another process is removing it.
                Ok(None) => {}
                Err(StoreError::File { error, .. }) if is_missing(&error) => {}
                Err(error) => return Err(error),
            }
            if started.elapsed() > FOLDER_DEADLINE {
                let error = io::Error::new(io::ErrorKind::TimedOut, "another process removes it, and does not end");
                return Err(file_error("use", &path)(error));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn check_room(&self, bytes: u64) -> Result<(), StoreError> {
        let free = free_bytes(&self.path);
        if free < bytes {
            return Err(StoreError::NoRoom { path: self.path.clone(), needed: bytes, free });
        }
        Ok(())
    }

    fn find(&self, description: &Description) -> Result<Option<Whole>, StoreError> {
        let path = self.path.join(description.file_name());
        let file = match open_readable(&path) {
            Ok(file) => file,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(file_error("open", &path)(error)),
        };
        let about = file.metadata().map_err(file_error("look at", &path))?;
        if !about.is_file() || about.len() != description.bytes() || about.uid() != user() {
            let error = io::Error::new(io::ErrorKind::InvalidData, "it is not a file of the announced size");
            return Err(file_error("use", &path)(error));
        }
        Ok(Some(Whole { description: description.clone(), file: Arc::new(file) }))
    }

    fn publish(
        &self,
        id: VersionId,
        kind: WeightKind,
        adapted: Option<Adapted>,
        content: &[u8],
    ) -> Result<Whole, StoreError> {
        // The final name contains the digest, which is known only after all is written.
        let part = self.path.join(format!("{}-{}-published.part", id.generation.0, id.version.0));
        let file = options().write(true).create(true).truncate(true).open(&part);
        let file = file.map_err(file_error("create", &part))?;
        let bytes = content.len() as u64;
        let described = Description::digested(id, kind, adapted, content, piece_bytes(bytes), |offset, piece| {
            let mut hasher = blake3::Hasher::new();
            for (chunk, begin) in piece.chunks(CHUNK).zip((offset..).step_by(CHUNK)) {
                hasher.update(chunk);
                write_at(&file, &part, chunk, begin, bytes)?;
            }
            Ok(*hasher.finalize().as_bytes())
        });
        let description = described.inspect_err(|_| drop(fs::remove_file(&part)))?;
        let whole = self.path.join(description.file_name());
        Part { description, file: Arc::new(file), part, whole, writes: Mutex::new(()) }.finish()
    }

    fn claim(&self, description: &Description) -> Result<Claim, StoreError> {
        let whole = self.path.join(description.file_name());
        let part = self.path.join(format!("{}.part", description.file_name()));
        let file = options().write(true).create(true).truncate(false).open(&part);
        let file = file.map_err(file_error("create", &part))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Claim::Theirs),
            Err(TryLockError::Error(error)) => return Err(file_error("lock", &part)(error)),
        }
        // The previous holder may have finished, or given up and removed the file, between opening and locking.
        if let Some(found) = self.find(description)? {
            if is_same(&file, &part) {
                let _ = fs::remove_file(&part);
            }
            return Ok(Claim::Whole(found));
        }
        // The locked file has lost its name, and another process may have created a new one: ask again.
        if !is_same(&file, &part) {
            return Ok(Claim::Theirs);
        }
        Ok(Claim::Ours(Part {
            description: description.clone(),
            file: Arc::new(file),
            part,
            whole,
            writes: Mutex::new(()),
        }))
    }

    fn retire_before(&self, oldest: VersionId) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if id_of_file(&name).is_none_or(|id| id >= oldest) {
                continue;
            }
            // A process that still brings it will hear from its source that it is no longer served.
            let held = name.ends_with(".part")
                && open_readable(&entry.path())
                    .is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)));
            if !held
                && let Err(error) = fs::remove_file(entry.path())
                && !is_missing(&error)
            {
                tracing::warn!("old weights `{}` are not removed: {error}", entry.path().display());
            }
        }
    }
}

impl Folder {
    /// Removes the folder if this is its last holder. Best effort: the next process of this user removes leftovers.
    fn leave(&self) {
        // After leaving, the name may belong to another process's folder.
        if self.lock.try_lock().is_ok() && is_same(&self.lock, &self.path.join(LOCK)) {
            remove(&self.path);
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Whether `path` still names this open file.
fn is_same(file: &File, path: &Path) -> bool {
    let named = fs::symlink_metadata(path).ok().map(|about| (about.dev(), about.ino()));
    named.is_some() && named == file.metadata().ok().map(|about| (about.dev(), about.ino()))
}

fn check_folder(path: &Path) -> Result<(), StoreError> {
    let about = fs::symlink_metadata(path).map_err(file_error("look at", path))?;
    let found = if about.is_symlink() {
        "a symbolic link".to_owned()
    } else if !about.is_dir() {
        "no folder".to_owned()
    } else if about.uid() != user() {
        format!("a folder of user {}", about.uid())
    } else if about.mode() & 0o777 != 0o700 {
        format!("of mode {:04o}", about.mode() & 0o777)
    } else {
        return Ok(());
    };
    Err(StoreError::NotOurs { path: path.to_owned(), found })
}

/// Takes the shared lock of a folder; `None` while it is being removed.
fn hold(folder: &Path) -> Result<Option<File>, StoreError> {
    let path = folder.join(LOCK);
    let lock = options().write(true).create(true).truncate(false).open(&path);
    let lock = lock.map_err(file_error("create", &path))?;
    match lock.try_lock_shared() {
        Ok(()) => Ok(is_same(&lock, &path).then_some(lock)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(file_error("lock", &path)(error)),
    }
}

/// Removes this user's folders without holders, except `own`: what a killed process of this run
/// has brought is still useful.
fn sweep(place: &Path, prefix: &str, own: &Path) {
    let Ok(entries) = fs::read_dir(place) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path == own || !entry.file_name().to_string_lossy().starts_with(prefix) || check_folder(&path).is_err() {
            continue;
        }
        // A folder without a lock file is being created, or was left by a process that was killed at that moment.
        let Ok(lock) = options().write(true).create(true).truncate(false).open(path.join(LOCK)) else { continue };
        if lock.try_lock().is_ok() && is_same(&lock, &path.join(LOCK)) {
            tracing::info!("leftover weights of an ended run are removed: {}", path.display());
            remove(&path);
        }
    }
}

/// Removes a folder whose lock is held exclusively. It is renamed first, so that no other process
/// creates a file in it meanwhile.
fn remove(path: &Path) {
    let gone = path.with_file_name(format!("pacs-{}-gone-{}", user(), std::process::id()));
    let _ = fs::remove_dir_all(&gone);
    if fs::rename(path, &gone).is_ok() {
        let _ = fs::remove_dir_all(&gone);
    }
}

/// Content of a version, for tests.
#[cfg(test)]
pub(crate) fn content(whole: &Whole) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(whole.description.bytes()).expect("small")];
    whole.file.read_exact_at(&mut bytes, 0).expect("it is whole");
    bytes
}

#[cfg(test)]
mod tests;
