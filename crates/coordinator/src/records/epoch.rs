use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::{CoordinatorRecord, write_atomically};
use crate::FileError;

/// Name of the file in the run folder.
const FILE: &str = "epoch";

/// Fencing token of a run folder: only the coordinator that has taken it last may write.
///
/// The folder's lock excludes a second coordinator where locks work. On a network file system, a lock can be lost while
/// its holder lives, and both would write one journal. So each coordinator writes a unique name when it starts, and
/// checks that it is still there before it makes anything durable. A row of the journal's database was rejected:
/// SQLite's exclusive mode, which a database on such a file system needs, never sees what others have written.
///
/// The name begins with the number of the start, from which identifiers and generations are numbered. So the number
/// must survive an unreadable file: [`CoordinatorRecord::starts`] repeats it.
#[derive(Clone, Debug)]
pub(crate) struct Epoch {
    path: PathBuf,
    ours: String,
    number: u64,
}

impl Epoch {
    /// Takes the folder over; an earlier holder can write nothing more.
    pub(crate) fn take(run_dir: &Path) -> Result<Self, FileError> {
        let path = run_dir.join(FILE);
        let number = starts_so_far(run_dir)? + 1;
        // Two coordinators that start at once compute the same number, but only one of their names remains in the file.
        let mut random = [0; 8];
        let source = Path::new("/dev/urandom");
        let read = File::open(source).and_then(|mut file| file.read_exact(&mut random));
        read.map_err(FileError::file("read", source))?;
        let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
        let name = u64::from_le_bytes(random);
        let ours = format!("{number} {name:016x} {host} {}\n", std::process::id());
        write_atomically(&path, |file| file.write_all(ours.as_bytes())).map_err(FileError::file("write", &path))?;
        Ok(Self { path, ours, number })
    }

    /// Number of coordinators that have worked in the folder, including this one.
    pub(crate) fn starts(&self) -> u64 {
        self.number
    }

    /// Fails if another coordinator has taken the folder over.
    pub(crate) fn check(&self) -> Result<(), FileError> {
        let text = fs::read_to_string(&self.path).map_err(FileError::file("read", &self.path))?;
        if text == self.ours {
            return Ok(());
        }
        let mut words = text.split_whitespace().skip(2);
        let (host, pid) = (words.next().unwrap_or("?"), words.next().unwrap_or("?"));
        Err(FileError::Taken { by: format!("process {pid} on {host}") })
    }
}

/// Number of coordinators that have worked in the folder before.
///
/// # Errors
/// When a number in the folder cannot be read and nothing repeats it: starting again at zero would reuse identifiers.
fn starts_so_far(run_dir: &Path) -> Result<u64, FileError> {
    let path = run_dir.join(FILE);
    let number = |text: String| text.split_whitespace().next().unwrap_or_default().parse().map_err(io::Error::other);
    let counted: io::Result<u64> = fs::read_to_string(&path).and_then(number);
    let recorded = CoordinatorRecord::read(run_dir).map(|record| record.starts);
    match (counted, recorded) {
        // One of them is written before the other.
        (Ok(counted), Ok(recorded)) => Ok(recorded.max(counted)),
        (Ok(starts), Err(_)) | (Err(_), Ok(starts)) => Ok(starts),
        (Err(first), Err(second)) if [&first, &second].iter().all(|error| error.kind() == io::ErrorKind::NotFound) => {
            Ok(0)
        }
        (Err(first), Err(second)) => {
            let problem = format!(
                "it does not say how many coordinators have worked here ({first}), and {} does not either ({second}); write a \
                 number into it that is at least as large, such as 1000",
                CoordinatorRecord::FILE
            );
            Err(FileError::damaged(&path, problem))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_counted_although_a_file_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let count = || {
            let starts = Epoch::take(dir.path())?.starts();
            let (address, host, job) = ("127.0.0.1:1".to_owned(), "here".to_owned(), "tiny".to_owned());
            let record = CoordinatorRecord { address, host, pid: 1, job, run_id: String::new(), tls_dir: None, starts };
            record.write(dir.path()).unwrap();
            Ok::<_, FileError>(starts)
        };
        assert_eq!(starts_so_far(dir.path()).unwrap(), 0);
        assert_eq!((count().unwrap(), count().unwrap()), (1, 2));
        for file in [CoordinatorRecord::FILE, FILE] {
            let before = starts_so_far(dir.path()).unwrap();
            fs::write(dir.path().join(file), "{").unwrap();
            assert_eq!(starts_so_far(dir.path()).unwrap(), before, "{file} is damaged");
            assert_eq!(count().unwrap(), before + 1, "and is mended by the next start");
            fs::remove_file(dir.path().join(file)).unwrap();
            assert_eq!(starts_so_far(dir.path()).unwrap(), before + 1, "{file} is lost");
            count().unwrap();
        }
        for file in [CoordinatorRecord::FILE, FILE] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let error = count().unwrap_err();
        assert!(error.to_string().contains("how many coordinators"), "{error}");
        assert_eq!(error.exit().code(), 78);
    }

    #[test]
    fn the_previous_coordinator_is_fenced() {
        let folder = tempfile::tempdir().unwrap();
        let first = Epoch::take(folder.path()).unwrap();
        first.check().unwrap();
        let second = Epoch::take(folder.path()).unwrap();
        let error = first.check().unwrap_err();
        assert!(matches!(error, FileError::Taken { .. }), "{error}");
        assert_eq!(error.exit(), pacs_runtime::Exit::Again);
        second.check().unwrap();
        assert!(fs::read_to_string(folder.path().join("epoch")).unwrap().starts_with("2 "));
        fs::remove_file(folder.path().join("epoch")).unwrap();
        assert!(matches!(second.check(), Err(FileError::File { .. })), "what cannot be read says nothing");
    }
}
