//! A server that speaks the hub's HTTP interface, on a port of the loopback interface: listings, files by way of a "CDN", refusals,
//! and the way back. It can be told to fail.

// Each test program uses a part of it.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};

/// Files longer than this are kept outside of Git.
const REGULAR: usize = 1 << 10;

/// The server; it ends with the test's process.
#[derive(Clone)]
pub struct HubServer {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    repos: BTreeMap<String, Repo>,
    /// Bytes that are kept outside of Git, by their digest.
    objects: BTreeMap<String, Vec<u8>>,
    parts: BTreeMap<String, BTreeMap<u64, Vec<u8>>>,
    verified: BTreeSet<String>,
    faults: Vec<Fault>,
    token: Option<String>,
    seen: Vec<Seen>,
    /// Size of the parts of uploads; none: they are whole.
    part_bytes: Option<u64>,
}

#[derive(Clone, Default)]
pub struct Repo {
    pub commits: Vec<(String, BTreeMap<String, Vec<u8>>)>,
    pub refs: BTreeMap<String, String>,
    pub gated: bool,
    pub private: bool,
}

/// A request that arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub line: String,
    pub headers: BTreeMap<String, String>,
}

/// What goes wrong with requests whose line contains `on`.
pub struct Fault {
    pub on: String,
    pub times: usize,
    pub kind: FaultKind,
}

pub enum FaultKind {
    /// This status, and headers.
    Status(u16, &'static str),
    /// The connection is cut after so many bytes of the body.
    Cut(usize),
    /// Nothing is answered for so long.
    Stall(Duration),
    /// One bit of the body is another one.
    Flip,
    /// A body with a byte too many, and a length to match.
    Excess,
    /// The whole file, whatever range is asked for.
    NoRange,
}

struct Asked {
    method: String,
    path: String,
    query: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

pub fn hex(algorithm: &'static ring::digest::Algorithm, bytes: &[u8]) -> String {
    digest(algorithm, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn git_hash(bytes: &[u8]) -> String {
    hex(&SHA1_FOR_LEGACY_USE_ONLY, &[format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat())
}

fn is_lfs(path: &str, bytes: &[u8]) -> bool {
    bytes.len() > REGULAR || path.ends_with(".safetensors") || path.ends_with(".parquet")
}

impl HubServer {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { address: listener.local_addr().unwrap(), state: Arc::default() };
        let own = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let own = own.clone();
                thread::spawn(move || drop(own.serve(stream)));
            }
        });
        server
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Adds a commit to `main` of a repository, `models/owner/name` or `datasets/owner/name`. Returns the commit.
    pub fn commit(&self, repo: &str, files: &[(&str, &[u8])]) -> String {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.to_vec())).collect();
        self.commit_to(repo, "main", files)
    }

    fn commit_to(&self, repo: &str, branch: &str, files: BTreeMap<String, Vec<u8>>) -> String {
        let mut state = self.state.lock().unwrap();
        let number = state.repos.values().map(|repo| repo.commits.len()).sum::<usize>();
        let sha = hex(&SHA1_FOR_LEGACY_USE_ONLY, format!("{repo} {branch} {number}").as_bytes());
        for (path, bytes) in &files {
            if is_lfs(path, bytes) {
                state.objects.insert(hex(&SHA256, bytes), bytes.clone());
            }
        }
        let repo = state.repos.entry(repo.to_owned()).or_default();
        repo.commits.push((sha.clone(), files));
        repo.refs.insert(branch.to_owned(), sha.clone());
        sha
    }

    pub fn change(&self, repo: &str, change: impl FnOnce(&mut Repo)) {
        change(self.state.lock().unwrap().repos.get_mut(repo).unwrap());
    }

    pub fn repo(&self, repo: &str) -> Option<Repo> {
        self.state.lock().unwrap().repos.get(repo).cloned()
    }

    pub fn require_token(&self, token: &str) {
        self.state.lock().unwrap().token = Some(token.to_owned());
    }

    pub fn upload_in_parts_of(&self, bytes: u64) {
        self.state.lock().unwrap().part_bytes = Some(bytes);
    }

    pub fn fault(&self, on: &str, times: usize, kind: FaultKind) {
        self.state.lock().unwrap().faults.push(Fault { on: on.to_owned(), times, kind });
    }

    pub fn verified(&self) -> usize {
        self.state.lock().unwrap().verified.len()
    }

    /// Takes the requests that have arrived since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut stream = stream;
        loop {
            let Some(asked) = read(&mut reader)? else { return Ok(()) };
            let line = format!("{} {}{}", asked.method, asked.path, asked.query);
            self.state.lock().unwrap().seen.push(Seen { line: line.clone(), headers: asked.headers.clone() });
            let fault = self.take_fault(&line);
            if let Some(FaultKind::Status(status, headers)) = fault {
                let headers: Vec<_> = headers.split('\n').filter_map(|line| line.split_once(": ")).collect();
                let headers = headers.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
                write(&mut stream, &Reply { status, headers, body: Vec::new() }, None)?;
                continue;
            }
            if let Some(FaultKind::Stall(time)) = fault {
                thread::sleep(time);
            }
            let ignores_range = matches!(fault, Some(FaultKind::NoRange));
            let mut reply = self.answer(&asked, ignores_range);
            match fault {
                Some(FaultKind::Cut(bytes)) => {
                    write(&mut stream, &reply, Some(bytes))?;
                    return stream.shutdown(std::net::Shutdown::Both);
                }
                Some(FaultKind::Flip) => reply.body[0] ^= 1,
                Some(FaultKind::Excess) => reply.body.push(b'x'),
                _ => {}
            }
            write(&mut stream, &reply, None)?;
        }
    }

    fn take_fault(&self, line: &str) -> Option<FaultKind> {
        let mut state = self.state.lock().unwrap();
        let fault = state.faults.iter_mut().find(|fault| fault.times > 0 && line.contains(&fault.on))?;
        fault.times -= 1;
        Some(match &fault.kind {
            FaultKind::Status(status, headers) => FaultKind::Status(*status, headers),
            FaultKind::Cut(bytes) => FaultKind::Cut(*bytes),
            FaultKind::Stall(time) => FaultKind::Stall(*time),
            FaultKind::Flip => FaultKind::Flip,
            FaultKind::Excess => FaultKind::Excess,
            FaultKind::NoRange => FaultKind::NoRange,
        })
    }

    fn answer(&self, asked: &Asked, ignores_range: bool) -> Reply {
        let parts: Vec<&str> = asked.path.trim_start_matches('/').split('/').collect();
        match (asked.method.as_str(), parts.as_slice()) {
            ("GET", ["api", kind, owner, name, "revision", revision]) => {
                self.listing(asked, &format!("{kind}/{owner}/{name}"), &revision.replace("%2F", "/"))
            }
            ("GET", ["datasets", owner, name, "resolve", commit, path @ ..]) => {
                self.resolve(asked, &format!("datasets/{owner}/{name}"), commit, &path.join("/"), ignores_range)
            }
            ("GET", ["cdn", oid]) => {
                // A signed address needs no token, and must not get one.
                if asked.headers.contains_key("authorization") {
                    return refuse(400, "", "a token was sent to another host");
                }
                let bytes = self.state.lock().unwrap().objects.get(*oid).cloned();
                bytes.map_or_else(|| refuse(404, "", "gone"), |bytes| ranged(asked, bytes, ignores_range, Vec::new()))
            }
            ("GET", [owner, name, "resolve", commit, path @ ..]) => {
                self.resolve(asked, &format!("models/{owner}/{name}"), commit, &path.join("/"), ignores_range)
            }
            ("GET", ["api", "resolve-cache", kind, owner, name, commit, path @ ..]) => {
                self.small(asked, &format!("{kind}/{owner}/{name}"), commit, &path.join("/"), ignores_range)
            }
            ("POST", ["api", "repos", "create"]) => self.create(asked),
            ("POST", ["api", "models", owner, name, "branch", branch]) => {
                self.change(&format!("models/{owner}/{name}"), |repo| {
                    let head = repo.refs.get("main").cloned().unwrap_or_default();
                    repo.refs.entry((*branch).to_owned()).or_insert(head);
                });
                Reply { status: 200, headers: Vec::new(), body: Vec::new() }
            }
            ("POST", ["api", "models", _, _, "preupload", _]) => preupload(asked),
            ("POST", [_, name, "info", "lfs", "objects", "batch"]) if name.ends_with(".git") => self.batch(asked),
            ("PUT", ["upload", oid]) => self.uploaded(asked, oid),
            ("PUT", ["part", oid, number]) => {
                let parts = &mut self.state.lock().unwrap().parts;
                parts.entry((*oid).to_owned()).or_default().insert(number.parse().unwrap(), asked.body.clone());
                Reply { status: 200, headers: vec![("ETag".into(), format!("\"{number}\""))], body: Vec::new() }
            }
            ("POST", ["complete", oid]) => self.completed(asked, oid),
            ("POST", ["verify"]) => self.verify(asked),
            ("POST", ["api", "models", owner, name, "commit", branch]) => {
                self.push(asked, &format!("models/{owner}/{name}"), branch)
            }
            _ => refuse(404, "", "no such address"),
        }
    }

    /// What stands before a repository's files, if something does.
    fn barred(&self, asked: &Asked, repo: &str) -> Result<Repo, Reply> {
        let state = self.state.lock().unwrap();
        let given = asked.headers.get("authorization");
        let is_known = state.token.as_ref().is_some_and(|token| given == Some(&format!("Bearer {token}")));
        if given.is_some() && !is_known {
            return Err(refuse(401, "", "Invalid credentials in Authorization header"));
        }
        match state.repos.get(repo) {
            Some(repo) if !repo.private || is_known => {
                let is_listing = asked.path.starts_with("/api/models/") || asked.path.starts_with("/api/datasets/");
                if repo.gated && !is_listing {
                    return Err(refuse(
                        if is_known { 403 } else { 401 },
                        "GatedRepo",
                        "Access to this repository is restricted",
                    ));
                }
                Ok(repo.clone())
            }
            // As the hub does: strangers are not told which repositories there are.
            _ if is_known => Err(refuse(404, "RepoNotFound", "Repository not found")),
            _ => Err(refuse(401, "", "Invalid username or password.")),
        }
    }

    fn listing(&self, asked: &Asked, repo: &str, revision: &str) -> Reply {
        let repo = match self.barred(asked, repo) {
            Ok(repo) => repo,
            Err(reply) => return reply,
        };
        let commit = repo.refs.get(revision).cloned().unwrap_or_else(|| revision.to_owned());
        let Some((sha, files)) = repo.commits.iter().find(|(sha, _)| *sha == commit) else {
            return refuse(404, "RevisionNotFound", "Invalid rev id");
        };
        let siblings: Vec<Value> = files
            .iter()
            .map(|(path, bytes)| match is_lfs(path, bytes) {
                true => json!({"rfilename": path, "size": bytes.len(), "blobId": git_hash(b"pointer"),
                               "lfs": {"sha256": hex(&SHA256, bytes), "size": bytes.len(), "pointerSize": 135}}),
                false => json!({"rfilename": path, "size": bytes.len(), "blobId": git_hash(bytes)}),
            })
            .collect();
        let body = json!({"id": "x", "sha": sha, "private": repo.private, "gated": repo.gated, "siblings": siblings});
        Reply { status: 200, headers: vec![("X-Repo-Commit".into(), sha.clone())], body: body.to_string().into() }
    }

    fn file(&self, asked: &Asked, repo: &str, commit: &str, path: &str) -> Result<Vec<u8>, Reply> {
        let repo = self.barred(asked, repo)?;
        let commit = repo.commits.iter().find(|(sha, _)| sha == commit);
        let (_, files) = commit.ok_or_else(|| refuse(404, "RevisionNotFound", "Invalid rev id"))?;
        files.get(&path.replace("%20", " ")).cloned().ok_or_else(|| refuse(404, "EntryNotFound", "Entry not found"))
    }

    fn resolve(&self, asked: &Asked, repo: &str, commit: &str, path: &str, ignores_range: bool) -> Reply {
        let bytes = match self.file(asked, repo, commit, path) {
            Ok(bytes) => bytes,
            Err(reply) => return reply,
        };
        let own = ("X-Repo-Commit".to_owned(), commit.to_owned());
        if is_lfs(path, &bytes) {
            let oid = hex(&SHA256, &bytes);
            // By another name it is another host.
            let port = self.address.port();
            let headers = vec![
                own,
                ("X-Linked-Etag".into(), format!("\"{oid}\"")),
                ("X-Linked-Size".into(), bytes.len().to_string()),
                ("Location".into(), format!("http://localhost:{port}/cdn/{oid}?signature=1")),
            ];
            return Reply { status: 302, headers, body: Vec::new() };
        }
        if path == "config.json" {
            let location = format!("/api/resolve-cache/{repo}/{commit}/{path}");
            return Reply { status: 307, headers: vec![own, ("Location".into(), location)], body: Vec::new() };
        }
        let headers = vec![own, ("ETag".into(), format!("\"{}\"", git_hash(&bytes)))];
        ranged(asked, bytes, ignores_range, headers)
    }

    fn small(&self, asked: &Asked, repo: &str, commit: &str, path: &str, ignores_range: bool) -> Reply {
        match self.file(asked, repo, commit, path) {
            Ok(bytes) => ranged(asked, bytes, ignores_range, vec![("X-Repo-Commit".into(), commit.to_owned())]),
            Err(reply) => reply,
        }
    }

    fn may_write(&self, asked: &Asked) -> bool {
        let state = self.state.lock().unwrap();
        state.token.as_ref().is_some_and(|token| asked.headers.get("authorization") == Some(&format!("Bearer {token}")))
    }

    fn create(&self, asked: &Asked) -> Reply {
        if !self.may_write(asked) {
            return refuse(403, "", "You don't have the rights to create a model");
        }
        let body: Value = serde_json::from_slice(&asked.body).unwrap();
        let id = format!("models/{}/{}", body["organization"].as_str().unwrap(), body["name"].as_str().unwrap());
        let mut state = self.state.lock().unwrap();
        if state.repos.contains_key(&id) {
            return refuse(409, "", "You already created this model repo");
        }
        state.repos.insert(id, Repo { private: body["private"] == true, ..Repo::default() });
        Reply { status: 200, headers: Vec::new(), body: b"{}".to_vec() }
    }

    fn batch(&self, asked: &Asked) -> Reply {
        if !self.may_write(asked) {
            return refuse(403, "", "no");
        }
        let body: Value = serde_json::from_slice(&asked.body).unwrap();
        let state = self.state.lock().unwrap();
        let endpoint = self.endpoint();
        let objects: Vec<Value> = body["objects"].as_array().unwrap().iter().map(|object| {
            let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap());
            if state.objects.contains_key(oid) {
                return json!({"oid": oid, "size": size});
            }
            let verify = json!({"href": format!("{endpoint}/verify")});
            let upload = match state.part_bytes {
                None => json!({"href": format!("http://localhost:{}/upload/{oid}", self.address.port()), "header": {"x-kind": "basic"}}),
                Some(part) => {
                    let mut header = json!({"chunk_size": part.to_string()});
                    for number in 1..=size.div_ceil(part) {
                        header[number.to_string()] = json!(format!("{endpoint}/part/{oid}/{number}"));
                    }
                    json!({"href": format!("{endpoint}/complete/{oid}"), "header": header})
                }
            };
            json!({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        }).collect();
        Reply {
            status: 200,
            headers: Vec::new(),
            body: json!({"transfer": "basic", "objects": objects}).to_string().into(),
        }
    }

    fn uploaded(&self, asked: &Asked, oid: &str) -> Reply {
        if asked.headers.contains_key("authorization") {
            return refuse(400, "", "a token was sent to another host");
        }
        if hex(&SHA256, &asked.body) != oid || asked.headers.get("x-kind").map(String::as_str) != Some("basic") {
            return refuse(400, "", "wrong bytes or headers");
        }
        self.state.lock().unwrap().objects.insert(oid.to_owned(), asked.body.clone());
        Reply { status: 200, headers: Vec::new(), body: Vec::new() }
    }

    fn completed(&self, asked: &Asked, oid: &str) -> Reply {
        let body: Value = serde_json::from_slice(&asked.body).unwrap();
        let mut state = self.state.lock().unwrap();
        let parts = state.parts.remove(oid).unwrap();
        let named = body["parts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|part| part["etag"] == format!("\"{}\"", part["partNumber"]))
            .filter(|ok| *ok)
            .count();
        let bytes: Vec<u8> = parts.values().flatten().copied().collect();
        if named != parts.len() || hex(&SHA256, &bytes) != oid {
            return refuse(400, "", "wrong parts");
        }
        state.objects.insert(oid.to_owned(), bytes);
        Reply { status: 200, headers: Vec::new(), body: Vec::new() }
    }

    fn verify(&self, asked: &Asked) -> Reply {
        let body: Value = serde_json::from_slice(&asked.body).unwrap();
        let mut state = self.state.lock().unwrap();
        let oid = body["oid"].as_str().unwrap();
        if state.objects.get(oid).map(|bytes| bytes.len() as u64) != body["size"].as_u64() {
            return refuse(404, "", "it is not there");
        }
        state.verified.insert(oid.to_owned());
        Reply { status: 200, headers: Vec::new(), body: Vec::new() }
    }

    fn push(&self, asked: &Asked, repo: &str, branch: &str) -> Reply {
        use base64::Engine;
        if !self.may_write(asked) {
            return refuse(403, "", "no");
        }
        let mut files = BTreeMap::new();
        for line in asked.body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let line: Value = serde_json::from_slice(line).unwrap();
            let value = &line["value"];
            let path = || value["path"].as_str().unwrap().to_owned();
            match line["key"].as_str().unwrap() {
                "header" => assert!(value["summary"].is_string()),
                "file" => {
                    let content = value["content"].as_str().unwrap();
                    files.insert(path(), base64::engine::general_purpose::STANDARD.decode(content).unwrap());
                }
                "lfsFile" => {
                    let oid = value["oid"].as_str().unwrap();
                    let Some(bytes) = self.state.lock().unwrap().objects.get(oid).cloned() else {
                        return refuse(400, "", "an object that was not uploaded");
                    };
                    files.insert(path(), bytes);
                }
                other => return refuse(400, "", other),
            }
        }
        let sha = self.commit_to(repo, branch, files);
        let url = format!("{}/{}/commit/{sha}", self.endpoint(), repo.trim_start_matches("models/"));
        let body = json!({"success": true, "commitOid": sha, "commitUrl": url});
        Reply { status: 200, headers: Vec::new(), body: body.to_string().into() }
    }
}

fn preupload(asked: &Asked) -> Reply {
    let body: Value = serde_json::from_slice(&asked.body).unwrap();
    let files: Vec<Value> = body["files"].as_array().unwrap().iter().map(|file| {
        let path = file["path"].as_str().unwrap();
        let is_large = file["size"].as_u64().unwrap() > REGULAR as u64 || path.ends_with(".safetensors");
        json!({"path": path, "uploadMode": if is_large { "lfs" } else { "regular" }, "shouldIgnore": path.ends_with(".tmp")})
    }).collect();
    Reply { status: 200, headers: Vec::new(), body: json!({"files": files}).to_string().into() }
}

fn refuse(status: u16, code: &str, message: &str) -> Reply {
    let mut headers = vec![("X-Error-Message".to_owned(), message.to_owned())];
    if !code.is_empty() {
        headers.push(("X-Error-Code".to_owned(), code.to_owned()));
    }
    Reply { status, headers, body: json!({"error": message}).to_string().into() }
}

fn ranged(asked: &Asked, bytes: Vec<u8>, ignores_range: bool, mut headers: Vec<(String, String)>) -> Reply {
    let range = asked.headers.get("range").filter(|_| !ignores_range);
    let start = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match start {
        None => Reply { status: 200, headers, body: bytes },
        Some(start) if start < bytes.len() => {
            headers.push(("Content-Range".into(), format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len())));
            Reply { status: 206, headers, body: bytes[start..].to_vec() }
        }
        Some(_) => refuse(416, "", "no such range"),
    }
}

fn read(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Asked>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let (path, query) = target.split_once('?').map_or((target.as_str(), ""), |(path, query)| (path, query));
    let query = if query.is_empty() { String::new() } else { format!("?{query}") };
    Ok(Some(Asked { method, path: path.to_owned(), query, headers, body }))
}

/// Writes an answer; all of its body, or so many bytes.
fn write(stream: &mut TcpStream, reply: &Reply, most: Option<usize>) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} Said\r\nContent-Length: {}\r\n", reply.status, reply.body.len());
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())?;
    stream.write_all(&reply.body[..most.unwrap_or(usize::MAX).min(reply.body.len())])?;
    stream.flush()
}
