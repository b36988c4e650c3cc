//! What the hub says of a repository.

use pacs_spec::{HubKind, HubRepo};
use serde::{Deserialize, Serialize};

use crate::http::{Answer, Complaint, Http, Request, Tries, escaped};
use crate::{Digest, HubError, Missing};

/// Longest answer that is not a file: a data set of 100,000 files has less.
const MOST_ANSWER: usize = 64 << 20;

/// The files of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The commit, 40 hexadecimal digits.
    pub commit: String,
    /// All files of the revision.
    pub files: Vec<Entry>,
}

/// One file of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path within the repository, which stays there.
    pub path: String,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// The digest of its bytes.
    pub digest: Digest,
}

/// What the hub calls a listing; also how one is kept in the cache.
#[derive(Debug, Serialize, Deserialize)]
struct RawListing {
    sha: String,
    #[serde(default)]
    siblings: Vec<RawEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RawEntry {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default, rename = "blobId")]
    blob_id: Option<String>,
    #[serde(default)]
    lfs: Option<RawLfs>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RawLfs {
    sha256: String,
    size: u64,
}

impl Listing {
    /// Reads the hub's JSON.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let raw: RawListing = serde_json::from_str(text).map_err(|error| format!("no listing of files: {error}"))?;
        if !matches!(Digest::of_hex(&raw.sha), Some(Digest::Git(_))) {
            return Err(format!("`{:.80}` is no commit", raw.sha));
        }
        let mut files = Vec::with_capacity(raw.siblings.len());
        for RawEntry { rfilename: path, size, blob_id, lfs } in raw.siblings {
            if !stays_inside(&path) {
                return Err(format!("it lists the file `{path:.200}`, which is no path within a repository"));
            }
            let (bytes, digest) = match lfs {
                Some(lfs) => (Some(lfs.size), Digest::of_hex(&lfs.sha256)),
                None => (size, blob_id.as_deref().and_then(Digest::of_hex)),
            };
            let (Some(bytes), Some(digest)) = (bytes, digest) else {
                return Err(format!("it says no size or digest of `{path:.200}`"));
            };
            files.push(Entry { path, bytes, digest });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self { commit: raw.sha, files })
    }

    /// The JSON that [`Listing::parse`] reads.
    pub(crate) fn to_json(&self) -> String {
        let entry = |entry: &Entry| {
            let (blob_id, lfs) = match &entry.digest {
                Digest::Git(hex) => (Some(hex.clone()), None),
                Digest::Sha256(hex) => (None, Some(RawLfs { sha256: hex.clone(), size: entry.bytes })),
            };
            RawEntry { rfilename: entry.path.clone(), size: Some(entry.bytes), blob_id, lfs }
        };
        let raw = RawListing { sha: self.commit.clone(), siblings: self.files.iter().map(entry).collect() };
        serde_json::to_string(&raw).expect("texts and numbers are JSON")
    }
}

/// Whether a path of a repository stays in a folder that it is put into.
fn stays_inside(path: &str) -> bool {
    path.len() <= 1024
        && !path.contains(['\\', '\0'])
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// The hub's name for kinds of repositories in paths of its interface.
pub(crate) fn plural(kind: HubKind) -> &'static str {
    match kind {
        HubKind::Model => "models",
        HubKind::Dataset => "datasets",
    }
}

impl Http {
    /// What lies beneath the interface's path of a repository.
    pub(crate) fn api(&self, repo: &HubRepo, rest: &str) -> String {
        format!("{}/api/{}/{}/{rest}", self.settings.endpoint, plural(repo.kind), escaped(&repo.id, true))
    }

    /// The files of a revision.
    pub(crate) async fn listing(&self, repo: &HubRepo, revision: &str) -> Result<Listing, HubError> {
        let url = self.api(repo, &format!("revision/{}?blobs=true", escaped(revision, false)));
        let (host, text) = self.asking_text(repo, &Missing::Revision, || Request::get(url.clone())).await?;
        Listing::parse(&text).map_err(|message| HubError::Answer { host, message })
    }

    /// Asks until there is an answer that is none of a passing failure; `what` is missing when the hub says only that something is.
    pub(crate) async fn asking(
        &self,
        repo: &HubRepo,
        what: &Missing,
        request: impl Fn() -> Request,
    ) -> Result<Answer, HubError> {
        let mut tries = Tries::default();
        loop {
            let (error, asked) = match self.send(request()).await {
                Ok(answer) if answer.status < 300 => return Ok(answer),
                Ok(answer) => {
                    let asked = Self::asked_pause(&answer);
                    (self.refusal(repo, what, answer.complaint().await), asked)
                }
                Err(error) => (error, None),
            };
            self.pause(&mut tries, error, asked).await?;
        }
    }

    /// Asks as [`Http::asking`] does, and reads the answer: one that breaks off is asked for again. Returns who answered, and what.
    pub(crate) async fn asking_text(
        &self,
        repo: &HubRepo,
        what: &Missing,
        request: impl Fn() -> Request,
    ) -> Result<(String, String), HubError> {
        let mut tries = Tries::default();
        loop {
            let answer = self.asking(repo, what, &request).await?;
            let host = answer.host.clone();
            match answer.text(MOST_ANSWER).await {
                Ok(text) => return Ok((host, text)),
                Err(error) => self.pause(&mut tries, error, None).await?,
            }
        }
    }

    /// What a refusal means.
    pub(crate) fn refusal(&self, repo: &HubRepo, what: &Missing, complaint: Complaint) -> HubError {
        let Complaint { status, code, message, host } = complaint;
        let has_token = self.settings.token.is_some();
        let endpoint = self.settings.endpoint.clone();
        let missing =
            |missing| HubError::NotFound { repo: repo.clone(), missing, endpoint: endpoint.clone(), has_token };
        match (status, code.as_str()) {
            (_, "GatedRepo") => {
                HubError::Gated { repo: repo.clone(), page: HubError::page(&endpoint, repo), has_token }
            }
            (_, "RepoNotFound") => missing(Missing::Repo),
            (_, "RevisionNotFound") => missing(Missing::Revision),
            (_, "EntryNotFound") | (404, _) => missing(what.clone()),
            // Without a token the hub says so of repositories that are not there, too.
            (401, _) if !has_token => missing(Missing::Repo),
            (401 | 403, _) => HubError::Denied { repo: repo.clone(), status, message },
            (408 | 425 | 429 | 500..=599, _) => HubError::Busy { host, status, message },
            _ => HubError::Answer { host, message: format!("status {status}: {message}") },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn listings_are_read_and_kept() {
        let sha256 = "a".repeat(64);
        let text = format!(
            r#"{{"sha": "{SHA}", "gated": false, "siblings": [
                {{"rfilename": "model.safetensors", "size": 135, "blobId": "{SHA}", "lfs": {{"sha256": "{sha256}", "size": 1000, "pointerSize": 135}}}},
                {{"rfilename": "a/config.json", "size": 7, "blobId": "{SHA}"}}]}}"#
        );
        let listing = Listing::parse(&text).expect("a listing");
        let seen: Vec<_> = listing.files.iter().map(|e| (e.path.as_str(), e.bytes, e.digest.hex())).collect();
        assert_eq!(seen, [("a/config.json", 7, SHA), ("model.safetensors", 1000, sha256.as_str())]);
        assert_eq!(Listing::parse(&listing.to_json()), Ok(listing));
    }

    #[test]
    fn listings_that_lead_elsewhere_are_refused() {
        let with = |path: &str| {
            format!(r#"{{"sha": "{SHA}", "siblings": [{{"rfilename": {path:?}, "size": 1, "blobId": "{SHA}"}}]}}"#)
        };
        for path in ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "a\\b"] {
            assert!(Listing::parse(&with(path)).is_err_and(|error| error.contains("no path within")), "{path}");
        }
        assert!(Listing::parse(r#"{"sha": "../x", "siblings": []}"#).is_err_and(|error| error.contains("no commit")));
        assert!(Listing::parse("<html>").is_err());
        let unsized_file = format!(r#"{{"sha": "{SHA}", "siblings": [{{"rfilename": "a"}}]}}"#);
        assert!(Listing::parse(&unsized_file).is_err_and(|error| error.contains("no size or digest")));
    }
}
