//! Reads the archive while its writer and its merger work. Nothing is modified here; a file that vanishes because it
//! was merged is looked up again.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pacs_types::Purpose;
use parquet::errors::{ParquetError, Result};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;

use super::files::parse;
use super::merge::listed;

/// A row, by column name.
pub(crate) type Columns = HashMap<String, Field>;

/// A file of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ArchiveFile {
    pub(crate) purpose: Purpose,
    pub(crate) first: u64,
    pub(crate) last: u64,
    path: PathBuf,
}

/// The files of a folder, without those whose rounds are in a larger one: files of training, then those of evaluations,
/// each newest first. A missing folder has none.
pub(crate) fn archive_files(folder: &Path) -> io::Result<Vec<ArchiveFile>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if let Some((purpose, first, last)) = entry.file_name().to_str().and_then(parse) {
            found.push(ArchiveFile { purpose, first, last, path: entry.path() });
        }
    }
    found.sort_by_key(|file| (file.purpose == Purpose::Train, file.first, std::cmp::Reverse(file.last)));
    // The longest file that begins at a step comes first, and files of one purpose never overlap partially.
    let mut whole: Vec<ArchiveFile> = Vec::new();
    for file in found {
        let is_in_another = whole.last().is_some_and(|other| other.purpose == file.purpose && file.last <= other.last);
        if !is_in_another {
            whole.push(file);
        }
    }
    whole.sort_by_key(|file| (file.purpose == Purpose::Evaluate, std::cmp::Reverse(file.last)));
    Ok(whole)
}

/// An open file of the archive.
pub(crate) struct ArchiveReader {
    reader: SerializedFileReader<File>,
    /// Step of each row group.
    steps: Vec<u64>,
}

impl ArchiveReader {
    pub(crate) fn open(file: &ArchiveFile) -> Result<Self> {
        let reader = SerializedFileReader::new(File::open(&file.path)?)?;
        let groups = reader.num_row_groups();
        let steps =
            if file.first == file.last { vec![file.first; groups] } else { listed(&reader).unwrap_or_default() };
        if steps.len() != groups {
            return Err(ParquetError::General(format!("its footer names {} of {groups} rounds", steps.len())));
        }
        Ok(Self { reader, steps })
    }

    /// The steps of the file, newest first.
    pub(crate) fn steps(&self) -> Vec<u64> {
        let mut steps = self.steps.clone();
        steps.dedup();
        steps.reverse();
        steps
    }

    /// Visits the rows of a step in order, with the columns of `names` that the file has, until `visit` breaks. Only
    /// one row is decoded at a time, because its tokens take many times their size in the file.
    pub(crate) fn visit(
        &self,
        step: u64,
        names: &[&str],
        mut visit: impl FnMut(Columns) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let projection = self.projection(names)?;
        for group in (0..self.steps.len()).filter(|group| self.steps[*group] == step) {
            let group = self.reader.get_row_group(group)?;
            for row in group.get_row_iter(Some(projection.clone()))? {
                if visit(row?.into_columns().into_iter().collect()).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The part of the file's schema with these columns; earlier versions wrote fewer.
    fn projection(&self, names: &[&str]) -> Result<Type> {
        let root = self.reader.metadata().file_metadata().schema_descr().root_schema();
        let fields = root.get_fields().iter().filter(|field| names.contains(&field.name()));
        Type::group_type_builder(root.name()).with_fields(fields.map(Arc::clone).collect()).build()
    }
}

/// Whether a file vanished because it was merged or its steps were undone.
pub(crate) fn is_gone(error: &ParquetError) -> bool {
    let ParquetError::External(error) = error else { return false };
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_listed_once_and_nothing_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(archive_files(&folder.path().join("none")).unwrap(), []);
        let names = [
            "steps-000001-000064.parquet",
            "step-000001.parquet",
            "step-000064.parquet",
            "step-000065.parquet",
            "step-000066.parquet",
            "eval-000000.parquet",
            "eval-000065.parquet",
            ".step-000067.parquet.tmp",
        ];
        names.iter().for_each(|name| fs::write(folder.path().join(name), "").unwrap());
        let listed = archive_files(folder.path()).unwrap();
        let listed: Vec<_> = listed.iter().map(|file| (file.purpose, file.first, file.last)).collect();
        let (train, evaluate) = (Purpose::Train, Purpose::Evaluate);
        assert_eq!(listed, [(train, 66, 66), (train, 65, 65), (train, 1, 64), (evaluate, 65, 65), (evaluate, 0, 0)]);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), names.len());
    }
}
