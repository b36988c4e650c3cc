use std::fs::File;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Arc;

use pacs_spec::SourceSpec;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::schema::types::Type;

use super::{Cell, Take, no_field, row, window};
use crate::DataError;

pub(super) fn rows(path: &Path, source: &SourceSpec, take: &mut Take<'_>) -> Result<(), DataError> {
    let reader = open(path)?;
    let format_error = |message: String| DataError::Format { path: path.to_owned(), message };
    let columns = projection(&reader, source).map_err(format_error)?;
    let iterator = contained(|| reader.get_row_iter(Some(columns))).and_then(|iterator| iterator);
    let mut iterator = iterator.map_err(|error| format_error(error.to_string()))?;
    let window = window(source);
    for number in 1..=window.end {
        let row_error = |message| DataError::Row { path: path.to_owned(), row: number, message };
        let next = contained(|| iterator.next().transpose()).and_then(|values| values);
        let Some(values) = next.map_err(|error| row_error(error.to_string()))? else { break };
        if number <= window.start {
            continue;
        }
        let value = |name: &str| {
            let found = values.get_column_iter().find(|(column, _)| column.as_str() == name);
            cell(found.map_or(&Field::Null, |(_, field)| field))
        };
        let place = format!("{}:{number}", path.display());
        take(row(source, value(&source.question_field), value(&source.answer_field), place).map_err(row_error))?;
    }
    Ok(())
}

pub(super) fn count(path: &Path) -> Result<usize, DataError> {
    let rows = open(path)?.metadata().file_metadata().num_rows();
    usize::try_from(rows)
        .map_err(|_| DataError::Format { path: path.to_owned(), message: format!("it has {rows} rows") })
}

fn open(path: &Path) -> Result<SerializedFileReader<File>, DataError> {
    let file = File::open(path).map_err(|error| DataError::Read { path: path.to_owned(), error })?;
    contained(|| SerializedFileReader::new(file))
        .and_then(|reader| reader)
        .map_err(|error| DataError::Format { path: path.to_owned(), message: error.to_string() })
}

/// Calls the library, which panics at some files that are no Parquet: whoever gave us the file may not end the process with it.
fn contained<T>(call: impl FnOnce() -> T) -> Result<T, ParquetError> {
    let broken = |_| ParquetError::General("its parts do not fit together".to_owned());
    panic::catch_unwind(AssertUnwindSafe(call)).map_err(broken)
}

/// The schema of the two columns that are read.
fn projection(reader: &SerializedFileReader<File>, source: &SourceSpec) -> Result<Type, String> {
    let schema = reader.metadata().file_metadata().schema();
    let column = |name: &str| {
        let found = schema.get_fields().iter().find(|field| field.name() == name);
        found.cloned().ok_or_else(|| no_field(name, schema.get_fields().iter().map(|field| field.name())))
    };
    let mut fields: Vec<Arc<Type>> = vec![column(&source.question_field)?];
    if source.answer_field != source.question_field {
        fields.push(column(&source.answer_field)?);
    }
    Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(|error| error.to_string())
}

fn cell(field: &Field) -> Cell {
    let number = match field {
        Field::Byte(n) => Some(n.to_string()),
        Field::Short(n) => Some(n.to_string()),
        Field::Int(n) => Some(n.to_string()),
        Field::Long(n) => Some(n.to_string()),
        Field::UByte(n) => Some(n.to_string()),
        Field::UShort(n) => Some(n.to_string()),
        Field::UInt(n) => Some(n.to_string()),
        Field::ULong(n) => Some(n.to_string()),
        Field::Float(n) => Some(n.to_string()),
        Field::Double(n) => Some(n.to_string()),
        _ => None,
    };
    let is_number = number.is_some();
    let text = match (number, field) {
        (Some(number), _) => Ok(number),
        (None, Field::Str(text)) => Ok(text.clone()),
        // Writers without a logical type store text as plain bytes.
        (None, Field::Bytes(bytes)) => {
            String::from_utf8(bytes.data().to_vec()).map_err(|_| "made of bytes that are no UTF-8 text")
        }
        (None, Field::Null) => Err("null"),
        (None, _) => Err("of another type"),
    };
    Cell { text, is_number }
}
