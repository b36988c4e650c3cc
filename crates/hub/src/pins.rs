use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use pacs_spec::{HubKind, HubRepo};
use serde::{Deserialize, Serialize};

use crate::cache::write_whole;
use crate::{Digest, HubError};

/// Name of the file in a run folder.
const FILE: &str = "hub.json";

/// The commits that a run's names of the hub stand for, in its folder: a run that resumes uses the same files, whatever was pushed since.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    pins: Vec<Pin>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pin {
    /// `model` or `dataset`.
    kind: String,
    id: String,
    /// What was asked for.
    revision: String,
    commit: String,
}

impl Pins {
    /// Reads those of a run folder; none where it has no such file.
    ///
    /// # Errors
    /// When there is one and it cannot be read.
    pub fn read(run_dir: &Path) -> Result<Self, HubError> {
        let path = run_dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Self::default());
            }
            Err(error) => return Err(HubError::file("read", &path)(error)),
        };
        let wrong = |message: String| {
            let what = format!("read `{}`", path.display());
            HubError::Setting { what, message }
        };
        let pins: Vec<Pin> = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
        match pins.iter().find(|pin| !matches!(Digest::of_hex(&pin.commit), Some(Digest::Git(_)))) {
            Some(pin) => Err(wrong(format!("`{:.80}` is no commit", pin.commit))),
            None => Ok(Self { pins }),
        }
    }

    /// Writes them into a run folder, which is there; nothing where there are none.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, run_dir: &Path) -> Result<(), HubError> {
        if self.pins.is_empty() || Self::read(run_dir)? == *self {
            return Ok(());
        }
        let path = run_dir.join(FILE);
        let text = serde_json::to_string_pretty(&self.pins).expect("texts are JSON");
        write_whole(&path, &format!("{text}\n")).map_err(HubError::file("write", &path))
    }

    /// The commit that a repository's revision stands for.
    #[must_use]
    pub fn commit(&self, repo: &HubRepo) -> Option<&str> {
        let pin = self.pins.iter().find(|pin| is_of(pin, repo))?;
        Some(&pin.commit)
    }

    /// Remembers a commit; the first one counts.
    pub fn add(&mut self, repo: &HubRepo, commit: &str) {
        if self.commit(repo).is_none() {
            let id = repo.id.clone();
            let revision = repo.revision().to_owned();
            self.pins.push(Pin { kind: kind(repo.kind).to_owned(), id, revision, commit: commit.to_owned() });
        }
    }
}

fn is_of(pin: &Pin, repo: &HubRepo) -> bool {
    (pin.kind.as_str(), pin.id.as_str(), pin.revision.as_str()) == (kind(repo.kind), repo.id.as_str(), repo.revision())
}

fn kind(kind: HubKind) -> &'static str {
    match kind {
        HubKind::Model => "model",
        HubKind::Dataset => "dataset",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_commit_of_a_run_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let repo = |revision: Option<&str>| HubRepo {
            kind: HubKind::Model,
            id: "o/n".to_owned(),
            revision: revision.map(str::to_owned),
        };
        let (one, other) = ("1".repeat(40), "2".repeat(40));
        let mut pins = Pins::read(dir.path()).expect("none yet");
        pins.add(&repo(None), &one);
        pins.add(&repo(None), &other);
        pins.write(dir.path()).expect("written");
        let read = Pins::read(dir.path()).expect("read");
        assert_eq!(read, pins);
        assert_eq!(read.commit(&repo(Some("main"))), Some(one.as_str()), "main is what no revision means");
        assert_eq!(read.commit(&repo(Some("v2"))), None);
        assert_eq!(read.commit(&HubRepo { kind: HubKind::Dataset, ..repo(None) }), None);
        fs::write(dir.path().join(FILE), r#"[{"kind":"model","id":"o/n","revision":"main","commit":"../x"}]"#)
            .expect("written");
        assert!(Pins::read(dir.path()).is_err_and(|error| error.to_string().contains("no commit")));
    }
}
