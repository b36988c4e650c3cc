//! Which files a path means: itself, or all of a folder whose names match a pattern.

use std::path::{Path, PathBuf};

use super::text;
use crate::DataError;

/// Files of one source.
const MOST_FILES: usize = 10_000;

/// The files that `path` means, in the order of their names. A `*` in the last part of it stands for any text; where a file has such a
/// name itself, it is that file.
pub(super) fn of(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let refuse = |message: String| Err(DataError::Format { path: path.to_owned(), message });
    let pattern = path.file_name().and_then(|name| name.to_str()).filter(|name| name.contains('*'));
    let Some(pattern) = pattern.filter(|_| !path.exists()) else {
        if path.to_str().is_some_and(|text| text.starts_with("hf://")) {
            return refuse(
                "it is a name of the hub, which this command does not fetch; `pacs fetch` prints a path".to_owned(),
            );
        }
        return Ok(vec![path.to_owned()]);
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|error| text::read_error(path, error))? {
        let file = entry.map_err(|error| text::read_error(path, error))?.path();
        let name = file.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| matches(pattern, name)) && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    match files.len() {
        0 => refuse("no file has such a name".to_owned()),
        1..=MOST_FILES => Ok(files),
        more => refuse(format!("{more} files have such a name, and at most {MOST_FILES} are read")),
    }
}

/// Whether a name is that of the pattern, with any text in the place of each `*`.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut left) = name.strip_prefix(first) else { return false };
    let parts: Vec<&str> = rest.split('*').collect();
    let Some((last, between)) = parts.split_last() else { return true };
    for part in between {
        match left.find(part) {
            Some(place) => left = &left[place + part.len()..],
            None => return false,
        }
    }
    left.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, name, fits) in [
            ("train-*.parquet", "train-00000-of-00002.parquet", true),
            ("train-*.parquet", "test-00000-of-00002.parquet", false),
            ("train-*.parquet", "train-.parquet", true),
            ("*", "x", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("a*a", "a", false),
            ("x.jsonl", "x.jsonl", true),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }

    #[test]
    fn patterns_are_read_in_the_order_of_names() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["b-1.jsonl", "b-0.jsonl", "c.jsonl", "b-2.txt"] {
            std::fs::write(folder.path().join(name), "").expect("written");
        }
        let names = |pattern: &str| {
            let files = of(&folder.path().join(pattern))?;
            Ok::<_, DataError>(
                files.iter().map(|file| file.file_name().expect("a name").to_owned()).collect::<Vec<_>>(),
            )
        };
        assert_eq!(names("b-*.jsonl").expect("two"), ["b-0.jsonl", "b-1.jsonl"]);
        assert!(names("d-*.jsonl").is_err_and(|error| error.to_string().contains("no file has such a name")));
        assert_eq!(
            names("missing.jsonl").expect("itself"),
            ["missing.jsonl"],
            "whoever opens it says that it is not there"
        );
        assert!(
            of(Path::new("hf://datasets/o/n/x.jsonl")).is_err_and(|error| error.to_string().contains("pacs fetch"))
        );
    }
}
