//! The record of a finished run: a small file of numbers, from which reports are computed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use anyhow::{Context, Result};
use pacs_spec::{JobSpec, UniformKind};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::spec::{Run, plain};

/// Maximum number of points of a training curve; longer curves are averaged over consecutive steps.
const MOST_POINTS: usize = 50;

/// Training metrics whose curves are kept.
pub(super) const CURVES: [&str; 6] =
    ["reward_mean", "mixed_share", "entropy", "answer_tokens_mean", "grad_norm", "truncated_share"];

/// The numbers of a finished run, as its file `data/<run>.json` holds them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: String,
    pub(super) task: String,
    /// The run's point of the grid: value by dotted key.
    pub(super) grid: BTreeMap<String, String>,
    pub(super) method: String,
    pub(super) seed: u64,
    /// Value of the tuned key; `None` without tuning.
    pub(super) tuned: Option<String>,
    pub(super) is_try: bool,
    /// Why the run ended before its last step (no signal left); `None` for a complete run.
    pub(super) ended_early: Option<String>,
    pub(super) evaluations: Vec<Evaluation>,
    /// Curves by metric, as means over consecutive steps; the curve `step` holds the last step of each mean.
    pub(super) training: BTreeMap<String, Vec<Option<f64>>>,
    /// Version of the program that trained the run.
    pub(super) program: String,
    /// The resolved job as TOML, with every default written out.
    pub(super) job: String,
}

/// One evaluation on held-out problems, with the samples and tokens generated for training until then.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Evaluation {
    pub(super) step: u64,
    pub(super) samples: u64,
    pub(super) tokens: u64,
    pub(super) pass_at_1: f64,
    pub(super) k: u64,
    /// Pass@k; `None` where `k` is 1.
    pub(super) pass_at_k: Option<f64>,
}

/// The unit of the budget at which runs are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Budget {
    Samples,
    Tokens,
}

impl Evaluation {
    pub(super) fn spent(&self, budget: Budget) -> u64 {
        match budget {
            Budget::Samples => self.samples,
            Budget::Tokens => self.tokens,
        }
    }
}

impl Record {
    /// Reads the numbers of a run folder; `None` when the run is not finished.
    pub(super) fn collect(run: &Run, run_dir: &Path, ended_early: Option<String>) -> Result<Option<Self>> {
        let metrics = lines(&run_dir.join("metrics.jsonl"))?;
        let measured = lines(&run_dir.join("evaluations.jsonl"))?;
        let steps = run.job.batch.steps;
        let is_whole = measured.iter().any(|line| line["step"].as_u64() == Some(steps));
        if !is_whole && ended_early.is_none() {
            return Ok(None);
        }
        let spent = spent(&run.job, &metrics);
        let evaluation = |line: &Value| {
            let step = line["step"].as_u64()?;
            let (samples, tokens) =
                step.checked_sub(1).and_then(|at| spent.get(at as usize)).copied().unwrap_or((0, 0));
            Some(Evaluation {
                step,
                samples,
                tokens,
                pass_at_1: line["pass_at_1"].as_f64()?,
                k: line["k"].as_u64().unwrap_or(1),
                pass_at_k: line["pass_at_k"].as_f64(),
            })
        };
        let evaluations = measured.iter().map(evaluation).collect::<Option<Vec<_>>>();
        Ok(Some(Self {
            id: run.id.clone(),
            task: run.cell.task.clone(),
            grid: run.cell.variant.iter().map(|(key, value)| (key.clone(), plain(value))).collect(),
            method: run.cell.method.clone(),
            seed: run.seed,
            tuned: run.tuned.as_ref().map(plain),
            is_try: run.is_try,
            ended_early: ended_early.filter(|_| !is_whole),
            evaluations: evaluations.context("a line of evaluations.jsonl lacks `pass_at_1`")?,
            training: curves(&metrics),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            job: run.job.resolved_toml(),
        }))
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read `{}`", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("read `{}`", path.display()))
    }

    /// Writes the file atomically, so that a killed study leaves no partial record.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let write = || -> Result<()> {
            fs::create_dir_all(path.parent().context("it is in a folder")?)?;
            let temporary = path.with_extension("json.new");
            let mut file = File::create(&temporary)?;
            file.write_all(serde_json::to_string(self)?.as_bytes())?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            Ok(fs::rename(&temporary, path)?)
        };
        write().with_context(|| format!("write `{}`", path.display()))
    }

    /// Interpolates a value linearly between the evaluations around `spent`. A run that ended early keeps its last value at every
    /// later budget; for other runs the result is `None` beyond the last evaluation.
    pub(super) fn at(&self, budget: Budget, spent: u64, value: impl Fn(&Evaluation) -> Option<f64>) -> Option<f64> {
        let after = self.evaluations.iter().position(|one| one.spent(budget) >= spent);
        let Some(after) = after else {
            return self.evaluations.last().filter(|_| self.ended_early.is_some()).and_then(value);
        };
        let right = &self.evaluations[after];
        let Some(left) = after.checked_sub(1).map(|at| &self.evaluations[at]) else { return value(right) };
        let (from, to) = (left.spent(budget), right.spent(budget));
        let part = if to > from { (spent - from) as f64 / (to - from) as f64 } else { 1.0 };
        Some(value(left)? * (1.0 - part) + value(right)? * part)
    }

    /// Returns pass@1 of the last evaluation. Runs are judged by it and never by their best one, which would be selected by its luck.
    pub(super) fn last(&self) -> Option<f64> {
        self.evaluations.last().map(|one| one.pass_at_1)
    }
}

/// Reads JSON lines; empty when the file is missing. A torn last line is left out.
fn lines(path: &Path) -> Result<Vec<Value>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read `{}`", path.display())),
    };
    let mut found = Vec::new();
    for line in BufReader::new(file).lines() {
        match serde_json::from_str(&line?) {
            Ok(value) => found.push(value),
            Err(_) => break,
        }
    }
    Ok(found)
}

/// Returns the cumulative samples and tokens generated up to each step, with refilled groups counted in proportion.
fn spent(job: &JobSpec, metrics: &[Value]) -> Vec<(u64, u64)> {
    let groups = f64::from(job.batch.prompts_per_step);
    let mut sum = (0.0, 0.0);
    let add = |line: &Value| {
        let refilled = match job.groups.uniform {
            UniformKind::Refill => line["uniform_groups_left_out"].as_f64().unwrap_or(0.0),
            _ => 0.0,
        };
        sum.0 += (groups + refilled) * f64::from(job.rollout.samples_per_prompt);
        sum.1 += line["generated_tokens"].as_f64().unwrap_or(0.0) * (groups + refilled) / groups;
        (sum.0.round() as u64, sum.1.round() as u64)
    };
    metrics.iter().map(add).collect()
}

fn curves(metrics: &[Value]) -> BTreeMap<String, Vec<Option<f64>>> {
    let window = metrics.len().div_ceil(MOST_POINTS).max(1);
    let mut curves = BTreeMap::new();
    let ends = metrics.chunks(window).map(|steps| steps.last().and_then(|line| line["step"].as_f64()));
    curves.insert("step".to_owned(), ends.collect());
    for name in CURVES {
        let mean = |steps: &[Value]| {
            let values: Vec<f64> = steps.iter().filter_map(|line| line[name].as_f64()).collect();
            (!values.is_empty()).then(|| rounded(values.iter().sum::<f64>() / values.len() as f64))
        };
        curves.insert(name.to_owned(), metrics.chunks(window).map(mean).collect());
    }
    curves
}

/// Rounds to six digits, to keep files small; plots show three.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn record(points: &[(u64, u64, f64)]) -> Record {
        let evaluation = |(step, tokens, pass): &(u64, u64, f64)| Evaluation {
            step: *step,
            samples: step * 10,
            tokens: *tokens,
            pass_at_1: *pass,
            k: 1,
            pass_at_k: None,
        };
        Record {
            id: "a".into(),
            task: "t".into(),
            grid: BTreeMap::new(),
            method: "m".into(),
            seed: 1,
            tuned: None,
            is_try: false,
            ended_early: None,
            evaluations: points.iter().map(evaluation).collect(),
            training: BTreeMap::new(),
            program: "0".into(),
            job: String::new(),
        }
    }

    #[test]
    fn between_measurements_a_curve_is_straight_and_beyond_there_is_none() {
        let mut run = record(&[(0, 0, 0.1), (10, 500, 0.3), (20, 1500, 0.5)]);
        let at = |run: &Record, budget, spent| run.at(budget, spent, |one| Some(one.pass_at_1));
        assert_eq!(at(&run, Budget::Samples, 0), Some(0.1));
        assert_eq!(at(&run, Budget::Samples, 150), Some(0.4));
        assert_eq!(at(&run, Budget::Tokens, 1000), Some(0.4));
        assert_eq!(at(&run, Budget::Tokens, 1500), Some(0.5));
        assert_eq!(at(&run, Budget::Tokens, 1501), None);
        run.ended_early = Some("solved".into());
        assert_eq!(at(&run, Budget::Tokens, 9000), Some(0.5));
        assert_eq!(run.last(), Some(0.5));
    }

    #[test]
    fn refilled_groups_are_paid_for() {
        let text = "name = 'a'\nmodel.path = 'm'\ndata.train.path = 'a.jsonl'\nbatch.prompts_per_step = 4\n\
                    rollout.samples_per_prompt = 2\nevaluation = { before = false, after = false, every_steps = 0 }\n";
        let line =
            |left_out: u64| serde_json::json!({"step": 1, "generated_tokens": 40, "uniform_groups_left_out": left_out});
        let of = |more: &str| {
            let job = pacs_spec::parse(&format!("{text}{more}"), Path::new("job")).expect("a job");
            spent(&job, &[line(2), line(0)])
        };
        assert_eq!(of(""), [(8, 40), (16, 80)]);
        assert_eq!(of("groups.uniform = 'refill'"), [(12, 60), (20, 100)]);
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a/b.json");
        let mut run = record(&[(0, 0, 0.1), (1, 2, 1.0 / 3.0)]);
        let metrics: Vec<Value> = (1..=120).map(|step| serde_json::json!({"step": step, "entropy": step})).collect();
        run.training = curves(&metrics);
        assert_eq!((run.training["step"].len(), run.training["entropy"][0]), (40, Some(2.0)));
        run.write(&path).expect("written");
        assert_eq!(Record::read(&path).expect("read"), run);
    }
}
