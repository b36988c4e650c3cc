use std::fs::File;
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
    let iterator = reader.get_row_iter(Some(columns)).map_err(|error| format_error(error.to_string()))?;
    let window = window(source);
    for (position, values) in iterator.enumerate().skip(window.start).take(window.len()) {
        let number = position + 1;
        let row_error = |message| DataError::Row { path: path.to_owned(), row: number, message };
        let values = values.map_err(|error: ParquetError| row_error(error.to_string()))?;
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
    SerializedFileReader::new(file)
        .map_err(|error| DataError::Format { path: path.to_owned(), message: error.to_string() })
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
