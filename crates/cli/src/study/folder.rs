//! The folder of a study: `data/` with the numbers of finished runs, `runs/` with unfinished ones, `models/`, `report.md`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use toml::Value;

use super::record::Record;
use super::spec::{Cell, Keep, Run, StudySpec, TuningSpec, plain};

#[derive(Clone, Debug)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    keep: Keep,
}

/// The state of a study: what is finished, and what to run next.
#[derive(Debug)]
pub(super) struct Plan {
    /// Unfinished runs that can start: tuning runs first, then the runs of cells whose tuning is finished.
    pub(super) open: Vec<Run>,
    pub(super) finished: Vec<Record>,
    /// Number of runs whose cell is still being tuned.
    pub(super) waiting: usize,
    /// Tuned value by cell id.
    pub(super) chosen: BTreeMap<String, String>,
}

impl Folder {
    pub(super) fn new(path: PathBuf, keep: Keep) -> Self {
        Self { path, keep }
    }

    /// Returns the folder for the job, run folder and log of a run.
    pub(super) fn run(&self, id: &str) -> PathBuf {
        self.path.join("runs").join(id)
    }

    fn record(&self, id: &str) -> PathBuf {
        self.path.join("data").join(format!("{id}.json"))
    }

    /// Determines what is finished and what is left. Also collects run folders that launched jobs have finished.
    pub(super) fn plan(&self, study: &StudySpec) -> Result<Plan> {
        let mut plan = Plan { open: Vec::new(), finished: Vec::new(), waiting: 0, chosen: BTreeMap::new() };
        let tries = study.tries()?;
        let mut open_tries = BTreeMap::<String, usize>::new();
        for run in tries {
            match self.finished(&run)? {
                Some(record) => plan.finished.push(record),
                None => {
                    *open_tries.entry(run.cell.id()).or_default() += 1;
                    plan.open.push(run);
                }
            }
        }
        for cell in study.cells() {
            if open_tries.contains_key(&cell.id()) {
                plan.waiting += study.seeds.len();
                continue;
            }
            let tuned = match &study.tuning {
                None => None,
                Some(tuning) => {
                    let best = best(tuning, &cell, &plan.finished)
                        .with_context(|| format!("the tries of {} have no result", cell.id()))?;
                    plan.chosen.insert(cell.id(), plain(best));
                    Some(best.clone())
                }
            };
            for run in study.runs(&cell, tuned)? {
                match self.finished(&run)? {
                    Some(record) => plan.finished.push(record),
                    None => plan.open.push(run),
                }
            }
        }
        Ok(plan)
    }

    /// Returns the numbers of a finished run; numbers of other settings under the same name are an error.
    fn finished(&self, run: &Run) -> Result<Option<Record>> {
        let path = self.record(&run.id);
        let record = match path.exists() {
            true => Some(Record::read(&path)?),
            // Collect only if the folder's job is this run's.
            false if self.is_of(run) => self.collect(run, None)?,
            false => None,
        };
        let Some(record) = record else { return Ok(None) };
        if record.job == run.job.resolved_toml() {
            return Ok(Some(record));
        }
        let made = pacs_spec::parse(&record.job, &path).map_err(|errors| anyhow!("{errors}"))?;
        let changed: Vec<String> =
            pacs_spec::differences(&made, &run.job).into_iter().map(|difference| difference.path).collect();
        // A key that this version has and the one that made the run had not is at its default in both.
        if changed.is_empty() {
            return Ok(Some(record));
        }
        bail!(
            "`{}` was made by a job that differs from the study's in {}; name another --out, or remove that file",
            path.display(),
            changed.join(", ")
        );
    }

    fn is_of(&self, run: &Run) -> bool {
        fs::read_to_string(self.run(&run.id).join("job.toml")).is_ok_and(|job| job == run.job.resolved_toml())
    }

    /// Writes the job of a run into the run's folder.
    pub(super) fn prepare(&self, run: &Run) -> Result<()> {
        let place = self.run(&run.id);
        let path = place.join("job.toml");
        let job = run.job.resolved_toml();
        let before = fs::read_to_string(&path).ok();
        if before.is_some_and(|before| before != job) {
            bail!(
                "`{}` is of another job than the study's; name another --out, or remove `{}`",
                path.display(),
                place.display()
            );
        }
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(&place)?;
            fs::write(&path, job)
        };
        write().with_context(|| format!("write `{}`", path.display()))
    }

    /// Stores the numbers of a finished run, and removes what `keep` does not ask for.
    pub(super) fn collect(&self, run: &Run, ended_early: Option<String>) -> Result<Option<Record>> {
        let place = self.run(&run.id);
        let Some(record) = Record::collect(run, &place.join("run"), ended_early)? else { return Ok(None) };
        record.write(&self.record(&run.id))?;
        if self.keep == Keep::Models && !run.is_try {
            self.keep_model(&run.id, &place.join("run/checkpoints"))?;
        }
        if self.keep != Keep::Runs {
            fs::remove_dir_all(&place).with_context(|| format!("remove `{}`", place.display()))?;
        }
        Ok(Some(record))
    }

    /// Moves the newest exported model to `models/`; a run that ended early may have none.
    fn keep_model(&self, id: &str, checkpoints: &Path) -> Result<()> {
        let found = fs::read_dir(checkpoints).into_iter().flatten().flatten().map(|entry| entry.path().join("model"));
        let Some(newest) = found.filter(|model| model.is_dir()).max() else { return Ok(()) };
        let to = self.path.join("models").join(id);
        let move_it = || -> std::io::Result<()> {
            fs::create_dir_all(to.parent().unwrap_or(&self.path))?;
            if to.exists() {
                fs::remove_dir_all(&to)?;
            }
            fs::rename(&newest, &to)
        };
        move_it().with_context(|| format!("keep the model in `{}`", to.display()))
    }
}

/// Returns the tried value with the best mean of last evaluations; the first of equals.
fn best<'a>(tuning: &'a TuningSpec, cell: &Cell, finished: &[Record]) -> Option<&'a Value> {
    let mut best: Option<(&Value, f64)> = None;
    for value in &tuning.values {
        let word = plain(value);
        let of_value = |record: &&Record| is_try_of(record, cell) && record.tuned.as_ref() == Some(&word);
        let reached: Vec<f64> = finished.iter().filter(of_value).filter_map(Record::last).collect();
        let mean = reached.iter().sum::<f64>() / reached.len() as f64;
        if !reached.is_empty() && best.is_none_or(|(_, most)| mean > most) {
            best = Some((value, mean));
        }
    }
    best.map(|(value, _)| value)
}

pub(super) fn is_try_of(record: &Record, cell: &Cell) -> bool {
    record.is_try && is_of_cell(record, cell)
}

pub(super) fn is_of_cell(record: &Record, cell: &Cell) -> bool {
    let variant = || cell.variant.iter().all(|(key, value)| record.grid.get(key) == Some(&plain(value)));
    record.task == cell.task && record.method == cell.method && variant()
}
