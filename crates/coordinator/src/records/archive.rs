use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use pacs_types::{FinishReason, GroupId, Purpose, Sample, SampleId, Verdict};
use parquet::basic::Compression;
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::errors::{ParquetError, Result};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

use super::write_atomically;
use crate::driver::KeptSample;

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

/// One row, whose content is read from the journal when it is written.
#[derive(Debug)]
pub(crate) struct ArchivedSample {
    pub(crate) group: GroupId,
    pub(crate) index: u32,
    pub(crate) question: String,
    pub(crate) gold: String,
    /// Tokens of the prompt, on the first row of a group; empty on the others.
    pub(crate) prompt_tokens: Vec<u32>,
    pub(crate) sample: KeptSample,
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
    let mut rest = round.samples.as_slice();
    while !rest.is_empty() {
        let part;
        (part, rest) = rest.split_at(part_of(rest));
        let rows = part.iter().filter_map(|row| Row::read(row).transpose()).collect::<Result<Vec<_>>>()?;
        write_columns(Rows { columns: writer.next_row_group()?, samples: &rows }, round)?;
    }
    writer.close()?;
    Ok(())
}

/// Tokens of a row group: what is in memory of a round while it is written.
const PART_TOKENS: u64 = 1 << 19;

/// How many of the samples go into the next row group.
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
    sample: Sample,
}

impl<'a> Row<'a> {
    /// None where the content is lost for good: that costs the row, and not the round.
    fn read(of: &'a ArchivedSample) -> Result<Option<Self>> {
        let sample = SampleId { group: of.group, index: of.index };
        match of.sample.content() {
            Ok(sample) => Ok(Some(Self { of, sample })),
            Err(error) if error.is_damage() => {
                tracing::warn!(%sample, "a sample was not archived: {error}");
                Ok(None)
            }
            Err(error) => Err(ParquetError::General(format!("{sample}: {error}"))),
        }
    }
}

/// In the order of the schema.
fn write_columns<W: io::Write + Send>(mut rows: Rows<'_, W>, round: &Round) -> Result<()> {
    let purpose = match round.purpose {
        Purpose::Train => "train",
        Purpose::Evaluate => "evaluate",
    };
    rows.int64(|_| round.step)?;
    rows.int64(|row| row.of.group.0)?;
    rows.int32(|row| row.of.index as usize)?;
    rows.text(|_| purpose)?;
    rows.text(|row| &row.of.question)?;
    rows.text(|row| &row.of.gold)?;
    rows.text(|row| &row.sample.text)?;
    rows.optional_text(|row| row.of.verdict.extracted.as_deref())?;
    rows.text(|row| row.of.verdict.outcome.name())?;
    rows.text(|row| &row.of.verdict.rule)?;
    rows.double(|row| row.of.verdict.label)?;
    rows.double(|row| row.of.verdict.reward)?;
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
    rows.int32_list(|row| row.of.prompt_tokens.iter().copied().map(int32).collect())?;
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
    use crate::journal::{Frame, FrameKey, write_frames};
    use pacs_protocol::v1;
    use pacs_types::{LeaseId, Outcome, VersionSpan, WeightVersion};
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use prost::Message;

    /// A row whose sample lies in a segment of `folder`.
    fn row(folder: &Path, group: u64, tokens: Vec<u32>, extracted: Option<&str>) -> ArchivedSample {
        let logprobs = tokens.iter().map(|token| -(*token as f32) / 8.0).collect();
        let spans = vec![VersionSpan { version: WeightVersion(3), tokens: tokens.len() as u32 }];
        let sample = Sample {
            tokens,
            logprobs,
            entropy_sum: 0.75,
            text: "ä 2".into(),
            finish: FinishReason::Length,
            version: WeightVersion(3),
            sampled_logprobs: Vec::new(),
            spans,
        };
        let key = FrameKey::Sample(SampleId { group: GroupId(group), index: 1 }, LeaseId(1));
        let frame = Frame::new(key, v1::Sample::from(sample.clone()).encode_to_vec());
        let kept = KeptSample::new(&sample, frame.stored());
        write_frames(folder, &[frame]).unwrap();
        ArchivedSample {
            group: GroupId(group),
            index: 1,
            question: "1 + 1?".into(),
            gold: "2".into(),
            prompt_tokens: if group == 7 { vec![9, 8] } else { Vec::new() },
            sample: kept,
            verdict: Verdict {
                outcome: Outcome::Wrong,
                label: 0.25,
                reward: -1.0,
                extracted: extracted.map(str::to_owned),
                rule: "number".into(),
            },
        }
    }

    /// Flips a bit of the last byte that was written to a segment of `folder`.
    fn damage_newest(folder: &Path) {
        let segments = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let newest =
            segments.filter(|path| path.extension().is_some_and(|extension| extension == "seg")).max().unwrap();
        let mut bytes = fs::read(&newest).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(newest, bytes).unwrap();
    }

    #[test]
    fn rows_are_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let row = |group, tokens, extracted| row(folder.path(), group, tokens, extracted);
        let samples = vec![row(7, vec![4, 2], None), row(8, vec![16], Some("3")), row(9, vec![8], Some(""))];
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
                 logprobs: {logprobs}, sampled_logprobs: [], span_versions: [3], span_tokens: [{tokens}], prompt_ids: {prompt}}}"
            )
        };
        assert_eq!(rows[0], expected(7, "null", 2, "-7.5E-1", "[4, 2]", "[-5E-1, -2.5E-1]", "[9, 8]"));
        assert_eq!(rows[1], expected(8, "3", 1, "-2E0", "[16]", "[-2E0]", "[]"));
        assert_eq!(rows[2], expected(9, "", 1, "-1E0", "[8]", "[-1E0]", "[]"));
    }

    #[test]
    fn a_large_round_is_written_in_parts_and_what_is_lost_costs_its_row() {
        let folder = tempfile::tempdir().unwrap();
        let long = |group| row(folder.path(), group, vec![1; 300_000], None);
        let mut samples = vec![long(1), long(2), row(folder.path(), 3, vec![1], None)];
        let lost = row(folder.path(), 4, vec![1], None);
        damage_newest(folder.path());
        samples.push(lost);
        let mut archive = Archive::open(folder.path()).unwrap();
        archive.write(Round { step: 1, purpose: Purpose::Train, samples });
        archive.close();
        let file = fs::File::open(folder.path().join("samples/step-000001.parquet")).unwrap();
        let reader = SerializedFileReader::new(file).unwrap();
        let parts = reader.metadata().row_groups().iter().map(|part| part.num_rows()).collect::<Vec<_>>();
        assert_eq!(parts, [1, 2]);
    }

    #[test]
    fn later_rounds_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let mut archive = Archive::open(folder.path()).unwrap();
        for step in 1..=3 {
            archive.write(Round { step, purpose: Purpose::Train, samples: vec![row(folder.path(), 1, vec![1], None)] });
            archive.write(Round {
                step,
                purpose: Purpose::Evaluate,
                samples: vec![row(folder.path(), 1, vec![1], None)],
            });
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
