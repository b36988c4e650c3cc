//! The folders of `tests/golden/models`. Tests of several crates include this file, so a folder that is added is tested by all of them.
#![allow(unreachable_pub, reason = "test programs include this file")]

use std::path::{Path, PathBuf};

/// Folder that holds the golden models. `PACS_GOLDEN` names its parent on a machine that has test programs and no repository.
pub fn folder() -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    std::env::var_os("PACS_GOLDEN").map_or_else(here, PathBuf::from).join("models")
}

/// Names of the golden models, in alphabetical order.
///
/// # Panics
/// When the folders are not those that `generate.py` noted in `summary.json`.
pub fn names() -> Vec<String> {
    let entries = std::fs::read_dir(folder()).expect("the golden models are in the repository");
    let folders = entries.map(|entry| entry.expect("a readable folder")).filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let summary = std::fs::read_to_string(folder().join("summary.json")).expect("the golden models have a summary");
    assert!(!names.is_empty() && names.len() == summary.matches("\"params\":").count(), "{names:?} and {summary}");
    for name in &names {
        assert!(summary.contains(&format!("\"{name}\": {{")), "`{name}` is not in the summary");
    }
    names
}
