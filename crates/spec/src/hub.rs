//! Names of repositories on the Hugging Face hub, as a job and a command line write them. Nothing here looks at a disk or a network:
//! `crates/hub` does.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// What every name begins with that is of the hub and never a path.
const SCHEME: &str = "hf://";
const DATASETS: &str = "hf://datasets/";

/// First parts of addresses of the hub itself, which no owner of repositories can have as a name. `models/x` is a folder.
const RESERVED: [&str; 6] = ["api", "collections", "datasets", "docs", "models", "spaces"];

/// Longest part of a name, and longest revision.
const MOST_PART: usize = 96;
const MOST_REVISION: usize = 255;

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HubKind {
    /// Weights, configuration and tokenizer: `OWNER/NAME`.
    Model,
    /// Files of problems: `hf://datasets/OWNER/NAME`.
    Dataset,
}

/// A repository of the hub at a revision.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HubRepo {
    /// What it holds.
    pub kind: HubKind,
    /// `owner/name`; a few old models and data sets are a `name` alone.
    pub id: String,
    /// Branch, tag or commit; none: `main`.
    pub revision: Option<String>,
}

/// Files of a data set of the hub.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HubData {
    /// Where they are.
    pub repo: HubRepo,
    /// A file, a pattern of file names (`data/train-*.parquet`), a `config/split`, a `split`, or nothing: the only split that there is.
    pub path: String,
}

impl HubRepo {
    /// Reads `model.path` as a name of the hub: `owner/name`, `owner/name@revision`, or either after `hf://`. `None` where it can only be
    /// the path of a folder. `owner/name` may be a folder, too, which is for those to say who look.
    #[must_use]
    pub fn of_model(path: &Path) -> Option<Result<Self, String>> {
        let text = path.to_str()?;
        if let Some(name) = text.strip_prefix(SCHEME) {
            return Some(Self::parse(HubKind::Model, name));
        }
        let name = text.split_once('@').map_or(text, |(name, _)| name);
        let (owner, rest) = name.split_once('/')?;
        let may_be = is_part(owner) && is_part(rest) && !RESERVED.contains(&owner);
        may_be.then(|| Self::parse(HubKind::Model, text)).filter(Result::is_ok)
    }

    /// Whether `path` is a name of the hub whatever lies on the disk.
    #[must_use]
    pub fn is_explicit(path: &Path) -> bool {
        path.to_str().is_some_and(|text| text.starts_with(SCHEME))
    }

    /// The revision that is asked for.
    #[must_use]
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }

    /// Whether the revision is a commit, which is never another one tomorrow.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.revision.as_deref().is_some_and(is_commit)
    }

    fn parse(kind: HubKind, text: &str) -> Result<Self, String> {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision)),
            None => (text, None),
        };
        let parts: Vec<&str> = id.split('/').collect();
        if parts.len() > 2 || !parts.iter().all(|part| is_part(part)) || RESERVED.contains(&parts[0]) {
            return Err(format!("`{id}` is not a name of the hub, such as `Qwen/Qwen3-0.6B`"));
        }
        if let Some(revision) = revision.filter(|revision| !is_revision(revision)) {
            return Err(format!("`{revision}` is not a branch, tag or commit of `{id}`"));
        }
        Ok(Self { kind, id: id.to_owned(), revision: revision.map(str::to_owned) })
    }
}

impl HubData {
    /// Reads the path of a source as a name of the hub. `None` where it is the path of a file.
    #[must_use]
    pub fn of_source(path: &Path) -> Option<Result<Self, String>> {
        let text = path.to_str()?;
        text.starts_with(SCHEME).then(|| text.parse())
    }
}

impl FromStr for HubData {
    type Err = String;

    /// Reads `hf://datasets/owner/name[@revision][/path]`.
    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str =
            "expected `hf://datasets/OWNER/NAME[@REVISION]/FILE`, or `…/CONFIG/SPLIT` in the place of the file";
        let rest = text.strip_prefix(DATASETS).ok_or(EXPECTED)?;
        let (owner, rest) = rest.split_once('/').ok_or(EXPECTED)?;
        // The name ends at the first slash that is not a part of a revision with slashes.
        let name_end = rest.find(['/', '@']).unwrap_or(rest.len());
        let (name, rest) = rest.split_at(name_end);
        let (revision, path) = match rest.strip_prefix('@') {
            None => (None, rest.strip_prefix('/').unwrap_or(rest)),
            Some(rest) => {
                let end = revision_end(rest);
                (Some(&rest[..end]), rest[end..].strip_prefix('/').unwrap_or(""))
            }
        };
        let id = match revision {
            Some(revision) => format!("{owner}/{name}@{revision}"),
            None => format!("{owner}/{name}"),
        };
        let repo = HubRepo::parse(HubKind::Dataset, &id)?;
        let is_plain = path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        if !path.is_empty() && (!is_plain || path.contains(['\\', '\0'])) {
            return Err(format!("`{path}` is no path within `{}`", repo.id));
        }
        Ok(Self { repo, path: path.to_owned() })
    }
}

/// Where the revision at the beginning of `text` ends: at a slash, but for the hub's own references, which have some.
fn revision_end(text: &str) -> usize {
    let parts = if text.starts_with("refs/") { 3 } else { 1 };
    text.match_indices('/').nth(parts - 1).map_or(text.len(), |(place, _)| place)
}

fn is_part(part: &str) -> bool {
    let is_known = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let ends_well = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    part.len() <= MOST_PART
        && part.chars().all(is_known)
        && ends_well(part.chars().next())
        && ends_well(part.chars().next_back())
        && !part.contains("..")
        && !part.contains("--")
}

fn is_revision(revision: &str) -> bool {
    let is_known = |c: char| c.is_ascii_alphanumeric() || "-_./+".contains(c);
    (1..=MOST_REVISION).contains(&revision.len())
        && revision.chars().all(is_known)
        && !revision.contains("..")
        && !revision.split('/').any(|part| part.is_empty() || part.starts_with('.'))
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c))
}

impl fmt::Display for HubRepo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind == HubKind::Dataset {
            f.write_str(DATASETS)?;
        }
        f.write_str(&self.id)?;
        self.revision.as_ref().map_or(Ok(()), |revision| write!(f, "@{revision}"))
    }
}

impl fmt::Display for HubData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.repo.fmt(f)?;
        if self.path.is_empty() { Ok(()) } else { write!(f, "/{}", self.path) }
    }
}

/// The repository and commit in the path of a snapshot of the hub's cache, `…/models--owner--name/snapshots/<commit>[/file]`, with what
/// follows: the part of it that is the same in every cache.
#[must_use]
pub fn snapshot_of(path: &str) -> Option<&str> {
    let (before, commit) = path.split_once("/snapshots/")?;
    let start = before.rfind('/').map_or(0, |slash| slash + 1);
    let folder = &before[start..];
    let is_ours = ["models--", "datasets--"].iter().any(|kind| folder.starts_with(kind));
    (is_ours && is_commit(commit.split('/').next()?)).then(|| &path[start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(text: &str) -> Option<Result<String, String>> {
        HubRepo::of_model(Path::new(text)).map(|repo| repo.map(|repo| format!("{} {}", repo.id, repo.revision())))
    }

    #[test]
    fn two_parts_may_be_a_model_of_the_hub() {
        for (text, read) in [
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B main"),
            ("Qwen/Qwen3-0.6B@v1.0", "Qwen/Qwen3-0.6B v1.0"),
            ("hf://Qwen/Qwen3-0.6B@refs/pr/3", "Qwen/Qwen3-0.6B refs/pr/3"),
            ("hf://gpt2", "gpt2 main"),
        ] {
            assert_eq!(model(text), Some(Ok(read.to_owned())), "{text}");
        }
        for text in [
            "m",
            "models/qwen3",
            "a/b/c",
            "/a/b",
            "./a/b",
            "../b",
            "a/",
            "runs/x/model",
            "a/..",
            "a b/c",
            "a/b@",
            "a/-b",
        ] {
            assert_eq!(model(text), None, "{text}");
        }
        for text in ["hf://a/b/c", "hf://", "hf://a/b@../x", "hf://a/b@", "hf://datasets/x", "hf://a/x--y"] {
            assert!(matches!(model(text), Some(Err(_))), "{text}");
        }
    }

    #[test]
    fn data_has_a_repository_and_a_path_in_it() {
        for (text, id, revision, path) in [
            ("hf://datasets/openai/gsm8k/main/train", "openai/gsm8k", "main", "main/train"),
            ("hf://datasets/openai/gsm8k@v2/a.parquet", "openai/gsm8k", "v2", "a.parquet"),
            (
                "hf://datasets/o/n@refs/convert/parquet/main/train/0000.parquet",
                "o/n",
                "refs/convert/parquet",
                "main/train/0000.parquet",
            ),
            ("hf://datasets/o/n@refs/pr/3", "o/n", "refs/pr/3", ""),
            ("hf://datasets/o/n", "o/n", "main", ""),
            ("hf://datasets/o/n/data/train-*.parquet", "o/n", "main", "data/train-*.parquet"),
        ] {
            let data: HubData = text.parse().expect("a name");
            assert_eq!(
                (data.repo.id.as_str(), data.repo.revision(), data.path.as_str()),
                (id, revision, path),
                "{text}"
            );
            assert_eq!(data.to_string(), text);
        }
        for text in [
            "hf://o/n/x.parquet",
            "hf://datasets/o",
            "hf://datasets/o/n/../x",
            "hf://datasets/o/n//x",
            "hf://datasets/o/n@/x",
        ] {
            assert!(text.parse::<HubData>().is_err(), "{text}");
        }
        assert!(HubData::of_source(Path::new("data/train.jsonl")).is_none());
    }

    #[test]
    fn a_snapshot_is_known_in_every_cache() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let path = format!("/home/a/.cache/huggingface/hub/models--o--n/snapshots/{commit}");
        assert_eq!(snapshot_of(&path), Some(format!("models--o--n/snapshots/{commit}").as_str()));
        let file = format!("c/datasets--o--n/snapshots/{commit}/main/train.parquet");
        assert_eq!(snapshot_of(&file).map(str::len), Some(file.len() - 2));
        for path in ["models/x", "models--o--n/snapshots/main", "/x/snapshots/0123456789abcdef0123456789abcdef01234567"]
        {
            assert_eq!(snapshot_of(path), None, "{path}");
        }
    }
}
