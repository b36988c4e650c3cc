//! Files on their way into the cache.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

use hyper::header::{CONTENT_RANGE, RANGE};
use pacs_spec::{HubKind, HubRepo};

use crate::cache::{RepoCache, create_parent};
use crate::digest::Hasher;
use crate::http::{Answer, Http, Request, Tries, escaped};
use crate::{Entry, HubError, Missing};

/// How far files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The file at work, within its repository.
    pub file: String,
    /// Its bytes that are there.
    pub file_bytes: u64,
    /// All of its bytes.
    pub file_total: u64,
    /// Bytes of all files that are there.
    pub bytes: u64,
    /// Bytes of all files.
    pub total: u64,
}

/// What is done with progress.
pub(crate) type Report<'a> = dyn FnMut(&Progress) + 'a;

/// A repository's commit, whose files are fetched.
pub(crate) struct Fetching<'a> {
    pub(crate) http: &'a Http,
    pub(crate) repo: &'a HubRepo,
    pub(crate) commit: &'a str,
    pub(crate) cache: RepoCache,
}

/// Whether what went wrong with a try is of that try alone, and how long the server asks to wait.
type Failed = (Box<HubError>, Option<Duration>);

impl Fetching<'_> {
    /// Puts files into the snapshot, and fetches those whose bytes are not in the cache.
    pub(crate) async fn files(&self, entries: &[&Entry], report: &mut Report<'_>) -> Result<(), HubError> {
        self.bytes(entries, report).await?;
        entries.iter().try_for_each(|entry| self.cache.link(self.commit, &entry.path, &entry.digest))
    }

    /// Fetches the bytes of files that are not in the cache.
    pub(crate) async fn bytes(&self, entries: &[&Entry], report: &mut Report<'_>) -> Result<(), HubError> {
        let missing: Vec<&Entry> = entries.iter().copied().filter(|entry| !self.has_bytes(entry)).collect();
        // Before the first byte: a full disk after an hour of fetching would also stop whatever else writes there.
        self.check_room(&missing)?;
        let total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let mut bytes: u64 = entries.iter().filter(|entry| self.has_bytes(entry)).map(|entry| entry.bytes).sum();
        for entry in missing {
            let mut seen = |file_bytes: u64| {
                let file = entry.path.clone();
                let file_total = entry.bytes;
                report(&Progress { file, file_bytes, file_total, bytes: bytes + file_bytes, total });
            };
            self.fetch(entry, &mut seen).await?;
            bytes += entry.bytes;
        }
        Ok(())
    }

    fn has_bytes(&self, entry: &Entry) -> bool {
        fs::metadata(self.cache.blob(&entry.digest)).is_ok_and(|blob| blob.is_file() && blob.len() == entry.bytes)
    }

    fn check_room(&self, missing: &[&Entry]) -> Result<(), HubError> {
        let have = |entry: &Entry| fs::metadata(self.incomplete(entry)).map_or(0, |file| file.len().min(entry.bytes));
        let needed: u64 = missing.iter().map(|entry| entry.bytes - have(entry)).sum();
        match self.cache.free_bytes().filter(|free| *free < needed) {
            Some(free) => Err(HubError::DiskFull { path: self.cache.snapshot(self.commit), needed, free }),
            None => Ok(()),
        }
    }

    fn incomplete(&self, entry: &Entry) -> std::path::PathBuf {
        let mut name = self.cache.blob(&entry.digest).into_os_string();
        name.push(".incomplete");
        name.into()
    }

    async fn fetch(&self, entry: &Entry, seen: &mut dyn FnMut(u64)) -> Result<(), HubError> {
        let blob = self.cache.blob(&entry.digest);
        let incomplete = self.incomplete(entry);
        create_parent(&blob)?;
        // Several processes of a host start at once and want the same file; one fetches it, the others wait.
        let _lock = self.cache.lock(&entry.digest, self.http.settings.patience.lock).await?;
        if self.has_bytes(entry) {
            // Another process has fetched it meanwhile.
            return Ok(());
        }
        let mut tries = Tries::default();
        let mut was_wrong = false;
        loop {
            let had = fs::metadata(&incomplete).map_or(0, |file| file.len());
            let (error, asked) = match self.attempt(entry, &incomplete, seen).await {
                Ok(()) => break,
                Err((error, asked)) => (*error, asked),
            };
            match error {
                // What was there from before may have been the wrong half; a whole file that is wrong stays so.
                HubError::Mismatch { .. } if had > 0 && !was_wrong => was_wrong = true,
                error => {
                    if fs::metadata(&incomplete).map_or(0, |file| file.len()) > had {
                        tries.progressed();
                    }
                    self.http.pause(&mut tries, error, asked).await?;
                }
            }
        }
        fs::rename(&incomplete, &blob).map_err(HubError::file("write", &blob))
    }

    /// One request, for what is not there yet.
    async fn attempt(&self, entry: &Entry, path: &Path, seen: &mut dyn FnMut(u64)) -> Result<(), Failed> {
        let opened = File::options().create(true).read(true).write(true).truncate(false).open(path);
        let mut file = opened.map_err(|error| plain(HubError::file("open", path)(error)))?;
        let mut have = file.metadata().map_err(|error| plain(HubError::file("read", path)(error)))?.len();
        if have > entry.bytes {
            have = self.begin_again(&mut file, path)?;
        }
        let mut hasher = entry.digest.hasher(entry.bytes);
        // What is there from an earlier try is digested again: a torn write after a power failure must not survive.
        hasher.update_from(&mut file).map_err(|error| plain(HubError::file("read", path)(error)))?;
        if have < entry.bytes {
            let mut answer = self.ask(entry, have).await?;
            if have > 0 && answer.status != 206 {
                // Servers may send the whole file all the same.
                have = self.begin_again(&mut file, path)?;
                hasher = entry.digest.hasher(entry.bytes);
            }
            self.receive(entry, &mut answer, (&mut file, path, &mut have), &mut hasher, seen).await?;
        }
        // Before the rename, because a name in the cache says that the bytes are whole.
        file.sync_all().map_err(|error| plain(written(path, entry.bytes)(error)))?;
        let found = hasher.hex();
        if found != entry.digest.hex() {
            // Whatever it is, it is not to be continued.
            fs::remove_file(path).map_err(|error| plain(HubError::file("remove", path)(error)))?;
            let expected = entry.digest.hex().to_owned();
            return Err(plain(HubError::Mismatch { file: entry.path.clone(), expected, found }));
        }
        Ok(())
    }

    fn begin_again(&self, file: &mut File, path: &Path) -> Result<u64, Failed> {
        let emptied = file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0)));
        emptied.map_err(|error| plain(HubError::file("write", path)(error)))
    }

    async fn ask(&self, entry: &Entry, have: u64) -> Result<Answer, Failed> {
        let datasets = if self.repo.kind == HubKind::Dataset { "datasets/" } else { "" };
        let id = escaped(&self.repo.id, true);
        let path = escaped(&entry.path, true);
        let url = format!("{}/{datasets}{id}/resolve/{}/{path}", self.http.settings.endpoint, self.commit);
        let mut request = Request::get(url);
        if have > 0 {
            request = request.with(RANGE, format!("bytes={have}-"));
        }
        let answer = self.http.send(request).await.map_err(plain)?;
        let wrong = |message: String| plain(HubError::Answer { host: answer.host.clone(), message });
        // A branch that moves between listing and fetching would mix files of two commits.
        if let Some(commit) = answer.header("x-repo-commit").filter(|commit| *commit != self.commit) {
            return Err(wrong(format!("it sends `{}` of commit {commit:.40} for commit {}", entry.path, self.commit)));
        }
        match answer.status {
            200 => Ok(answer),
            206 => {
                let range = answer.headers.get(CONTENT_RANGE).and_then(|range| range.to_str().ok()).unwrap_or_default();
                if range.starts_with(&format!("bytes {have}-")) {
                    return Ok(answer);
                }
                Err(wrong(format!("it sends `{range:.60}` of `{}` from byte {have} on", entry.path)))
            }
            _ => {
                let asked = Http::asked_pause(&answer);
                let complaint = answer.complaint().await;
                let error = self.http.refusal(self.repo, &Missing::File(entry.path.clone()), complaint);
                Err((Box::new(error), asked))
            }
        }
    }

    async fn receive(
        &self,
        entry: &Entry,
        answer: &mut Answer,
        (file, path, have): (&mut File, &Path, &mut u64),
        hasher: &mut Hasher,
        seen: &mut dyn FnMut(u64),
    ) -> Result<(), Failed> {
        while let Some(chunk) = answer.chunk().await.map_err(plain)? {
            *have += chunk.len() as u64;
            if *have > entry.bytes {
                let message = format!("it sends more of `{}` than the {} bytes that it has", entry.path, entry.bytes);
                // The excess is not written, so that what is there can be continued.
                return Err(plain(HubError::Answer { host: answer.host.clone(), message }));
            }
            file.write_all(&chunk).map_err(|error| plain(written(path, entry.bytes - *have)(error)))?;
            hasher.update(&chunk);
            seen(*have);
        }
        if *have < entry.bytes {
            let reason = format!("`{}` ended after {} of {} bytes", entry.path, *have, entry.bytes);
            return Err(plain(HubError::Unreachable { host: answer.host.clone(), reason }));
        }
        Ok(())
    }
}

/// A failure after which no server asks to wait.
fn plain(error: HubError) -> Failed {
    (Box::new(error), None)
}

/// Why bytes cannot be written.
fn written(path: &Path, needed: u64) -> impl FnOnce(std::io::Error) -> HubError {
    move |error| match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            HubError::DiskFull { path: path.to_owned(), needed, free: 0 }
        }
        _ => HubError::file("write", path)(error),
    }
}
