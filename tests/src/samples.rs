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

impl Job {
    /// Reads all samples in the archive of the run, ordered by file and row.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn samples(&self) -> Result<Vec<Archived>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(self.run_path("samples")).context("list the archive")? {
            names.push(entry?.file_name().into_string().ok().context("a readable name")?);
        }
        names.sort();
        let mut samples = Vec::new();
        for name in names {
            let reader = SerializedFileReader::new(File::open(self.run_path("samples").join(&name))?)?;
            for row in reader.get_row_iter(None)? {
                samples.push(archived(&name, &row?).with_context(|| format!("read {name}"))?);
            }
        }
        Ok(samples)
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

fn archived(file: &str, row: &Row) -> Result<Archived> {
    let field = |name: &str| {
        let found = row.get_column_iter().find(|(column, _)| column.as_str() == name);
        found.map(|(_, field)| field.clone()).with_context(|| format!("no column {name}"))
    };
    let text = |name: &str| match field(name)? {
        Field::Str(text) => Ok(text),
        other => bail!("column {name} holds {other:?}"),
    };
    let number = |name: &str| match field(name)? {
        Field::Double(number) => Ok(number),
        other => bail!("column {name} holds {other:?}"),
    };
    let (Field::Long(step), Field::Long(group), Field::Int(sample)) =
        (field("step")?, field("group")?, field("sample")?)
    else {
        bail!("step, group and sample are no numbers");
    };
    Ok(Archived {
        file: file.to_owned(),
        step,
        purpose: text("purpose")?,
        group,
        sample,
        response: text("response")?,
        outcome: text("outcome")?,
        rule: text("rule")?,
        label: number("label")?,
        reward: number("reward")?,
    })
}
