//! Names of the Hugging Face hub for the commands that compute with a model. Workers of a run never come here: they use what their
//! coordinator has fetched.

use std::io::Write;
use std::path::{Path, PathBuf};

use pacs_hub::{Meter, Part, Pins, Progress, Resolver, Unresolved};
use pacs_runtime::{Exit, harmless_lines};
use pacs_spec::JobSpec;

use crate::Failure;

/// The folder of a model: the path itself, or what the hub has by that name.
pub(crate) fn model(path: &Path) -> Result<PathBuf, Failure> {
    model_of_run(path, None)
}

/// As [`model`], but in the commit that the run in `run_dir` began with, if it used that name.
pub(crate) fn model_of_run(path: &Path, run_dir: Option<&Path>) -> Result<PathBuf, Failure> {
    let pins = run_dir.map(Pins::read).transpose().map_err(|error| failure(Unresolved::model(path, error)))?;
    resolve(pins.unwrap_or_default(), |resolver| {
        resolver.model(path, Part::Whole).map_err(|error| Unresolved::model(path, error))
    })
}

/// Turns all names of the hub in a job into paths, as `pacs run` does.
pub(crate) fn job(spec: &mut JobSpec) -> Result<(), Failure> {
    resolve(Pins::default(), |resolver| pacs_hub::resolve_job(spec, Part::Whole, resolver))
}

/// As [`job`], but leaves the model's name alone, for a command that does not use the job's model.
pub(crate) fn problems(spec: &mut JobSpec) -> Result<(), Failure> {
    resolve(Pins::default(), |resolver| pacs_hub::resolve_sources(spec, resolver).map_err(Unresolved::problems))
}

fn resolve<T>(pins: Pins, work: impl FnOnce(&mut Resolver<'_>) -> Result<T, Unresolved>) -> Result<T, Failure> {
    let mut meter = Meter::new("fetching");
    // A standard error that cannot be written to is no reason to end.
    let tell = |text: &str| drop(writeln!(std::io::stderr(), "{}", harmless_lines(text)));
    let mut say = |text: &str| tell(text);
    let mut report = |progress: &Progress| {
        if let Some(line) = meter.line(progress) {
            tell(&line);
        }
    };
    work(&mut Resolver::new(pins, &mut say, &mut report)).map_err(failure)
}

fn failure(unresolved: Unresolved) -> Failure {
    let exit = if unresolved.error.is_transient() { Exit::Again } else { Exit::Config };
    let hint = unresolved.error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
    Failure { exit, error: anyhow::anyhow!("{unresolved}{hint}") }
}
