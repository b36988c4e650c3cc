//! A small file system for tests that fill their disk.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Name of the file that fills the disk.
const FILLER: &str = ".filler";

/// A tmpfs of a few megabytes, mounted at a folder; unmounted on drop.
#[derive(Debug)]
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Mounts a tmpfs; `None` without the permission, which is reported on standard error.
    pub(crate) fn mount(folder: &Path, megabytes: u32) -> Result<Option<Self>> {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let size = format!("size={megabytes}m,mode=0700");
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder).stdin(Stdio::null());
        match command.output() {
            Ok(output) if output.status.success() => Ok(Some(Self(folder.to_owned()))),
            refused => {
                eprintln!("SKIPPED: no small disk can be mounted here, so none is filled: {refused:?}");
                Ok(None)
            }
        }
    }

    /// Fills the disk up to `but` free bytes.
    pub(crate) fn fill(&self, but: u64) -> Result<()> {
        let mut filler = fs::File::options().create(true).append(true).open(self.0.join(FILLER))?;
        // Large blocks first, then small ones for the remainder.
        for block in [&[7; 1 << 16][..], &[7; 512]] {
            while filler.write_all(block).is_ok() {}
        }
        let bytes = filler.metadata()?.len();
        filler.set_len(bytes.saturating_sub(but)).context("leave some room")
    }

    /// Frees the disk again.
    pub(crate) fn clear(&self) -> Result<()> {
        match fs::remove_file(self.0.join(FILLER)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove the filler"),
            _ => Ok(()),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let unmount = || -> Result<()> {
            // A lazy unmount, because a process that is about to end may still have a file open.
            let status = Command::new("umount").arg("-l").arg(&self.0).status()?;
            ensure!(status.success(), "{status}");
            Ok(())
        };
        if let Err(error) = unmount() {
            eprintln!("{} stays mounted: {error:#}", self.0.display());
        }
    }
}
