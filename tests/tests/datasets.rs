//! Data sets as they are published, with nothing but `--dataset FILE`.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use pacs_tests::{Job, root};

fn trains_on(dataset: &Path, said: &str) -> Result<()> {
    let job = Job::tiny()?;
    let dataset = dataset.display().to_string();
    let ended = job.start_with(&["--dataset", &dataset, "--steps", "1"])?.wait()?;
    ended.expect_code(0);
    ensure!(ended.stdout.contains(said), "`{said}` is not in: {}", ended.stdout);
    job.check_no_panic()?;
    let metrics = job.json_lines("metrics.jsonl")?;
    ensure!(metrics.len() == 1 && metrics[0]["step"] == 1, "{metrics:?}");
    Ok(())
}

/// Questions and solutions that end with `#### 72`, as GSM8K has them; a tenth is held out.
#[test]
fn worked_solutions_with_a_marked_answer() -> Result<()> {
    trains_on(&root().join("tests/cases/datasets/solutions.jsonl"), "36 of 36 rows used")
}

/// Messages, nested references and superfluous columns, as verl's sets (DAPO) have them.
#[test]
fn messages_with_a_nested_reference() -> Result<()> {
    let fields = "questions from `prompt`, answers from `reward_model.ground_truth`";
    trains_on(&root().join("tests/cases/datasets/verl.parquet"), fields)
}

/// The published file itself.
#[test]
fn gsm8k() -> Result<()> {
    let Some(dataset) = std::env::var_os("PACS_GSM8K") else {
        eprintln!("skipped: set PACS_GSM8K to a file of GSM8K (.jsonl or .parquet) to train on it");
        return Ok(());
    };
    trains_on(&PathBuf::from(dataset), "rows used")
}
