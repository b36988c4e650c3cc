//! Finding a coordinator through the run folder: its address changes whenever a scheduler moves it, the folder does not.

use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

/// The file of a run folder that says where its coordinator listens.
pub const RECORD_FILE: &str = "coordinator.json";

/// As much of the file as is needed here.
#[derive(Deserialize)]
struct Record {
    address: String,
}

/// The address, host:port, that `coordinator` stands for: itself, unless it is an absolute path; then that of the
/// coordinator that works in that folder, or did last.
///
/// # Errors
/// When the folder does not say (yet).
pub fn find(coordinator: &str) -> io::Result<String> {
    let folder = Path::new(coordinator);
    if !folder.is_absolute() {
        return Ok(coordinator.to_owned());
    }
    let path = folder.join(RECORD_FILE);
    let found = fs::read_to_string(&path).and_then(|text| Ok(serde_json::from_str::<Record>(&text)?.address));
    found.map_err(|error| io::Error::new(error.kind(), format!("read `{}`: {error}", path.display())))
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
    }
}
