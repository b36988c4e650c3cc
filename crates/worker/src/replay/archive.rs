//! The archive of a run: one Parquet file a step.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};

use super::recorded::{RecordedGroup, RecordedSample, RecordedStep};

/// Recorded steps of the run in `run_dir`, which must follow each other. They must begin with the first, unless the
/// weights that they begin with were `given`.
pub(super) fn steps(run_dir: &Path, given: bool) -> Result<impl Iterator<Item = Result<RecordedStep>> + use<>> {
    let folder = run_dir.join("samples");
    let files = files(&folder).with_context(|| format!("read `{}`", folder.display()))?;
    let Some((first, _)) = files.first() else {
        bail!("`{}` holds no steps; `logging.samples` must be on when they are made", folder.display());
    };
    ensure!(given || *first == 1, "the archive begins with step {first}; name the weights before it with `--model`");
    for pair in files.windows(2) {
        let [(before, _), (after, _)] = pair else { continue };
        ensure!(before + 1 == *after, "`{}` goes from step {before} to step {after}", folder.display());
    }
    Ok(files.into_iter().map(|(number, path)| {
        let groups = groups(&path).with_context(|| format!("read `{}`", path.display()))?;
        Ok(RecordedStep { number, groups })
    }))
}

/// Files of training steps by number.
fn files(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let number = name.and_then(|name| name.strip_prefix("step-")?.strip_suffix(".parquet")?.parse().ok());
        files.extend(number.map(|number| (number, path)));
    }
    files.sort();
    Ok(files)
}

/// Groups of a file in its order. A prompt stands on the first row of its group.
fn groups(path: &Path) -> Result<Vec<RecordedGroup>> {
    let reader = SerializedFileReader::new(File::open(path)?)?;
    let mut groups: Vec<RecordedGroup> = Vec::new();
    for row in reader.get_row_iter(None)? {
        let row = row?;
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
    values.with_context(|| format!("column `{name}` holds something else than it should"))
}
