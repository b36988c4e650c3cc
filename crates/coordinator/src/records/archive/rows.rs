//! Writes a round as rows, in row groups of bounded size.

use std::fs;
use std::io;
use std::sync::Arc;

use pacs_data::Problem;
use pacs_types::{FinishReason, Purpose, Sample, SampleId};
use parquet::basic::Compression;
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::errors::{ParquetError, Result};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

use super::{ArchivedSample, Round};

const SCHEMA: &str = "
message sample {
  required int64 step;
  required int64 group;
  required int32 sample;
  required binary purpose (STRING);
  required binary question (STRING);
  required binary gold (STRING);
  required binary response (STRING);
  optional binary extracted (STRING);
  required binary outcome (STRING);
  required binary rule (STRING);
  required double label;
  required double reward;
  required int32 tokens;
  required binary finish (STRING);
  required double logprob_sum;
  required double entropy_sum;
  optional float score;
  optional float coefficient;
  required int64 version;
  required group token_ids (LIST) { repeated group list { required int32 element; } }
  required group logprobs (LIST) { repeated group list { required float element; } }
  required group sampled_logprobs (LIST) { repeated group list { required float element; } }
  required group span_versions (LIST) { repeated group list { required int32 element; } }
  required group span_tokens (LIST) { repeated group list { required int32 element; } }
  required group prompt_ids (LIST) { repeated group list { required int32 element; } }
}
";

pub(super) fn write_rows(file: &mut fs::File, round: &Round) -> Result<()> {
    let schema = Arc::new(parse_message_type(SCHEMA)?);
    let mut writer = SerializedFileWriter::new(&mut *file, schema, properties())?;
    let mut rest = round.samples.as_slice();
    let mut before = None;
    while !rest.is_empty() {
        let part;
        (part, rest) = rest.split_at(part_of(rest));
        let mut rows = Vec::with_capacity(part.len());
        for of in part {
            let is_first = before.replace(of.group) != Some(of.group);
            rows.extend(Row::read(of, round, is_first)?);
        }
        write_columns(Rows { columns: writer.next_row_group()?, samples: &rows }, round)?;
    }
    writer.close()?;
    Ok(())
}

/// Tokens per row group, which bounds the memory for a round while it is written.
const PART_TOKENS: u64 = 1 << 19;

/// Number of samples for the next row group.
fn part_of(samples: &[ArchivedSample]) -> usize {
    let mut tokens = 0;
    let fitting = samples.iter().take_while(|row| {
        tokens += u64::from(row.sample.tokens);
        tokens <= PART_TOKENS
    });
    fitting.count().max(1)
}

/// A row with its content.
struct Row<'a> {
    of: &'a ArchivedSample,
    problem: &'a Problem,
    /// Prompt tokens, on the first row of a group; empty on the others.
    prompt_tokens: &'a [u32],
    sample: Sample,
}

impl<'a> Row<'a> {
    /// Reads the content; `None` if it is lost for good, which costs the row but not the round.
    fn read(of: &'a ArchivedSample, round: &'a Round, is_first: bool) -> Result<Option<Self>> {
        let problem = round.problems.problem(of.group);
        let prompt_tokens = if is_first { problem.prompt_tokens.as_slice() } else { &[] };
        let sample = SampleId { group: of.group, index: of.index };
        match of.sample.content() {
            // Routes are not archived: they take many times the rest of a sample, and a part of a round is in memory at once.
            Ok(sample) => {
                Ok(Some(Self { of, problem, prompt_tokens, sample: Sample { routes: Vec::new(), ..sample } }))
            }
            Err(error) if error.is_damage() => {
                tracing::warn!(%sample, "a sample was not archived: {error}");
                Ok(None)
            }
            Err(error) => Err(ParquetError::General(format!("{sample}: {error}"))),
        }
    }
}

/// Writer settings of all archive files.
pub(super) fn properties() -> Arc<WriterProperties> {
    Arc::new(WriterProperties::builder().set_compression(Compression::SNAPPY).build())
}

/// Writes the columns in the order of the schema.
fn write_columns<W: io::Write + Send>(mut rows: Rows<'_, W>, round: &Round) -> Result<()> {
    let purpose = match round.purpose {
        Purpose::Train => "train",
        Purpose::Evaluate => "evaluate",
    };
    rows.int64(|_| round.step)?;
    rows.int64(|row| row.of.group.0)?;
    rows.int32(|row| row.of.index as usize)?;
    rows.text(|_| purpose)?;
    rows.text(|row| &row.problem.question)?;
    rows.text(|row| &row.problem.answer)?;
    rows.text(|row| &row.sample.text)?;
    rows.optional_text(|row| row.of.verdict.extracted.as_deref())?;
    rows.text(|row| row.of.verdict.outcome.name())?;
    rows.text(|row| &row.of.verdict.rule)?;
    rows.double(|row| row.of.verdict.label)?;
    rows.double(|row| row.of.verdict.reward)?;
    rows.int32(|row| row.sample.tokens.len())?;
    rows.text(|row| finish_name(row.sample.finish))?;
    // The `sum` of an empty iterator is -0.
    rows.double(|row| row.sample.logprobs.iter().fold(0.0, |sum, logprob| sum + f64::from(*logprob)))?;
    rows.double(|row| row.sample.entropy_sum)?;
    rows.optional_float(|row| row.of.signal?.score)?;
    rows.optional_float(|row| Some(row.of.signal?.coefficient))?;
    rows.int64(|row| row.sample.version.0)?;
    rows.int32_list(|row| row.sample.tokens.iter().copied().map(int32).collect())?;
    rows.float_list(|row| row.sample.logprobs.clone())?;
    rows.float_list(|row| row.sample.sampled_logprobs.clone())?;
    rows.int32_list(|row| row.sample.spans.iter().map(|span| int32(span.version.0)).collect())?;
    rows.int32_list(|row| row.sample.spans.iter().map(|span| int32(span.tokens)).collect())?;
    rows.int32_list(|row| row.prompt_tokens.iter().copied().map(int32).collect())?;
    rows.columns.close()?;
    Ok(())
}

fn int32(value: impl TryInto<i32>) -> i32 {
    value.try_into().unwrap_or(i32::MAX)
}

fn finish_name(finish: FinishReason) -> &'static str {
    match finish {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// Writes one column after the other.
struct Rows<'a, W: io::Write + Send> {
    columns: SerializedRowGroupWriter<'a, W>,
    samples: &'a [Row<'a>],
}

impl<W: io::Write + Send> Rows<'_, W> {
    fn int64(&mut self, value: impl Fn(&Row<'_>) -> u64) -> Result<()> {
        let values: Vec<i64> = self.samples.iter().map(|row| i64::try_from(value(row)).unwrap_or(i64::MAX)).collect();
        self.column(|column| match column {
            ColumnWriter::Int64ColumnWriter(writer) => writer.write_batch(&values, None, None),
            _ => Err(mismatch("int64")),
        })
    }

    fn int32(&mut self, value: impl Fn(&Row<'_>) -> usize) -> Result<()> {
        let values: Vec<i32> = self.samples.iter().map(|row| i32::try_from(value(row)).unwrap_or(i32::MAX)).collect();
        self.column(|column| match column {
            ColumnWriter::Int32ColumnWriter(writer) => writer.write_batch(&values, None, None),
            _ => Err(mismatch("int32")),
        })
    }

    fn double(&mut self, value: impl Fn(&Row<'_>) -> f64) -> Result<()> {
        let values: Vec<f64> = self.samples.iter().map(value).collect();
        self.column(|column| match column {
            ColumnWriter::DoubleColumnWriter(writer) => writer.write_batch(&values, None, None),
            _ => Err(mismatch("double")),
        })
    }

    fn optional_float(&mut self, value: impl Fn(&Row<'_>) -> Option<f32>) -> Result<()> {
        let values: Vec<f32> = self.samples.iter().filter_map(&value).collect();
        let levels: Vec<i16> = self.samples.iter().map(|row| i16::from(value(row).is_some())).collect();
        self.column(|column| match column {
            ColumnWriter::FloatColumnWriter(writer) => writer.write_batch(&values, Some(&levels), None),
            _ => Err(mismatch("optional float")),
        })
    }

    fn text<'s>(&'s mut self, value: impl Fn(&'s Row<'_>) -> &'s str) -> Result<()> {
        let values: Vec<ByteArray> = self.samples.iter().map(|row| ByteArray::from(value(row))).collect();
        self.column(|column| match column {
            ColumnWriter::ByteArrayColumnWriter(writer) => writer.write_batch(&values, None, None),
            _ => Err(mismatch("binary")),
        })
    }

    fn optional_text<'s>(&'s mut self, value: impl Fn(&'s Row<'_>) -> Option<&'s str>) -> Result<()> {
        let values: Vec<ByteArray> = self.samples.iter().filter_map(&value).map(ByteArray::from).collect();
        let levels: Vec<i16> = self.samples.iter().map(|row| i16::from(value(row).is_some())).collect();
        self.column(|column| match column {
            ColumnWriter::ByteArrayColumnWriter(writer) => writer.write_batch(&values, Some(&levels), None),
            _ => Err(mismatch("optional binary")),
        })
    }

    fn int32_list(&mut self, value: impl Fn(&Row<'_>) -> Vec<i32>) -> Result<()> {
        let list = List::new(self.samples.iter().map(value));
        self.column(|column| match column {
            ColumnWriter::Int32ColumnWriter(writer) => {
                writer.write_batch(&list.values, Some(&list.definitions), Some(&list.repetitions))
            }
            _ => Err(mismatch("list of int32")),
        })
    }

    fn float_list(&mut self, value: impl Fn(&Row<'_>) -> Vec<f32>) -> Result<()> {
        let list = List::new(self.samples.iter().map(value));
        self.column(|column| match column {
            ColumnWriter::FloatColumnWriter(writer) => {
                writer.write_batch(&list.values, Some(&list.definitions), Some(&list.repetitions))
            }
            _ => Err(mismatch("list of float")),
        })
    }

    fn column(&mut self, write: impl FnOnce(&mut ColumnWriter<'_>) -> Result<usize>) -> Result<()> {
        let mut column = self.columns.next_column()?.ok_or_else(|| mismatch("more columns"))?;
        write(column.untyped())?;
        column.close()
    }
}

fn mismatch(written: &str) -> ParquetError {
    ParquetError::General(format!("the schema of the archive has no {written} here"))
}

/// A list column in Parquet's form: all values, with definition and repetition levels.
struct List<T> {
    values: Vec<T>,
    definitions: Vec<i16>,
    repetitions: Vec<i16>,
}

impl<T> List<T> {
    fn new(lists: impl Iterator<Item = Vec<T>>) -> Self {
        let mut flat = Self { values: Vec::new(), definitions: Vec::new(), repetitions: Vec::new() };
        for list in lists {
            flat.definitions.extend(std::iter::repeat_n(1, list.len()));
            flat.repetitions.extend((0..list.len()).map(|position| i16::from(position > 0)));
            if list.is_empty() {
                flat.definitions.push(0);
                flat.repetitions.push(0);
            }
            flat.values.extend(list);
        }
        flat
    }
}
