//! The root that programs see: the interpreter and libraries, read-only, at the places that they have outside.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{chdir, pivot_root};

/// Devices that reveal nothing of the machine.
const DEVICES: [&str; 5] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];

/// Where the new root may be put together; nothing that it shows may be within.
const PLACES: [&str; 7] = ["/mnt", "/media", "/srv", "/opt", "/home", "/run", "/tmp"];

/// Makes `paths` all that this process, and those that it starts, can see of the machine, beside an empty folder `scratch`. Its mount
/// namespace has to be its own.
pub(crate) fn enter(paths: &BTreeSet<PathBuf>, scratch: &Path) -> Result<(), String> {
    const NONE: Option<&str> = None;
    let said = |what: &str| {
        let what = what.to_owned();
        move |error: nix::Error| format!("{what}: {}", error.desc())
    };
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(said("keep mounts private"))?;
    let is_free = |place: &&str| Path::new(place).is_dir() && !paths.iter().any(|path| path.starts_with(place));
    let place = PLACES.into_iter().find(is_free).ok_or("there is no folder to put a root together in")?;
    let root = Path::new(place);
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), root, Some("tmpfs"), flags, Some("mode=0755,size=1m")).map_err(said("mount a root"))?;
    for path in paths {
        show(root, path, true).map_err(|error| format!("show `{}`: {error}", path.display()))?;
    }
    for device in DEVICES {
        show(root, Path::new(device), false).map_err(|error| format!("show `{device}`: {error}"))?;
    }
    fs::create_dir_all(root.join(scratch.strip_prefix("/").unwrap_or(scratch)))
        .map_err(|error| format!("make `{}`: {error}", scratch.display()))?;
    chdir(root).map_err(said("enter the root"))?;
    pivot_root(".", ".").map_err(said("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(said("leave the old root"))?;
    chdir("/").map_err(said("enter the root"))?;
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | flags;
    mount(NONE, "/", NONE, read_only, NONE).map_err(said("make the root read-only"))
}

/// Shows one file or folder, or the link that it is; nothing where it is not there.
fn show(root: &Path, path: &Path, without_devices: bool) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    let target = root.join(path.strip_prefix("/").unwrap_or(path));
    // Within a folder that is shown already.
    if target.exists() {
        return Ok(());
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    if found.is_symlink() {
        return symlink(fs::read_link(path)?, target);
    }
    match found.is_dir() {
        true => fs::create_dir_all(&target)?,
        false => drop(fs::File::create(&target)?),
    }
    const NONE: Option<&str> = None;
    mount(Some(path), &target, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
    let mut flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
    flags.set(MsFlags::MS_NODEV, without_devices);
    mount(NONE, &target, NONE, flags | kept(&target), NONE)?;
    Ok(())
}

/// Flags of a mount that a user namespace may not take away.
fn kept(path: &Path) -> MsFlags {
    let Ok(found) = statvfs(path) else { return MsFlags::empty() };
    let mut flags = MsFlags::empty();
    for (here, there) in [
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
    ] {
        flags.set(there, found.flags().contains(here));
    }
    flags
}
