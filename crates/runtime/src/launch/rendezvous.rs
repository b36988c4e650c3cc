//! Finds a coordinator through its run folder, which stays in place when a scheduler moves the process.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

use crate::net::is_run_id;

/// File in the run folder with the coordinator's address.
pub const RECORD_FILE: &str = "coordinator.json";

/// File in the run folder with the run's id.
const RUN_ID_FILE: &str = "run_id";

/// The part of the record that is needed here.
#[derive(Deserialize)]
struct Record {
    address: String,
}

/// Resolves `coordinator` to host:port. An absolute path is a run folder, and resolves to the coordinator that works
/// there or did last; anything else is the address itself.
///
/// # Errors
/// When the folder has no record (yet).
pub fn find(coordinator: &str) -> io::Result<String> {
    let folder = Path::new(coordinator);
    if !folder.is_absolute() {
        return Ok(coordinator.to_owned());
    }
    let path = folder.join(RECORD_FILE);
    let found = fs::read_to_string(&path).and_then(|text| Ok(serde_json::from_str::<Record>(&text)?.address));
    found.map_err(|error| io::Error::new(error.kind(), format!("read `{}`: {error}", path.display())))
}

/// The run id in the folder `coordinator`; `None` for an address, or when the folder has no id yet.
#[must_use]
pub fn run_id(coordinator: &str) -> Option<String> {
    let folder = Path::new(coordinator);
    let text = folder.is_absolute().then(|| fs::read_to_string(folder.join(RUN_ID_FILE)).ok())??;
    Some(text.trim_end().to_owned()).filter(|id| is_run_id(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_stand_for_the_address_in_them() {
        assert_eq!(find("node-1:7700").expect("an address"), "node-1:7700");
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = dir.path().display().to_string();
        assert_eq!(find(&folder).expect_err("nothing yet").kind(), io::ErrorKind::NotFound);
        fs::write(dir.path().join(RECORD_FILE), r#"{"address": "n3:41", "job": "tiny"}"#).expect("written");
        assert_eq!(find(&folder).expect("an address"), "n3:41");
        let id = "0123456789abcdef".repeat(2);
        for (text, found) in [("nonsense\n".to_owned(), None), (format!("{id}\n"), Some(id))] {
            fs::write(dir.path().join(RUN_ID_FILE), text).expect("written");
            assert_eq!(run_id(&folder), found);
        }
        assert_eq!(run_id("node-1:7700"), None);
    }
}
