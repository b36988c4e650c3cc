use std::fs::File;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::Arc;

use pacs_spec::SourceSpec;
use parquet::data_type::Decimal;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use super::fields::Fields;
use super::value::Value;
use super::{Record, Take, text, window};
use crate::DataError;

pub(super) fn rows(path: &Path, source: &SourceSpec, take: &mut Take<'_, Record>) -> Result<Option<Fields>, DataError> {
    let reader = open(path)?;
    let format_error = |message: String| DataError::Format { path: path.to_owned(), message };
    let schema = reader.metadata().file_metadata().schema();
    let names = || schema.get_fields().iter().map(|field| field.name().to_owned()).collect();
    let fields = Fields::choose(source, |path| holds(schema, path), names).map_err(format_error)?;
    let columns = projection(schema, &fields).map_err(format_error)?;
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
        let value = |path: &str| Ok(at(&values, path));
        let place = format!("{}:{number}", path.display());
        take(fields.record(value, names, place).map_err(row_error))?;
    }
    Ok(Some(fields))
}

pub(super) fn count(path: &Path) -> Result<usize, DataError> {
    let rows = open(path)?.metadata().file_metadata().num_rows();
    usize::try_from(rows)
        .map_err(|_| DataError::Format { path: path.to_owned(), message: format!("it has {rows} rows") })
}

fn open(path: &Path) -> Result<SerializedFileReader<File>, DataError> {
    let file = File::open(path).map_err(|error| text::read_error(path, error))?;
    contained(|| SerializedFileReader::new(file)).and_then(|reader| reader).map_err(|error| {
        // What it is instead says more than that its last bytes are not those of a Parquet file.
        let instead = text::open(path).err().filter(|error| matches!(error, DataError::Format { .. }));
        let is_parquet = |error: &DataError| error.to_string().contains("a Parquet file");
        instead
            .filter(|error| !is_parquet(error))
            .unwrap_or_else(|| DataError::Format { path: path.to_owned(), message: error.to_string() })
    })
}

/// Calls the library, which panics at some files that are no Parquet: the file's author must not be able to end the process.
fn contained<T>(call: impl FnOnce() -> T) -> Result<T, ParquetError> {
    let broken = |_| ParquetError::General("its parts do not fit together".to_owned());
    panic::catch_unwind(AssertUnwindSafe(call)).map_err(broken)
}

/// Whether the schema has a field at this path. Lists and maps have levels of their own in it, so that beyond one only rows can say.
fn holds(schema: &Type, path: &str) -> bool {
    let field = |name: &str| schema.get_fields().iter().find(|field| field.name() == name);
    if field(path).is_some() {
        return true;
    }
    let Some((name, rest)) = path.split_once('.') else { return false };
    match field(name) {
        Some(group) if group.is_group() => {
            group.get_basic_info().converted_type() != parquet::basic::ConvertedType::NONE || holds(group, rest)
        }
        _ => false,
    }
}

/// The schema of the columns that are read.
fn projection(schema: &Type, fields: &Fields) -> Result<Type, String> {
    let mut columns: Vec<Arc<Type>> = Vec::new();
    for path in [&fields.question, &fields.answer] {
        let find = |name: &str| schema.get_fields().iter().find(|field| field.name() == name).cloned();
        let column = find(path).or_else(|| find(path.split('.').next().unwrap_or(path)));
        columns.extend(column.filter(|column| columns.iter().all(|known| known.name() != column.name())));
    }
    Type::group_type_builder(schema.name()).with_fields(columns).build().map_err(|error| error.to_string())
}

fn at(row: &Row, path: &str) -> Option<Value> {
    let field = |name: &str| row.get_column_iter().find(|(column, _)| column.as_str() == name).map(|(_, field)| field);
    if let Some(field) = field(path) {
        return Some(value(field));
    }
    let (name, rest) = path.split_once('.')?;
    value(field(name)?).at(rest).cloned()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(*value),
        Field::Byte(n) => Value::Number(n.to_string()),
        Field::Short(n) => Value::Number(n.to_string()),
        Field::Int(n) => Value::Number(n.to_string()),
        Field::Long(n) => Value::Number(n.to_string()),
        Field::UByte(n) => Value::Number(n.to_string()),
        Field::UShort(n) => Value::Number(n.to_string()),
        Field::UInt(n) => Value::Number(n.to_string()),
        Field::ULong(n) => Value::Number(n.to_string()),
        Field::Float16(n) => Value::of_float(f64::from(*n), n.to_string()),
        Field::Float(n) => Value::of_float(f64::from(*n), n.to_string()),
        Field::Double(n) => Value::of_float(*n, n.to_string()),
        Field::Decimal(n) => match n {
            Decimal::Int32 { value, scale, .. } => Value::of_decimal(value, *scale),
            Decimal::Int64 { value, scale, .. } => Value::of_decimal(value, *scale),
            Decimal::Bytes { value, scale, .. } => Value::of_decimal(value.data(), *scale),
        },
        Field::Str(text) => Value::Text(text.clone()),
        // Writers without a logical type store text as plain bytes.
        Field::Bytes(bytes) => match String::from_utf8(bytes.data().to_vec()) {
            Ok(text) => Value::Text(text),
            Err(_) => Value::Other("made of bytes that are no UTF-8 text"),
        },
        Field::Group(row) => {
            Value::Fields(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect())
        }
        Field::ListInternal(list) => Value::List(list.elements().iter().map(value).collect()),
        Field::MapInternal(map) => {
            let entry = |(key, field): &(Field, Field)| Some((value(key).into_text().ok()?, value(field)));
            Value::Fields(map.entries().iter().filter_map(entry).collect())
        }
        Field::Date(_) => Value::Other("a date"),
        Field::TimeMillis(_) | Field::TimeMicros(_) | Field::TimestampMillis(_) | Field::TimestampMicros(_) => {
            Value::Other("a time")
        }
    }
}
