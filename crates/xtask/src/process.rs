//! Running other programs from the repository's root.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result, bail};

/// Root folder of the repository.
pub(crate) fn root() -> PathBuf {
    // This crate lives in crates/xtask.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2);
    root.expect("the manifest lies two folders below the root").to_owned()
}

/// Folder that cargo builds into.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Cache folder of this project, per user.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .context("find the cache folder: neither XDG_CACHE_HOME nor HOME is set")?;
    Ok(base.join("pacs"))
}

/// The libtorch that the user chose. Cargo's own setting arrives in the same variable.
pub(crate) fn user_libtorch() -> Option<PathBuf> {
    let path = std::env::var_os("LIBTORCH").map(PathBuf::from)?;
    (path != root().join("target/libtorch/torch")).then_some(path)
}

/// Creates a command that runs in the repository's root with the user's libtorch.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    if let Some(libtorch) = user_libtorch() {
        let mut path = libtorch.join("lib").into_os_string();
        if let Some(existing) = std::env::var_os("LD_LIBRARY_PATH") {
            path.push(":");
            path.push(existing);
        }
        command.env("LD_LIBRARY_PATH", path);
    }
    command
}

pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    command
}

/// Runs a command to its end; its output is inherited.
pub(crate) fn status(command: &mut Command) -> Result<ExitStatus> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.status().with_context(|| format!("start `{name}`"))
}

/// Runs a command and fails unless it succeeds; `what` completes "failed to".
pub(crate) fn check(what: &str, command: &mut Command) -> Result<()> {
    let status = status(command).context(what.to_owned())?;
    if !status.success() {
        bail!("{what}: `{command:?}` ended with {status}");
    }
    Ok(())
}
