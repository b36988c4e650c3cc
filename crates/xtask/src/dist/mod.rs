//! `cargo xtask dist`: what a machine without Rust needs, as an archive and as a Python wheel.
//!
//! Both hold the same programs. Neither holds libtorch (545 MB, or 2.9 GB with CUDA): it is the one of Python's torch, which
//! most machines for training have already, and which decides between CPU and CUDA. The start script `pacs-worker`
//! (`pacs-worker.sh`) finds it.

mod licences;
mod wheel;

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::process::{cargo, check, command, root, target};
use crate::setup;

/// Program that never links libtorch, and program that does.
const CONTROL: &str = "pacs";
const WORKER: &str = "pacs-worker";

/// Folders of the repository that go along as they are.
const FOLDERS: [&str; 2] = ["deploy", "proto"];
/// Files of the repository that go along as they are.
const FILES: [&str; 2] = ["LICENSE", "CHANGELOG.md"];

/// Start script of the worker, and the page for whoever unpacks the archive; `@TORCH@` and `@VERSION@` are filled in.
const START_SCRIPT: &str = include_str!("pacs-worker.sh");
const README: &str = include_str!("README.md");

/// Time of every packed file, in seconds since 1970: that of the build would make two archives of one state differ. It is
/// 1980-01-01, the first that a wheel can hold.
const TIME: u64 = 315_532_800;

/// Builds the programs and packs them as a relocatable archive and as a Python wheel, without libtorch.
#[derive(Debug, Args)]
#[command(after_help = "\
On a machine without Rust, with the Python package torch of the same version:
  pip install pacs-0.1.0-py3-none-manylinux_2_35_x86_64.whl && pacs demo
or
  tar -xzf pacs-0.1.0-x86_64-linux.tar.gz && pacs-0.1.0-x86_64-linux/bin/pacs demo

Examples:
  cargo xtask dist
  cargo xtask dist --out /tmp/pacs-dist --no-build")]
pub(crate) struct Arguments {
    /// Folder of the two files and their checksums [default: target/dist]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Pack the programs as they were built before.
    #[arg(long)]
    no_build: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !arguments.no_build {
        setup::libtorch()?;
        println!("building (some minutes the first time)");
        check("build the programs", &mut cargo(&["build", "--release", "--locked", "--workspace", "--bins"]))?;
    }
    let out = arguments.out.clone().unwrap_or_else(|| target().join("dist"));
    let out = std::path::absolute(&out).with_context(|| format!("make {} absolute", out.display()))?;
    fs::create_dir_all(&out).with_context(|| format!("create {}", out.display()))?;
    let parts = Parts::gather(&out.join("parts"))?;
    let made = [parts.archive(&out)?, wheel::make(&parts, &out)?];
    fs::remove_dir_all(&parts.folder).with_context(|| format!("remove {}", parts.folder.display()))?;
    for path in made {
        let (digest, bytes) = sign(&path)?;
        println!("{}: {:.1} MiB, SHA-256 {digest}", path.display(), bytes as f64 / f64::from(1 << 20));
    }
    Ok(())
}

/// What both packages hold, in one folder.
struct Parts {
    folder: PathBuf,
    /// Oldest glibc that both programs start with.
    glibc: (u32, u32),
}

impl Parts {
    /// Strips the programs into an empty `folder` and puts all other files next to them.
    fn gather(folder: &Path) -> Result<Self> {
        if folder.exists() {
            fs::remove_dir_all(folder).with_context(|| format!("remove the old {}", folder.display()))?;
        }
        let (control, worker) = (folder.join("bin").join(CONTROL), folder.join("libexec").join(WORKER));
        let mut glibc = (0, 0);
        for program in [&control, &worker] {
            fs::create_dir_all(program.parent().context("a program lies in a folder")?).context("create folders")?;
            let name = program.file_name().context("a program has a name")?;
            let built = target().join("release").join(name);
            ensure!(built.exists(), "find {}: leave out --no-build", built.display());
            let what = format!("strip {}", built.display());
            check(&what, command("strip").arg("--strip-all").arg("-o").arg(program).arg(&built))?;
            glibc = glibc.max(needed_glibc(program)?);
        }
        let script = folder.join("bin").join(WORKER);
        write(&script, &filled(START_SCRIPT))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).context("make the script executable")?;
        write(&folder.join("README.md"), &filled(README))?;
        write(&folder.join("THIRD_PARTY_LICENSES.txt"), &licences::of_programs()?)?;
        for file in FILES {
            fs::copy(root().join(file), folder.join(file)).with_context(|| format!("copy {file}"))?;
        }
        for part in FOLDERS {
            copy(&root().join(part), &folder.join(part)).with_context(|| format!("copy {part}"))?;
        }
        Ok(Self { folder: folder.to_owned(), glibc })
    }

    fn archive(&self, out: &Path) -> Result<PathBuf> {
        let name = format!("pacs-{}-{}-linux", env!("CARGO_PKG_VERSION"), std::env::consts::ARCH);
        let archive = out.join(format!("{name}.tar.gz"));
        pack(&self.folder, &name, &archive)?;
        Ok(archive)
    }
}

/// Packs a folder under another name. The bytes depend on names, contents and permissions alone.
fn pack(folder: &Path, name: &str, archive: &Path) -> Result<()> {
    let mut tar = command("tar");
    tar.args(["--format=ustar", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mode=u=rwX,go=rX"]);
    tar.arg(format!("--mtime=@{TIME}")).args(["-I", "gzip -6 -n"]);
    // `./bin/pacs` becomes `NAME/bin/pacs`; targets of links are left alone.
    tar.arg(format!("--transform=flags=r;s,^\\.,{name},")).arg("-C").arg(folder).arg("-cf").arg(archive).arg(".");
    check("pack the archive", &mut tar)
}

/// Fills in the version of this project and that of torch.
fn filled(text: &str) -> String {
    text.replace("@TORCH@", setup::TORCH_VERSION).replace("@VERSION@", env!("CARGO_PKG_VERSION"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// Copies a folder without what Python leaves in it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("list {}", from.display()))? {
        let path = entry.context("list a folder")?.path();
        let target = to.join(path.file_name().context("an entry has a name")?);
        if !path.is_dir() {
            fs::copy(&path, &target).with_context(|| format!("copy {}", path.display()))?;
        } else if !path.ends_with("__pycache__") {
            copy(&path, &target)?;
        }
    }
    Ok(())
}

/// Files below a folder by their paths in it, in order.
fn files(folder: &Path) -> Result<Vec<String>> {
    let mut open = vec![folder.to_owned()];
    let mut found = Vec::new();
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).with_context(|| format!("list {}", next.display()))? {
            let path = entry.context("list a folder")?.path();
            match path.is_dir() {
                true => open.push(path),
                false => {
                    let name = path.strip_prefix(folder).context("an entry lies below its folder")?;
                    found.push(name.to_str().context("names are UTF-8")?.to_owned());
                }
            }
        }
    }
    found.sort();
    Ok(found)
}

/// SHA-256 of a file, in hexadecimal digits, and its size.
fn digest(path: &Path) -> Result<(ring::digest::Digest, u64)> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    Ok((ring::digest::digest(&ring::digest::SHA256, &bytes), bytes.len() as u64))
}

/// Writes the digest of a file next to it, as `sha256sum --check` reads it.
fn sign(path: &Path) -> Result<(String, u64)> {
    let (digest, bytes) = digest(path)?;
    let mut hex = String::new();
    for byte in digest.as_ref() {
        write!(hex, "{byte:02x}").expect("a string takes all that is written");
    }
    let name = path.file_name().context("a file has a name")?.to_string_lossy();
    write(&path.with_file_name(format!("{name}.sha256")), &format!("{hex}  {name}\n"))?;
    Ok((hex, bytes))
}

/// Oldest glibc that has all versions of symbols that a program asks for.
fn needed_glibc(program: &Path) -> Result<(u32, u32)> {
    let mut readelf = command("readelf");
    let output = readelf.arg("--version-info").arg(program).output().context("start `readelf` (binutils)")?;
    ensure!(output.status.success(), "read the symbols of {}: readelf ended with {}", program.display(), output.status);
    match newest_glibc(&String::from_utf8_lossy(&output.stdout)) {
        Some(version) => Ok(version),
        None => bail!("find the versions of glibc that {} needs", program.display()),
    }
}

fn newest_glibc(text: &str) -> Option<(u32, u32)> {
    let versions = text.split_whitespace().filter_map(|word| word.strip_prefix("GLIBC_"));
    let numbers = versions.filter_map(|version| {
        let mut numbers = version.split('.').map(|number| number.parse().ok());
        Some((numbers.next()??, numbers.next()??))
    });
    numbers.max()
}

#[cfg(test)]
mod tests;
