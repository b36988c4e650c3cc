//! Reads the results of evaluations from a run folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use pacs_report::{MEASURED_PROBLEMS, MeasuredProblem};
use pacs_spec::{EvaluationSet, JobSpec, VerifierKind};
use serde_json::Value;

use super::no_results;
use crate::failure::Failure;

/// One evaluation of one model.
#[derive(Debug)]
pub(super) struct Results {
    pub(super) folder: PathBuf,
    /// Training steps of the model, 0 for one that was not trained here.
    pub(super) step: u64,
    /// True for a `pacs eval` folder, which holds this evaluation only.
    pub(super) only: bool,
    pub(super) model: PathBuf,
    pub(super) sets: Vec<SetResults>,
}

/// The results of one set.
#[derive(Debug)]
pub(super) struct SetResults {
    pub(super) name: String,
    /// Settings of the set; `None` where this version cannot read the folder's job.
    pub(super) settings: Option<EvaluationSet>,
    /// Whether the built-in math verifier judged, and so can decide which answers are equal.
    pub(super) math: bool,
    /// Number of problems left out because no verifier could judge them.
    pub(super) excluded: u64,
    pub(super) seconds: f64,
    /// Measured problems, in the order of the set.
    pub(super) problems: Vec<MeasuredProblem>,
}

impl Results {
    /// Returns whether all sets of the job are measured.
    pub(super) fn are_complete(folder: &Path, spec: &JobSpec) -> bool {
        let Ok(lines) = lines::<Value>(&folder.join("evaluations.jsonl")) else { return false };
        let named = |line: &Value| line["set"].as_str().unwrap_or("evaluation").to_owned();
        let measured: Vec<String> = lines.iter().map(named).collect();
        spec.evaluation_sets().iter().all(|set| measured.iter().any(|name| name == set.label()))
    }

    /// Reads the evaluation after `step` training steps, or the newest.
    pub(super) fn read(folder: &Path, step: Option<u64>) -> Result<Self, Failure> {
        let path = folder.join(MEASURED_PROBLEMS);
        let missing = |error: std::io::Error| no_results(folder, format!("read `{}`: {error}", path.display()));
        let problems: Vec<MeasuredProblem> = lines(&path).map_err(missing)?;
        let summaries: Vec<Value> = lines(&folder.join("evaluations.jsonl")).map_err(missing)?;
        // The summary line is written last: problems without one belong to an evaluation that is still being written.
        let measured = |step: u64| summaries.iter().any(|line| line["step"].as_u64() == Some(step));
        let newest = problems.iter().map(|problem| problem.step).filter(|step| measured(*step)).max();
        let step = match (step, newest) {
            (_, None) => return Err(no_results(folder, "no measurement is complete".to_owned())),
            (Some(wanted), Some(_)) if !measured(wanted) => {
                let mut steps: Vec<u64> = summaries.iter().filter_map(|line| line["step"].as_u64()).collect();
                steps.dedup();
                let steps: Vec<String> = steps.iter().map(u64::to_string).collect();
                return Err(no_results(
                    folder,
                    format!("there is none after step {wanted}, but after {}", steps.join(", ")),
                ));
            }
            (wanted, Some(newest)) => wanted.unwrap_or(newest),
        };
        let spec = fs::read_to_string(folder.join("job.toml")).ok();
        let spec = spec.and_then(|text| pacs_spec::parse(&text, Path::new("job.toml")).ok());
        let mut by_set: BTreeMap<String, Vec<MeasuredProblem>> = BTreeMap::new();
        for problem in problems.into_iter().filter(|problem| problem.step == step) {
            by_set.entry(problem.set.clone()).or_default().push(problem);
        }
        let set = |(name, mut problems): (String, Vec<MeasuredProblem>)| {
            problems.sort_by_key(|problem| problem.problem);
            let settings = spec.iter().flat_map(JobSpec::all_evaluation_sets).find(|set| set.label() == name);
            let own = settings.as_ref().and_then(|set| set.verifier.as_ref());
            let kind = own.map(|verifier| verifier.kind).or(spec.as_ref().map(|spec| spec.verifier.kind));
            let summary = summaries.iter().find(|line| {
                line["step"].as_u64() == Some(step) && line["set"].as_str().unwrap_or("evaluation") == name
            });
            SetResults {
                math: kind.is_none_or(|kind| kind == VerifierKind::Math),
                excluded: summary.and_then(|line| line["excluded"].as_u64()).unwrap_or(0),
                seconds: summary.and_then(|line| line["seconds"].as_f64()).unwrap_or(0.0),
                name,
                settings,
                problems,
            }
        };
        Ok(Self {
            folder: folder.to_owned(),
            step,
            only: spec.as_ref().is_some_and(|spec| spec.evaluation.only),
            model: spec.as_ref().map(|spec| spec.model.path.clone()).unwrap_or_default(),
            sets: by_set.into_iter().map(set).collect(),
        })
    }
}

/// Reads JSON lines; a torn last line counts as not written.
fn lines<T: serde::de::DeserializeOwned>(path: &Path) -> std::io::Result<Vec<T>> {
    let text = fs::read_to_string(path)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|error| std::io::Error::other(format!("line {}: {error}", index + 1)))
        })
        .collect()
}
