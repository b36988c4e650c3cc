//! Shows that the simulation finds bugs: plants each known bug in a copy of the sources, and counts the seeds
//! that detect it.
//!
//! The copy is a workspace of its own below `target/`, with the machine and the two crates it needs. It builds into the
//! same target folder, where its dependencies are compiled already.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Arguments;
use crate::process::{cargo, root, target};

const LIST: &str = "crates/machine/tests/simulation/bugs.toml";
const CRATES: [&str; 3] = ["machine", "order", "types"];
/// Time limit for the seeds of one bug: a machine that hangs in a step would never return.
const MOST_TIME: Duration = Duration::from_secs(600);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    bug: Vec<Bug>,
}

/// One edit of the sources that makes the machine wrong.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bug {
    name: String,
    what: String,
    file: PathBuf,
    find: String,
    replace: String,
}

/// Result of the seeds for one bug.
struct Found {
    seeds: u64,
    /// First seed that detected the bug, and its message.
    first: Option<(u64, String)>,
    hangs: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let seeds = arguments.seeds.unwrap_or(1000);
    let mut bugs = read()?;
    if let Some(only) = &arguments.only {
        bugs.retain(|bug| bug.name == *only);
        ensure!(!bugs.is_empty(), "find the bug `{only}` in {LIST}");
    }
    let sources = bugs.iter().map(planted).collect::<Result<Vec<_>>>()?;
    let copy = target().join("sim-bugs");
    copy_workspace(&copy)?;
    let control = simulate(&build(&copy)?, arguments.first_seed, seeds)?;
    if let Some((seed, why)) = control.first {
        bail!("simulate without a bug: seed {seed} fails: {why}");
    }
    if !arguments.json {
        println!("{seeds} seeds each; without a bug, none fails\n");
        println!("{:<30} {:>6} {:>6}  by", "bug", "seeds", "first");
    }
    let mut missed = Vec::new();
    for (bug, source) in bugs.iter().zip(sources) {
        let path = copy.join(&bug.file);
        let original = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        write(&path, &source)?;
        let found = build(&copy).and_then(|program| simulate(&program, arguments.first_seed, seeds));
        write(&path, &original)?;
        let found = found.with_context(|| format!("plant `{}`", bug.name))?;
        report(bug, &found, arguments.json);
        if found.first.is_none() {
            missed.push(bug.name.as_str());
        }
    }
    ensure!(missed.is_empty(), "find every bug: no seed noticed {}", missed.join(", "));
    Ok(())
}

fn report(bug: &Bug, found: &Found, as_json: bool) {
    let (first, by) = found.first.clone().map_or((None, String::new()), |(seed, why)| (Some(seed), why));
    if as_json {
        let Bug { name, what, .. } = bug;
        let line =
            json!({ "bug": name, "what": what, "seeds": found.seeds, "first": first, "by": by, "hangs": found.hangs });
        return println!("{line}");
    }
    let first = first.map_or_else(|| "none".to_owned(), |seed| seed.to_string());
    let by = if found.hangs { format!("{by} (some seed hangs)") } else { by };
    println!("{:<30} {:>6} {first:>6}  {by}", bug.name, found.seeds);
}

fn read() -> Result<Vec<Bug>> {
    let text = fs::read_to_string(root().join(LIST)).with_context(|| format!("read {LIST}"))?;
    let List { bug } = toml::from_str(&text).with_context(|| format!("parse {LIST}"))?;
    Ok(bug)
}

/// Returns the source file with the bug planted.
fn planted(bug: &Bug) -> Result<String> {
    let source = fs::read_to_string(root().join(&bug.file)).with_context(|| format!("read {}", bug.file.display()))?;
    let places = source.matches(&bug.find).count();
    ensure!(
        places == 1,
        "plant `{}`: its `find` occurs {places} times in {}, and has to occur once; adapt {LIST}",
        bug.name,
        bug.file.display()
    );
    Ok(source.replacen(&bug.find, &bug.replace, 1))
}

fn copy_workspace(copy: &Path) -> Result<()> {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).context("read Cargo.toml")?;
    let members = CRATES.map(|name| format!("\"crates/{name}\"")).join(", ");
    let lines = manifest.lines().filter(|line| !line.starts_with("default-members"));
    let lines =
        lines.map(|line| if line.starts_with("members") { format!("members = [{members}]") } else { line.into() });
    let manifest: String = lines.map(|line| line + "\n").collect();
    write(&copy.join("Cargo.toml"), &manifest)?;
    let lock = fs::read_to_string(root().join("Cargo.lock")).context("read Cargo.lock")?;
    fs::write(copy.join("Cargo.lock"), lock).context("write the copy's Cargo.lock")?;
    let mut folders: Vec<PathBuf> = CRATES.map(|name| Path::new("crates").join(name)).to_vec();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root().join(&folder)).with_context(|| format!("list {}", folder.display()))? {
            let entry = entry.with_context(|| format!("list {}", folder.display()))?;
            let path = folder.join(entry.file_name());
            if entry.path().is_dir() {
                folders.push(path);
            } else {
                let text = fs::read_to_string(entry.path()).with_context(|| format!("read {}", path.display()))?;
                write(&copy.join(path), &text)?;
            }
        }
    }
    Ok(())
}

/// Writes a file unless it has this content already, because cargo rebuilds by modification time.
fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|there| there == text) {
        return Ok(());
    }
    let folder = path.parent().context("find a folder above the file")?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Builds the simulation of the copy and returns its program.
fn build(copy: &Path) -> Result<PathBuf> {
    let mut command =
        cargo(&["test", "--release", "--offline", "--quiet", "-p", "pacs-machine", "--test", "simulation"]);
    command.args(["--no-run", "--message-format", "json"]).current_dir(copy).env("CARGO_TARGET_DIR", target());
    // An edit then compiles in seconds; the seeds of a bug also run for seconds only.
    command.env("CARGO_INCREMENTAL", "1").env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    command.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
    let output = command.output().context("start cargo")?;
    if !output.status.success() {
        let messages = String::from_utf8_lossy(&output.stdout);
        let rendered = messages.lines().filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            Some(message["message"]["rendered"].as_str()?.to_owned())
        });
        bail!(
            "build the simulation with the bug: {}{}",
            rendered.collect::<String>(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    let program = messages.lines().rev().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == "simulation").then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    program.context("find the program that cargo has built")
}

fn simulate(program: &Path, first: u64, count: u64) -> Result<Found> {
    let mut command = Command::new(program);
    command.args(["runs_finish", "--nocapture"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.env("PACS_SEEDS", count.to_string()).env("PACS_FIRST_SEED", first.to_string());
    let mut child = command.spawn().context("start the simulation")?;
    let mut output = child.stdout.take().context("read from the simulation")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).map(|_| text)
    });
    let deadline = Instant::now() + MOST_TIME;
    let mut hangs = false;
    let status = loop {
        if let Some(status) = child.try_wait().context("wait for the simulation")? {
            break status;
        }
        if Instant::now() > deadline {
            hangs = true;
            child.kill().context("end the simulation")?;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = reader.join().ok().context("read from the simulation")?.context("read from the simulation")?;
    let failures = text.lines().filter_map(|line| {
        let (seed, why) = line.strip_prefix("seed ")?.split_once(" failed: ")?;
        Some((seed.parse::<u64>().ok()?, why.to_owned()))
    });
    let failures: Vec<_> = failures.collect();
    ensure!(status.success() || hangs || !failures.is_empty(), "simulate: {status}, and no seed was named:\n{text}");
    let seeds = u64::try_from(failures.len()).context("count the seeds")?;
    Ok(Found { seeds, first: failures.into_iter().min(), hangs })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_bug_can_still_be_planted() {
        let bugs = read().unwrap();
        let names: BTreeSet<_> = bugs.iter().map(|bug| bug.name.as_str()).collect();
        assert_eq!(names.len(), bugs.len(), "two bugs have one name");
        for bug in &bugs {
            let source = planted(bug).unwrap();
            assert!(source != fs::read_to_string(root().join(&bug.file)).unwrap(), "{} changes nothing", bug.name);
        }
    }
}
