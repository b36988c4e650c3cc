//! `deploy/examples`: every job is accepted, every file that it names is there, and its verifier grades as it says.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use pacs_tests::{program, root};
use serde_json::Value;

/// Where the examples are, as their commands write it: relative to the root of the repository.
const FOLDER: &str = "deploy/examples";

/// Names of the examples: one folder each.
fn examples() -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(root().join(FOLDER)).context("list the examples")? {
        let path = entry?.path();
        if path.is_dir() {
            names.insert(path.file_name().context("a folder has a name")?.to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

fn job_of(example: &str) -> PathBuf {
    root().join(FOLDER).join(example).join("job.toml")
}

/// What a job and the commands in its comments name below the folder of the examples.
fn named_files(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| c.is_whitespace() || "\"'`,;()".contains(c));
    words.filter(|word| word.starts_with(FOLDER)).collect()
}

#[test]
fn every_example_is_accepted_without_advice() -> Result<()> {
    let examples = examples()?;
    assert!(examples.len() >= 9, "examples are missing: {examples:?}");
    for name in &examples {
        let spec = pacs_spec::read(&job_of(name)).with_context(|| format!("read the example `{name}`"))?;
        assert_eq!(&spec.name, name, "the run folder of an example has the name of its folder");
        // What `pacs job check` notes of a job: an example should show none of it.
        assert_eq!(spec.advice(), [""; 0], "{name}");
    }
    Ok(())
}

#[test]
fn every_file_that_an_example_names_is_there() -> Result<()> {
    for name in examples()? {
        let text = fs::read_to_string(job_of(&name))?;
        let own = format!("{FOLDER}/{name}/job.toml");
        let files = named_files(&text);
        assert!(files.contains(own.as_str()), "{own} does not say how it is started");
        for file in files {
            assert!(root().join(file).exists(), "{own} names {file}, which is not there");
        }
    }
    Ok(())
}

#[test]
fn the_page_lists_every_example() -> Result<()> {
    let page = fs::read_to_string(root().join(FOLDER).join("README.md"))?;
    let listed: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| [")?.split_once(']'))
        .map(|(name, _)| name.to_owned())
        .collect();
    assert_eq!(listed, examples()?);
    Ok(())
}

#[test]
fn problems_of_the_examples_are_read_and_none_is_held_out_and_trained_on() -> Result<()> {
    for name in ["own-data", "own-verifier"] {
        let mut parts = Vec::new();
        for part in ["train", "held-out"] {
            let text = fs::read_to_string(root().join(FOLDER).join(name).join(format!("{part}.jsonl")))?;
            let rows: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
            let keys = if name == "own-data" { ["text", "result"] } else { ["question", "answer"] };
            for row in &rows {
                assert!(keys.iter().all(|key| row[key].is_string()), "{name}, {part}: {row}");
            }
            let questions: BTreeSet<String> = rows.iter().map(|row| row[keys[0]].to_string()).collect();
            assert_eq!(questions.len(), rows.len(), "{name}, {part}: a question is there twice");
            parts.push(questions);
        }
        assert!(parts[0].is_disjoint(&parts[1]), "{name}: a held-out question is trained on");
    }
    Ok(())
}

/// The command in the comments of `own-verifier/job.toml`.
#[test]
fn the_verifier_in_python_grades_its_rows() -> Result<()> {
    let folder = Path::new(FOLDER).join("own-verifier");
    let mut command = Command::new(program("pacs")?);
    command.args(["verify", "exec", "--input"]).arg(folder.join("rows.jsonl"));
    command.args(["--", "python3"]).arg(folder.join("verifier.py"));
    let output = command.current_dir(root()).output().context("start pacs")?;
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    let text = String::from_utf8(output.stdout)?;
    let verdicts: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let outcomes: Vec<_> = verdicts.iter().map(|verdict| verdict["outcome"].as_str().unwrap_or_default()).collect();
    assert_eq!(outcomes, ["correct", "wrong", "wrong", "unparsable", "failed"], "{error}");
    let rewards: Vec<_> = verdicts.iter().map(|verdict| verdict["reward"].as_f64()).collect();
    // The right word in a sentence two words too short; the right length without the word.
    assert_eq!(rewards, [Some(1.0), Some(0.5), Some(0.5), Some(0.0), None], "{error}");
    Ok(())
}
