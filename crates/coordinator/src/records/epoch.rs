use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::write_atomically;
use crate::FileError;

/// Who may write in a run folder: the coordinator that has taken it last.
///
/// The lock of the folder keeps a second one out, where locks hold. On a network file system a lock can be lost while its
/// holder lives; then both would write one journal. So each coordinator writes a name of its own down when it starts, and
/// looks whether that still stands there before it makes anything durable. A file and not a row of the journal's database:
/// SQLite's exclusive mode, which a database on such a file system needs, never looks at what others have written.
#[derive(Clone, Debug)]
pub(crate) struct Epoch {
    path: PathBuf,
    ours: String,
}

impl Epoch {
    /// Takes the folder: from now on an earlier holder writes nothing more.
    pub(crate) fn take(run_dir: &Path) -> Result<Self, FileError> {
        let path = run_dir.join("epoch");
        let before = match fs::read_to_string(&path) {
            Ok(text) => text.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(FileError::file("read", &path)(error)),
        };
        // Two that start at once come to the same number, and only one of their names stays in the file.
        let mut random = [0; 8];
        let source = Path::new("/dev/urandom");
        let read = File::open(source).and_then(|mut file| file.read_exact(&mut random));
        read.map_err(FileError::file("read", source))?;
        let host = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
        let (number, name) = (before + 1, u64::from_le_bytes(random));
        let ours = format!("{number} {name:016x} {host} {}\n", std::process::id());
        write_atomically(&path, |file| file.write_all(ours.as_bytes())).map_err(FileError::file("write", &path))?;
        Ok(Self { path, ours })
    }

    /// Looks whether the folder is still this coordinator's.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_before_is_fenced_off() {
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
