//! The documentation as a whole: every page is in the book, every link between pages leads somewhere, and files that pages name exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use pacs_tests::root;

/// Pages outside of `docs`, relative to the root of the repository.
const OUTSIDE: [&str; 4] = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", ".github/SECURITY.md"];

/// Collects the Markdown files below a folder.
fn pages_below(folder: &Path, found: &mut BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            pages_below(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.insert(path);
        }
    }
    Ok(())
}

/// The lines of a page that are not in a fenced block, where brackets and `#` have other meanings.
fn prose(text: &str) -> Vec<&str> {
    let mut is_fenced = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
        } else if !is_fenced {
            lines.push(line);
        }
    }
    lines
}

/// Targets of the links of a page, without those to other sites.
fn links(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for line in prose(text) {
        for rest in line.split("](").skip(1) {
            let target = rest.split(')').next().unwrap_or_default();
            let is_link = !target.is_empty() && !target.contains(char::is_whitespace);
            if is_link && !target.starts_with("http") && !target.starts_with("mailto:") {
                found.push(target);
            }
        }
    }
    found
}

/// The text of a heading as a reader sees it: `[text](target)` is `text`.
fn shown(heading: &str) -> String {
    let mut shown = String::new();
    let mut rest = heading;
    while let Some((before, after)) = rest.split_once("](") {
        shown.push_str(before);
        rest = after.split_once(')').map_or("", |(_, after)| after);
    }
    shown.push_str(rest);
    shown
}

/// Anchors of the headings of a page, as forges and mdBook make them: a repeated one gets a number.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut seen = BTreeMap::<String, usize>::new();
    let mut anchors = BTreeSet::new();
    for line in prose(text) {
        let Some(heading) = line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#')) else {
            continue;
        };
        let kept = shown(heading).to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let earlier = seen.entry(anchor.clone()).or_default();
        anchors.insert(if *earlier == 0 { anchor } else { format!("{anchor}-{earlier}") });
        *earlier += 1;
    }
    anchors
}

/// Removes `.` and `..` from a path without asking the file system, as a browser does.
fn resolved(path: &Path) -> PathBuf {
    let mut resolved = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                resolved.pop();
            }
            part => resolved.push(part),
        }
    }
    resolved
}

#[test]
fn every_page_is_in_the_book_and_every_chapter_is_a_page() -> Result<()> {
    let docs = root().join("docs");
    let mut pages = BTreeSet::new();
    pages_below(&docs, &mut pages)?;
    let summary = docs.join("SUMMARY.md");
    assert!(pages.remove(&summary), "docs/SUMMARY.md is missing");
    assert!(pages.len() > 20, "the pages were not found");
    let text = fs::read_to_string(&summary)?;
    let chapters: BTreeSet<PathBuf> = links(&text).into_iter().map(|target| docs.join(target)).collect();
    let missing: Vec<_> = pages.difference(&chapters).collect();
    assert!(missing.is_empty(), "docs/SUMMARY.md lacks {missing:?}");
    let gone: Vec<_> = chapters.difference(&pages).collect();
    assert!(gone.is_empty(), "docs/SUMMARY.md names {gone:?}, which are not there");
    Ok(())
}

#[test]
fn links_between_pages_lead_somewhere() -> Result<()> {
    let docs = root().join("docs");
    let mut pages: BTreeSet<PathBuf> = OUTSIDE.iter().map(|page| root().join(page)).collect();
    pages_below(&docs, &mut pages)?;
    pages_below(&root().join("deploy"), &mut pages)?;
    let mut checked = 0;
    for page in &pages {
        let text = fs::read_to_string(page).with_context(|| format!("read {}", page.display()))?;
        let folder = page.parent().context("a page lies in a folder")?;
        for link in links(&text) {
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { resolved(&folder.join(file)) };
            let from = page.display();
            assert!(target.exists(), "{from}: the link `{link}` leads nowhere");
            // The book holds nothing but `docs`; a page there names other files in plain text.
            let leaves = page.starts_with(&docs) && !target.starts_with(&docs);
            assert!(!leaves, "{from}: the link `{link}` leaves docs/, and would be broken in the book");
            if !anchor.is_empty() && target.extension().is_some_and(|extension| extension == "md") {
                let headings = anchors(&fs::read_to_string(&target)?);
                assert!(headings.contains(anchor), "{from}: no heading has the anchor of `{link}`");
            }
            checked += 1;
        }
    }
    assert!(checked > 100, "only {checked} links were found");
    Ok(())
}

/// Folders whose files pages name by their path from the root of the repository.
const NAMED: [&str; 8] = [".cargo/", ".ci/", ".github/", "crates/", "deploy/", "docs/", "proto/", "tests/"];

/// The paths that a pattern of a shell stands for: `a/{b,c}.rs` is `a/b.rs` and `a/c.rs`.
fn expanded(pattern: &str) -> Vec<String> {
    let Some((before, rest)) = pattern.split_once('{') else { return vec![pattern.to_owned()] };
    let Some((choices, after)) = rest.split_once('}') else { return vec![pattern.to_owned()] };
    choices.split(',').flat_map(|choice| expanded(&format!("{before}{}{after}", choice.trim()))).collect()
}

#[test]
fn files_that_pages_name_exist() -> Result<()> {
    let mut pages: BTreeSet<PathBuf> = OUTSIDE.iter().map(|page| root().join(page)).collect();
    pages_below(&root().join("docs"), &mut pages)?;
    // It says what was changed, which may be gone since.
    pages.remove(&root().join("CHANGELOG.md"));
    let mut checked = 0;
    for page in &pages {
        let text = fs::read_to_string(page)?;
        let quoted = prose(&text).into_iter().flat_map(|line| line.split('`').skip(1).step_by(2));
        let is_path = |word: &&str| NAMED.iter().any(|folder| word.starts_with(folder)) && !word.contains(' ');
        // `NAME` stands for a name of the reader's.
        for path in quoted.filter(is_path).filter(|path| !path.contains("NAME")).flat_map(expanded) {
            // Of a pattern, the folder that holds what it matches.
            let fixed = path.split('*').next().unwrap_or_default();
            let file =
                if fixed == path { path.as_str() } else { fixed.rsplit_once('/').map_or("", |(folder, _)| folder) };
            assert!(root().join(file).exists(), "{} names `{path}`, which is not there", page.display());
            checked += 1;
        }
    }
    assert!(checked > 100, "only {checked} paths were found");
    Ok(())
}

/// The part of a page below a heading, up to the next one of the same level.
fn section<'a>(page: &'a str, heading: &str) -> Result<&'a str> {
    let level = heading.split(' ').next().context("a heading has a level")?;
    let (_, rest) = page.split_once(&format!("\n{heading}\n")).with_context(|| format!("no heading `{heading}`"))?;
    Ok(rest.split_once(&format!("\n{level} ")).map_or(rest, |(section, _)| section))
}

/// Functions and types that a text says are in a file, each with that file: `file` (`item`) or `item` (`file`).
fn named_items(text: &str) -> Vec<(&str, &str)> {
    let mut items = Vec::new();
    let mut previous = "";
    let is_file = |code: &str| code.ends_with(".rs") && code.starts_with("crates/");
    let parts: Vec<&str> = text.split('`').collect();
    // Text and code take turns; `before` is the text in front of a piece of code.
    for pair in parts.chunks_exact(2) {
        let [before, code] = pair else { continue };
        if before.trim() == "(" && is_file(previous) != is_file(code) {
            items.push(if is_file(code) { (*code, previous) } else { (previous, *code) });
        }
        previous = code;
    }
    items
}

/// Endings of files that an answer has to name by their path from the root, where another test looks for them.
const FILES: [&str; 7] = [".rs", ".py", ".toml", ".json", ".yaml", ".js", ".proto"];

/// The table of the architecture answers in one step: each row names a path and the item to look for in it.
#[test]
fn the_architecture_names_the_first_file_of_each_change() -> Result<()> {
    let page = fs::read_to_string(root().join("docs/ARCHITECTURE.md"))?;
    let answers = section(&page, "## Where a change goes")?;
    let (_, table) = answers.split_once("\n| change | begins in |\n|---|---|\n").context("a table of changes")?;
    let rows: Vec<&str> = table.lines().take_while(|line| line.starts_with('|')).collect();
    let mut items = 0;
    for row in &rows {
        let paths = row.split('`').skip(1).step_by(2).filter(|word| word.contains('/'));
        assert!(paths.count() > 0, "no path in `{row}`");
        for (file, item) in named_items(row) {
            let text = fs::read_to_string(root().join(file)).with_context(|| format!("read {file}"))?;
            let is_defined =
                ["struct", "enum", "trait", "fn"].iter().any(|kind| text.contains(&format!("{kind} {item}")));
            assert!(is_defined, "`{row}` says that `{item}` is defined in {file}");
            items += 1;
        }
    }
    let linked = rows.iter().filter(|row| row.contains("](#")).count();
    let worked = answers.lines().filter(|line| line.starts_with("### ")).count();
    assert_eq!(linked, worked, "every worked answer has a row that leads to it");
    assert!(rows.len() >= 10 && items >= 8, "{} rows and {items} items were found", rows.len());
    for word in answers.split('`').skip(1).step_by(2).filter(|word| FILES.iter().any(|end| word.ends_with(end))) {
        assert!(word.contains('/') || root().join(word).exists(), "`{word}` is named without its folder");
    }
    Ok(())
}

/// The five changes for which the architecture promises that their place is found in two minutes.
#[test]
fn the_architecture_answers_where_five_changes_go() -> Result<()> {
    let page = fs::read_to_string(root().join("docs/ARCHITECTURE.md"))?;
    let answers = section(&page, "## Where a change goes")?;
    let mut items = 0;
    for heading in ["A new objective", "A retry rule", "A metric", "A spec key", "A weight transport"] {
        let answer = section(answers, &format!("### {heading}"))?;
        let (steps, tests) = answer.split_once("\n| test | what it checks |\n").context("an answer names its tests")?;
        let files = |text: &str| -> Vec<String> {
            let quoted = text
                .split('`')
                .skip(1)
                .step_by(2)
                .filter(|word| word.starts_with("crates/") || word.starts_with("tests/"));
            quoted.flat_map(expanded).collect()
        };
        assert!(files(steps).len() >= 3, "{heading}: {steps}");
        assert!(files(tests).len() >= 2, "{heading}: {tests}");
        for (file, item) in named_items(steps).into_iter().filter(|(file, _)| !file.contains("NAME")) {
            let text = fs::read_to_string(root().join(file)).with_context(|| format!("read {file}"))?;
            assert!(text.contains(item), "`{heading}` says that `{item}` is in {file}");
            items += 1;
        }
    }
    assert!(items >= 3, "only {items} functions and types were found");
    Ok(())
}

#[test]
fn items_belong_to_the_file_before_them() {
    let text =
        "1. `crates/a/b.rs` (`fail`): the count. `crates/c/d.rs`: and `other` (`more`), `Item` (`crates/e/f.rs`).";
    assert_eq!(named_items(text), [("crates/a/b.rs", "fail"), ("crates/e/f.rs", "Item")]);
    let page = "# A\n\n## B\n\ntext\n### C\n\nmore\n\n## D\n";
    assert_eq!(section(page, "## B").ok(), Some("\ntext\n### C\n\nmore\n"));
    assert!(section(page, "## E").is_err());
}

#[test]
fn patterns_are_those_of_a_shell() {
    assert_eq!(expanded("a/{b, c}/{d,e}.rs"), ["a/b/d.rs", "a/b/e.rs", "a/c/d.rs", "a/c/e.rs"]);
    assert_eq!(expanded("a/b.rs"), ["a/b.rs"]);
}

#[test]
fn anchors_are_those_of_forges() {
    let page = "# The `job` spec\n\n```sh\n# no heading\n```\n\n## See [Data](DATA.md#x), too\n\n## A\n\n## A\n";
    let expected = ["the-job-spec", "see-data-too", "a", "a-1"].map(str::to_owned);
    assert_eq!(anchors(page), BTreeSet::from(expected));
    assert_eq!(links("[a](b.md#c) and [d](https://e)\n```\n[f](g)\n```\n![h](i.svg)"), ["b.md#c", "i.svg"]);
    assert_eq!(resolved(Path::new("/a/b/../c/./d")), Path::new("/a/c/d"));
}
