use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};

use anyhow::{Context, Result, bail, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};

use crate::Job;

/// A row of the sample archive of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Archived {
    /// Name of the Parquet file, which names its steps or evaluation.
    pub file: String,
    /// Training step that the sample was drawn for, or after which it was evaluated.
    pub step: i64,
    /// `train`, or the evaluation that the sample belongs to.
    pub purpose: String,
    /// Group id, unique in a run.
    pub group: i64,
    /// Index of the sample in its group, from 0.
    pub sample: i32,
    /// Text of the answer.
    pub response: String,
    /// Outcome of the verification, for example `correct`.
    pub outcome: String,
    /// The verifier's rule that decided the outcome.
    pub rule: String,
    /// Label, 0 to 1.
    pub label: f64,
    /// Reward after the spec's bonuses and penalties.
    pub reward: f64,
}

/// A trained sample of the archive, with what the learner made of it.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainedSample {
    /// Training step, from 1.
    pub step: i64,
    /// Group id, unique in a run.
    pub group: i64,
    /// Index of the sample in its group, from 0.
    pub sample: i32,
    /// Label, 0 to 1.
    pub label: f64,
    /// Reward after the spec's bonuses and penalties.
    pub reward: f64,
    /// Whether the answer ended at the length limit.
    pub truncated: bool,
    /// Log-probs of its tokens by the rollout engine, nats.
    pub logprobs: Vec<f32>,
    /// Score of the objective; `None` where the archive has none.
    pub score: Option<f32>,
    /// Weight of its log-prob in the update; `None` where the archive has none.
    pub coefficient: Option<f32>,
}

impl Job {
    /// Reads the samples of training steps in the archive of the run, ordered by file and row.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn trained_samples(&self) -> Result<Vec<TrainedSample>> {
        let mut samples = Vec::new();
        self.each_row(|_, row| {
            samples.extend(trained(row)?);
            Ok(())
        })?;
        Ok(samples)
    }

    /// Reads all samples in the archive of the run, ordered by file and row.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn samples(&self) -> Result<Vec<Archived>> {
        let mut samples = Vec::new();
        self.each_row(|name, row| {
            samples.push(archived(name, row)?);
            Ok(())
        })?;
        Ok(samples)
    }

    /// Calls `read` with the file and the content of each row, ordered by file and row.
    fn each_row(&self, mut read: impl FnMut(&str, &Row) -> Result<()>) -> Result<()> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.run_path("samples")).context("list the archive")? {
            names.push(entry?.file_name().into_string().ok().context("a readable name")?);
        }
        names.sort();
        for name in names {
            let reader = SerializedFileReader::new(File::open(self.run_path("samples").join(&name))?)?;
            for row in reader.get_row_iter(None)? {
                read(&name, &row?).with_context(|| format!("read {name}"))?;
            }
        }
        Ok(())
    }
}

impl Job {
    /// Checks that the archive holds, for each of `steps` steps, `prompts` groups of `samples` samples each, and no sample twice.
    ///
    /// # Errors
    /// When a sample is missing or repeated.
    pub fn check_every_sample_once(&self, steps: u64, prompts: usize, samples: usize) -> Result<()> {
        let mut groups = BTreeMap::<(i64, i64), BTreeSet<i32>>::new();
        for sample in self.samples()?.into_iter().filter(|sample| sample.purpose == "train") {
            let is_new = groups.entry((sample.step, sample.group)).or_default().insert(sample.sample);
            ensure!(is_new, "sample {} of group {} is there twice", sample.sample, sample.group);
        }
        let distinct: BTreeSet<i64> = groups.keys().map(|(_, group)| *group).collect();
        ensure!(distinct.len() == groups.len(), "a group was trained on in two steps: {:?}", groups.keys());
        for step in 1..=i64::try_from(steps)? {
            let of_step: Vec<_> = groups.range((step, i64::MIN)..=(step, i64::MAX)).collect();
            let whole = of_step.iter().all(|(_, indices)| indices.len() == samples);
            ensure!(of_step.len() == prompts && whole, "step {step} has {of_step:?}");
        }
        ensure!(
            groups.len() as u64 == steps * prompts as u64,
            "the archive has groups of no step: {:?}",
            groups.keys()
        );
        Ok(())
    }
}

fn field(row: &Row, name: &str) -> Result<Field> {
    let found = row.get_column_iter().find(|(column, _)| column.as_str() == name);
    found.map(|(_, field)| field.clone()).with_context(|| format!("no column {name}"))
}

fn text(row: &Row, name: &str) -> Result<String> {
    match field(row, name)? {
        Field::Str(text) => Ok(text),
        other => bail!("column {name} holds {other:?}"),
    }
}

fn number(row: &Row, name: &str) -> Result<f64> {
    match field(row, name)? {
        Field::Double(number) => Ok(number),
        other => bail!("column {name} holds {other:?}"),
    }
}

/// Step, group and index of a row.
fn place(row: &Row) -> Result<(i64, i64, i32)> {
    match (field(row, "step")?, field(row, "group")?, field(row, "sample")?) {
        (Field::Long(step), Field::Long(group), Field::Int(sample)) => Ok((step, group, sample)),
        other => bail!("step, group and sample are {other:?}"),
    }
}

fn archived(file: &str, row: &Row) -> Result<Archived> {
    let (step, group, sample) = place(row)?;
    Ok(Archived {
        file: file.to_owned(),
        step,
        purpose: text(row, "purpose")?,
        group,
        sample,
        response: text(row, "response")?,
        outcome: text(row, "outcome")?,
        rule: text(row, "rule")?,
        label: number(row, "label")?,
        reward: number(row, "reward")?,
    })
}

/// The row if it is one of training.
fn trained(row: &Row) -> Result<Option<TrainedSample>> {
    if text(row, "purpose")? != "train" {
        return Ok(None);
    }
    let optional = |name: &str| match field(row, name)? {
        Field::Float(value) => Ok(Some(value)),
        Field::Null => Ok(None),
        other => bail!("column {name} holds {other:?}"),
    };
    let Field::ListInternal(logprobs) = field(row, "logprobs")? else { bail!("the log-probs are no list") };
    let logprob = |field: &Field| match field {
        Field::Float(value) => Ok(*value),
        other => bail!("a log-prob is {other:?}"),
    };
    let (step, group, sample) = place(row)?;
    Ok(Some(TrainedSample {
        step,
        group,
        sample,
        label: number(row, "label")?,
        reward: number(row, "reward")?,
        truncated: text(row, "finish")? == "length",
        logprobs: logprobs.elements().iter().map(logprob).collect::<Result<_>>()?,
        score: optional("score")?,
        coefficient: optional("coefficient")?,
    }))
}
