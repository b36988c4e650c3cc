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
use crate::arguments::{Eval, EvalCommand, EvalReport, Measure, Run};
use crate::failure::Failure;
use crate::{output, run};

pub(crate) fn run(arguments: &Eval) -> Result<Exit, Failure> {
    match &arguments.command {
        None => measure(&arguments.measure),
        Some(EvalCommand::Report(arguments)) => report_again(arguments),
        Some(EvalCommand::Compare(arguments)) => compare::run(arguments),
    }
}

fn measure(arguments: &Measure) -> Result<Exit, Failure> {
    let job = job::of(arguments)?;
    let model = job::Model::inspect(&job.spec.model.path)?;
    job::check_folder(&job, &model)?;
    if !Results::are_complete(&job.run_dir, &job.spec) {
        model.note(&job.run_dir)?;
        let exit = run::run_spec(job.spec, &run_arguments(arguments, &job.run_dir))?;
        if exit != Exit::Done {
            return Ok(exit);
        }
    }
    let results = Results::read(&job.run_dir, None)?;
    show(&results, arguments.json)
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

fn run_arguments(arguments: &Measure, run_dir: &Path) -> Run {
    Run {
        metrics_listen: None,
        job: arguments.job.clone().unwrap_or_default(),
        run_dir: Some(run_dir.to_owned()),
        listen: arguments.listen,
        tls_dir: arguments.tls_dir.clone(),
        plaintext: arguments.plaintext,
        worker_binary: arguments.worker_binary.clone(),
        model: None,
        dataset: None,
        eval_dataset: None,
        steps: None,
        max_new_tokens: None,
        seed: None,
        objective: None,
        stop_before: None,
        log_format: arguments.log_format,
        json: arguments.json,
    }
}

fn no_results(folder: &Path, what: String) -> Failure {
    let hint = "`pacs eval` makes them; a training run has those of its evaluations, of versions of PACS that write \
                evaluation_problems.jsonl";
    Failure::config(anyhow!("{what}")).doing(format!("read the results in `{}`", folder.display())).hint(hint)
}
