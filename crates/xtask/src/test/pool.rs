//! Runs the workspace's test programs, several at a time.
//!
//! `cargo test` runs them one after the other. About half of their time passes in waiting (for timeouts, for processes that were killed
//! and start again), so that cores idle.

use std::collections::VecDeque;
use std::fs::File;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::process::{cargo, command, target};

/// Longest that one test program may run: several times what the longest takes on two busy cores.
const DEADLINE: Duration = Duration::from_secs(20 * 60);
/// How often the running programs are looked at.
const INTERVAL: Duration = Duration::from_millis(50);
/// Programs that take a minute or more, the longest first. They start first, so that no long one is left at the end with an idle core
/// next to it. Durations of earlier runs would be lost with each fresh machine.
const LONGEST: [&str; 11] = [
    "watchdog",
    "memory",
    "exactness",
    "engine",
    "identity",
    "killed_run",
    "checkpoints",
    "chaos",
    "lost_ranks",
    "pacs_torch",
    "weights",
];

/// One test program, as cargo names it.
pub(super) struct Program {
    package: String,
    name: String,
    executable: PathBuf,
    /// Where its manifest is, which is its working directory, too.
    folder: PathBuf,
}

/// A message of `cargo … --message-format=json`, as far as it is needed.
#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds all test programs, and lists them with the longest first.
pub(super) fn programs() -> Result<Vec<Program>> {
    let mut build =
        cargo(&["test", "--release", "--workspace", "--no-run", "--message-format=json-render-diagnostics"]);
    let output = build.stderr(Stdio::inherit()).output().context("build the tests")?;
    ensure!(output.status.success(), "build the tests: cargo ended with {}", output.status);
    let mut programs = listed(&String::from_utf8_lossy(&output.stdout))?;
    ensure!(!programs.is_empty(), "find the tests: cargo named no test program");
    programs.sort_by_key(|program| LONGEST.iter().position(|name| *name == program.name).unwrap_or(LONGEST.len()));
    Ok(programs)
}

fn listed(messages: &str) -> Result<Vec<Program>> {
    let mut programs = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Message = serde_json::from_str(line).with_context(|| format!("read cargo's message `{line}`"))?;
        let (Some(executable), Some(manifest), Some(target), Some(profile)) =
            (message.executable, message.manifest_path, message.target, message.profile)
        else {
            continue;
        };
        if message.reason != "compiler-artifact" || !profile.test {
            continue;
        }
        let folder = manifest.parent().context("find the folder of a manifest")?.to_owned();
        let package = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        programs.push(Program { package, name: target.name, executable, folder });
    }
    Ok(programs)
}

/// A program that runs, with the file that its output goes to.
struct Running {
    label: String,
    child: Child,
    output: PathBuf,
    since: Instant,
}

impl Running {
    fn start(program: &Program, output: PathBuf) -> Result<Self> {
        let label = format!("{} {}", program.package, program.name);
        let file = File::create(&output).with_context(|| format!("create {}", output.display()))?;
        // With `--show-output` a test that skips is seen; the harness hides what passing tests print otherwise.
        let child = command(&program.executable)
            .arg("--show-output")
            .current_dir(&program.folder)
            .env("CARGO_MANIFEST_DIR", &program.folder)
            .stdin(Stdio::null())
            .stderr(file.try_clone().context("share the output file")?)
            .stdout(file)
            .spawn()
            .with_context(|| format!("start the tests {label}"))?;
        Ok(Self { label, child, output, since: Instant::now() })
    }

    /// Whether it passed, once it has ended; one that has run for too long is killed, and failed.
    fn poll(&mut self) -> Result<Option<bool>> {
        if let Some(status) = self.child.try_wait().context("wait for a test program")? {
            return Ok(Some(status.success()));
        }
        if self.since.elapsed() < DEADLINE {
            return Ok(None);
        }
        eprintln!("{}: killed after {} minutes", self.label, DEADLINE.as_secs() / 60);
        self.child.kill().context("kill a test program")?;
        self.child.wait().context("wait for a killed test program")?;
        Ok(Some(false))
    }
}

/// Runs all of them. Prints the verdict on each test of a program that passed, and the whole output of one that failed.
pub(super) fn run(programs: Vec<Program>, jobs: Option<NonZeroUsize>) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let jobs = jobs.map_or(cores + 1, NonZeroUsize::get);
    let outputs = target().join("test-output");
    std::fs::create_dir_all(&outputs).with_context(|| format!("create {}", outputs.display()))?;
    let total = programs.len();
    let since = Instant::now();
    let mut waiting: VecDeque<_> = programs.into_iter().enumerate().collect();
    let mut running: Vec<Running> = Vec::new();
    let mut failed = Vec::new();
    while !waiting.is_empty() || !running.is_empty() {
        while running.len() < jobs {
            let Some((index, program)) = waiting.pop_front() else { break };
            running.push(Running::start(&program, outputs.join(format!("{index}-{}", program.name)))?);
        }
        let mut still = Vec::new();
        for mut one in running {
            match one.poll()? {
                None => still.push(one),
                Some(has_passed) => {
                    report(&one, has_passed)?;
                    if !has_passed {
                        failed.push(one.label);
                    }
                }
            }
        }
        running = still;
        std::thread::sleep(INTERVAL);
    }
    println!("{total} test programs in {:.0} s, {} at a time", since.elapsed().as_secs_f64(), jobs);
    if !failed.is_empty() {
        bail!("pass the tests: {} of {total} test programs failed: {}", failed.len(), failed.join(", "));
    }
    Ok(())
}

/// Prints the harness's own lines on each test and the sum of them, as `cargo test` does: whoever reads them, a person or a
/// program, counts tests and not programs. What a passing test prints is left out, except that it skipped something.
fn report(one: &Running, has_passed: bool) -> Result<()> {
    let output = read(&one.output)?;
    let seconds = one.since.elapsed().as_secs_f64();
    if !has_passed {
        println!("     Running {} (FAILED after {seconds:.1} s)\n{output}", one.label);
        return Ok(());
    }
    println!("     Running {} (passed in {seconds:.1} s)\n", one.label);
    output.lines().filter(|line| is_told(line)).for_each(|line| println!("{line}"));
    println!();
    Ok(())
}

/// Whether a line of a test program that passed is printed.
fn is_told(line: &str) -> bool {
    let is_harness = ["running ", "test "].iter().any(|start| line.starts_with(start));
    // What was left out has to be seen: it is not a success.
    is_harness || line.trim_start().to_lowercase().starts_with("skip")
}

fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::{LONGEST, PathBuf, is_told, listed};

    #[test]
    fn only_test_programs_are_listed() {
        let messages = r#"   Compiling pacs-algo
{"reason":"compiler-artifact","manifest_path":"/w/crates/algo/Cargo.toml","target":{"name":"golden"},"profile":{"test":true},"executable":"/w/target/golden-1"}
{"reason":"compiler-artifact","manifest_path":"/w/crates/cli/Cargo.toml","target":{"name":"pacs"},"profile":{"test":false},"executable":"/w/target/pacs"}
{"reason":"compiler-artifact","manifest_path":"/w/crates/algo/Cargo.toml","target":{"name":"pacs_algo"},"profile":{"test":false},"executable":null}
{"reason":"build-finished","success":true}"#;
        let programs = listed(messages).expect("cargo's own messages can be read");
        assert_eq!(programs.len(), 1);
        assert_eq!((programs[0].package.as_str(), programs[0].name.as_str()), ("algo", "golden"));
        assert!(listed("{\"reason\":").is_err());
    }

    /// A program that was renamed or removed would start late without a word.
    #[test]
    fn the_longest_programs_exist() {
        let root = crate::process::root();
        let crates = std::fs::read_dir(root.join("crates")).expect("the crates of the workspace");
        let packages: Vec<PathBuf> =
            crates.map(|entry| entry.expect("a readable folder").path()).chain([root.join("tests")]).collect();
        for name in LONGEST {
            // The unit tests of a library, or a file or folder of integration tests.
            let is_library = name.strip_prefix("pacs_").is_some_and(|name| root.join("crates").join(name).is_dir());
            let is_test = |package: &PathBuf| {
                let tests = package.join("tests");
                tests.join(format!("{name}.rs")).is_file() || tests.join(name).join("main.rs").is_file()
            };
            assert!(is_library || packages.iter().any(is_test), "there is no test program `{name}`");
        }
    }

    #[test]
    fn verdicts_and_skips_are_told() {
        let told = [
            "running 2 tests",
            "test a::b ... ok",
            "test result: ok. 2 passed; 0 failed",
            "    skipped on a GPU: none",
        ];
        assert!(told.iter().all(|line| is_told(line)));
        assert!(["successes:", "---- a::b stdout ----", "loss 0.5", ""].iter().all(|line| !is_told(line)));
    }
}
