//! Merges several files into one, or shortens one, by copying row groups unchanged.

use std::fs::File;
use std::io;
use std::panic;
use std::path::Path;

use parquet::column::writer::ColumnCloseResult;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::KeyValue;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};

use super::rows::properties;
use crate::records::write_atomically;

/// Footer key for the step of each row group of a merged file, in order: `1,2,3`.
const STEPS: &str = "pacs.steps";

/// A file whose row groups are copied.
pub(super) struct Source {
    file: File,
    reader: SerializedFileReader<File>,
    /// Step of each row group.
    steps: Vec<u64>,
}

impl Source {
    /// Opens a file. `of_its_name` is the step of a file with a single round.
    pub(super) fn open(path: &Path, of_its_name: Option<u64>) -> Result<Self> {
        let (file, again) = (File::open(path)?, File::open(path)?);
        // The library panics on some files that a crash or a disk has damaged.
        let torn = |_| ParquetError::General("its parts do not fit together".to_owned());
        let reader = panic::catch_unwind(|| SerializedFileReader::new(again)).map_err(torn)??;
        let groups = reader.num_row_groups();
        let steps = match of_its_name {
            Some(step) => vec![step; groups],
            None => listed(&reader).unwrap_or_default(),
        };
        if steps.len() != groups {
            return Err(ParquetError::General(format!("its footer names {} of {groups} rounds", steps.len())));
        }
        Ok(Self { file, reader, steps })
    }

    /// Whether its row groups can be in one file with those of `other`.
    pub(super) fn fits(&self, other: &Self) -> bool {
        self.root() == other.root()
    }

    /// The newest step up to `last`.
    pub(super) fn newest(&self, last: u64) -> Option<u64> {
        self.steps.iter().copied().filter(|step| *step <= last).max()
    }

    fn root(&self) -> &parquet::schema::types::Type {
        self.reader.metadata().file_metadata().schema_descr().root_schema()
    }

    fn copy(&self, group: usize, mut to: SerializedRowGroupWriter<'_, &mut File>) -> Result<()> {
        let group = self.reader.metadata().row_group(group);
        for column in group.columns() {
            let close = ColumnCloseResult {
                bytes_written: u64::try_from(column.compressed_size()).unwrap_or(0),
                rows_written: u64::try_from(group.num_rows()).unwrap_or(0),
                metadata: column.clone(),
                bloom_filter: None,
                column_index: None,
                offset_index: None,
            };
            to.append_column(&self.file, close)?;
        }
        to.close()?;
        Ok(())
    }
}

/// The step of each row group, from the footer of a merged file.
pub(super) fn listed(reader: &SerializedFileReader<File>) -> Option<Vec<u64>> {
    let pairs = reader.metadata().file_metadata().key_value_metadata()?;
    let steps = pairs.iter().find(|pair| pair.key == STEPS)?.value.as_deref()?;
    steps.split(',').map(|step| step.parse().ok()).collect()
}

/// Writes the rounds of the sources up to `last` as one file, atomically.
pub(super) fn write_merged(path: &Path, sources: &[Source], last: u64) -> io::Result<()> {
    write_atomically(path, |file| merge(file, sources, last).map_err(io::Error::other))
}

fn merge(file: &mut File, sources: &[Source], last: u64) -> Result<()> {
    let Some(first) = sources.first() else { return Ok(()) };
    let schema = first.reader.metadata().file_metadata().schema_descr().root_schema_ptr();
    let mut writer = SerializedFileWriter::new(file, schema, properties())?;
    let mut steps = Vec::new();
    for source in sources {
        for (group, step) in source.steps.iter().enumerate().filter(|(_, step)| **step <= last) {
            source.copy(group, writer.next_row_group()?)?;
            steps.push(step.to_string());
        }
    }
    writer.append_key_value_metadata(KeyValue::new(STEPS.to_owned(), steps.join(",")));
    writer.close()?;
    Ok(())
}
