//! The sample archive of a run: files of one step each, and merged files with one row group per step.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};

use super::recorded::{RecordedGroup, RecordedSample, RecordedStep};

/// An archive file, with its range of steps.
struct Steps {
    first: u64,
    last: u64,
    path: PathBuf,
}

/// Reads the recorded steps of the run in `run_dir`, which must be consecutive. They must begin with step 1, unless the
/// weights before them were `given`.
pub(super) fn steps(run_dir: &Path, given: bool) -> Result<impl Iterator<Item = Result<RecordedStep>> + use<>> {
    let folder = run_dir.join("samples");
    let files = files(&folder).with_context(|| format!("read `{}`", folder.display()))?;
    let Some(Steps { first, .. }) = files.first() else {
        bail!("`{}` holds no steps; `logging.samples` must be on when they are made", folder.display());
    };
    ensure!(given || *first == 1, "the archive begins with step {first}; name the weights before it with `--model`");
    for pair in files.windows(2) {
        let [Steps { last: before, .. }, Steps { first: after, .. }] = pair else { continue };
        ensure!(before + 1 == *after, "`{}` goes from step {before} to step {after}", folder.display());
    }
    Ok(Recorded { files: files.into(), open: None })
}

/// Reads one row group at a time, because a merged file may exceed memory.
struct Recorded {
    files: VecDeque<Steps>,
    open: Option<Open>,
}

/// The file being read.
struct Open {
    steps: Steps,
    reader: SerializedFileReader<File>,
    /// Next step, and its row group.
    next: (u64, usize),
}

impl Iterator for Recorded {
    type Item = Result<RecordedStep>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut open = match self.open.take() {
            Some(open) => open,
            None => match Open::new(self.files.pop_front()?) {
                Ok(open) => open,
                Err(error) => return Some(Err(error)),
            },
        };
        let step = open.step();
        self.open = Some(open).filter(|open| step.is_ok() && open.next.0 <= open.steps.last);
        Some(step)
    }
}

impl Open {
    fn new(steps: Steps) -> Result<Self> {
        let open = || Ok::<_, anyhow::Error>(SerializedFileReader::new(File::open(&steps.path)?)?);
        let reader = open().with_context(|| format!("read `{}`", steps.path.display()))?;
        Ok(Self { next: (steps.first, 0), steps, reader })
    }

    fn step(&mut self) -> Result<RecordedStep> {
        let (number, row_group) = self.next;
        self.next = (number + 1, row_group + 1);
        let read = || {
            let rows = self.reader.get_row_group(row_group)?;
            groups(number, RowIter::from_row_group(None, rows.as_ref())?)
        };
        let groups = read().with_context(|| format!("read step {number} of `{}`", self.steps.path.display()))?;
        Ok(RecordedStep { number, groups })
    }
}

/// Lists the files of training steps in order. After an interrupted merge, some steps are both in the merged file and
/// in files of their own.
fn files(folder: &Path) -> Result<Vec<Steps>> {
    let mut files: Vec<Steps> = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        files.extend(name.and_then(span).map(|(first, last)| Steps { first, last, path: path.clone() }));
    }
    files.sort_by_key(|steps| (steps.first, std::cmp::Reverse(steps.last)));
    let mut reached = None;
    files.retain(|steps| {
        let is_new = reached.is_none_or(|reached| steps.last > reached);
        reached = reached.max(Some(steps.last));
        is_new
    });
    Ok(files)
}

/// Parses the first and last step from a file name: `step-000012.parquet` or `steps-000001-000064.parquet`.
fn span(name: &str) -> Option<(u64, u64)> {
    let stem = name.strip_suffix(".parquet")?;
    if let Some(step) = stem.strip_prefix("step-") {
        let step = step.parse().ok()?;
        return Some((step, step));
    }
    let (first, last) = stem.strip_prefix("steps-")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

/// Reads the groups of a step in the order of its rows. The prompt is stored in the first row of its group.
fn groups(step: u64, rows: RowIter<'_>) -> Result<Vec<RecordedGroup>> {
    let mut groups: Vec<RecordedGroup> = Vec::new();
    for row in rows {
        let row = row?;
        let of = long(&row, "step")?;
        ensure!(u64::try_from(of) == Ok(step), "these are the samples of step {of}");
        let group = u64::try_from(long(&row, "group")?)?;
        if groups.last().is_none_or(|last| last.group != group) {
            let prompt_tokens = tokens(&row, "prompt_ids")?;
            ensure!(!prompt_tokens.is_empty(), "group {group} has no prompt; the run is of an older version");
            groups.push(RecordedGroup { group, prompt_tokens, samples: Vec::new() });
        }
        let truncated = match column(&row, "finish")? {
            Field::Str(finish) => Some(finish == "length"),
            _ => bail!("column `finish` is no text"),
        };
        let sample = RecordedSample {
            tokens: tokens(&row, "token_ids")?,
            logprobs: floats(&row, "logprobs")?,
            sampled_logprobs: floats(&row, "sampled_logprobs")?,
            label: double(&row, "label")?,
            reward: double(&row, "reward")?,
            truncated,
            version: u64::try_from(long(&row, "version")?).ok(),
        };
        groups.last_mut().expect("a group was pushed").samples.push(sample);
    }
    Ok(groups)
}

fn column<'r>(row: &'r Row, name: &str) -> Result<&'r Field> {
    let found = row.get_column_iter().find(|(column, _)| column.as_str() == name);
    found.map(|(_, field)| field).with_context(|| format!("column `{name}` is missing; the run is of an older version"))
}

fn long(row: &Row, name: &str) -> Result<i64> {
    match column(row, name)? {
        Field::Long(value) => Ok(*value),
        _ => bail!("column `{name}` is no int64"),
    }
}

fn double(row: &Row, name: &str) -> Result<f64> {
    match column(row, name)? {
        Field::Double(value) => Ok(*value),
        _ => bail!("column `{name}` is no double"),
    }
}

fn tokens(row: &Row, name: &str) -> Result<Vec<u32>> {
    list(row, name, |field| match field {
        Field::Int(token) => u32::try_from(*token).ok(),
        _ => None,
    })
}

fn floats(row: &Row, name: &str) -> Result<Vec<f32>> {
    list(row, name, |field| match field {
        Field::Float(number) => Some(*number),
        _ => None,
    })
}

fn list<T>(row: &Row, name: &str, value: impl Fn(&Field) -> Option<T>) -> Result<Vec<T>> {
    let Field::ListInternal(list) = column(row, name)? else { bail!("column `{name}` is no list") };
    let values: Option<Vec<T>> = list.elements().iter().map(value).collect();
    values.with_context(|| format!("column `{name}` has an unexpected type"))
}
