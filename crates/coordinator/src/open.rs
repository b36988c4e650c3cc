//! Opens a run folder: resumes from its journal or its newest checkpoint, or starts from the beginning.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pacs_data::Day;
use pacs_machine::{Event, Machine};
use pacs_report::MEASURED_PROBLEMS;
use pacs_shape::{Flops, ModelConfig, RouteShape, ShapeError};
use pacs_spec::{DataSpec, JobSpec};
use tokio::sync::{broadcast, mpsc};

use crate::driver::{Door, Driver, Parts};
use crate::journal::{Journal, Recovered};
use crate::machine_options::machine_options;
use crate::progress::Progress;
use crate::records::{
    Archive, Checkpoints, Coverage, Done, Epoch, Fault, Files, Job, Lines, Manifest, ProblemSet, Room, RunFolder,
};
use crate::{StartError, Timing, sizes};

/// Keys, and tables with all keys in them, that a run must not change, except for [`DataSpec::FREE`].
const FIXED: [&str; 6] = ["name", "seed", "model", "data", "rollout.samples_per_prompt", "objective"];

/// Opens the run folder and builds the driver of the run in it.
///
/// Repairs leftovers of a crash itself; from then on the threads of the journal and of the run folder write there.
pub(crate) fn open(
    spec: JobSpec,
    run_dir: PathBuf,
    timing: Timing,
    progress: broadcast::Sender<Progress>,
) -> Result<(Driver, mpsc::Receiver<Done>, u64), StartError> {
    // Taken first: from here on a coordinator that has lost its lock can write nothing more.
    let epoch = Epoch::take(&run_dir)?;
    let starts = epoch.starts();
    let model = ModelConfig::read(&spec.model.path);
    // With adapters, what is saved and computed is less than the model.
    let trained =
        model.as_ref().ok().map(|model| spec.model.trained(model)).transpose().map_err(StartError::Adapters)?;
    let routes = routes(&spec, &model)?;
    let coverage = model.as_ref().ok().zip(trained.as_ref());
    let coverage = coverage.map(|(model, trained)| Coverage::new(&spec, model, trained));
    let checkpoints = Checkpoints::open(&run_dir)?.holding(coverage);
    let resumed = resume(&checkpoints, &spec, model.as_ref().ok())?;
    let known = ProblemSet::read(&run_dir)?;
    let day = known.as_ref().and_then(ProblemSet::day).unwrap_or_else(Day::today);
    let problems = pacs_data::load_on(&spec, day)?;
    let toml = spec.resolved_toml();
    sizes::check(&toml, &problems.train, problems.sets.iter().map(|set| set.problems.as_slice()))?;
    let found = ProblemSet::of(&problems, day);
    let changes = known.as_ref().map(|known| found.changes_since(known, &problems)).unwrap_or_default();
    // A checkpoint's draw order refers to problems by index, so changed problems cannot be trained on with it.
    if let Some(manifest) = resumed.as_ref().filter(|_| !changes.is_empty()) {
        return Err(StartError::ProblemsChanged { checkpoint: checkpoints.path(manifest.step), changes });
    }
    let mut notes = vec![problems.report.to_string()];
    if let Some(warning) = problems.report.ends.warning() {
        tracing::warn!("{warning}");
        notes.push(warning);
    }
    notes.extend(model.as_ref().ok().and_then(|model| spec.long_factors(model)));
    if let Err(error) = &model {
        notes.push(format!(
            "batches are shared among learners by their tokens alone, and samples are not checked against the vocabulary: {error}"
        ));
    }
    let cost = trained.as_ref().map_or_else(Flops::of_any_model, |trained| Flops::new(trained, trained.vocab_size));
    let door = Door::new(&spec, model.as_ref().ok(), routes);

    let room = Room::of(&run_dir);
    let (mut journal, mut recovered, journal_notes) = Journal::open(&run_dir, &toml, &epoch, &room)?;
    notes.extend(journal_notes);
    if known.is_none() && (resumed.is_some() || recovered.is_some()) {
        notes.push(
            "an earlier version began this run and did not record its problems: those of now are taken for them, and changes are \
             refused from now on"
                .to_owned(),
        );
    }
    let misfit = recovered.as_ref().and_then(|found| misfit(found, resumed.as_ref()));
    let changed = (!changes.is_empty()).then(|| format!("the problems have changed: {}", changes.join("; ")));
    if let Some(problem) = recovered.as_ref().and(changed.or(misfit)) {
        notes.push(format!("the journal was moved aside; the run resumes from its newest checkpoint: {problem}"));
        journal = journal.discard(&run_dir, &toml, &epoch, &room)?;
        recovered = None;
    }
    // Written only after the journal of other problems is moved aside: a start that fails in between refuses it again.
    found.write(&run_dir, known)?;
    let mut files = open_files(&run_dir, checkpoints.clone(), spec.logging.samples)?;
    let machine = match &recovered {
        Some(recovered) => recovered.machine.clone(),
        None => {
            let last_step = resumed.as_ref().map(|manifest| manifest.step);
            files.truncate(last_step, last_step).map_err(StartError::file("truncate records in", &run_dir))?;
            // The evaluation at the current step is not repeated if it is recorded.
            let evaluated = files.evaluations.last_step().into_iter().collect();
            if let Some(manifest) = &resumed {
                notes.push(format!("resumed from step {} of {}", manifest.step, spec.batch.steps));
            }
            let earlier = starts.saturating_sub(1);
            let options = machine_options(&spec, &problems, timing, resumed.clone(), evaluated, earlier);
            Machine::new(options, Duration::ZERO)
        }
    };
    let kept = (spec.checkpoint.keep as usize, spec.checkpoint.keep_best as usize);
    let (run_folder, done) = RunFolder::start(files, kept, epoch, journal.snapshots(), room.clone(), Fault::current())?;
    let measured = std::fs::read_to_string(run_dir.join("evaluations.jsonl")).unwrap_or_default();
    let mut driver = Driver::new(Parts {
        machine,
        spec,
        run_dir,
        heartbeat_interval: timing.heartbeat_interval,
        problems,
        door,
        cost,
        save_bytes: trained.as_ref().map_or(0, least_save_bytes),
        room,
        checkpoints,
        run_folder,
        progress,
        started: Instant::now(),
        journal,
    });
    driver.remember_measured(&measured);
    notes.into_iter().for_each(|text| driver.note(text));
    if let Some(recovered) = recovered {
        driver.recover(recovered);
        // A line may have been written before its record was durable. It then describes a step or an evaluation that
        // never happened and will be repeated.
        let step = driver.machine.position().step;
        let evaluations = if driver.machine.has_evaluated(step) { Some(step) } else { step.checked_sub(1) };
        driver.hand_over(Job::Truncate { steps: Some(step), evaluations });
    }
    driver.begin();
    Ok((driver, done, starts))
}

/// How samples record their experts; `None` where they do not. Without the model's configuration they could not be checked, and a learner
/// would read beyond the matrices of its experts.
fn routes(spec: &JobSpec, model: &Result<ModelConfig, ShapeError>) -> Result<Option<RouteShape>, StartError> {
    match model {
        Ok(model) => spec.route_shape(model).map_err(StartError::Routes),
        Err(error) if spec.rollout.router_replay && !spec.evaluation.only => {
            Err(StartError::Routes(format!("`rollout.router_replay` needs the configuration of the model: {error}")))
        }
        Err(_) => Ok(None),
    }
}

/// Lower bound on the size of a checkpoint: master weights and two moments of each parameter, 4 bytes each.
fn least_save_bytes(trained: &ModelConfig) -> u64 {
    12 * trained.parameter_count() as u64
}

/// Opens the files that the run appends to.
fn open_files(run_dir: &Path, checkpoints: Checkpoints, archives: bool) -> Result<Files, StartError> {
    let lines = |name: &str| {
        let path = run_dir.join(name);
        Lines::open(path.clone()).map_err(StartError::file("open", &path))
    };
    let archive = match archives {
        true => Some(Archive::open(run_dir).map_err(StartError::file("open archive", &run_dir.join("samples")))?),
        false => None,
    };
    let (evaluations, mut problems) = (lines("evaluations.jsonl")?, lines(MEASURED_PROBLEMS)?);
    // Problem lines are written before those of their set; without the latter they are written again.
    problems.truncate(evaluations.last_step()).map_err(StartError::file("cut", problems.path()))?;
    Ok(Files { checkpoints, metrics: lines("metrics.jsonl")?, evaluations, problems, archive })
}

/// Why a journal and the newest checkpoint do not belong together; `None` if they do.
fn misfit(recovered: &Recovered, resumed: Option<&Manifest>) -> Option<String> {
    let on_disk = resumed.map(|manifest| manifest.step);
    let last = recovered.records.iter().rev().find_map(|(record, _)| match record.event {
        Event::CheckpointCommitted { step } => Some(step),
        _ => None,
    });
    let known = last.or(recovered.machine.newest_checkpoint());
    // A checkpoint in the middle of its commit may be on disk before the record that says so.
    let expected = |step: u64| known == Some(step) || recovered.may_commit(step);
    match (on_disk, known) {
        (None, None) => None,
        (Some(step), _) if expected(step) => None,
        (Some(step), _) => {
            Some(format!("the newest whole checkpoint is that of step {step}, of which it does not know"))
        }
        (None, Some(step)) => Some(format!("its checkpoint of step {step} is gone")),
    }
}

/// The checkpoint to resume from, if there is one.
fn resume(
    checkpoints: &Checkpoints,
    spec: &JobSpec,
    model: Option<&ModelConfig>,
) -> Result<Option<Manifest>, StartError> {
    let (newest, damages) = checkpoints.newest_valid()?;
    for damage in &damages {
        tracing::error!("a checkpoint was set aside: {damage}");
    }
    let Some(manifest) = newest else {
        if damages.is_empty() {
            return Ok(None);
        }
        let damages = damages.iter().map(ToString::to_string).collect();
        return Err(StartError::NoValidCheckpoint { folder: checkpoints.folder().to_owned(), damages });
    };
    let checkpoint = checkpoints.path(manifest.step);
    let old = pacs_spec::parse(&manifest.spec, &checkpoint.join("manifest.json")).map_err(|errors| {
        StartError::SpecChanged { checkpoint: checkpoint.clone(), changes: vec![errors.to_string()] }
    })?;
    let (fixed, free): (Vec<_>, Vec<_>) =
        pacs_spec::differences(&old, spec).into_iter().partition(|difference| is_fixed(&difference.path));
    let mut changes: Vec<String> = fixed.iter().map(ToString::to_string).collect();
    changes.extend(model.and_then(|model| other_factors(&old, spec, model)));
    if !changes.is_empty() {
        return Err(StartError::SpecChanged { checkpoint, changes });
    }
    for difference in free {
        tracing::info!("the job spec has changed: {difference}");
    }
    Ok(Some(manifest))
}

/// Why the model of a resumed run would not be the one that was trained, though all its keys are the same; `None` where it is.
fn other_factors(old: &JobSpec, new: &JobSpec, model: &ModelConfig) -> Option<String> {
    let is_long = |spec: &JobSpec| spec.long_factors(model).is_some();
    (is_long(old) != is_long(new)).then(|| {
        let factors = |spec: &JobSpec| if is_long(spec) { "long_factor" } else { "short_factor" };
        format!(
            "sequences of up to {} tokens, rotated by the model's `{}`, became sequences of up to {}, rotated by `{}`",
            old.longest_sequence(),
            factors(old),
            new.longest_sequence(),
            factors(new)
        )
    })
}

fn is_fixed(path: &str) -> bool {
    let is_free = DataSpec::FREE.contains(&path);
    !is_free
        && FIXED
            .iter()
            .any(|fixed| path.strip_prefix(fixed).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_keeps_the_factors_of_its_longrope() {
        let job = |max_new_tokens: u32| {
            let text = format!(
                "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                 data.max_prompt_tokens = 56\nrollout.max_new_tokens = {max_new_tokens}"
            );
            pacs_spec::parse(&text, std::path::Path::new("a.toml")).expect("a valid job")
        };
        let golden = |name: &str| {
            let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
            ModelConfig::read(&models.join(name)).expect("a golden model")
        };
        let change = |old, new, model: &str| other_factors(&job(old), &job(new), &golden(model));
        assert_eq!(change(100, 200, "phi3"), None);
        assert_eq!(change(201, 300, "phi3"), None);
        assert_eq!(change(100, 300, "llama3"), None);
        let said = change(200, 201, "phi3").expect("another list");
        assert!(said.contains("up to 256 tokens, rotated by the model's `short_factor`"), "{said}");
        assert!(change(201, 200, "phi3").is_some_and(|said| said.ends_with("rotated by `short_factor`")));
    }

    #[test]
    fn fixed_paths_are_whole_names() {
        for (path, fixed) in [
            ("name", true),
            ("model.path", true),
            ("data.shuffle", true),
            ("data.retire_after", false),
            ("data.difficulty_floor", false),
            ("objective.beta", true),
            ("rollout.samples_per_prompt", true),
            ("rollout.temperature", false),
            ("batch.steps", false),
            ("optimizer.learning_rate", false),
            ("names", false),
            ("resources.learners", false),
        ] {
            assert_eq!(is_fixed(path), fixed, "{path}");
        }
    }
}
