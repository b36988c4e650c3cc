//! Applies command-line options of `pacs run` to a job spec.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::anyhow;
use pacs_spec::{JobSpec, LORA_LEARNING_RATE, ObjectiveSpec, OptimizerSpec, SourceSpec};

use super::console::Commands;
use crate::arguments::Run;
use crate::failure::Failure;
use crate::plan::default_run_dir;

/// One row in this many is held out of a `--dataset` without `--eval-dataset`, up to the limit below.
const HOLD_OUT_ONE_OF: usize = 10;
const HOLD_OUT_AT_MOST: usize = 200;

/// Room for an answer to a problem of a `--dataset` when the job's own problems are generated: their token limit is made for
/// answers of a few words, and an answer that is cut is never right.
const ANSWER_TOKENS: u32 = 256;

/// Where a data set lies that the command line names.
type Find<'a> = dyn FnMut(&Path) -> Result<PathBuf, Failure> + 'a;

/// Applies the options, then validates the spec again.
pub(crate) fn apply(spec: &mut JobSpec, arguments: &Run, find: &mut Find<'_>) -> Result<(), Failure> {
    if let Some(model) = &arguments.model {
        spec.model.path.clone_from(model);
        // The spec's chat template belongs to the spec's model.
        spec.model.chat_template = None;
    }
    if let Some(dataset) = &arguments.dataset {
        let dataset = &find(dataset)?;
        if spec.data.train.generator.is_some() {
            spec.rollout.max_new_tokens = spec.rollout.max_new_tokens.max(ANSWER_TOKENS);
        }
        spec.data.train = file(dataset);
        // `--dataset` replaces all training data, mixed sets included.
        spec.data.mix.clear();
        if arguments.eval_dataset.is_none() && spec.evaluation.is_on() {
            hold_out(spec, dataset)?;
        }
    }
    if let Some(dataset) = &arguments.eval_dataset {
        spec.data.evaluation = Some(file(dataset));
    }
    spec.batch.steps = arguments.steps.unwrap_or(spec.batch.steps);
    spec.seed = arguments.seed.unwrap_or(spec.seed);
    if let Some(kind) = arguments.objective {
        // Start from published settings: settings of one objective rarely suit another, and comparisons use the published ones.
        spec.objective = ObjectiveSpec { kind, ..ObjectiveSpec::default() };
    }
    if let Some(rank) = arguments.lora {
        if spec.model.lora.is_none() {
            spec.optimizer.learning_rate *= LORA_LEARNING_RATE / OptimizerSpec::default().learning_rate;
        }
        spec.model.lora.get_or_insert_default().rank = rank;
    }
    spec.rollout.max_new_tokens = arguments.max_new_tokens.unwrap_or(spec.rollout.max_new_tokens);
    let origin = format!("{} with the options of the command line", arguments.job.display());
    spec.validate(Path::new(&origin)).map_err(|errors| Failure::config(errors).doing("read the job"))
}

/// Chooses the run folder: `--run-dir`, or else one named after job, model, dataset and objective, so that changed jobs do not
/// share a folder.
pub(crate) fn run_dir(spec: &JobSpec, arguments: &Run) -> PathBuf {
    if let Some(run_dir) = &arguments.run_dir {
        return run_dir.clone();
    }
    let mut name = default_run_dir(spec).into_os_string();
    let model = arguments.model.as_deref().and_then(Path::file_name);
    let dataset = arguments.dataset.as_deref().and_then(Path::file_stem);
    let objective = arguments.objective.map(|kind| OsStr::new(kind.name()));
    let lora = arguments.lora.map(|rank| format!("lora{rank}"));
    for part in [model, dataset, objective, lora.as_deref().map(OsStr::new)].into_iter().flatten() {
        name.push("-");
        name.push(part);
    }
    name.into()
}

/// Reconstructs the given command, for suggestions; `program` is the name by which it was called.
pub(crate) fn commands(arguments: &Run, program: &str) -> Commands {
    let job = arguments.job.display().to_string();
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let options = [
        ("--run-dir", path(&arguments.run_dir)),
        ("--model", path(&arguments.model)),
        ("--dataset", path(&arguments.dataset)),
        ("--eval-dataset", path(&arguments.eval_dataset)),
        ("--max-new-tokens", arguments.max_new_tokens.map(|tokens| tokens.to_string())),
        ("--seed", arguments.seed.map(|seed| seed.to_string())),
        ("--lora", arguments.lora.map(|rank| rank.to_string())),
        ("--objective", arguments.objective.map(|kind| kind.name().to_owned())),
    ];
    let mut same = format!("{program} run {job}");
    for (option, value) in options {
        if let Some(value) = value {
            same.push_str(&format!(" {option} {value}"));
        }
    }
    Commands { program: program.to_owned(), job, same }
}

fn file(path: &Path) -> SourceSpec {
    SourceSpec { path: Some(path.to_owned()), ..SourceSpec::default() }
}

/// Holds the last rows of `dataset` out of training, for evaluation.
fn hold_out(spec: &mut JobSpec, dataset: &Path) -> Result<(), Failure> {
    let rows = pacs_data::count_rows(dataset).map_err(Failure::config)?;
    if rows < 2 {
        let error = anyhow!("it has {rows} rows, which leaves none for training");
        let doing = format!("hold out rows of `{}`", dataset.display());
        return Err(Failure::config(error).doing(doing).hint("give held-out problems with --eval-dataset FILE"));
    }
    let held_out = (rows / HOLD_OUT_ONE_OF).clamp(1, HOLD_OUT_AT_MOST);
    spec.data.train.limit = Some(rows - held_out);
    spec.data.evaluation = Some(SourceSpec { skip: Some(rows - held_out), ..file(dataset) });
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use pacs_spec::ObjectiveKind;

    use super::*;
    use crate::arguments::{Arguments, Command};

    fn demo() -> JobSpec {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/jobs/demo.toml");
        pacs_spec::read(&path).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn arguments(options: &[&str]) -> Run {
        let line = ["pacs", "run", "job.toml"].iter().chain(options);
        match Arguments::parse_from(line).command {
            Command::Run(run) => run,
            other => panic!("parsed as {other:?}"),
        }
    }

    fn applied(options: &[&str]) -> Result<JobSpec, Failure> {
        let mut spec = demo();
        apply(&mut spec, &arguments(options), &mut |path| Ok(path.to_owned())).map(|()| spec)
    }

    fn window(source: &SourceSpec) -> (usize, Option<usize>) {
        (source.skip.unwrap_or(0), source.limit)
    }

    #[test]
    fn the_last_rows_of_a_dataset_are_held_out() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("rows.jsonl");
        let option = path.display().to_string();
        for (rows, train) in [(2, 1), (25, 23), (1000, 900), (5000, 4800)] {
            std::fs::write(&path, "{}\n".repeat(rows)).expect("written");
            let spec = applied(&["--dataset", &option]).expect("enough rows");
            let evaluation = spec.data.evaluation.as_ref().expect("held-out rows");
            assert_eq!((window(&spec.data.train), window(evaluation)), ((0, Some(train)), (train, None)), "{rows}");
        }
        std::fs::write(&path, "{}\n").expect("written");
        let failure = applied(&["--dataset", &option]).expect_err("one row is too few").to_string();
        assert!(failure.contains("hint: give held-out problems with --eval-dataset"), "{failure}");
    }

    #[test]
    fn a_dataset_with_its_own_evaluation_is_used_whole() {
        let spec = applied(&["--dataset", "a.jsonl", "--eval-dataset", "b.parquet"]).expect("valid");
        assert_eq!(window(&spec.data.train), (0, None));
        assert_eq!(spec.data.evaluation.and_then(|source| source.path), Some("b.parquet".into()));
    }

    #[test]
    fn answers_to_a_dataset_have_room_where_those_to_generated_problems_are_short() {
        let tokens = |options: &[&str]| applied(&[&["--eval-dataset", "b.jsonl"], options].concat());
        let tokens = |options: &[&str]| tokens(options).expect("valid").rollout.max_new_tokens;
        assert_eq!((tokens(&[]), tokens(&["--dataset", "a.jsonl"])), (demo().rollout.max_new_tokens, ANSWER_TOKENS));
        assert_eq!(tokens(&["--dataset", "a.jsonl", "--max-new-tokens", "40"]), 40);
        let mut own = demo();
        own.data.train = file(Path::new("own.jsonl"));
        let options = arguments(&["--dataset", "a.jsonl", "--eval-dataset", "b.jsonl"]);
        apply(&mut own, &options, &mut |path| Ok(path.to_owned())).expect("valid");
        assert_eq!(own.rollout.max_new_tokens, demo().rollout.max_new_tokens, "the job's limit is for such problems");
    }

    #[test]
    fn another_model_brings_its_own_template() {
        assert!(demo().model.chat_template.is_some());
        let spec = applied(&["--model", "m", "--steps", "3", "--seed", "5"]).expect("valid");
        assert_eq!((spec.model.path, spec.model.chat_template), ("m".into(), None));
        assert_eq!((spec.batch.steps, spec.seed), (3, 5));
        assert_eq!(applied(&["--steps", "0"]).expect_err("no steps").exit.code(), 78);
    }

    #[test]
    fn another_objective_has_its_published_settings() {
        let spec = applied(&["--objective", "ppo"]).expect("valid");
        assert_eq!(spec.objective, ObjectiveSpec { kind: ObjectiveKind::Ppo, ..ObjectiveSpec::default() });
        let line = ["pacs", "run", "job.toml", "--objective", "sarsa"];
        let refused = Arguments::try_parse_from(line).expect_err("no such objective").to_string();
        assert!(refused.contains("expected one of pacs, grpo, dr_grpo"), "{refused}");
    }

    #[test]
    fn adapters_learn_at_ten_times_the_rate_of_the_job() {
        let spec = applied(&["--lora", "16"]).expect("valid");
        assert_eq!(spec.model.lora, Some(pacs_spec::LoraSpec::default()));
        assert!((spec.optimizer.learning_rate / demo().optimizer.learning_rate - 10.0).abs() < 1e-9);
        let mut own = demo();
        own.model.lora = Some(pacs_spec::LoraSpec { alpha: 8.0, ..Default::default() });
        apply(&mut own, &arguments(&["--lora", "4"]), &mut |path| Ok(path.to_owned())).expect("valid");
        let lora = own.model.lora.expect("adapters");
        assert_eq!((lora.rank, lora.alpha, own.optimizer.learning_rate), (4, 8.0, demo().optimizer.learning_rate));
        assert_eq!(applied(&["--lora", "0"]).expect_err("no rank").exit.code(), 78);
    }

    #[test]
    fn the_same_command_keeps_what_decides_the_run() {
        let same = commands(
            &arguments(&["--steps", "5", "--objective", "rloo", "--seed", "3", "--model", "m", "--json"]),
            "pacs",
        )
        .same;
        assert_eq!(same, "pacs run job.toml --model m --seed 3 --objective rloo");
    }

    #[test]
    fn folders_tell_runs_apart() {
        let folder = |options: &[&str]| run_dir(&demo(), &arguments(options)).display().to_string();
        assert_eq!(folder(&[]), "runs/demo");
        assert_eq!(folder(&["--model", "models/tiny/", "--dataset", "x/gsm8k.jsonl"]), "runs/demo-tiny-gsm8k");
        assert_eq!(folder(&["--objective", "grpo"]), "runs/demo-grpo");
        assert_eq!(folder(&["--lora", "8"]), "runs/demo-lora8");
        assert_eq!(folder(&["--run-dir", "/r", "--dataset", "x.jsonl"]), "/r");
    }
}
