//! The study file, and its expansion into runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use pacs_spec::JobSpec;
use serde::Deserialize;
use toml::{Table, Value};

/// Limit of runs; a grid grows by multiplication, so a slip makes a million.
const MOST_RUNS: usize = 100_000;

/// A study: every method on every task at every point of the grid, once per seed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StudySpec {
    /// Name of the study: letters, digits, `-` and `_`.
    pub(super) name: String,
    /// The question that the study asks, for the head of the report.
    #[serde(default)]
    pub(super) about: String,
    pub(super) seeds: Vec<u64>,
    /// Method that the others are compared with.
    pub(super) reference: String,
    pub(super) tasks: BTreeMap<String, TaskSpec>,
    pub(super) methods: BTreeMap<String, MethodSpec>,
    /// Keys of the job by dotted path, each with the values to combine.
    #[serde(default)]
    pub(super) grid: BTreeMap<String, Vec<Value>>,
    #[serde(default)]
    pub(super) tuning: Option<TuningSpec>,
    #[serde(default)]
    pub(super) keep: Keep,
    /// Folder of the study file, to which paths of jobs are relative.
    #[serde(skip)]
    folder: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TaskSpec {
    /// The base job, relative to the study file.
    pub(super) job: PathBuf,
    #[serde(default)]
    pub(super) set: Table,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MethodSpec {
    #[serde(default)]
    pub(super) set: Table,
}

/// Tuning runs before the study itself, the same number for every method.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TuningSpec {
    pub(super) key: String,
    pub(super) values: Vec<Value>,
    /// Seeds of the tuning runs. They must not be seeds of the study, or a value could win by fitting the seeds it is judged by.
    pub(super) seeds: Vec<u64>,
}

/// What is kept of a finished run besides its numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Keep {
    /// Keep the numbers only.
    Numbers,
    /// Keep the trained model, except of tuning runs.
    #[default]
    Models,
    /// Keep the whole run folder.
    Runs,
}

/// One point of the grid: each dotted path with its value.
pub(super) type Variant = Vec<(String, Value)>;

/// All runs that differ only in seed and tuned value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cell {
    pub(super) task: String,
    pub(super) variant: Variant,
    pub(super) method: String,
}

/// One training run of the study, with its resolved job.
#[derive(Clone, Debug)]
pub(super) struct Run {
    /// Relative path of the run in every folder of the study.
    pub(super) id: String,
    pub(super) cell: Cell,
    pub(super) seed: u64,
    /// Value of the tuned key; `None` without tuning.
    pub(super) tuned: Option<Value>,
    pub(super) is_try: bool,
    pub(super) job: JobSpec,
}

impl StudySpec {
    /// Reads a study and validates every job that it would make, before any of them runs.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)?;
        let mut study: Self = toml::from_str(&text)?;
        study.folder = path.parent().unwrap_or(Path::new("")).to_owned();
        study.check()?;
        // Any tried value will do for this check: `tries` below validates the jobs of all values.
        for cell in study.cells() {
            let value = study.tuning.as_ref().map(|tuning| tuning.values[0].clone());
            study.runs(&cell, value)?;
        }
        study.tries()?;
        Ok(study)
    }

    fn check(&self) -> Result<()> {
        let is_name = |name: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            (1..=32).contains(&name.len()) && name.chars().all(plain)
        };
        let names = std::iter::once(&self.name).chain(self.tasks.keys()).chain(self.methods.keys());
        for name in names {
            ensure!(is_name(name), "`{name}` is not a valid name: expected 1 to 32 letters, digits, `-` and `_`");
        }
        ensure!(!self.tasks.is_empty(), "`tasks` is empty");
        let methods: Vec<&str> = self.methods.keys().map(String::as_str).collect();
        ensure!(
            self.methods.contains_key(&self.reference),
            "`reference` is \"{}\", expected one of the methods: {}",
            self.reference,
            methods.join(", ")
        );
        distinct("seeds", &self.seeds)?;
        for (key, values) in &self.grid {
            ensure!(!values.is_empty(), "`grid.\"{key}\"` has no values");
            ensure!(!values.iter().any(Value::is_table), "`grid.\"{key}\"`: expected plain values");
        }
        if let Some(tuning) = &self.tuning {
            distinct("tuning.seeds", &tuning.seeds)?;
            ensure!(tuning.values.len() > 1, "`tuning.values` leaves nothing to choose from");
            let both = tuning.seeds.iter().find(|seed| self.seeds.contains(seed));
            if let Some(seed) = both {
                bail!("seed {seed} is one of `tuning.seeds` and of `seeds`: values would be judged by what chose them");
            }
            ensure!(!self.grid.contains_key(&tuning.key), "`tuning.key` is a key of `grid`, too");
        }
        let points = self.grid.values().try_fold(1usize, |points, values| points.checked_mul(values.len()));
        let tries = self.tuning.as_ref().map_or(0, |tuning| tuning.values.len() * tuning.seeds.len());
        let runs = points
            .and_then(|points| points.checked_mul(self.tasks.len() * self.methods.len()))
            .and_then(|cells| cells.checked_mul(self.seeds.len() + tries))
            .filter(|runs| *runs <= MOST_RUNS);
        ensure!(runs.is_some(), "the study has more than {MOST_RUNS} runs");
        Ok(())
    }

    /// Returns every combination of task, point of the grid and method.
    pub(super) fn cells(&self) -> Vec<Cell> {
        let mut variants: Vec<Variant> = vec![Vec::new()];
        for (key, values) in &self.grid {
            let longer = |variant: &Variant| {
                let with = |value: &Value| [variant.clone(), vec![(key.clone(), value.clone())]].concat();
                values.iter().map(with).collect::<Vec<_>>()
            };
            variants = variants.iter().flat_map(longer).collect();
        }
        let mut cells = Vec::new();
        for task in self.tasks.keys() {
            for variant in &variants {
                for method in self.methods.keys() {
                    cells.push(Cell { task: task.clone(), variant: variant.clone(), method: method.clone() });
                }
            }
        }
        cells
    }

    /// Returns all tuning runs; empty without tuning.
    pub(super) fn tries(&self) -> Result<Vec<Run>> {
        let mut tries = Vec::new();
        let Some(tuning) = &self.tuning else { return Ok(tries) };
        for cell in self.cells() {
            for value in &tuning.values {
                for seed in &tuning.seeds {
                    tries.push(self.run(&cell, *seed, Some(value.clone()), true)?);
                }
            }
        }
        Ok(tries)
    }

    /// Returns the runs of a cell with the tuned value, one per seed.
    pub(super) fn runs(&self, cell: &Cell, tuned: Option<Value>) -> Result<Vec<Run>> {
        self.seeds.iter().map(|seed| self.run(cell, *seed, tuned.clone(), false)).collect()
    }

    fn run(&self, cell: &Cell, seed: u64, tuned: Option<Value>, is_try: bool) -> Result<Run> {
        let task = &self.tasks[&cell.task];
        let path = self.folder.join(&task.job);
        let text = fs::read_to_string(&path).with_context(|| format!("read job `{}`", path.display()))?;
        let mut job: Table = toml::from_str(&text).with_context(|| format!("read job `{}`", path.display()))?;
        merge(&mut job, &task.set)?;
        merge(&mut job, &self.methods[&cell.method].set)?;
        for (key, value) in &cell.variant {
            put(&mut job, key, value)?;
        }
        if let (Some(tuning), Some(value)) = (&self.tuning, &tuned) {
            put(&mut job, &tuning.key, value)?;
        }
        let mut id = cell.id();
        if let Some(value) = tuned.as_ref().filter(|_| is_try) {
            id = format!("tries/{id}/{}", plain(value));
        }
        id = format!("{id}/seed-{seed}");
        put(&mut job, "seed", &Value::Integer(i64::try_from(seed)?))?;
        put(&mut job, "name", &Value::String(job_name(&self.name, &id)))?;
        let origin = PathBuf::from(format!("{} as {id}", path.display()));
        let job = pacs_spec::parse(&toml::to_string(&job)?, &origin).map_err(|errors| anyhow!("{errors}"))?;
        let measures = job.data.evaluation.is_some() && job.evaluation.after;
        ensure!(
            measures,
            "{id}: expected `evaluation.after` = true, for a study compares what is left after the last step"
        );
        Ok(Run { id, cell: cell.clone(), seed, tuned, is_try, job })
    }
}

impl Cell {
    /// Returns task, point of the grid and method as a path.
    pub(super) fn id(&self) -> String {
        format!("{}/{}", self.group(), self.method)
    }

    /// Returns task and point of the grid as a path; methods are compared within it.
    pub(super) fn group(&self) -> String {
        let words = self.variant.iter().map(|(key, value)| format!("{}-{}", last(key), plain(value)));
        std::iter::once(self.task.clone()).chain(words).collect::<Vec<_>>().join("/")
    }
}

fn last(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// Renders a TOML value as a word that can stand in a path.
pub(super) fn plain(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Float(number) => format!("{number:e}"),
        other => other.to_string(),
    };
    text.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.+".contains(c) { c } else { '_' }).collect()
}

/// Makes a job name of at most 64 characters; a longer one is cut and ends in a hash of the whole.
fn job_name(study: &str, id: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' };
    let name: String = format!("{study}-{id}").chars().map(plain).collect();
    if name.len() <= 64 {
        return name;
    }
    // FNV-1a rather than the standard hasher, because names must be the same on every machine and with every library version.
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{}-{hash:016x}", &name[..47])
}

fn distinct(what: &str, seeds: &[u64]) -> Result<()> {
    ensure!(!seeds.is_empty(), "`{what}` is empty");
    let different: BTreeSet<&u64> = seeds.iter().collect();
    ensure!(different.len() == seeds.len(), "`{what}` has a seed twice");
    Ok(())
}

/// Merges `changes` into `table`; keys are dotted paths.
fn merge(table: &mut Table, changes: &Table) -> Result<()> {
    for (key, value) in changes {
        match value {
            Value::Table(inner) if !key.contains('.') => {
                let place = table.entry(key).or_insert_with(|| Value::Table(Table::new()));
                let place = place.as_table_mut().with_context(|| format!("`{key}` is not a table"))?;
                merge(place, inner)?;
            }
            _ => put(table, key, value)?,
        }
    }
    Ok(())
}

fn put(table: &mut Table, path: &str, value: &Value) -> Result<()> {
    match path.split_once('.') {
        None => {
            table.insert(path.to_owned(), value.clone());
            Ok(())
        }
        Some((first, rest)) => {
            let place = table.entry(first).or_insert_with(|| Value::Table(Table::new()));
            put(place.as_table_mut().with_context(|| format!("`{path}`: `{first}` is not a table"))?, rest, value)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "name = 's'\nseeds = [1, 2]\nreference = 'pacs'\ntasks.add.job = 'job.toml'\n\
                         [methods.pacs]\n[methods.grpo]\nset = { 'objective.kind' = 'grpo', objective.clip_low = 0.1 }\n";

    #[test]
    fn a_grid_becomes_runs_with_jobs_of_their_own() {
        let text = format!(
            "{SMALL}[grid]\n'batch.mini_batches' = [1, 4]\n'data.shuffle' = [true, false]\n\
             [tuning]\nkey = 'optimizer.learning_rate'\nvalues = [1e-5, 1e-4]\nseeds = [7]\n"
        );
        let (study, _folder) = studied(&text);
        let study = study.expect("a study");
        assert_eq!(study.cells().len(), 8);
        let tries = study.tries().expect("tries");
        assert_eq!(tries.len(), 16);
        assert_eq!(tries[0].id, "tries/add/mini_batches-1/shuffle-true/grpo/1e-5/seed-7");
        assert_eq!((tries[1].job.optimizer.learning_rate, tries[1].job.seed), (1e-4, 7));
        let cell = &study.cells()[6];
        let runs = study.runs(cell, Some(Value::Float(1e-4))).expect("runs");
        assert_eq!(runs[1].id, "add/mini_batches-4/shuffle-false/grpo/seed-2");
        let job = &runs[1].job;
        assert_eq!((job.batch.mini_batches, job.data.shuffle, job.objective.clip_low), (4, false, Some(0.1)));
        assert_eq!(job.name, "s-add-mini-batches-4-shuffle-false-grpo-seed-2");
    }

    /// Parses a study, and returns it with the temporary folder of its jobs.
    fn studied(text: &str) -> (Result<StudySpec>, tempfile::TempDir) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let job = "name = 'base'\nmodel.path = 'm'\ndata.prompt_suffix = ''\n\
                   data.train.generator = { task = 'addition' }\n\
                   data.evaluation.generator = { task = 'addition', part = 'held_out' }\n";
        fs::write(folder.path().join("job.toml"), job).expect("written");
        fs::write(folder.path().join("study.toml"), text).expect("written");
        (StudySpec::read(&folder.path().join("study.toml")), folder)
    }

    #[test]
    fn what_makes_no_fair_study_is_refused() {
        for (change, expected) in [
            ("[tuning]\nkey = 'optimizer.learning_rate'\nvalues = [1e-5, 1e-4]\nseeds = [2]", "seed 2 is one of"),
            ("[tuning]\nkey = 'optimizer.learning_rate'\nvalues = [1e-5]\nseeds = [7]", "nothing to choose from"),
            ("[grid]\n'objective.kindd' = [1]", "objective.kindd"),
            ("[grid]\n'batch.mini_batches' = []", "has no values"),
            ("[grid]\n'evaluation.after' = [false]", "evaluation.after"),
            ("[methods.bad]\nset = { 'objective.kind' = 'sarsa' }", "sarsa"),
            ("[methods.'a/b']", "is not a valid name"),
            ("colour = 1", "unknown field"),
        ] {
            let error = format!("{:#}", studied(&format!("{SMALL}{change}\n")).0.expect_err(expected));
            assert!(error.contains(expected), "{change}: {error}");
        }
        for (from, to, expected) in [
            ("reference = 'pacs'", "reference = 'ppo'", "expected one of the methods: grpo, pacs"),
            ("seeds = [1, 2]", "seeds = [1, 1]", "a seed twice"),
            ("job.toml", "none.toml", "read job"),
        ] {
            let error = format!("{:#}", studied(&SMALL.replace(from, to)).0.expect_err(expected));
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn long_names_stay_apart() {
        let name = |seed: u32| job_name("s", &format!("{}/seed-{seed}", "x".repeat(80)));
        assert!(name(1).len() == 64 && name(1) != name(2), "{}", name(1));
    }
}
