//! `pacs job check` prints the plan of a job spec; `pacs job init` writes a template.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};

use pacs_hub::Part;
use pacs_runtime::Exit;
use serde_json::json;

use crate::arguments::{Check, Init};
use crate::failure::Failure;
use crate::hub;
use crate::output;
use crate::plan::{Plan, default_run_dir};
use crate::preflight::{self, Trial};

pub(crate) fn check(arguments: &Check) -> Result<Exit, Failure> {
    let mut spec = pacs_spec::read(&arguments.job).map_err(|errors| Failure::config(errors).doing("read the job"))?;
    // A run that has begun stays with its commits.
    hub::session(Some(&default_run_dir(&spec)), |hub| match arguments.preflight {
        true => hub.job(&mut spec, Part::Whole),
        false => hub.job_if_reachable(&mut spec, Part::Texts),
    })?;
    let plan = Plan::of(&spec);
    if !arguments.json {
        output::text(&plan);
    }
    let mut problem = plan.problem();
    let mut trials = None;
    if arguments.preflight && problem.is_none() {
        let seen = |trial: &Trial| {
            if !arguments.json {
                output::text(format_args!("{trial}\n"))
            }
        };
        let tried = preflight::run(&spec, arguments, seen)?;
        problem = tried.iter().find_map(Trial::problem);
        trials = Some(tried);
    }
    if arguments.json {
        let mut json = plan.json();
        json["problem"] = json!(problem);
        json["preflight"] = json!(trials);
        output::json(format_args!("{json:#}"));
    }
    match problem {
        None => Ok(Exit::Done),
        Some(problem) => Err(Failure::config(anyhow::anyhow!("{problem}")).doing("use what the job names")),
    }
}

pub(crate) fn init(arguments: &Init) -> Result<Exit, Failure> {
    let text = pacs_spec::init_template();
    let Some(path) = &arguments.file else {
        output::raw(text);
        return Ok(Exit::Done);
    };
    let created = OpenOptions::new().write(true).create_new(true).open(path);
    created.and_then(|mut file| file.write_all(text.as_bytes())).map_err(|error| {
        let exists = error.kind() == ErrorKind::AlreadyExists;
        let failure = Failure::config(error).doing(format!("write job spec `{}`", path.display()));
        if exists { failure.hint("name a file that does not exist yet") } else { failure }
    })?;
    output::line(format_args!("wrote {0}; edit it, then: pacs job check {0}", path.display()));
    Ok(Exit::Done)
}
