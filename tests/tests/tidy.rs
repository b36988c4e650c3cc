//! Invariants of the repository itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use pacs_tests::root;

/// Crates from the bottom up; a crate depends on earlier lines only. This is the table of `docs/ARCHITECTURE.md`.
const LAYERS: [&[&str]; 8] = [
    &["types", "algo", "text", "shape", "report", "sandbox"],
    &["verify", "protocol", "collective", "order", "spec"],
    &["torch"],
    &["runtime", "dashboard", "data", "hub", "machine", "model"],
    &["weights"],
    &["broadcast", "engine"],
    &["coordinator", "rollout", "learner", "verifier", "vllm"],
    &["cli", "worker", "xtask"],
];

/// The only crates that may hold `unsafe`.
const UNSAFE_CRATES: [&str; 2] = ["torch", "collective"];

/// Limit of lines per source file; a longer one holds more than one thing.
const MOST_LINES: usize = 700;

fn crates() -> Result<BTreeMap<String, PathBuf>> {
    let mut crates = BTreeMap::new();
    for entry in fs::read_dir(root().join("crates"))? {
        let path = entry?.path();
        let name = path.file_name().context("a folder has a name")?.to_string_lossy().into_owned();
        crates.insert(name, path);
    }
    Ok(crates)
}

/// Returns the workspace crates that a crate depends on, without dev-dependencies.
fn dependencies(folder: &Path) -> Result<BTreeSet<String>> {
    let manifest: toml::Table = toml::from_str(&fs::read_to_string(folder.join("Cargo.toml"))?)?;
    let tables = ["dependencies", "build-dependencies"].into_iter().filter_map(|table| manifest.get(table)?.as_table());
    let names = tables.flat_map(|table| table.keys());
    Ok(names.filter_map(|name| name.strip_prefix("pacs-")).map(str::to_owned).collect())
}

fn layer(name: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&name))
}

#[test]
fn dependencies_point_down() -> Result<()> {
    for (name, folder) in crates()? {
        let own = layer(&name).with_context(|| format!("crate {name} has no layer"))?;
        for dependency in dependencies(&folder)? {
            let below = layer(&dependency).with_context(|| format!("{name} depends on unknown {dependency}"))?;
            assert!(below < own, "{name} depends on {dependency}, which is not below it");
        }
    }
    Ok(())
}

#[test]
fn the_control_plane_never_links_libtorch() -> Result<()> {
    let crates = crates()?;
    let mut reached = BTreeSet::new();
    let mut open = vec!["cli".to_owned()];
    while let Some(name) = open.pop() {
        if reached.insert(name.clone()) {
            open.extend(dependencies(&crates[&name])?);
        }
    }
    for libtorch in ["torch", "model", "rollout", "learner", "collective", "broadcast"] {
        assert!(!reached.contains(libtorch), "`pacs` depends on {libtorch}");
    }
    Ok(())
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

#[test]
fn unsafe_code_is_forbidden_outside_its_crates() -> Result<()> {
    for (name, folder) in crates()? {
        if UNSAFE_CRATES.contains(&name.as_str()) {
            continue;
        }
        let roots = ["lib.rs", "main.rs"].map(|file| folder.join("src").join(file));
        for root in roots.iter().filter(|root| root.exists()) {
            let forbidden = fs::read_to_string(root)?.contains("#![forbid(unsafe_code)]");
            assert!(forbidden, "{} does not forbid unsafe code", root.display());
        }
    }
    Ok(())
}

#[test]
fn files_hold_one_thing() -> Result<()> {
    let mut found = Vec::new();
    for folder in crates()?.values() {
        sources(&folder.join("src"), &mut found)?;
    }
    assert!(found.len() > 100, "the sources were not found");
    for path in found {
        let lines = fs::read_to_string(&path)?.lines().count();
        assert!(lines <= MOST_LINES, "{} has {lines} lines", path.display());
    }
    Ok(())
}

/// Names that follow `prefix` in the code of a file, without comments and tests.
fn names_after<'a>(text: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default().lines();
    let code = code.filter(|line| !line.trim_start().starts_with("//"));
    let rests = code.flat_map(move |line| line.split(prefix).skip(1));
    rests.map(|rest| rest.split(|c: char| !c.is_ascii_lowercase() && c != '_').next().unwrap_or_default())
}

/// A circle in a graph of modules, if there is one.
fn circle(uses: &BTreeMap<String, BTreeSet<String>>) -> Option<BTreeSet<&str>> {
    let mut left: BTreeSet<&str> = uses.keys().map(String::as_str).collect();
    // A module that uses none of those left is in no circle.
    while let Some(end) =
        left.iter().copied().find(|module| uses[*module].iter().all(|used| !left.contains(used.as_str())))
    {
        left.remove(end);
    }
    (!left.is_empty()).then_some(left)
}

#[test]
fn modules_of_the_learner_form_no_circle() -> Result<()> {
    let folder = root().join("crates/learner/src");
    let mut found = Vec::new();
    sources(&folder, &mut found)?;
    let mut of_crate = BTreeMap::<String, BTreeSet<String>>::new();
    let mut of_module = BTreeMap::<String, BTreeMap<String, BTreeSet<String>>>::new();
    for path in found.iter().filter(|path| !path.ends_with("lib.rs") && !path.ends_with("tests.rs")) {
        let text = fs::read_to_string(path)?;
        let name = path.strip_prefix(&folder)?.with_extension("");
        let names: Vec<_> = name.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let used = names_after(&text, "crate::").filter(|used| *used != names[0]).map(str::to_owned);
        of_crate.entry(names[0].clone()).or_default().extend(used);
        if let [module, file] = &names[..]
            && file != "mod"
        {
            let used = names_after(&text, "super::").map(str::to_owned).collect();
            of_module.entry(module.clone()).or_default().insert(file.clone(), used);
        }
    }
    assert!(of_crate.len() >= 6 && of_module.len() == 5, "the modules were not found: {:?}", of_crate.keys());
    for (module, uses) in &of_crate {
        assert!(uses.iter().all(|used| of_crate.contains_key(used)), "{module} uses {uses:?}");
    }
    assert_eq!(circle(&of_crate), None, "modules of the learner use each other in a circle: {of_crate:?}");
    for (module, files) in &of_module {
        assert_eq!(circle(files), None, "files of {module} use each other in a circle: {files:?}");
    }
    Ok(())
}

#[test]
fn circles_are_found() {
    let graph = |arrows: &[(&str, &[&str])]| -> BTreeMap<String, BTreeSet<String>> {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        arrows.iter().map(|(from, to)| ((*from).to_owned(), names(to))).collect()
    };
    assert_eq!(circle(&graph(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])])), None);
    let with_circle = graph(&[("a", &["b"]), ("b", &["c"]), ("c", &["b"])]);
    assert!(circle(&with_circle).is_some_and(|left| left.contains("b") && left.contains("c")));
    let text = "use crate::one::{A};\n// crate::no\nlet x = crate::two_b::f();\n#[cfg(test)]\nuse crate::no;";
    assert_eq!(names_after(text, "crate::").collect::<Vec<_>>(), ["one", "two_b"]);
}

#[test]
fn the_architecture_names_every_crate() -> Result<()> {
    let text = fs::read_to_string(root().join("docs/ARCHITECTURE.md"))?;
    for name in crates()?.keys() {
        assert!(text.contains(&format!("`{name}`")), "docs/ARCHITECTURE.md does not say what `{name}` is");
    }
    Ok(())
}

#[test]
fn every_dependency_is_explained() -> Result<()> {
    let manifest: toml::Table = toml::from_str(&fs::read_to_string(root().join("Cargo.toml"))?)?;
    let dependencies = manifest["workspace"]["dependencies"].as_table().context("a table")?;
    let page = fs::read_to_string(root().join("docs/DEPENDENCIES.md"))?;
    let rows: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next()).collect();
    let explained: BTreeSet<&str> =
        rows.iter().flat_map(|row| row.split(", ")).map(|name| name.trim_matches('`')).collect();
    let used: BTreeSet<&str> =
        dependencies.keys().map(String::as_str).filter(|name| !name.starts_with("pacs-")).collect();
    // `tonic-prost-build` is the build-time part of `tonic-prost`, which the page explains.
    let missing: Vec<_> =
        used.iter().filter(|name| !explained.contains(*name) && **name != "tonic-prost-build").collect();
    assert!(missing.is_empty(), "docs/DEPENDENCIES.md does not explain {missing:?}");
    let gone: Vec<_> = explained.difference(&used).collect();
    assert!(gone.is_empty(), "docs/DEPENDENCIES.md explains {gone:?}, which the manifest lacks");
    let mut members = fs::read_to_string(root().join("tests/Cargo.toml"))?;
    for folder in crates()?.values() {
        members.push_str(&fs::read_to_string(folder.join("Cargo.toml"))?);
    }
    for name in used {
        assert!(
            members.contains(&format!("\n{name}.workspace")) || members.contains(&format!("\n{name} = ")),
            "nothing uses {name}"
        );
    }
    Ok(())
}

/// Names of all tests, in the sources below a folder.
fn tests_of(folder: &Path, names: &mut BTreeSet<String>) -> Result<()> {
    let mut found = Vec::new();
    sources(folder, &mut found)?;
    for path in found {
        let text = fs::read_to_string(&path)?;
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            is_test |= line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            let function = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ");
            if let Some((name, _)) = function.and_then(|rest| rest.split_once('(')) {
                if is_test {
                    names.insert(name.to_owned());
                }
                is_test = false;
            }
        }
    }
    Ok(())
}

/// What a text has between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether a word can be nothing but the name of a test: keys of specs and names of metrics are shorter.
fn is_test_name(word: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    word.chars().all(is_plain) && word.matches('_').count() >= 3
}

#[test]
fn every_promise_names_a_test_that_exists() -> Result<()> {
    let mut tests = BTreeSet::new();
    for folder in ["crates", "tests/src", "tests/tests"] {
        tests_of(&root().join(folder), &mut tests)?;
    }
    assert!(tests.len() > 1000, "the tests were not found");
    for page in ["docs/SECURITY.md", "docs/RELIABILITY.md"] {
        let text = fs::read_to_string(root().join(page))?;
        let missing: Vec<_> = quoted(&text).filter(|word| is_test_name(word) && !tests.contains(*word)).collect();
        assert!(missing.is_empty(), "{page} names tests that do not exist: {missing:?}");
        let (mut promises, mut is_shown) = (0, false);
        for line in text.lines() {
            let Some(row) = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")) else {
                is_shown &= line.starts_with("|--");
                continue;
            };
            let last = row.rsplit(" | ").next().unwrap_or_default();
            if last == "shown by" {
                is_shown = true;
            } else if is_shown {
                let shows = |word: &str| tests.contains(word) || word.starts_with("cargo xtask ");
                assert!(quoted(last).any(shows), "{page} does not say what shows this: {line}");
                promises += 1;
            }
        }
        assert!(promises >= 10, "{page} has {promises} promises");
    }
    Ok(())
}
