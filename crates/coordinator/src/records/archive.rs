use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use pacs_types::{FinishReason, GroupId, Purpose, Sample, Verdict};
use parquet::basic::Compression;
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::errors::{ParquetError, Result};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

use super::write_atomically;

/// Rounds that may wait to be written; a full queue makes the run wait.
const QUEUE: usize = 4;

/// The batch of a step, or an evaluation.
#[derive(Debug)]
pub(crate) struct Round {
    /// Training: the step made; evaluation: the steps that the policy has seen.
    pub(crate) step: u64,
    pub(crate) purpose: Purpose,
    pub(crate) samples: Vec<ArchivedSample>,
}

/// One row.
#[derive(Debug)]
pub(crate) struct ArchivedSample {
    pub(crate) group: GroupId,
    pub(crate) index: u32,
    pub(crate) question: String,
    pub(crate) gold: String,
    /// Tokens of the prompt, on the first row of a group; empty on the others.
    pub(crate) prompt_tokens: Vec<u32>,
    pub(crate) sample: Sample,
    pub(crate) verdict: Verdict,
}

enum Job {
    Write(Round),
    /// Remove the rounds of later steps; all when there is none.
    Truncate(Option<u64>),
}

/// Writes rounds to `samples/`, on a thread of its own: compression must not hold up the run.
#[derive(Debug)]
pub(crate) struct Archive {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Archive {
    pub(crate) fn open(run_dir: &Path) -> io::Result<Self> {
        let folder = run_dir.join("samples");
        fs::create_dir_all(&folder)?;
        let (jobs, inbox) = sync_channel(QUEUE);
        // Ends when the sender is dropped, after the last job.
        let thread = std::thread::Builder::new().name("archive".into()).spawn(move || {
            for job in inbox {
                let result = match job {
                    Job::Write(round) => write_round(&folder, &round),
                    Job::Truncate(last) => truncate(&folder, last),
                };
                if let Err(error) = result {
                    tracing::warn!(folder = %folder.display(), "samples were not archived: {error}");
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    pub(crate) fn write(&self, round: Round) {
        self.send(Job::Write(round));
    }

    pub(crate) fn truncate(&self, last_step: Option<u64>) {
        self.send(Job::Truncate(last_step));
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs
            && jobs.send(job).is_err()
        {
            tracing::warn!("samples were not archived: the archive's thread is gone");
        }
    }

    /// Waits until everything is written.
    pub(crate) fn close(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("samples were not archived: the archive's thread panicked");
        }
    }
}

fn name(purpose: Purpose, step: u64) -> String {
    match purpose {
        Purpose::Train => format!("step-{step:06}.parquet"),
        Purpose::Evaluate => format!("eval-{step:06}.parquet"),
    }
}

fn truncate(folder: &Path, last_step: Option<u64>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".parquet"));
        let number = stem.and_then(|stem| stem.strip_prefix("step-").or_else(|| stem.strip_prefix("eval-")));
        let step = number.and_then(|number| number.parse::<u64>().ok());
        if step.is_some_and(|step| last_step.is_none_or(|last| step > last)) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

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
  required int64 version;
  required group token_ids (LIST) { repeated group list { required int32 element; } }
  required group logprobs (LIST) { repeated group list { required float element; } }
  required group sampled_logprobs (LIST) { repeated group list { required float element; } }
  required group span_versions (LIST) { repeated group list { required int32 element; } }
  required group span_tokens (LIST) { repeated group list { required int32 element; } }
  required group prompt_ids (LIST) { repeated group list { required int32 element; } }
}
";

fn write_round(folder: &Path, round: &Round) -> io::Result<()> {
    let path: PathBuf = folder.join(name(round.purpose, round.step));
    write_atomically(&path, |file| write_rows(file, round).map_err(io::Error::other))
}

fn write_rows(file: &mut fs::File, round: &Round) -> Result<()> {
    let schema = Arc::new(parse_message_type(SCHEMA)?);
    let properties = Arc::new(WriterProperties::builder().set_compression(Compression::SNAPPY).build());
    let mut writer = SerializedFileWriter::new(&mut *file, schema, properties)?;
    write_columns(Rows { columns: writer.next_row_group()?, samples: &round.samples }, round)?;
    writer.close()?;
    Ok(())
}

/// In the order of the schema.
fn write_columns<W: io::Write + Send>(mut rows: Rows<'_, W>, round: &Round) -> Result<()> {
    let purpose = match round.purpose {
        Purpose::Train => "train",
        Purpose::Evaluate => "evaluate",
    };
    rows.int64(|_| round.step)?;
    rows.int64(|row| row.group.0)?;
    rows.int32(|row| row.index as usize)?;
    rows.text(|_| purpose)?;
    rows.text(|row| &row.question)?;
    rows.text(|row| &row.gold)?;
    rows.text(|row| &row.sample.text)?;
    rows.optional_text(|row| row.verdict.extracted.as_deref())?;
    rows.text(|row| row.verdict.outcome.name())?;
    rows.text(|row| &row.verdict.rule)?;
    rows.double(|row| row.verdict.label)?;
    rows.double(|row| row.verdict.reward)?;
    rows.int32(|row| row.sample.tokens.len())?;
    rows.text(|row| finish_name(row.sample.finish))?;
    // An empty `sum` is -0.
    rows.double(|row| row.sample.logprobs.iter().fold(0.0, |sum, logprob| sum + f64::from(*logprob)))?;
    rows.double(|row| row.sample.entropy_sum)?;
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
    samples: &'a [ArchivedSample],
}

impl<W: io::Write + Send> Rows<'_, W> {
    fn int64(&mut self, value: impl Fn(&ArchivedSample) -> u64) -> Result<()> {
        let values: Vec<i64> = self.samples.iter().map(|row| i64::try_from(value(row)).unwrap_or(i64::MAX)).collect();
        self.column(|column| match column {
            ColumnWriter::Int64ColumnWriter(writer) => writer.write_batch(&values, None, None),
            _ => Err(mismatch("int64")),
        })
    }

    fn int32(&mut self, value: impl Fn(&ArchivedSample) -> usize) -> Result<()> {
        let values: Vec<i32> = self.samples.iter().map(|row| i32::try_from(value(row)).unwrap_or(i32::MAX)).collect();
        self.column(|column| match column {
            ColumnWriter::Int32ColumnWriter(writer) => writer.write_batch(&values, None, None),
            _ => Err(mismatch("int32")),
        })
    }

    fn double(&mut self, value: impl Fn(&ArchivedSample) -> f64) -> Result<()> {
        let values: Vec<f64> = self.samples.iter().map(value).collect();
        self.column(|column| match column {
            ColumnWriter::DoubleColumnWriter(writer) => writer.write_batch(&values, None, None),
            _ => Err(mismatch("double")),
        })
    }

    fn text<'s>(&'s mut self, value: impl Fn(&'s ArchivedSample) -> &'s str) -> Result<()> {
        let values: Vec<ByteArray> = self.samples.iter().map(|row| ByteArray::from(value(row))).collect();
        self.column(|column| match column {
            ColumnWriter::ByteArrayColumnWriter(writer) => writer.write_batch(&values, None, None),
            _ => Err(mismatch("binary")),
        })
    }

    fn optional_text<'s>(&'s mut self, value: impl Fn(&'s ArchivedSample) -> Option<&'s str>) -> Result<()> {
        let values: Vec<ByteArray> = self.samples.iter().filter_map(&value).map(ByteArray::from).collect();
        let levels: Vec<i16> = self.samples.iter().map(|row| i16::from(value(row).is_some())).collect();
        self.column(|column| match column {
            ColumnWriter::ByteArrayColumnWriter(writer) => writer.write_batch(&values, Some(&levels), None),
            _ => Err(mismatch("optional binary")),
        })
    }

    fn int32_list(&mut self, value: impl Fn(&ArchivedSample) -> Vec<i32>) -> Result<()> {
        let list = List::new(self.samples.iter().map(value));
        self.column(|column| match column {
            ColumnWriter::Int32ColumnWriter(writer) => {
                writer.write_batch(&list.values, Some(&list.definitions), Some(&list.repetitions))
            }
            _ => Err(mismatch("list of int32")),
        })
    }

    fn float_list(&mut self, value: impl Fn(&ArchivedSample) -> Vec<f32>) -> Result<()> {
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

/// Lists as Parquet has them: all values, and for each whether it starts a list and whether it is there at all.
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

#[cfg(test)]
mod tests {
    use super::*;
    use pacs_types::{Outcome, VersionSpan, WeightVersion};
    use parquet::file::reader::{FileReader, SerializedFileReader};

    fn row(group: u64, tokens: Vec<u32>, extracted: Option<&str>) -> ArchivedSample {
        let logprobs = tokens.iter().map(|token| -(*token as f32) / 8.0).collect();
        ArchivedSample {
            group: GroupId(group),
            index: 1,
            question: "1 + 1?".into(),
            gold: "2".into(),
            prompt_tokens: if group == 7 { vec![9, 8] } else { Vec::new() },
            sample: Sample {
                tokens,
                logprobs,
                entropy_sum: 0.75,
                text: "ä 2".into(),
                finish: FinishReason::Length,
                version: WeightVersion(3),
                sampled_logprobs: Vec::new(),
                spans: vec![VersionSpan { version: WeightVersion(3), tokens: 5 }],
            },
            verdict: Verdict {
                outcome: Outcome::Wrong,
                label: 0.25,
                reward: -1.0,
                extracted: extracted.map(str::to_owned),
                rule: "number".into(),
            },
        }
    }

    #[test]
    fn rows_are_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let samples = vec![row(7, vec![4, 2], None), row(8, vec![16], Some("3")), row(9, vec![], Some(""))];
        let mut archive = Archive::open(folder.path()).unwrap();
        archive.write(Round { step: 12, purpose: Purpose::Train, samples });
        archive.close();
        let file = fs::File::open(folder.path().join("samples/step-000012.parquet")).unwrap();
        let reader = SerializedFileReader::new(file).unwrap();
        let rows: Vec<String> =
            reader.get_row_iter(None).unwrap().map(|row| row.unwrap().to_string().replace('"', "")).collect();
        let expected = |group, extracted, tokens, sum, ids, logprobs, prompt| {
            format!(
                "{{step: 12, group: {group}, sample: 1, purpose: train, question: 1 + 1?, gold: 2, response: ä 2, \
                 extracted: {extracted}, outcome: wrong, rule: number, label: 0.25, reward: -1E0, tokens: {tokens}, \
                 finish: length, logprob_sum: {sum}, entropy_sum: 0.75, version: 3, token_ids: {ids}, \
                 logprobs: {logprobs}, sampled_logprobs: [], span_versions: [3], span_tokens: [5], prompt_ids: {prompt}}}"
            )
        };
        assert_eq!(rows[0], expected(7, "null", 2, "-7.5E-1", "[4, 2]", "[-5E-1, -2.5E-1]", "[9, 8]"));
        assert_eq!(rows[1], expected(8, "3", 1, "-2E0", "[16]", "[-2E0]", "[]"));
        assert_eq!(rows[2], expected(9, "", 0, "0E0", "[]", "[]", "[]"));
    }

    #[test]
    fn later_rounds_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let mut archive = Archive::open(folder.path()).unwrap();
        for step in 1..=3 {
            archive.write(Round { step, purpose: Purpose::Train, samples: vec![row(1, vec![1], None)] });
            archive.write(Round { step, purpose: Purpose::Evaluate, samples: vec![row(1, vec![1], None)] });
        }
        archive.truncate(Some(1));
        archive.close();
        let mut names: Vec<_> = fs::read_dir(folder.path().join("samples"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["eval-000001.parquet", "step-000001.parquet"]);
    }
}
