//! A folder on its way to the hub: the repository is made, the hub says which files it keeps outside of Git, those are uploaded, and one
//! commit names all of them.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::Method;
use hyper::header::{ACCEPT, ETAG, HeaderName};
use pacs_spec::{HubKind, HubRepo};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::digest::sha256_of;
use crate::http::{Answer, Http, Payload, Request, Tries};
use crate::{Hub, HubError, Missing, Progress};

/// Bytes of a file by which the hub decides how it keeps it.
const SAMPLE: usize = 512;

/// Files that are asked about in one request.
const BATCH: usize = 256;

/// Longest file that goes into a commit itself; the hub wants longer ones outside of Git.
const MOST_INLINE: u64 = 100 << 20;

const JSON: &str = "application/json";
const LFS: &str = "application/vnd.git-lfs+json";

/// What is pushed, and where to.
#[derive(Clone, Debug)]
pub struct PushOptions {
    /// The folder. Its files go to the top of the repository; files and folders whose names begin with a dot stay.
    pub folder: PathBuf,
    /// The repository, of models, and its branch.
    pub repo: HubRepo,
    /// Make the repository private, if it is not there yet.
    pub private: bool,
    /// What the commit says.
    pub message: String,
    /// Change nothing: say what would be pushed.
    pub dry_run: bool,
}

/// What was pushed, or would be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Path and length of each file.
    pub files: Vec<(String, u64)>,
    /// Bytes that were uploaded outside of Git; the hub may have had the others.
    pub uploaded: u64,
    /// The commit, and its page; none after a dry run, or where the hub has all of it already.
    pub commit: Option<(String, String)>,
}

/// One file of the folder.
struct Local {
    name: String,
    path: PathBuf,
    bytes: u64,
}

/// Pushes a folder.
///
/// # Errors
/// [`HubError`]; the repository is as it was before, or the commit is there as a whole.
pub async fn push(hub: &Hub, options: &PushOptions, report: &mut dyn FnMut(&Progress)) -> Result<Pushed, HubError> {
    let pushing = Pushing { http: &hub.http, options, branch: options.repo.revision() };
    let files = pushing.local_files()?;
    let listed = files.iter().map(|file| (file.name.clone(), file.bytes)).collect();
    // Before the checks of token and network, so that a dry run works on any machine.
    if options.dry_run {
        return Ok(Pushed { files: listed, uploaded: 0, commit: None });
    }
    if hub.http.settings.offline {
        let message = "nothing can be pushed while it is set".to_owned();
        return Err(HubError::Setting { what: "HF_HUB_OFFLINE".to_owned(), message });
    }
    if hub.http.settings.token.is_none() {
        let message = "a push takes a token that may write".to_owned();
        return Err(HubError::Setting { what: "HF_TOKEN".to_owned(), message });
    }
    // Each step can be repeated: what exists already is no error, so a push that was interrupted is started again as a whole.
    pushing.create_repo().await?;
    pushing.create_branch().await?;
    let outside = pushing.kept_outside(&files).await?;
    let mut digests = HashMap::new();
    for file in files.iter().filter(|file| outside.get(&file.name) == Some(&Mode::Lfs)) {
        let (oid, bytes) = sha256_of(&file.path).map_err(HubError::file("read", &file.path))?;
        digests.insert(file.name.clone(), (oid, bytes));
    }
    let uploaded = pushing.upload(&files, &digests, report).await?;
    let kept: Vec<&Local> = files.iter().filter(|file| outside.get(&file.name) != Some(&Mode::Ignored)).collect();
    let commit = pushing.commit(&kept, &digests).await?;
    Ok(Pushed { files: listed, uploaded, commit: Some(commit) })
}

/// How the hub keeps a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Regular,
    Lfs,
    Ignored,
}

#[derive(Deserialize)]
struct Preupload {
    files: Vec<PreuploadFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PreuploadFile {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
}

#[derive(Deserialize)]
struct Batch {
    objects: Vec<BatchObject>,
}

#[derive(Deserialize)]
struct BatchObject {
    oid: String,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<BatchError>,
}

#[derive(Deserialize)]
struct BatchError {
    message: String,
}

#[derive(Deserialize)]
struct Actions {
    upload: Option<Action>,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Committed {
    commit_oid: String,
    commit_url: String,
}

struct Pushing<'a> {
    http: &'a Http,
    options: &'a PushOptions,
    branch: &'a str,
}

impl Pushing<'_> {
    fn repo(&self) -> &HubRepo {
        &self.options.repo
    }

    /// The files of the folder, by name.
    fn local_files(&self) -> Result<Vec<Local>, HubError> {
        let root = &self.options.folder;
        let mut open = vec![root.clone()];
        let mut files = Vec::new();
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(&folder).map_err(HubError::file("list", &folder))? {
                let path = entry.map_err(HubError::file("list", &folder))?.path();
                // Links of a cache lead to the files themselves.
                let metadata = fs::metadata(&path).map_err(HubError::file("read", &path))?;
                let inside = path.strip_prefix(root).ok().and_then(Path::to_str).map(str::to_owned);
                let name = inside.ok_or_else(|| {
                    let error = std::io::Error::other("its name is no UTF-8 text");
                    HubError::File { doing: "name", path: path.clone(), error }
                })?;
                match path.file_name() {
                    Some(own) if own.to_string_lossy().starts_with('.') => {}
                    _ if metadata.is_dir() => open.push(path),
                    _ => files.push(Local { name, path, bytes: metadata.len() }),
                }
            }
        }
        // The order of a folder differs between file systems; commits of the same folder should not.
        files.sort_by(|a, b| a.name.cmp(&b.name));
        // Guards against pushing a checkpoint folder: its optimizer state is six times the model, and useless on the hub.
        if files.iter().any(|file| file.name == "config.json") {
            return Ok(files);
        }
        let error = std::io::Error::other("it has no config.json; push the `model` folder of a checkpoint");
        Err(HubError::File { doing: "use model folder", path: root.clone(), error })
    }

    async fn create_repo(&self) -> Result<(), HubError> {
        let (owner, name) = self.repo().id.split_once('/').unwrap_or(("", &self.repo().id));
        let mut body = json!({"name": name, "type": "model", "private": self.options.private});
        if !owner.is_empty() {
            body["organization"] = json!(owner);
        }
        let url = format!("{}/api/repos/create", self.http.settings.endpoint);
        let text = body.to_string();
        self.post_unless_there(|| Request::post(url.clone(), text.clone(), JSON)).await
    }

    async fn create_branch(&self) -> Result<(), HubError> {
        if self.branch == "main" {
            return Ok(());
        }
        let url = self.http.api(self.repo(), &format!("branch/{}", crate::http::escaped(self.branch, false)));
        self.post_unless_there(|| Request::post(url.clone(), "{}".to_owned(), JSON)).await
    }

    /// Makes something on the hub, which may be there already.
    async fn post_unless_there(&self, request: impl Fn() -> Request) -> Result<(), HubError> {
        const CONFLICT: u16 = 409;
        let mut tries = Tries::default();
        loop {
            let error = match self.http.send(request()).await {
                Ok(answer) if answer.status < 300 || answer.status == CONFLICT => return Ok(()),
                Ok(answer) => self.http.refusal(self.repo(), &Missing::Repo, answer.complaint().await),
                Err(error) => error,
            };
            self.http.pause(&mut tries, error, None).await?;
        }
    }

    /// How the hub keeps each file.
    async fn kept_outside(&self, files: &[Local]) -> Result<HashMap<String, Mode>, HubError> {
        let url = self.http.api(self.repo(), &format!("preupload/{}", crate::http::escaped(self.branch, false)));
        let mut modes = HashMap::new();
        // With a sample of each file, because the hub decides by content and size, and not by the name alone.
        for files in files.chunks(BATCH) {
            let mut listed = Vec::new();
            for file in files {
                let mut sample = Vec::new();
                let read = File::open(&file.path).and_then(|open| open.take(SAMPLE as u64).read_to_end(&mut sample));
                read.map_err(HubError::file("read", &file.path))?;
                listed.push(json!({"path": file.name, "size": file.bytes, "sample": STANDARD.encode(&sample)}));
            }
            let text = json!({"files": listed}).to_string();
            let found: Preupload = self.ask(|| Request::post(url.clone(), text.clone(), JSON)).await?;
            for file in found.files {
                let mode = match (file.should_ignore, file.upload_mode.as_str()) {
                    (true, _) => Mode::Ignored,
                    (false, "lfs") => Mode::Lfs,
                    (false, _) => Mode::Regular,
                };
                modes.insert(file.path, mode);
            }
        }
        let long = files.iter().find(|f| f.bytes > MOST_INLINE && modes.get(&f.name) != Some(&Mode::Lfs));
        match long.filter(|file| modes.get(&file.name) != Some(&Mode::Ignored)) {
            Some(file) => Err(HubError::Answer {
                host: self.http.settings.endpoint.clone(),
                message: format!("it wants the {} bytes of `{}` within the commit", file.bytes, file.name),
            }),
            None => Ok(modes),
        }
    }

    /// Uploads the files that are kept outside of Git, those that the hub lacks. Returns how many bytes that were.
    async fn upload(
        &self,
        files: &[Local],
        digests: &HashMap<String, (String, u64)>,
        report: &mut dyn FnMut(&Progress),
    ) -> Result<u64, HubError> {
        let large: Vec<&Local> = files.iter().filter(|file| digests.contains_key(&file.name)).collect();
        let total = large.iter().map(|file| file.bytes).sum();
        let url = format!("{}/{}.git/info/lfs/objects/batch", self.http.settings.endpoint, self.repo().id);
        let mut bytes = 0;
        let mut uploaded = 0;
        for files in large.chunks(BATCH) {
            let objects: Vec<_> =
                files.iter().map(|file| json!({"oid": digests[&file.name].0, "size": digests[&file.name].1})).collect();
            let text = json!({
                "operation": "upload",
                "transfers": ["basic", "multipart"],
                "objects": objects,
                "hash_algo": "sha256",
                "ref": {"name": self.branch},
            })
            .to_string();
            let batch: Batch = self.ask(|| Request::post(url.clone(), text.clone(), LFS).with(ACCEPT, LFS)).await?;
            for file in files {
                let (oid, size) = &digests[&file.name];
                let object = batch.objects.iter().find(|object| object.oid == *oid);
                let object = object.ok_or_else(|| self.odd(format!("it does not mention `{}`", file.name)))?;
                if let Some(error) = &object.error {
                    return Err(self.odd(format!("it refuses `{}`: {:.200}", file.name, error.message)));
                }
                if let Some(upload) = object.actions.as_ref().and_then(|actions| actions.upload.as_ref()) {
                    let mut seen = |file_bytes: u64| {
                        let name = file.name.clone();
                        let file_total = *size;
                        report(&Progress { file: name, file_bytes, file_total, bytes: bytes + file_bytes, total });
                    };
                    self.upload_one(file, upload, (oid, *size), &mut seen).await?;
                    uploaded += size;
                }
                if let Some(verify) = object.actions.as_ref().and_then(|actions| actions.verify.as_ref()) {
                    let text = json!({"oid": oid, "size": size}).to_string();
                    self.post(|| Request::post(verify.href.clone(), text.clone(), LFS)).await?;
                }
                bytes += size;
            }
        }
        Ok(uploaded)
    }

    /// Uploads one file: as a whole, or in the parts that the hub asks for.
    async fn upload_one(
        &self,
        file: &Local,
        action: &Action,
        (oid, size): (&str, u64),
        seen: &mut dyn FnMut(u64),
    ) -> Result<(), HubError> {
        let Some(chunk) = number(action.header.get("chunk_size")) else {
            self.put(file, &action.href, (0, size), &headers(&action.header)).await?;
            seen(size);
            return Ok(());
        };
        if chunk == 0 {
            return Err(self.odd("it wants parts of 0 bytes".to_owned()));
        }
        let mut parts = Vec::new();
        for number in 1..=size.div_ceil(chunk) {
            let url = action.header.get(&number.to_string()).or_else(|| action.header.get(&format!("{number:05}")));
            let url = url
                .and_then(|url| url.as_str())
                .ok_or_else(|| self.odd(format!("it names no place for part {number}")))?;
            let start = (number - 1) * chunk;
            let length = chunk.min(size - start);
            let answer = self.put(file, url, (start, length), &[]).await?;
            let etag = answer.headers.get(ETAG).and_then(|etag| etag.to_str().ok()).unwrap_or_default().to_owned();
            parts.push(json!({"partNumber": number, "etag": etag}));
            seen(start + length);
        }
        let text = json!({"oid": oid, "parts": parts}).to_string();
        self.post(|| Request::post(action.href.clone(), text.clone(), LFS)).await.map(drop)
    }

    async fn put(
        &self,
        file: &Local,
        url: &str,
        (start, length): (u64, u64),
        headers: &[(HeaderName, String)],
    ) -> Result<Answer, HubError> {
        let request = || Request {
            method: Method::PUT,
            url: url.to_owned(),
            headers: headers.to_vec(),
            payload: Payload::part(file.path.clone(), start, length),
            follows: false,
        };
        self.post(request).await
    }

    /// Commits all files. Returns the commit and its page.
    async fn commit(
        &self,
        files: &[&Local],
        digests: &HashMap<String, (String, u64)>,
    ) -> Result<(String, String), HubError> {
        let header = json!({"key": "header", "value": {"summary": self.options.message, "description": ""}});
        let mut text = format!("{header}\n");
        for file in files {
            let line = match digests.get(&file.name) {
                Some((oid, size)) => json!({
                    "key": "lfsFile",
                    "value": {"path": file.name, "algo": "sha256", "oid": oid, "size": size},
                }),
                // At most `MOST_INLINE` bytes, which was checked, so it may be in memory as a whole.
                None => {
                    let content = fs::read(&file.path).map_err(HubError::file("read", &file.path))?;
                    let content = STANDARD.encode(content);
                    json!({"key": "file", "value": {"path": file.name, "content": content, "encoding": "base64"}})
                }
            };
            text.push_str(&format!("{line}\n"));
        }
        let url = self.http.api(self.repo(), &format!("commit/{}", crate::http::escaped(self.branch, false)));
        // A commit whose answer was lost is made again, with the same files.
        let committed: Committed =
            self.ask(|| Request::post(url.clone(), text.clone(), "application/x-ndjson")).await?;
        Ok((committed.commit_oid, committed.commit_url))
    }

    async fn post(&self, request: impl Fn() -> Request) -> Result<Answer, HubError> {
        self.http.asking(self.repo(), &Missing::Revision, request).await
    }

    async fn ask<T: DeserializeOwned>(&self, request: impl Fn() -> Request) -> Result<T, HubError> {
        let (host, text) = self.http.asking_text(self.repo(), &Missing::Revision, request).await?;
        serde_json::from_str(&text)
            .map_err(|error| HubError::Answer { host, message: format!("its answer is not the one expected: {error}") })
    }

    fn odd(&self, message: String) -> HubError {
        HubError::Answer { host: self.http.settings.endpoint.clone(), message }
    }
}

fn number(value: Option<&serde_json::Value>) -> Option<u64> {
    let value = value?;
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// The headers that the hub wants to be sent with a file.
fn headers(given: &BTreeMap<String, serde_json::Value>) -> Vec<(HeaderName, String)> {
    let header = |(name, value): (&String, &serde_json::Value)| Some((name.parse().ok()?, value.as_str()?.to_owned()));
    given.iter().filter_map(header).collect()
}

impl Hub {
    /// A repository of models from its name, for a push.
    ///
    /// # Errors
    /// When it is no `owner/name`, or its revision is a commit, which cannot be pushed to.
    pub fn target(name: &str, branch: Option<&str>) -> Result<HubRepo, HubError> {
        let whole = branch.map_or_else(|| name.to_owned(), |branch| format!("{name}@{branch}"));
        let repo = match HubRepo::of_model(Path::new(&whole)) {
            Some(Ok(repo)) if repo.id.contains('/') && repo.kind == HubKind::Model => repo,
            Some(Err(message)) => return Err(HubError::Name(message)),
            _ => return Err(HubError::Name(format!("`{whole}` is not a name of the hub, such as `owner/name`"))),
        };
        if repo.is_pinned() {
            return Err(HubError::Name(format!("`{repo}` is a commit; a push takes a branch")));
        }
        Ok(repo)
    }
}
