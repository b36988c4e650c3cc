//! Licences of the crates that the programs are linked from.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{CONTROL, WORKER};
use crate::process::cargo;

/// What cargo says of the workspace and everything that it depends on.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    repository: Option<String>,
    /// `None` for crates of this workspace.
    source: Option<String>,
    manifest_path: String,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Debug, Deserialize)]
struct DependencyKind {
    /// `None` for what is linked; else `build` or `dev`.
    kind: Option<String>,
}

/// Names every crate of the programs with its licence, followed by the texts of the licences, each once.
pub(super) fn of_programs() -> Result<String> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let arguments = ["metadata", "--locked", "--format-version", "1", "--filter-platform", &platform];
    let output = cargo(&arguments).stderr(Stdio::inherit()).output().context("ask cargo for the dependencies")?;
    ensure!(output.status.success(), "ask cargo for the dependencies: it ended with {}", output.status);
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("read what cargo says")?;
    page(&linked(&metadata))
}

/// Crates of others that the programs are linked from, by name and version.
fn linked(metadata: &Metadata) -> Vec<&Package> {
    let packages: BTreeMap<&str, &Package> = metadata.packages.iter().map(|package| (&*package.id, package)).collect();
    let nodes: BTreeMap<&str, &Node> = metadata.resolve.nodes.iter().map(|node| (&*node.id, node)).collect();
    let is_program = |package: &&Package| package.source.is_none() && [CONTROL, WORKER].contains(&&*package.name);
    let mut open: Vec<&str> = metadata.packages.iter().filter(is_program).map(|package| &*package.id).collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if seen.insert(id) {
            let dependencies = nodes.get(id).map_or(&[][..], |node| &node.deps);
            let is_linked = |dependency: &&Dependency| dependency.dep_kinds.iter().any(|kind| kind.kind.is_none());
            open.extend(dependencies.iter().filter(is_linked).map(|dependency| &*dependency.pkg));
        }
    }
    let mut linked: Vec<&Package> = seen.iter().filter_map(|id| packages.get(id).copied()).collect();
    linked.retain(|package| package.source.is_some());
    linked.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    linked
}

fn page(linked: &[&Package]) -> Result<String> {
    let mut page = String::from(
        "The programs pacs and pacs-worker are linked from the crates below, each under its own licence.\nThe texts of the \
         licences follow the list; a crate names those that came with it by their numbers.\n\n",
    );
    let mut texts: Vec<String> = Vec::new();
    for package in linked {
        let folder = Path::new(&package.manifest_path).parent().context("a manifest lies in a folder")?;
        let mut numbers = BTreeSet::new();
        for text in texts_in(folder)? {
            let known = texts.iter().position(|known| *known == text).unwrap_or_else(|| {
                texts.push(text);
                texts.len() - 1
            });
            numbers.insert(known + 1);
        }
        let numbers: Vec<String> = numbers.iter().map(|number| format!("[{number}]")).collect();
        let licence = package.license.as_deref().unwrap_or("see its text");
        let repository = package.repository.as_deref().unwrap_or_default();
        let line = [&package.name, &package.version, licence, &numbers.concat(), repository].join("  ");
        page.push_str(line.trim_end());
        page.push('\n');
    }
    for (number, text) in (1..).zip(&texts) {
        page.push_str(&format!("\n{}\n[{number}]\n\n{text}\n", "-".repeat(80)));
    }
    Ok(page)
}

/// Licences in the folder of a crate and in its folders, where bundled C code has its own.
fn texts_in(folder: &Path) -> Result<Vec<String>> {
    let mut texts = BTreeMap::new();
    let list = |folder: &Path| {
        let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
        entries.map(|entry| Ok(entry.context("list a folder")?.path())).collect::<Result<Vec<_>>>()
    };
    let mut candidates = list(folder)?;
    for inner in candidates.clone().iter().filter(|path| path.is_dir()) {
        candidates.extend(list(inner)?);
    }
    for path in candidates.iter().filter(|path| path.is_file() && is_licence(path)) {
        let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        texts.insert(path, String::from_utf8_lossy(&bytes).trim().to_owned());
    }
    Ok(texts.into_values().collect())
}

fn is_licence(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().to_uppercase()).unwrap_or_default();
    let is_text = !name.contains('.') || [".TXT", ".MD"].iter().any(|end| name.ends_with(end));
    let starts = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE"];
    is_text && starts.iter().any(|start| name.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, source: Option<&str>, folder: &Path) -> Package {
        Package {
            id: name.to_owned(),
            name: name.to_owned(),
            version: "1.0.0".to_owned(),
            license: Some("MIT".to_owned()),
            repository: None,
            source: source.map(str::to_owned),
            manifest_path: folder.join("Cargo.toml").display().to_string(),
        }
    }

    fn node(id: &str, deps: &[(&str, Option<&str>)]) -> Node {
        let dependency = |(pkg, kind): &(&str, Option<&str>)| Dependency {
            pkg: (*pkg).to_owned(),
            dep_kinds: vec![DependencyKind { kind: kind.map(str::to_owned) }],
        };
        Node { id: id.to_owned(), deps: deps.iter().map(dependency).collect() }
    }

    #[test]
    fn crates_that_are_linked_are_listed_and_no_others() {
        let folder = tempfile::tempdir().expect("a folder");
        let of = |name: &str, source| package(name, source, folder.path());
        let registry = Some("registry");
        let metadata = Metadata {
            packages: vec![
                of(CONTROL, None),
                of("pacs-spec", None),
                of("serde", registry),
                of("proptest", registry),
                of("cc", registry),
                of("toml", registry),
                of("other", registry),
            ],
            resolve: Resolve {
                nodes: vec![
                    node(CONTROL, &[("pacs-spec", None), ("proptest", Some("dev")), ("cc", Some("build"))]),
                    node("pacs-spec", &[("toml", None), ("serde", None)]),
                    node("toml", &[("serde", None)]),
                ],
            },
        };
        let names: Vec<&str> = linked(&metadata).iter().map(|package| &*package.name).collect();
        assert_eq!(names, ["serde", "toml"]);
    }

    #[test]
    fn texts_stand_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let crate_folder = |name: &str| folder.path().join(name);
        for name in ["a", "b/bundled"] {
            fs::create_dir_all(crate_folder(name)).expect("created");
        }
        for (path, text) in [
            ("a/LICENSE-MIT", "mit\n"),
            ("a/Cargo.toml", "no licence"),
            ("a/license.rs", "no licence"),
            ("b/LICENSE.txt", "mit"),
            ("b/bundled/COPYING", "of the C code"),
        ] {
            fs::write(crate_folder(path), text).expect("written");
        }
        let (a, b) = (package("a", None, &crate_folder("a")), package("b", None, &crate_folder("b")));
        let page = page(&[&a, &b]).expect("read");
        assert!(page.contains("\na  1.0.0  MIT  [1]\n") && page.contains("\nb  1.0.0  MIT  [1][2]\n"), "{page}");
        assert_eq!((page.matches("\nmit\n").count(), page.matches("of the C code").count()), (1, 1), "{page}");
        assert!(!page.contains("no licence"), "{page}");
    }
}
