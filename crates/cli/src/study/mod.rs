//! `pacs study`: compares methods over many runs, and reports with intervals.
//!
//! `spec` expands a study file into runs, `execute` trains them, `record` stores the numbers of each in a small file, and `report`
//! is computed from those files alone.

mod execute;
mod folder;
mod record;
mod report;
mod spec;

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use clap::Parser;
use pacs_runtime::{Exit, LogFormat, Shutdown, init_logging};
use serde_json::json;

use self::folder::{Folder, Plan};
use self::spec::{Run, StudySpec};
use crate::arguments::{Arguments, Command, LaunchCommand, StudyCommand, StudyFile};
use crate::failure::Failure;
use crate::format::plural;
use crate::run::find_worker;
use crate::{launch, output};

pub(crate) fn run(command: &StudyCommand) -> Result<Exit, Failure> {
    init_logging(LogFormat::Human);
    match command {
        StudyCommand::Plan { file, json } => Study::read(file)?.plan(*json),
        StudyCommand::Run { file, parallel, worker_binary } => {
            let study = Study::read(file)?;
            let worker = find_worker(worker_binary.as_deref())?;
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            study.run(parallel.map_or(cores, |parallel| parallel as usize), worker)
        }
        StudyCommand::Launch { file, launcher, options } => Study::read(file)?.launch(launcher, options),
        StudyCommand::Report { file } => {
            let study = Study::read(file)?;
            let plan = study.planned()?;
            study.report(&plan)?;
            Ok(Exit::Done)
        }
    }
}

/// A study with its file and folder.
struct Study {
    spec: StudySpec,
    folder: Folder,
    file: PathBuf,
    /// Tasks whose runs are made; all where there are none.
    tasks: Vec<String>,
}

impl Study {
    fn read(file: &StudyFile) -> Result<Self, Failure> {
        let doing = format!("read study `{}`", file.study.display());
        let spec = StudySpec::read(&file.study).map_err(|error| Failure::config(error).doing(doing))?;
        if let Some(unknown) = file.tasks.iter().find(|task| !spec.tasks.contains_key(*task)) {
            let known: Vec<&str> = spec.tasks.keys().map(String::as_str).collect();
            let error = anyhow!("the study has no task `{unknown}`; it has {}", known.join(", "));
            return Err(Failure::with_exit(Exit::Usage, error).doing("choose tasks"));
        }
        let path = file.out.clone().unwrap_or_else(|| PathBuf::from("studies").join(&spec.name));
        Ok(Self { folder: Folder::new(path, spec.keep), file: file.study.clone(), tasks: file.tasks.clone(), spec })
    }

    fn planned(&self) -> Result<Plan, Failure> {
        self.folder.plan(&self.spec).map_err(|error| Failure::config(error).doing("look at what is finished"))
    }

    /// The runs to make: those that are not finished, of the chosen tasks.
    fn open<'a>(&self, plan: &'a Plan) -> Vec<&'a Run> {
        plan.open.iter().filter(|run| self.tasks.is_empty() || self.tasks.contains(&run.cell.task)).collect()
    }

    fn plan(&self, as_json: bool) -> Result<Exit, Failure> {
        let plan = self.planned()?;
        if as_json {
            let open: Vec<&str> = self.open(&plan).iter().map(|run| run.id.as_str()).collect();
            let finished: Vec<&str> = plan.finished.iter().map(|record| record.id.as_str()).collect();
            let line = json!({"study": self.spec.name, "folder": self.folder.path, "open": open, "finished": finished,
                              "waiting": plan.waiting, "chosen": plan.chosen});
            output::json(format_args!("{line:#}"));
            return Ok(Exit::Done);
        }
        for record in &plan.finished {
            output::line(format_args!("finished  {}", record.id));
        }
        for run in self.open(&plan) {
            output::line(format_args!("open      {}", run.id));
        }
        output::line(state(&plan));
        Ok(Exit::Done)
    }

    fn run(&self, parallel: usize, worker: PathBuf) -> Result<Exit, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        let runtime = runtime.context("start the runtime").map_err(Failure::bug)?;
        runtime.block_on(async {
            let shutdown = Shutdown::new();
            shutdown.on_signals().context("install signal handlers").map_err(Failure::bug)?;
            // Two rounds with tuning: the runs of the study are known only after the tuning runs.
            loop {
                let plan = self.planned()?;
                let open: Vec<Run> = self.open(&plan).into_iter().cloned().collect();
                if open.is_empty() {
                    self.report(&plan)?;
                    return Ok(Exit::Done);
                }
                let runs = plural(open.len() as u64, "run", "runs");
                output::line(format_args!("{}; {runs} to make, {parallel} at once", state(&plan)));
                for run in &open {
                    self.folder.prepare(run).map_err(|error| Failure::config(error).doing("prepare the runs"))?;
                }
                let ends = execute::execute(open, &self.folder, parallel, Some(&worker), &shutdown).await;
                let ends = ends.map_err(|error| Failure::again(error).doing("make the runs"))?;
                if ends.interrupted {
                    output::line("interrupted; the same command resumes what is not finished");
                    return Ok(Exit::Again);
                }
                if !ends.failed.is_empty() {
                    let shown: Vec<String> = ends.failed.iter().map(|(id, why)| format!("{id}: {why}")).collect();
                    let text = format!("{}\n{}", plural(shown.len() as u64, "run", "runs"), shown.join("\n"));
                    let hint = "the log of each is in its folder under runs; the same command tries what is not finished again";
                    return Err(Failure::config(anyhow!("{text}")).doing("finish").hint(hint));
                }
            }
        })
    }

    /// Submits every unfinished run to a launcher, as `pacs launch` would.
    fn launch(&self, launcher: &str, options: &[String]) -> Result<Exit, Failure> {
        let plan = self.planned()?;
        for run in self.open(&plan) {
            self.folder.prepare(run).map_err(|error| Failure::config(error).doing("prepare the runs"))?;
            let place = self.folder.run(&run.id);
            let mut line =
                vec!["pacs".into(), "launch".into(), launcher.into(), place.join("job.toml").into_os_string()];
            if launcher == "slurm" {
                line.extend(["--run-dir".into(), place.join("run").into_os_string()]);
            }
            line.extend(options.iter().map(Into::into));
            let parsed = Arguments::try_parse_from(line).map_err(|error| {
                Failure::with_exit(Exit::Usage, anyhow!("{error}")).doing("read the launcher's options")
            })?;
            match parsed.command {
                Command::Launch { command: LaunchCommand::Slurm(arguments) } => launch::slurm(&arguments)?,
                Command::Launch { command: LaunchCommand::Kubernetes(arguments) } => launch::kubernetes(&arguments)?,
                _ => return Err(Failure::bug(anyhow!("no launcher `{launcher}`"))),
            };
        }
        output::error(format_args!("{}", state(&plan)));
        Ok(Exit::Done)
    }

    fn report(&self, plan: &Plan) -> Result<(), Failure> {
        let written = report::write(&self.spec, &self.folder.path, &self.file, plan);
        let path = written.map_err(|error| Failure::again(error).doing("write the report"))?;
        output::line(format_args!("{}; report in {}", state(plan), path.display()));
        Ok(())
    }
}

fn state(plan: &Plan) -> String {
    let all = plan.finished.len() + plan.open.len() + plan.waiting;
    let waiting = match plan.waiting {
        0 => String::new(),
        waiting => format!(", {waiting} wait for their tries"),
    };
    format!("{} of {} finished{waiting}", plan.finished.len(), plural(all as u64, "run", "runs"))
}
