//! The hub's cache on this machine, in the layout that all programs of the hub share:
//!
//! ```text
//! models--owner--name/
//!   refs/main                   the commit of a revision
//!   blobs/<digest>              the bytes of a file; <digest>.incomplete while they arrive
//!   snapshots/<commit>/…        a link to its blob for each file
//!   pacs/<commit>.json          which files the commit has (ours; others pass it over)
//! .locks/models--owner--name/<digest>.lock
//! ```

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pacs_spec::{HubRepo, snapshot_of};

use crate::api::plural;
use crate::{Digest, HubError, Listing, Settings};

/// Between two looks at a lock of another process.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// The part of the cache that is of one repository.
#[derive(Clone, Debug)]
pub(crate) struct RepoCache {
    root: PathBuf,
    name: String,
}

impl RepoCache {
    pub(crate) fn new(root: &Path, repo: &HubRepo) -> Self {
        let name = format!("{}--{}", plural(repo.kind), repo.id.replace('/', "--"));
        Self { root: root.to_owned(), name }
    }

    fn folder(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    /// The folder of a commit's files.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        self.folder().join("blobs").join(digest.hex())
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.folder().join("refs").join(revision)
    }

    /// The commit that a revision was when it was asked for the last time.
    pub(crate) fn commit_of(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.reference(revision)).ok()?;
        let commit = text.trim();
        // Other programs write this file, too, and a torn or foreign one must not become a path.
        matches!(Digest::of_hex(commit), Some(Digest::Git(_))).then(|| commit.to_owned())
    }

    pub(crate) fn note_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        self.replace(&self.reference(revision), commit)
    }

    /// The files of a commit, as they were listed when one of them was fetched here.
    pub(crate) fn listing(&self, commit: &str) -> Option<Listing> {
        let text = fs::read_to_string(self.listing_path(commit)).ok()?;
        Listing::parse(&text).ok().filter(|listing| listing.commit == commit)
    }

    pub(crate) fn note_listing(&self, listing: &Listing) -> Result<(), HubError> {
        self.replace(&self.listing_path(&listing.commit), &listing.to_json())
    }

    fn listing_path(&self, commit: &str) -> PathBuf {
        self.folder().join("pacs").join(format!("{commit}.json"))
    }

    /// Whether the snapshot has a file, and its bytes are there.
    pub(crate) fn has(&self, commit: &str, path: &str) -> bool {
        self.snapshot(commit).join(path).is_file()
    }

    /// Files of a snapshot, as paths within the repository, in order.
    pub(crate) fn files(&self, commit: &str) -> Vec<String> {
        let root = self.snapshot(commit);
        let mut open = vec![root.clone()];
        let mut found = Vec::new();
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                // A link to a folder is none of the hub's.
                match path.symlink_metadata() {
                    Ok(metadata) if metadata.is_dir() => open.push(path),
                    Ok(_) if path.is_file() => {
                        found.extend(path.strip_prefix(&root).ok().and_then(Path::to_str).map(str::to_owned));
                    }
                    _ => {}
                }
            }
        }
        found.sort();
        found
    }

    /// Puts a file of a commit into its snapshot.
    pub(crate) fn link(&self, commit: &str, path: &str, digest: &Digest) -> Result<(), HubError> {
        let link = self.snapshot(commit).join(path);
        if link.is_file() {
            return Ok(());
        }
        create_parent(&link)?;
        // From the file's own folder up to that of the repository.
        let up = "../".repeat(path.split('/').count() + 1);
        let target = format!("{up}blobs/{}", digest.hex());
        let made = symlink(&target, &link).or_else(|error| match error.kind() {
            ErrorKind::AlreadyExists if link.is_file() => Ok(()),
            // A link to bytes that are gone.
            ErrorKind::AlreadyExists => fs::remove_file(&link).and_then(|()| symlink(&target, &link)),
            _ => Err(error),
        });
        made.map_err(HubError::file("link", &link))
    }

    /// Waits until no other process fetches these bytes; the lock ends with what is returned.
    pub(crate) async fn lock(&self, digest: &Digest, patience: Duration) -> Result<File, HubError> {
        let path = self.root.join(".locks").join(&self.name).join(format!("{}.lock", digest.hex()));
        create_parent(&path)?;
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(HubError::file("open", &path))?;
        let began = Instant::now();
        // By polling: a blocking lock would hold a thread of the runtime for as long as the other process fetches.
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(HubError::file("lock", &path)(error)),
                Err(TryLockError::WouldBlock) if began.elapsed() >= patience => {
                    return Err(HubError::Locked { path, seconds: patience.as_secs() });
                }
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Bytes that the disk of the cache has free; none where that cannot be said.
    pub(crate) fn free_bytes(&self) -> Option<u64> {
        // The cache may not exist yet; the disk is that of its nearest ancestor.
        let there = self.root.ancestors().find(|folder| folder.exists())?;
        let room = rustix::fs::statvfs(there).ok()?;
        room.f_bavail.checked_mul(room.f_frsize)
    }

    /// Writes a small file so that it is there as a whole or not at all.
    fn replace(&self, path: &Path, text: &str) -> Result<(), HubError> {
        if fs::read_to_string(path).is_ok_and(|known| known == text) {
            return Ok(());
        }
        create_parent(path)?;
        write_whole(path, text).map_err(HubError::file("write", path))
    }
}

/// Writes a file under another name first.
pub(crate) fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let unfinished = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let mut file = File::create(&unfinished)?;
    // Synced before the rename: otherwise a power failure may leave the new name with no content.
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all())?;
    fs::rename(&unfinished, path)
}

pub(crate) fn create_parent(path: &Path) -> Result<(), HubError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(HubError::file("create", parent))
}

/// The folder or file that a job's path means on this machine: the path itself where it is there. A snapshot that lies in another
/// machine's cache is looked for in the cache of this one, by repository and commit; workers fetch nothing.
///
/// # Errors
/// When the environment's settings cannot be read, or the snapshot is in neither.
pub fn snapshot_here(path: &Path) -> Result<PathBuf, HubError> {
    if path.exists() {
        return Ok(path.to_owned());
    }
    let Some(snapshot) = path.to_str().and_then(snapshot_of) else { return Ok(path.to_owned()) };
    snapshot_in(&Settings::from_env()?.cache, snapshot, path)
}

fn snapshot_in(cache: &Path, snapshot: &str, path: &Path) -> Result<PathBuf, HubError> {
    let own = cache.join(snapshot);
    if own.exists() {
        return Ok(own);
    }
    let message = format!(
        "the coordinator took it from the hub into its cache, and this machine has it neither there nor in `{}`; share the cache \
         (HF_HOME), or bring the same commit with `pacs fetch`",
        own.display()
    );
    Err(HubError::File { doing: "read", path: path.to_owned(), error: io::Error::new(ErrorKind::NotFound, message) })
}

#[cfg(test)]
mod tests {
    use pacs_spec::HubKind;

    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn repo(kind: HubKind) -> HubRepo {
        HubRepo { kind, id: "o/n".to_owned(), revision: None }
    }

    #[test]
    fn names_of_the_cache_are_those_of_the_hub() {
        let root = Path::new("/c");
        assert_eq!(RepoCache::new(root, &repo(HubKind::Model)).snapshot("s"), Path::new("/c/models--o--n/snapshots/s"));
        let data = RepoCache::new(root, &repo(HubKind::Dataset));
        assert_eq!(data.reference("refs/pr/1"), Path::new("/c/datasets--o--n/refs/refs/pr/1"));
    }

    #[test]
    fn links_lead_to_their_blobs_from_every_depth() {
        let root = tempfile::tempdir().expect("a folder");
        let cache = RepoCache::new(root.path(), &repo(HubKind::Model));
        let digest = Digest::of_hex(COMMIT).expect("a digest");
        for path in ["a.json", "x/y/b.json"] {
            cache.link(COMMIT, path, &digest).expect("linked");
            assert!(!cache.has(COMMIT, path), "its bytes are not there yet");
        }
        create_parent(&cache.blob(&digest)).expect("created");
        fs::write(cache.blob(&digest), "{}").expect("written");
        for path in ["a.json", "x/y/b.json"] {
            cache.link(COMMIT, path, &digest).expect("linked again");
            assert_eq!(fs::read_to_string(cache.snapshot(COMMIT).join(path)).expect("read"), "{}");
        }
        assert_eq!(cache.files(COMMIT), ["a.json", "x/y/b.json"]);
    }

    #[test]
    fn another_machines_snapshot_is_found_here() {
        let root = tempfile::tempdir().expect("a folder");
        let there = PathBuf::from(format!("/login/hub/models--o--n/snapshots/{COMMIT}"));
        let part = snapshot_of(there.to_str().expect("a text")).expect("a snapshot");
        let missing = snapshot_in(root.path(), part, &there).expect_err("not there").to_string();
        assert!(missing.contains("pacs fetch") && missing.contains("/login/hub"), "{missing}");
        fs::create_dir_all(root.path().join(part)).expect("created");
        assert_eq!(snapshot_in(root.path(), part, &there).expect("found"), root.path().join(part));
        assert_eq!(snapshot_here(Path::new("no/such/model")).expect("left as it is"), Path::new("no/such/model"));
    }

    #[test]
    fn a_lock_is_waited_for_up_to_a_deadline() {
        let root = tempfile::tempdir().expect("a folder");
        let cache = RepoCache::new(root.path(), &repo(HubKind::Model));
        let digest = Digest::of_hex(COMMIT).expect("a digest");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let held = cache.lock(&digest, Duration::ZERO).await.expect("free");
            let refused = cache.lock(&digest, Duration::ZERO).await.expect_err("held");
            assert!(matches!(refused, HubError::Locked { .. }) && refused.is_transient(), "{refused}");
            drop(held);
            cache.lock(&digest, Duration::ZERO).await.expect("free again");
        });
    }
}
