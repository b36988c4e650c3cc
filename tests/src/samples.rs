use std::fs::{self, File};

use anyhow::{Context, Result, bail};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};

use crate::Job;

/// A sample as the archive of a run has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Archived {
    /// Name of the file: the step or evaluation.
    pub file: String,
    /// Its group.
    pub group: i64,
    /// Its position in the group.
    pub sample: i32,
    /// The answer.
    pub response: String,
    /// How the verification ended.
    pub outcome: String,
    /// The rule that decided.
    pub rule: String,
    /// The label.
    pub label: f64,
    /// The reward.
    pub reward: f64,
}

impl Job {
    /// All samples in the archive of the run, in order.
    ///
    /// # Errors
    /// When it cannot be read.
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
    let (Field::Long(group), Field::Int(sample)) = (field("group")?, field("sample")?) else {
        bail!("group and sample are no numbers");
    };
    Ok(Archived {
        file: file.to_owned(),
        group,
        sample,
        response: text("response")?,
        outcome: text("outcome")?,
        rule: text("rule")?,
        label: number("label")?,
        reward: number("reward")?,
    })
}
