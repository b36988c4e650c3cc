//! `pacs eval`: evaluates a model on held-out problems and reports estimates with intervals.
//!
//! An evaluation is an ordinary run of a job with `evaluation.only`, which [`job`] makes. The report is computed from the run folder
//! alone ([`read`]), so evaluations of a training run are reported by the same code.

mod compare;
mod estimate;
mod job;
mod read;
mod report;

use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow};
use pacs_runtime::Exit;

use self::read::Results;
use crate::arguments::{Eval, EvalCommand, EvalReport, Measure};
use crate::failure::Failure;
use crate::run::Launch;
use crate::{hub, output, run};

pub(crate) fn run(arguments: &Eval) -> Result<Exit, Failure> {
    match &arguments.command {
        None => measure(&arguments.measure),
        Some(EvalCommand::Report(arguments)) => report_again(arguments),
        Some(EvalCommand::Compare(arguments)) => compare::run(arguments),
    }
}

fn measure(arguments: &Measure) -> Result<Exit, Failure> {
    let mut job = job::of(arguments)?;
    let run_dir = job.run_dir.clone();
    let ((), pins) = hub::session(Some(&run_dir), |hub| job.find(hub))?;
    let model = job::Model::inspect(&job.spec.model.path)?;
    job::check_folder(&job, &model)?;
    let json = arguments.local.json;
    if !Results::are_complete(&job.run_dir, &job.spec) {
        model.note(&job.run_dir)?;
        let launch = Launch::new(job.run_dir.clone(), &arguments.local, pins);
        let exit = run::run_spec(job.spec, launch)?;
        if exit != Exit::Done {
            return Ok(exit);
        }
    }
    let results = Results::read(&job.run_dir, None)?;
    show(&results, json)
}

fn report_again(arguments: &EvalReport) -> Result<Exit, Failure> {
    let results = Results::read(&arguments.folder, arguments.step)?;
    show(&results, arguments.json)
}

/// Writes the report into the folder, and prints it without the table of problems.
fn show(results: &Results, json: bool) -> Result<Exit, Failure> {
    let report = report::Report::of(results);
    // A training run has several evaluations, so their file names carry the step.
    let name = |file: &str, extension: &str| match results.only {
        true => format!("{file}.{extension}"),
        false => format!("{file}-{:06}.{extension}", results.step),
    };
    let plot = name("pass_at_k", "svg");
    write(&results.folder.join(name("report", "json")), &format!("{:#}\n", report.json()))?;
    write(&results.folder.join(name("report", "md")), &report.markdown(&plot, true))?;
    write(&results.folder.join(&plot), &report.plot().to_svg())?;
    match json {
        true => output::json(report.json()),
        false => output::text(report.markdown("", false)),
    }
    if !json {
        output::line(format_args!("report: {}", results.folder.join(name("report", "md")).display()));
    }
    Ok(Exit::Done)
}

/// Writes a file atomically.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let unfinished = path.with_extension("part");
    fs::write(&unfinished, text)
        .and_then(|()| fs::rename(&unfinished, path))
        .with_context(|| format!("write `{}`", path.display()))
        .map_err(Failure::config)
}

fn no_results(folder: &Path, what: String) -> Failure {
    let hint = "`pacs eval` makes them; a training run has those of its evaluations, of versions of PACS that write \
                evaluation_problems.jsonl";
    Failure::config(anyhow!("{what}")).doing(format!("read the results in `{}`", folder.display())).hint(hint)
}
