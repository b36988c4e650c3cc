use std::path::Path;

/// How the problems of a file are written down, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// Objects, one a line or in one array.
    Json,
    /// A table whose first row names the fields, with this byte between two.
    Table(u8),
    /// Typed columns, compressed each by itself.
    Parquet,
}

impl FileFormat {
    /// What is expected of a name.
    pub const EXPECTED: &str = "expected a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file; all but the last may be packed (`.gz`, `.zst`)";

    /// The format of the file at `path`; none where its name says nothing of it.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let bare = [".gz", ".zst"].iter().find_map(|packed| name.strip_suffix(packed));
        match bare.unwrap_or(&name).rsplit_once('.')?.1 {
            "jsonl" | "ndjson" | "json" => Some(Self::Json),
            "csv" => Some(Self::Table(b',')),
            "tsv" => Some(Self::Table(b'\t')),
            // It packs its columns itself, and is read from its end.
            "parquet" if bare.is_none() => Some(Self::Parquet),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_is_inside() {
        let of = |name: &str| FileFormat::of(Path::new(name));
        for name in ["a/t.jsonl", "t.json", "t.ndjson", "t.v2.JSONL.gz", "t.json.zst"] {
            assert_eq!(of(name), Some(FileFormat::Json), "{name}");
        }
        assert_eq!((of("t.csv.gz"), of("t.tsv")), (Some(FileFormat::Table(b',')), Some(FileFormat::Table(b'\t'))));
        assert_eq!(of("t.parquet"), Some(FileFormat::Parquet));
        for name in ["t.parquet.gz", "t.txt", "t", "jsonl", "t.gz", "t.csv.bz2", ""] {
            assert_eq!(of(name), None, "{name}");
        }
    }
}
