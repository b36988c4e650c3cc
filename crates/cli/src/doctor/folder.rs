//! Checks of the run folder: free space, write speed, working file locks.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statvfs::statvfs;

use super::{Finding, Needs, gib};

/// Bytes written by the speed probe.
const PROBE_BYTES: usize = 64 << 20;

/// Write speed in bytes per second below which checkpoints take too long.
const SLOW: f64 = 100e6;

pub(super) fn look(folder: &Path, needs: Needs) -> Vec<Finding> {
    if let Err(error) = fs::create_dir_all(folder) {
        let found = format!("{} cannot be made: {error}", folder.display());
        return vec![Finding::failure("run folder", found, "choose another with --run-dir")];
    }
    vec![room(folder, needs), speed(folder), lock(folder)]
}

fn room(folder: &Path, needs: Needs) -> Finding {
    const CHECK: &str = "free disk";
    let free = match statvfs(folder) {
        Ok(size) => size.blocks_available() * size.fragment_size(),
        Err(error) => return Finding::warning(CHECK, format!("cannot be read: {error}"), "see `df`"),
    };
    let Some(checkpoint) = needs.checkpoint_bytes() else { return Finding::ok(CHECK, gib(free)) };
    // One more than `checkpoint.keep`: the oldest is removed only after the newest is committed.
    let wanted = checkpoint.saturating_mul(needs.keep + 1);
    let found = format!("{}, and {} checkpoints take {}", gib(free), needs.keep + 1, gib(wanted));
    match free >= wanted {
        true => Finding::ok(CHECK, found),
        false => Finding::failure(CHECK, found, "make room, choose another --run-dir, or keep fewer (checkpoint.keep)"),
    }
}

fn speed(folder: &Path) -> Finding {
    const CHECK: &str = "disk speed";
    match write_probe(folder) {
        Ok(speed) => {
            let found = format!("{:.0} MB/s written and synced", speed / 1e6);
            match speed >= SLOW {
                true => Finding::ok(CHECK, found),
                false => Finding::warning(
                    CHECK,
                    found,
                    "checkpoints will take long: use a faster file system, or save less often",
                ),
            }
        }
        Err(error) => {
            let found = format!("{} cannot be written: {error}", folder.display());
            Finding::failure(CHECK, found, "choose another folder with --run-dir, or set its permissions")
        }
    }
}

/// Measures the write speed of the folder, in bytes per second.
fn write_probe(folder: &Path) -> io::Result<f64> {
    // Not zeros, which some file systems store as holes or compress away.
    let block: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let path = folder.join(format!(".doctor-{}", std::process::id()));
    let began = Instant::now();
    let written = File::create(&path).and_then(|mut file| {
        (0..PROBE_BYTES / block.len()).try_for_each(|_| file.write_all(&block))?;
        file.sync_all()
    });
    let seconds = began.elapsed().as_secs_f64();
    let removed = fs::remove_file(&path);
    written.and(removed)?;
    Ok(PROBE_BYTES as f64 / seconds)
}

/// Checks that an exclusive lock excludes a second holder; the lock of the run folder prevents two coordinators in it.
fn lock(folder: &Path) -> Finding {
    const CHECK: &str = "file locks";
    let path = folder.join(format!(".doctor-{}.lock", std::process::id()));
    let open = || File::options().create(true).write(true).truncate(false).open(&path);
    let attempt = || -> io::Result<bool> {
        let _first =
            Flock::lock(open()?, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| io::Error::from(error))?;
        // The second lock must be refused.
        Ok(Flock::lock(open()?, FlockArg::LockExclusiveNonblock).is_err())
    };
    let result = attempt();
    // The file does not exist if opening it failed.
    let _ = fs::remove_file(&path);
    let advice =
        "two coordinators could work in one folder: mount with locks (Lustre: `-o flock`), or use another file system";
    match result {
        Ok(true) => Finding::ok(CHECK, "a second lock is refused"),
        Ok(false) => Finding::failure(CHECK, "a second lock is granted", advice),
        Err(error) => Finding::failure(CHECK, format!("cannot be taken: {error}"), advice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn a_good_folder_is_left_as_it_was() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = dir.path().join("run");
        let findings = look(&folder, Needs::default());
        assert!(findings.iter().all(|finding| finding.level != Level::Failure), "{findings:?}");
        assert_eq!(fs::read_dir(&folder).expect("made").count(), 0);
    }

    #[test]
    fn checkpoints_that_do_not_fit_are_a_failure() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let needs = Needs { parameters: Some(u64::MAX / 1000), keep: 2, ..Needs::default() };
        assert_eq!(room(dir.path(), needs).level, Level::Failure);
    }

    #[test]
    fn what_is_no_folder_is_a_failure() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let findings = look(&file.path().join("run"), Needs::default());
        assert_eq!(findings[0].level, Level::Failure);
    }
}
