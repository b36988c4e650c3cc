//! `cargo xtask gpu-bundle`: what a machine with a GPU needs that has neither Rust nor a network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::process::{cargo, check, command, root, target};
use crate::setup;

/// Programs of the bundle.
const PROGRAMS: [&str; 2] = ["pacs", "pacs-worker"];

/// Test programs, by package and target, and their names in the bundle (`tests/gpu/prove.py` knows them).
const TESTS: [(&str, &str, &str); 5] = [
    ("pacs-torch", "pacs_torch", "pacs_torch"),
    ("pacs-torch", "flash", "torch.flash"),
    ("pacs-model", "gpu", "model.gpu"),
    ("pacs-rollout", "gpu", "rollout.gpu"),
    ("pacs-collective", "pacs_collective", "pacs_collective"),
];

/// Folders of the repository that go along as they are.
const FOLDERS: [&str; 2] = ["tests/gpu", "tests/golden/models"];

/// Most that the archive may take: machines that are lent take no more.
const MOST_BYTES: u64 = 55 << 20;

/// Builds, strips and packs the programs, the tests of a GPU and `tests/gpu/prove.sh`.
#[derive(Debug, Args)]
#[command(after_help = "\
On the machine with the GPU, which has Python's torch 2.11 (`pip install torch==2.11.0`):
  tar -xzf pacs-gpu.tar.gz && pacs-gpu/tests/gpu/prove.sh

Examples:
  cargo xtask gpu-bundle
  cargo xtask gpu-bundle --out /tmp/pacs-gpu.tar.gz")]
pub(crate) struct Arguments {
    /// The archive [default: target/pacs-gpu.tar.gz]
    #[arg(long)]
    out: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::libtorch()?;
    println!("building (some minutes the first time)");
    check("build the programs", &mut cargo(&["build", "--release", "--workspace", "--bins", "--tests"]))?;
    let folder = target().join("pacs-gpu");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("remove the old {}", folder.display()))?;
    }
    let tests = folder.join("bin/tests");
    fs::create_dir_all(&tests).with_context(|| format!("create {}", tests.display()))?;
    for name in PROGRAMS {
        strip(&target().join("release").join(name), &folder.join("bin").join(name))?;
    }
    let built = test_programs()?;
    for (package, name, packed) in TESTS {
        let found = built.iter().find(|program| program.package == package && program.name == name);
        let program = found.with_context(|| format!("find the test program {name} of {package}"))?;
        strip(&program.path, &tests.join(packed))?;
    }
    for part in FOLDERS {
        let above = folder.join(part);
        let above = above.parent().context("a folder of the repository is below its root")?;
        fs::create_dir_all(above).with_context(|| format!("create {}", above.display()))?;
        check(&format!("copy {part}"), command("cp").arg("-r").arg(root().join(part)).arg(above))?;
    }
    let archive = arguments.out.clone().unwrap_or_else(|| target().join("pacs-gpu.tar.gz"));
    let archive = std::path::absolute(&archive).with_context(|| format!("make {} absolute", archive.display()))?;
    let mut tar = command("tar");
    tar.args(["--owner=0", "--group=0", "-I", "gzip -9", "-C"]).arg(target()).arg("-cf").arg(&archive).arg("pacs-gpu");
    check("pack the bundle", &mut tar)?;
    let bytes = fs::metadata(&archive).context("look at the archive")?.len();
    let mib = bytes as f64 / f64::from(1 << 20);
    println!("{}: {mib:.1} MiB", archive.display());
    ensure!(bytes <= MOST_BYTES, "keep the bundle within {} MiB: it takes {mib:.1}", MOST_BYTES >> 20);
    Ok(())
}

/// A program without what a debugger would read.
fn strip(from: &Path, to: &Path) -> Result<()> {
    check(&format!("strip {}", from.display()), command("strip").arg("-o").arg(to).arg(from))
}

/// A test program as cargo names it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct TestProgram {
    package: String,
    name: String,
    path: PathBuf,
}

/// All that the build above has made; nothing is compiled any more.
fn test_programs() -> Result<Vec<TestProgram>> {
    let arguments = ["build", "--release", "--workspace", "--bins", "--tests", "--message-format=json"];
    let output = cargo(&arguments).stderr(Stdio::inherit()).output().context("ask cargo for the test programs")?;
    ensure!(output.status.success(), "ask cargo for the test programs: it ended with {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(test_program).collect())
}

/// What a message of cargo says of a test program.
fn test_program(line: &str) -> Option<TestProgram> {
    let message: Value = serde_json::from_str(line).ok()?;
    let is_test = message["reason"] == "compiler-artifact" && message["profile"]["test"] == true;
    let path = message["executable"].as_str().filter(|_| is_test)?;
    // `path+file:///…/crates/torch#pacs-torch@0.1.0`.
    let package = message["package_id"].as_str()?.rsplit('#').next()?.split('@').next()?;
    let name = message["target"]["name"].as_str()?;
    Some(TestProgram { package: package.to_owned(), name: name.to_owned(), path: path.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_cargo_name_test_programs() {
        let line = r#"{"reason":"compiler-artifact","package_id":"path+file:///src/crates/torch#pacs-torch@0.1.0","target":{"kind":["test"],"name":"flash"},"profile":{"test":true},"executable":"/t/release/deps/flash-bc07"}"#;
        let program = TestProgram {
            package: "pacs-torch".into(),
            name: "flash".into(),
            path: "/t/release/deps/flash-bc07".into(),
        };
        assert_eq!(test_program(line), Some(program));
        // A library, and a program that is no test.
        assert_eq!(test_program(&line.replace("\"test\":true", "\"test\":false")), None);
        assert_eq!(test_program(&line.replace("\"/t/release/deps/flash-bc07\"", "null")), None);
        assert_eq!(test_program("   Compiling pacs-torch"), None);
    }

    #[test]
    fn packed_folders_exist() {
        for part in FOLDERS {
            assert!(root().join(part).is_dir(), "{part}");
        }
        let script = fs::read_to_string(root().join("tests/gpu/prove.py")).expect("the script");
        for (.., packed) in TESTS {
            assert!(script.contains(&format!("\"{packed}\"")), "prove.py does not know {packed}");
        }
    }
}
