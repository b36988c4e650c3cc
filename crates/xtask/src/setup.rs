//! Fetching libtorch from the Python package registry.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::process::{cache, check, command, target, user_libtorch};

/// Version of libtorch that `tch` requires.
pub(crate) const TORCH_VERSION: &str = "2.11.0";

/// Wheel tags that run on any x86-64 Linux of recent years; pip matches each of them literally.
const PLATFORMS: [&str; 4] =
    ["manylinux_2_28_x86_64", "manylinux_2_25_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"];

/// Extracts the CPU half of libtorch from the `torch` wheels, which contain it together with the CUDA half.
///
/// The CPU library links two small CUDA libraries (run time and profiling interface), so they are extracted too. The
/// folders keep their relative places, so that the library's own run path finds them.
const UNPACK: &str = r#"
import os, sys, zipfile
out = sys.argv[1]
unwanted = ("cuda", "python", "nvshmem", "libtorch.so")
for wheel in sys.argv[2:]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            base = os.path.basename(name)
            header = name.startswith("torch/include/")
            library = name.startswith("torch/lib/lib") and ".so" in base and not any(word in base for word in unwanted)
            runtime = name.startswith("nvidia/") and (base.startswith("libcudart.so") or base.startswith("libcupti.so"))
            if header or library or runtime:
                archive.extract(name, out)
"#;

/// Provides libtorch: the user's (`LIBTORCH`), or one in the cache that `target/libtorch` points to.
pub(crate) fn libtorch() -> Result<()> {
    if let Some(path) = user_libtorch() {
        println!("using libtorch at {}", path.display());
        return Ok(());
    }
    let home = cache()?.join(format!("libtorch-{TORCH_VERSION}"));
    if !home.join("complete").exists() {
        println!("fetching libtorch {TORCH_VERSION} (545 MB, once per user) into {}", home.display());
        fetch_libtorch(&home).context("set up libtorch")?;
    }
    link(&home).context("link libtorch below target/")
}

/// Options of `cargo xtask setup`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Also gets the CUDA half of libtorch and its libraries (2.9 GB, once per user), for workers with `--device cuda`.
    #[arg(long)]
    cuda: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    libtorch()?;
    if arguments.cuda { cuda() } else { Ok(()) }
}

/// Makes sure that the CUDA half is there: a Python environment in the cache, of which the libraries alone are used. Workers look for
/// it there (`crates/torch/src/place.rs`).
fn cuda() -> Result<()> {
    if let Some(path) = user_libtorch() {
        let lib = path.join("lib/libtorch_cuda.so");
        ensure!(lib.exists(), "libtorch at {} is yours and has no CUDA half: install one that has", path.display());
        println!("using the CUDA half at {}", lib.display());
        return Ok(());
    }
    let home = cache()?.join(format!("torch-{TORCH_VERSION}-cuda"));
    if home.join("complete").exists() {
        println!("the CUDA half of libtorch is at {}", home.join("site/torch/lib").display());
        return Ok(());
    }
    println!("fetching torch {TORCH_VERSION} with CUDA (2.9 GB, once per user) into {}", home.display());
    if home.exists() {
        fs::remove_dir_all(&home).with_context(|| format!("remove the unfinished {}", home.display()))?;
    }
    // In its own place from the beginning: an environment cannot be moved.
    check("make a Python environment", command("python3").args(["-m", "venv"]).arg(&home))?;
    let python = home.join("bin/python");
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"];
    let torch = format!("torch=={TORCH_VERSION}");
    check("install torch with pip", command(&python).args(pip).arg(torch))?;
    let site = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let output = command(&python).args(["-c", site]).output().context("ask Python for its folder")?;
    let site = PathBuf::from(String::from_utf8(output.stdout).context("read Python's folder")?.trim());
    let half = site.join("torch/lib/libtorch_cuda.so");
    ensure!(half.exists(), "the torch that pip has installed has no CUDA half: {} is missing", half.display());
    std::os::unix::fs::symlink(&site, home.join("site")).context("link the packages")?;
    fs::write(home.join("complete"), TORCH_VERSION).context("mark it as complete")
}

fn fetch_libtorch(home: &Path) -> Result<()> {
    let parent = home.parent().expect("the cache folder has a parent");
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    let work = Scratch::new(parent)?;
    let downloads = work.0.join("downloads");
    let packages =
        [format!("torch=={TORCH_VERSION}"), "nvidia-cuda-runtime==13.0.*".into(), "nvidia-cuda-cupti==13.0.*".into()];
    let wheels = download(&packages, &downloads)?;
    let unpacked = work.0.join("libtorch");
    check("unpack libtorch", command("python3").args(["-c", UNPACK]).arg(&unpacked).args(&wheels))?;
    // Only the linker asks for libtorch.so, and the real one would load the CUDA libraries.
    let empty = work.0.join("empty.c");
    fs::write(&empty, "").context("write an empty C file")?;
    let output = unpacked.join("torch/lib/libtorch.so");
    let soname = "-Wl,-soname,libtorch.so";
    check("make an empty libtorch.so", command("gcc").args(["-shared", soname, "-o"]).arg(output).arg(&empty))?;
    fs::write(unpacked.join("complete"), TORCH_VERSION).context("mark libtorch as complete")?;
    if home.exists() {
        fs::remove_dir_all(home).with_context(|| format!("remove the unfinished {}", home.display()))?;
    }
    fs::rename(&unpacked, home).with_context(|| format!("move libtorch to {}", home.display()))
}

/// Downloads wheels without their dependencies and returns their paths.
fn download(packages: &[String], folder: &Path) -> Result<Vec<PathBuf>> {
    let mut pip = command("python3");
    // Any Python may run this; the wheels are for the version that the libraries were tested with.
    pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"])
        .args(["--python-version", "3.11"])
        .args(PLATFORMS.iter().flat_map(|platform| ["--platform", platform]))
        .arg("--dest")
        .arg(folder)
        .args(packages);
    check("download packages with pip", &mut pip)?;
    let entries = fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))?;
    let mut wheels = Vec::new();
    for entry in entries {
        wheels.push(entry.context("list the downloads")?.path());
    }
    Ok(wheels)
}

fn link(home: &Path) -> Result<()> {
    let link = target().join("libtorch");
    fs::create_dir_all(target()).context("create the target folder")?;
    if fs::read_link(&link).is_ok_and(|existing| existing == home) {
        return Ok(());
    }
    if link.symlink_metadata().is_ok() {
        fs::remove_file(&link).with_context(|| format!("remove the old {}", link.display()))?;
    }
    std::os::unix::fs::symlink(home, &link).with_context(|| format!("create {}", link.display()))
}

/// A temporary folder, removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> Result<Self> {
        let path = parent.join(format!("unfinished-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: what remains is a folder in the cache.
        let _ = fs::remove_dir_all(&self.0);
    }
}
