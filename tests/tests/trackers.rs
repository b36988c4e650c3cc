//! `deploy/trackers/follow.py`: the trackers' own readers see what it has written, where their packages are installed.

use std::process::Command;

use anyhow::{Context, Result};
use pacs_tests::root;

#[test]
fn trackers_read_what_a_followed_run_has_measured() -> Result<()> {
    let Some(python) = std::env::var_os("PACS_TRACKERS_PYTHON") else {
        eprintln!("skipped: set PACS_TRACKERS_PYTHON to a Python that has tensorboard, wandb and mlflow");
        return Ok(());
    };
    let folder = root().join("deploy/trackers");
    let mut done = Command::new(python);
    let done = done.args(["-m", "unittest", "-v", "test_follow"]).current_dir(folder);
    let done = done.env("PYTHONDONTWRITEBYTECODE", "1").output();
    let done = done.context("start PACS_TRACKERS_PYTHON")?;
    let said = String::from_utf8_lossy(&done.stderr);
    // Skips of single trackers are said aloud, too.
    eprint!("{said}");
    assert!(done.status.success() && said.contains("Ran 3 tests"), "{said}");
    Ok(())
}

/// The help must work without any of the packages: it says which ones there are.
#[test]
fn the_help_needs_no_package() -> Result<()> {
    let script = root().join("deploy/trackers/follow.py");
    let help = Command::new("python3").arg("-S").arg(script).arg("--help").output().context("start python3")?;
    let text = String::from_utf8_lossy(&help.stdout);
    assert!(help.status.success() && text.contains("--to") && text.contains("WANDB_MODE"), "{text}");
    Ok(())
}
