//! `cargo xtask dist`: the archive and the wheel hold what they should, and their programs start on a machine without Rust.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use pacs_tests::{program, root};

/// Where the system's own programs are; Rust is in none of these.
const SYSTEM: &str = "/usr/bin:/bin";

/// Runs a command to its end and returns its exit code and all that it said.
fn said(command: &mut Command) -> Result<(Option<i32>, String)> {
    let output = command.output().with_context(|| format!("start {:?}", command.get_program()))?;
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((output.status.code(), text))
}

fn done(command: &mut Command) -> Result<String> {
    let (code, text) = said(command)?;
    ensure!(code == Some(0), "{command:?} ended with {code:?}:\n{text}");
    Ok(text)
}

/// A program as a user without Rust starts it: nothing of this environment but a home and the system's programs.
fn start(program: &Path, home: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", SYSTEM).env("HOME", home).current_dir(home);
    command
}

/// The folder of the libtorch that the tests run with, which has `torch/lib`.
fn libtorch() -> Result<PathBuf> {
    let torch = std::env::var_os("LIBTORCH").map_or_else(|| root().join("target/libtorch/torch"), PathBuf::from);
    Ok(torch.canonicalize()?.parent().context("it lies in a folder")?.to_owned())
}

/// The only file of a folder that ends so.
fn only(folder: &Path, end: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        found.extend(path.to_string_lossy().ends_with(end).then_some(path));
    }
    ensure!(found.len() == 1, "{found:?} is not one {end}");
    found.pop().context("there is one")
}

#[test]
fn both_packages_start_without_rust() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let out = folder.path().join("out");
    done(Command::new(program("xtask")?).args(["dist", "--no-build", "--out"]).arg(&out))?;
    let (archive, wheel) = (only(&out, ".tar.gz")?, only(&out, ".whl")?);
    for file in [&archive, &wheel] {
        let sum = format!("{}.sha256", file.file_name().context("a name")?.to_string_lossy());
        done(Command::new("sha256sum").args(["--check", &sum]).current_dir(&out))?;
    }
    assert_eq!(fs::read_dir(&out)?.count(), 4, "nothing but the packages and their sums is left");
    check_archive(&archive, &folder.path().join("archive"))?;
    check_wheel(&wheel, &folder.path().join("wheel"))
}

fn check_archive(archive: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let listed = done(Command::new("tar").arg("-tzf").arg(archive))?;
    let names: BTreeSet<&str> = listed.lines().filter_map(|name| name.split_once('/').map(|(_, name)| name)).collect();
    for name in [
        "bin/pacs",
        "bin/pacs-worker",
        "libexec/pacs-worker",
        "LICENSE",
        "THIRD_PARTY_LICENSES.txt",
        "README.md",
        "CHANGELOG.md",
        "deploy/jobs/demo.toml",
        "deploy/examples/laptop/job.toml",
        "deploy/kubernetes/base/kustomization.yaml",
        "deploy/verifiers/llm_judge.py",
        "proto/pacs/v1/custom_verifier.proto",
    ] {
        assert!(names.contains(name), "{name} is missing in\n{listed}");
    }
    assert!(!listed.contains("__pycache__"), "{listed}");
    assert!(names.len() > 50, "{listed}");
    done(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(folder))?;
    // It works wherever it lies.
    let moved = folder.join("anywhere");
    let unpacked = fs::read_dir(folder)?.next().context("the archive has one folder")??.path();
    fs::rename(unpacked, &moved)?;
    let (control, worker) = (moved.join("bin/pacs"), moved.join("bin/pacs-worker"));
    let program = moved.join("libexec/pacs-worker");
    for file in [&control, &program] {
        let sections = done(Command::new("readelf").arg("--section-headers").arg("--wide").arg(file))?;
        assert!(sections.contains(".text") && !sections.contains(".debug_info"), "{} is not stripped", file.display());
    }
    assert_eq!(done(start(&control, folder).arg("--version"))?, format!("pacs {}\n", env!("CARGO_PKG_VERSION")));
    let plan = done(start(&control, &moved).args(["job", "check", "deploy/jobs/demo.toml"]))?;
    assert!(plan.contains("runs/demo"), "{plan}");
    let licences = fs::read_to_string(moved.join("THIRD_PARTY_LICENSES.txt"))?;
    assert!(["tokio ", "tch ", "rusqlite "].iter().all(|name| licences.contains(&format!("\n{name}"))), "{licences}");
    assert!(!licences.contains("\nproptest "), "tests are not linked");
    symlink(libtorch()?, moved.join("libtorch"))?;
    done(start(&worker, folder).args(["create", "model"]))?;
    assert!(folder.join("model/config.json").exists());
    Ok(())
}

/// Compares every digest of a wheel's record with the file.
const CHECK_RECORD: &str = r#"
import base64, csv, hashlib, io, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = wheel.namelist()
    record = names[-1]
    assert record.endswith(".dist-info/RECORD"), names
    rows = list(csv.reader(io.StringIO(wheel.read(record).decode())))
    assert [row[0] for row in rows] == names, (rows, names)
    for name, digest, size in rows[:-1]:
        content = wheel.read(name)
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == ("sha256=" + expected, len(content)), name
    assert {info.date_time for info in wheel.infolist()} == {(1980, 1, 1, 0, 0, 0)}
"#;

fn check_wheel(wheel: &Path, folder: &Path) -> Result<()> {
    let name = wheel.file_name().context("a name")?.to_string_lossy();
    let expected = format!("pacs-{}-py3-none-manylinux_2_", env!("CARGO_PKG_VERSION"));
    assert!(name.starts_with(&expected) && name.ends_with("_x86_64.whl"), "{name}");
    done(Command::new("python3").args(["-c", CHECK_RECORD]).arg(wheel))?;
    // An environment whose pip is that of the machine, so that it takes no network to make it.
    done(Command::new("python3").args(["-m", "venv", "--without-pip"]).arg(folder))?;
    let python = folder.join("bin/python");
    let pip = ["-m", "pip", "--disable-pip-version-check", "--python"];
    let install = ["install", "--quiet", "--no-index", "--no-deps"];
    done(Command::new("python3").args(pip).arg(&python).args(install).arg(wheel))?;
    let (control, worker) = (folder.join("bin/pacs"), folder.join("bin/pacs-worker"));
    let version = format!("pacs {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(done(start(&control, folder).arg("--version"))?, version);
    for shared in ["deploy/jobs/demo.toml", "deploy/examples/slurm/job.toml", "proto/pacs/v1/custom_verifier.proto"] {
        assert!(folder.join("share/pacs").join(shared).exists(), "{shared}");
    }
    let (code, text) = said(start(&worker, folder).arg("devices"))?;
    assert!(code == Some(78) && text.contains("has no package torch"), "{code:?}: {text}");
    let hint = format!("{} -m pip install torch==", python.display());
    assert!(text.contains(&hint), "{text}");
    // As pip installs torch, of which the libraries alone are used.
    let site = done(Command::new(&python).args(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]))?;
    let site = PathBuf::from(site.trim());
    let libtorch = libtorch()?;
    fs::create_dir(site.join("torch"))?;
    fs::write(site.join("torch/__init__.py"), "")?;
    symlink(libtorch.join("torch/lib"), site.join("torch/lib"))?;
    if libtorch.join("nvidia").exists() {
        symlink(libtorch.join("nvidia"), site.join("nvidia"))?;
    }
    done(start(&worker, folder).args(["create", "model"]))?;
    assert!(folder.join("model/config.json").exists());
    // The control program finds the worker of its own package, not that of the search path.
    let doctor = said(start(&control, folder).args(["doctor", "--json"]))?.1;
    let own = site.join("pacs/bin/pacs-worker").display().to_string();
    assert!(doctor.contains(&own), "{own} is not in\n{doctor}");
    fs::write(site.join("torch/version.py"), "__version__ = '1.13.1'\n")?;
    let (code, text) = said(start(&worker, folder).arg("devices"))?;
    assert!(code == Some(78) && text.contains("is 1.13.1, and this program needs"), "{code:?}: {text}");
    Ok(())
}
