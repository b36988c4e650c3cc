//! The hub's client against a server that speaks the hub's interface.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pacs_hub::{Hub, HubError, Missing, Part, Patience, Progress, PushOptions, Settings, Token, push};
use pacs_spec::{HubData, HubRepo};
use support::{FaultKind, HubServer};

const MODEL: &str = "models/o/tiny";
const DATA: &str = "datasets/o/sums";

/// A cache, and the hub as a process with that cache sees it.
struct Client {
    folder: tempfile::TempDir,
    settings: Settings,
    said: Vec<String>,
    progress: Vec<Progress>,
}

impl Client {
    fn of(server: &HubServer) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("hub");
        let patience = Patience {
            connect: Duration::from_secs(20),
            answer: Duration::from_secs(20),
            silence: Duration::from_secs(20),
            tries: 3,
            pause: Duration::from_millis(5),
            lock: Duration::from_secs(20),
        };
        let settings = Settings {
            endpoint: server.endpoint(),
            cache,
            token: None,
            offline: false,
            proxy: None,
            no_proxy: Vec::new(),
            authorities: None,
            patience,
        };
        Self { folder, settings, said: Vec::new(), progress: Vec::new() }
    }

    fn with_token(mut self, token: &str) -> Self {
        self.settings.token = Token::new(token);
        self
    }

    fn run<T>(&mut self, work: impl AsyncFnOnce(&Hub, &mut Vec<String>, &mut Vec<Progress>) -> T) -> T {
        let hub = Hub::new(self.settings.clone()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work(&hub, &mut self.said, &mut self.progress))
    }

    fn model(&mut self, name: &str, pin: Option<&str>, part: Part) -> Result<(PathBuf, String), HubError> {
        let repo = HubRepo::of_model(Path::new(name)).unwrap().unwrap();
        self.run(async |hub, said, progress| {
            let (mut say, mut report) =
                (|text: &str| said.push(text.to_owned()), |p: &Progress| progress.push(p.clone()));
            hub.model(&repo, pin, part, &mut say, &mut report).await
        })
    }

    fn data(&mut self, name: &str) -> Result<(PathBuf, String), HubError> {
        let data: HubData = name.parse().unwrap();
        self.run(async |hub, said, progress| {
            let (mut say, mut report) =
                (|text: &str| said.push(text.to_owned()), |p: &Progress| progress.push(p.clone()));
            hub.data(&data, None, &mut say, &mut report).await
        })
    }

    fn push(&mut self, options: &PushOptions) -> Result<pacs_hub::Pushed, HubError> {
        self.run(async |hub, _, progress| push(hub, options, &mut |p: &Progress| progress.push(p.clone())).await)
    }
}

fn weights() -> Vec<u8> {
    (0..200_000_u32).flat_map(u32::to_le_bytes).collect()
}

fn served() -> (HubServer, String) {
    let server = HubServer::start();
    let weights = weights();
    let files: [(&str, &[u8]); 6] = [
        ("config.json", b"{\"model_type\": \"qwen2\"}"),
        ("tokenizer.json", b"{}"),
        ("chat template.txt", b"x"),
        ("README.md", b"# tiny"),
        ("pytorch_model.bin", b"not wanted, and longer than what is kept in Git"),
        ("model.safetensors", &weights),
    ];
    let commit = server.commit(MODEL, &files);
    (server, commit)
}

fn files_requested(server: &HubServer) -> Vec<String> {
    let is_file = |line: &String| line.contains("/resolve/");
    let name = |line: String| line.split_once("/resolve/").unwrap().1.split_once('/').unwrap().1.to_owned();
    server.seen().into_iter().map(|seen| seen.line).filter(is_file).map(name).collect()
}

#[test]
fn a_model_is_fetched_once_and_what_it_needs_of_it() {
    let (server, commit) = served();
    let mut client = Client::of(&server);
    let (folder, found) = client.model("o/tiny", None, Part::Whole).unwrap();
    assert_eq!(found, commit);
    assert_eq!(folder, client.settings.cache.join(format!("models--o--tiny/snapshots/{commit}")));
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert!(folder.join("chat template.txt").is_file() && !folder.join("pytorch_model.bin").exists());
    assert!(fs::symlink_metadata(folder.join("config.json")).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(client.settings.cache.join("models--o--tiny/refs/main")).unwrap(), commit);
    let last = client.progress.last().unwrap();
    assert_eq!((last.file.as_str(), last.bytes, last.file_bytes), ("model.safetensors", last.total, 800_000));
    assert_eq!(files_requested(&server).len(), 4);
    let (again, _) = client.model("o/tiny@main", None, Part::Whole).unwrap();
    assert_eq!((again, files_requested(&server)), (folder, Vec::new()));
}

#[test]
fn weights_in_several_files_are_those_that_the_index_names() {
    let (server, _) = served();
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let config: &[u8] = b"{}";
    let files: [(&str, &[u8]); 5] = [
        ("config.json", config),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", b"one"),
        ("model-2.safetensors", b"two"),
        ("consolidated.safetensors", b"not named"),
    ];
    server.commit("models/o/large", &files);
    let mut client = Client::of(&server);
    let (folder, _) = client.model("o/large", None, Part::Texts).unwrap();
    assert!(folder.join("config.json").is_file(), "configuration and tokenizer are enough to look at a job");
    assert!(!folder.join("model.safetensors.index.json").exists(), "an index without its files is a broken folder");
    let (folder, _) = client.model("o/large", None, Part::Whole).unwrap();
    let names = ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"];
    assert!(names.iter().all(|name| folder.join(name).is_file()));
    assert!(!folder.join("consolidated.safetensors").exists());
}

#[test]
fn a_pinned_commit_stays_when_the_branch_moves_on() {
    let (server, old) = served();
    let mut client = Client::of(&server);
    let (folder, _) = client.model("o/tiny", None, Part::Whole).unwrap();
    let new = server.commit(MODEL, &[("config.json", b"{\"new\": 1}"), ("model.safetensors", b"new")]);
    server.seen();
    assert_eq!(client.model("o/tiny", Some(&old), Part::Whole).unwrap(), (folder, old.clone()));
    assert_eq!(server.seen().len(), 0, "a pinned commit that is there needs no hub");
    assert_eq!(client.model("o/tiny", None, Part::Whole).unwrap().1, new);
    let mut other = Client::of(&server);
    assert_eq!(other.model(&format!("o/tiny@{old}"), None, Part::Whole).unwrap().1, old);
}

#[test]
fn downloads_that_break_off_are_continued() {
    let (server, _) = served();
    server.fault("/cdn/", 1, FaultKind::Cut(300_000));
    server.fault("/cdn/", 1, FaultKind::Cut(100_000));
    let mut client = Client::of(&server);
    let (folder, _) = client.model("o/tiny", None, Part::Whole).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<String> = server.seen().into_iter().filter_map(|seen| seen.headers.get("range").cloned()).collect();
    // The hub and then the CDN are asked for the rest, twice.
    assert_eq!(ranges.len(), 4, "{ranges:?}");
    assert!(ranges.iter().all(|range| range.ends_with("000-") && range != "bytes=0-"), "{ranges:?}");
}

#[test]
fn leftovers_of_a_process_are_used_by_the_next_one() {
    let (server, _) = served();
    server.fault("/cdn/", 3, FaultKind::Cut(0));
    server.fault("/cdn/", 0, FaultKind::Cut(0));
    let mut client = Client::of(&server);
    client.settings.patience.tries = 2;
    let error = client.model("o/tiny", None, Part::Whole).unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }) && error.is_transient(), "{error}");
    // Half of the file, as if its process had been killed.
    let blobs = client.settings.cache.join("models--o--tiny/blobs");
    let partial =
        fs::read_dir(&blobs).unwrap().flatten().find(|entry| entry.path().extension().is_some()).unwrap().path();
    fs::write(&partial, &weights()[..400_000]).unwrap();
    server.seen();
    client.settings.patience.tries = 3;
    let (folder, _) = client.model("o/tiny", None, Part::Whole).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert!(server.seen().iter().any(|seen| seen.headers.get("range").is_some_and(|range| range == "bytes=400000-")));
}

#[test]
fn a_wrong_half_is_fetched_anew_and_a_wrong_file_is_refused() {
    let (server, _) = served();
    let mut client = Client::of(&server);
    client.model("o/tiny", None, Part::Texts).unwrap();
    let blobs = client.settings.cache.join("models--o--tiny/blobs");
    let digest = support::hex(&ring::digest::SHA256, &weights());
    fs::write(blobs.join(format!("{digest}.incomplete")), vec![7; 1000]).unwrap();
    let (folder, _) = client.model("o/tiny", None, Part::Whole).unwrap();
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());

    let (server, _) = served();
    server.fault("/cdn/", 9, FaultKind::Flip);
    let mut client = Client::of(&server);
    let error = client.model("o/tiny", None, Part::Whole).unwrap_err();
    assert!(matches!(&error, HubError::Mismatch { file, .. } if file == "model.safetensors"), "{error}");
    let left: Vec<_> = fs::read_dir(client.settings.cache.join("models--o--tiny/blobs")).unwrap().flatten().collect();
    assert!(left.iter().all(|entry| !entry.file_name().to_string_lossy().starts_with(&digest)), "{left:?}");
}

#[test]
fn servers_that_send_too_much_or_ignore_ranges() {
    let (server, _) = served();
    server.fault("/cdn/", 9, FaultKind::Excess);
    let error = Client::of(&server).model("o/tiny", None, Part::Whole).unwrap_err();
    assert!(error.to_string().contains("more of `model.safetensors`"), "{error}");

    let (server, _) = served();
    server.fault("/cdn/", 1, FaultKind::Cut(300_000));
    server.fault("/cdn/", 1, FaultKind::NoRange);
    let (folder, _) = Client::of(&server)
        .model("o/tiny", None, Part::Whole)
        .map(|found| (fs::read(found.0.join("model.safetensors")).unwrap(), ()))
        .unwrap();
    assert_eq!(folder, weights());
}

#[test]
fn overloaded_servers_are_retried_a_bounded_number_of_times() {
    let (server, _) = served();
    server.fault("revision/main", 1, FaultKind::Status(503, ""));
    server.fault("revision/main", 1, FaultKind::Status(429, "Retry-After: 0"));
    assert!(Client::of(&server).model("o/tiny", None, Part::Texts).is_ok());
    server.fault("revision/main", 9, FaultKind::Status(500, ""));
    server.seen();
    let error = Client::of(&server).model("o/tiny", None, Part::Texts).unwrap_err();
    assert!(matches!(error, HubError::Busy { status: 500, .. }) && error.is_transient(), "{error}");
    assert_eq!(server.seen().len(), 3, "as often as `tries` says");
}

#[test]
fn a_silent_server_is_abandoned() {
    let (server, _) = served();
    server.fault("revision/main", 9, FaultKind::Stall(Duration::from_secs(5)));
    let mut client = Client::of(&server);
    client.settings.patience.answer = Duration::from_millis(100);
    client.settings.patience.tries = 2;
    let error = client.model("o/tiny", None, Part::Texts).unwrap_err();
    assert!(error.to_string().contains("no answer within 0.1 s"), "{error}");
}

#[test]
fn refusals_say_what_to_do() {
    let (server, _) = served();
    let error = Client::of(&server).model("o/none", None, Part::Texts).unwrap_err();
    assert!(matches!(&error, HubError::NotFound { missing: Missing::Repo, .. }), "{error:?}");
    assert!(error.to_string().contains("takes a token (HF_TOKEN)"), "{error}");
    let error = Client::of(&server).model("o/tiny@v9", None, Part::Texts).unwrap_err();
    assert!(matches!(&error, HubError::NotFound { missing: Missing::Revision, .. }), "{error:?}");
    let error = Client::of(&server).with_token("hf_wrong").model("o/tiny", None, Part::Texts).unwrap_err();
    assert!(
        matches!(&error, HubError::Denied { status: 401, .. }) && !error.to_string().contains("hf_wrong"),
        "{error}"
    );

    server.require_token("hf_right");
    server.change(MODEL, |repo| repo.gated = true);
    let error = Client::of(&server).with_token("hf_right").model("o/tiny", None, Part::Texts).unwrap_err();
    assert!(matches!(&error, HubError::Gated { page, .. } if page.ends_with("/o/tiny")), "{error:?}");
    server.change(MODEL, |repo| (repo.gated, repo.private) = (false, true));
    assert!(Client::of(&server).model("o/tiny", None, Part::Whole).is_err());
    // Another host that answers 400 to tokens stands between.
    assert!(Client::of(&server).with_token("hf_right").model("o/tiny", None, Part::Whole).is_ok());
    for said in [error.is_transient(), error.hint().is_some()] {
        assert!(!said);
    }
}

#[test]
fn repositories_that_hold_no_model_are_refused() {
    let (server, _) = served();
    server.commit("models/o/adapter", &[("adapter_config.json", b"{}")]);
    let error = Client::of(&server).model("o/adapter", None, Part::Texts).unwrap_err();
    assert!(matches!(&error, HubError::Unusable { message, .. } if message.contains("adapter")), "{error}");
    let index: &[u8] = br#"{"weight_map": {"a": "gone.safetensors"}}"#;
    server.commit("models/o/torn", &[("config.json", b"{}"), ("model.safetensors.index.json", index)]);
    let error = Client::of(&server).model("o/torn", None, Part::Whole).unwrap_err();
    assert!(error.to_string().contains("no file `gone.safetensors`"), "{error}");
    server.commit("models/o/evil", &[("config.json", b"{}"), ("../../evil.json", b"{}")]);
    let error = Client::of(&server).model("o/evil", None, Part::Texts).unwrap_err();
    assert!(matches!(&error, HubError::Answer { message, .. } if message.contains("no path within")), "{error}");
}

#[test]
fn without_a_network_the_cache_is_what_there_is() {
    let (server, commit) = served();
    let mut client = Client::of(&server);
    client.settings.offline = true;
    let error = client.model("o/tiny", None, Part::Whole).unwrap_err();
    assert!(matches!(&error, HubError::Offline { .. }) && !error.is_transient(), "{error}");
    client.settings.offline = false;
    client.model("o/tiny", None, Part::Texts).unwrap();
    client.settings.offline = true;
    server.seen();
    assert!(client.model("o/tiny", None, Part::Texts).is_ok());
    let error = client.model("o/tiny", None, Part::Whole).unwrap_err();
    assert!(error.to_string().contains("`model.safetensors` of `o/tiny`"), "{error}");
    client.settings.offline = false;
    client.model("o/tiny", None, Part::Whole).unwrap();
    client.settings.offline = true;
    server.seen();
    assert_eq!(client.model("o/tiny", None, Part::Whole).unwrap().1, commit);
    assert_eq!(server.seen().len(), 0);

    // A hub that cannot be reached is said, and the cache is used.
    client.settings.offline = false;
    client.settings.endpoint = "http://127.0.0.1:1".to_owned();
    client.said.clear();
    assert_eq!(client.model("o/tiny", None, Part::Whole).unwrap().1, commit);
    assert!(client.said[0].contains("taking what the cache has"), "{:?}", client.said);
    let mut other = Client::of(&server);
    other.settings.endpoint = "http://127.0.0.1:1".to_owned();
    let error = other.model("o/tiny", None, Part::Whole).unwrap_err();
    assert!(matches!(&error, HubError::Unreachable { host, .. } if host == "127.0.0.1"), "{error}");
}

#[test]
fn a_cache_that_another_program_filled_is_used_offline() {
    let (server, commit) = served();
    let mut client = Client::of(&server);
    client.model("o/tiny", None, Part::Whole).unwrap();
    fs::remove_dir_all(client.settings.cache.join("models--o--tiny/pacs")).unwrap();
    client.settings.offline = true;
    assert_eq!(client.model("o/tiny", None, Part::Whole).unwrap().1, commit);
    assert!(client.said.iter().any(|said| said.contains("another program")), "{:?}", client.said);
    assert!(client.folder.path().join("hub").is_dir());
}

#[test]
fn data_comes_as_a_file_or_as_a_pattern_of_its_shards() {
    let (server, _) = served();
    let row: &[u8] = br#"{"question": "1 + 1?", "answer": "2"}"#;
    let commit = server.commit(
        DATA,
        &[
            ("README.md", b"x"),
            ("main/train.jsonl", row),
            ("main/test.jsonl", row),
            ("data/x-00000-of-00002.jsonl", row),
            ("data/x-00001-of-00002.jsonl", row),
        ],
    );
    let mut client = Client::of(&server);
    let snapshot = client.settings.cache.join(format!("datasets--o--sums/snapshots/{commit}"));
    assert_eq!(
        client.data("hf://datasets/o/sums/main/train").unwrap(),
        (snapshot.join("main/train.jsonl"), commit.clone())
    );
    assert!(!snapshot.join("main/test.jsonl").exists(), "nobody asked for it");
    assert_eq!(client.data("hf://datasets/o/sums/x").unwrap().0, snapshot.join("data/x-*.jsonl"));
    assert_eq!(fs::read(snapshot.join("data/x-00001-of-00002.jsonl")).unwrap(), row);
    let error = client.data("hf://datasets/o/sums/main/dev").unwrap_err();
    assert!(
        error.to_string().contains("nothing for `main/dev`") && error.to_string().contains("main/train.jsonl"),
        "{error}"
    );
}

fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

fn pushing(folder: &Path, name: &str, branch: Option<&str>) -> PushOptions {
    let repo = Hub::target(name, branch).unwrap();
    PushOptions { folder: folder.to_owned(), repo, private: true, message: "Step 40".to_owned(), dry_run: false }
}

#[test]
fn a_folder_is_pushed_and_fetched_again() {
    let weights: Vec<u8> = weights().into_iter().rev().collect();
    let model =
        folder(&[("config.json", b"{}"), ("model.safetensors", &weights), (".git/x", b"no"), ("a.tmp", b"ignored")]);
    for part in [None, Some(300_000)] {
        let (server, _) = served();
        server.require_token("hf_write");
        part.into_iter().for_each(|bytes| server.upload_in_parts_of(bytes));
        let mut client = Client::of(&server).with_token("hf_write");
        let dry = PushOptions { dry_run: true, ..pushing(model.path(), "me/mine", None) };
        let would = client.push(&dry).unwrap();
        assert_eq!((would.files.len(), would.commit), (3, None));
        assert!(server.seen().is_empty(), "nothing was sent");

        let pushed = client.push(&pushing(model.path(), "me/mine", None)).unwrap();
        assert_eq!(pushed.uploaded, weights.len() as u64);
        assert_eq!(server.verified(), 1);
        let (commit, url) = pushed.commit.unwrap();
        assert!(url.ends_with(&format!("/me/mine/commit/{commit}")), "{url}");
        let repo = server.repo("models/me/mine").unwrap();
        assert!(repo.private);
        let names: Vec<&String> = repo.commits[0].1.keys().collect();
        assert_eq!(names, ["config.json", "model.safetensors"]);
        let mut reader = Client::of(&server).with_token("hf_write");
        let (fetched, found) = reader.model("me/mine", None, Part::Whole).unwrap();
        assert_eq!(found, commit);
        assert_eq!(fs::read(fetched.join("model.safetensors")).unwrap(), weights);

        // What the hub has is not sent again; a branch is made.
        let again = client.push(&pushing(model.path(), "me/mine", Some("step-40"))).unwrap();
        assert_eq!(again.uploaded, 0);
        assert!(server.repo("models/me/mine").unwrap().refs.contains_key("step-40"));
    }
}

#[test]
fn pushes_survive_cut_connections_and_refusals_are_plain() {
    let model = folder(&[("config.json", b"{}"), ("model.safetensors", b"weights of its own")]);
    let (server, _) = served();
    server.require_token("hf_write");
    server.fault("PUT /upload", 1, FaultKind::Status(500, ""));
    server.fault("/commit/", 1, FaultKind::Cut(0));
    server.fault("preupload", 1, FaultKind::Cut(20));
    let mut client = Client::of(&server).with_token("hf_write");
    assert!(client.push(&pushing(model.path(), "me/mine", None)).is_ok());

    let error = Client::of(&server).push(&pushing(model.path(), "me/mine", None)).unwrap_err();
    assert!(error.to_string().contains("HF_TOKEN"), "{error}");
    let error = Client::of(&server).with_token("hf_read").push(&pushing(model.path(), "me/mine", None)).unwrap_err();
    assert!(matches!(&error, HubError::Denied { status: 403, .. }), "{error}");
    let empty = folder(&[("x.txt", b"x")]);
    let error = client.push(&pushing(empty.path(), "me/mine", None)).unwrap_err();
    assert!(error.to_string().contains("no config.json"), "{error}");
    for name in ["mine", "a/b/c", "models/x", "me/mine@0123456789abcdef0123456789abcdef01234567"] {
        assert!(Hub::target(name, None).is_err(), "{name}");
    }
}
