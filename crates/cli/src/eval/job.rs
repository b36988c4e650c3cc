//! Makes the job that `pacs eval` runs (`evaluation.only`) from the user's job, if any, and the command line.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, anyhow};
use pacs_hub::Part;
use pacs_spec::{DeviceKind, EvaluationPreset, EvaluationSetSpec, Extraction, JobSpec};
use serde::{Deserialize, Serialize};

use crate::arguments::{ExtractionMode, Measure, Preset};
use crate::failure::Failure;
use crate::hub::Session;

/// File that identifies the model whose samples the folder holds.
const MODEL_FILE: &str = "model.json";

/// A resolved evaluation: its spec and folder.
#[derive(Debug)]
pub(super) struct EvalJob {
    pub(super) spec: JobSpec,
    pub(super) run_dir: PathBuf,
    /// The model that the job's chat template is written for, where another one is measured.
    written_for: Option<PathBuf>,
}

impl EvalJob {
    /// Turns names of the hub into paths.
    pub(super) fn find(&mut self, hub: &mut Session<'_>) -> Result<(), Failure> {
        hub.job(&mut self.spec, Part::Whole)?;
        if let Some(model) = self.written_for.take().filter(|_| self.spec.model.chat_template.is_some()) {
            // A template in the spec is written for the spec's model, and for what is trained from it.
            let model = hub.model(&model, Part::Texts)?;
            if !has_same_tokenizer(&self.spec.model.path, &model) {
                self.spec.model.chat_template = None;
            }
        }
        Ok(())
    }
}

pub(super) fn of(arguments: &Measure) -> Result<EvalJob, Failure> {
    let (mut spec, name) = match &arguments.job {
        Some(path) => {
            let spec = pacs_spec::read(path).map_err(|errors| Failure::config(errors).doing("read the job"))?;
            let model = arguments.model.as_deref().map(|model| format!("-{}", model_name(model)));
            let name = format!("{}{}", spec.name, model.unwrap_or_default());
            (spec, name)
        }
        None => without_a_job(arguments)?,
    };
    let written_for = arguments.model.as_ref().map(|model| std::mem::replace(&mut spec.model.path, model.clone()));
    // What is measured is a whole model: a run exports adapters merged into theirs.
    spec.model.lora = None;
    choose_sets(&mut spec, arguments)?;
    set_sampling(&mut spec, arguments);
    let evaluation = &mut spec.evaluation;
    (evaluation.only, evaluation.before) = (true, true);
    // An evaluation writes no checkpoints, so there is no best one to keep.
    spec.checkpoint.keep_best = 0;
    spec.seed = arguments.seed.unwrap_or(spec.seed);
    let resources = &mut spec.resources;
    resources.rollouts = arguments.rollouts.unwrap_or(resources.rollouts);
    resources.verifiers = arguments.verifiers.unwrap_or(resources.verifiers);
    if arguments.cuda {
        resources.device = DeviceKind::Cuda;
    }
    let most = spec.evaluation_sets().iter().map(|set| set.samples).max().unwrap_or(1);
    spec.rollout.max_concurrent_samples = spec.rollout.max_concurrent_samples.max(most);
    spec.validate(Path::new("the job with the options of the command line"))
        .map_err(|errors| Failure::config(errors).doing("read the job"))?;
    let run_dir = arguments.run_dir.clone().unwrap_or_else(|| Path::new("runs").join(format!("eval-{name}")));
    Ok(EvalJob { spec, run_dir, written_for })
}

fn has_same_tokenizer(one: &Path, other: &Path) -> bool {
    let read = |folder: &Path| fs::read(folder.join("tokenizer.json")).ok();
    read(one).is_some_and(|text| read(other) == Some(text))
}

/// Makes a job with default settings from the model and files of the command line.
fn without_a_job(arguments: &Measure) -> Result<(JobSpec, String), Failure> {
    let Some(model) = arguments.model.as_deref().filter(|_| !arguments.data.is_empty()) else {
        let error = anyhow!("there is neither a job nor both of --model DIR and --data FILE");
        let hint = "`pacs eval job.toml`, or `pacs eval --model DIR --data FILE`";
        return Err(Failure::with_exit(pacs_runtime::Exit::Usage, error).doing("see what to measure").hint(hint));
    };
    let name = model_name(model);
    // A job must name training data; with `evaluation.only` it is never read.
    let text = format!(
        "name = {name:?}\nmodel.path = {:?}\ndata.train.path = 'train.jsonl'\ndata.evaluation.path = 'none.jsonl'\n\
         rollout.max_new_tokens = 2048\n",
        model.display().to_string()
    );
    let mut spec = pacs_spec::parse(&text, Path::new("the command line"))
        .map_err(|errors| Failure::config(errors).doing("read the command line"))?;
    spec.data.evaluation = None;
    Ok((spec, name))
}

fn choose_sets(spec: &mut JobSpec, arguments: &Measure) -> Result<(), Failure> {
    if !arguments.data.is_empty() {
        spec.data.evaluation = None;
        spec.evaluation.sets = BTreeMap::new();
        for data in &arguments.data {
            let (name, file) = named(data);
            let mut set = EvaluationSetSpec::of_file(file);
            set.question_field = arguments.question_field.clone().unwrap_or(set.question_field);
            set.answer_field = arguments.answer_field.clone().unwrap_or(set.answer_field);
            if spec.evaluation.sets.insert(name.clone(), set).is_some() {
                let error = anyhow!("two of --data are called `{name}`");
                return Err(Failure::config(error)
                    .doing("see what to measure")
                    .hint("give one a name: --data NAME=FILE"));
            }
        }
    }
    let known: Vec<String> = spec.all_evaluation_sets().map(|set| set.label().to_owned()).collect();
    if let Some(unknown) = arguments.set.iter().find(|wanted| !known.contains(wanted)) {
        let error = anyhow!("the job has no set `{unknown}`; it has {}", known.join(", "));
        return Err(Failure::config(error).doing("see what to measure"));
    }
    if known.is_empty() {
        let hint = "name some in [evaluation.sets] or data.evaluation, or give --data FILE";
        return Err(Failure::config(anyhow!("the job has no held-out problems"))
            .doing("see what to measure")
            .hint(hint));
    }
    if !arguments.set.is_empty() {
        spec.evaluation.sets.retain(|name, _| arguments.set.contains(name));
        spec.data.evaluation =
            spec.data.evaluation.take().filter(|_| arguments.set.iter().any(|set| set == "evaluation"));
    }
    Ok(())
}

/// Applies sampling and grading options to all sets; they take precedence over a set's own settings.
fn set_sampling(spec: &mut JobSpec, arguments: &Measure) {
    // The unnamed set samples with the job's training settings, which are free to change because nothing is trained.
    if arguments.preset == Some(Preset::Paper) {
        let rollout = &mut spec.rollout;
        (rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p) = (0.6, 0.95, 0, 0.0);
        (spec.evaluation.samples_per_problem, spec.evaluation.temperature) = (128, None);
        spec.data.prompt_suffix = pacs_spec::PAPER_SUFFIX.to_owned();
        spec.data.evaluation.iter_mut().for_each(|source| source.prompt_suffix = None);
        for set in spec.evaluation.sets.values_mut() {
            set.preset = Some(EvaluationPreset::Paper);
            (set.samples_per_problem, set.temperature, set.top_p, set.top_k, set.min_p) =
                (None, None, None, None, None);
            set.prompt_suffix = None;
        }
    }
    if let Some(samples) = arguments.samples {
        spec.evaluation.samples_per_problem = samples;
        spec.evaluation.sets.values_mut().for_each(|set| set.samples_per_problem = Some(samples));
    }
    if let Some(temperature) = arguments.temperature {
        spec.evaluation.temperature = Some(temperature);
        spec.evaluation.sets.values_mut().for_each(|set| set.temperature = Some(temperature));
    }
    if let Some(top_p) = arguments.top_p {
        spec.rollout.top_p = top_p;
        spec.evaluation.sets.values_mut().for_each(|set| set.top_p = Some(top_p));
    }
    if let Some(tokens) = arguments.max_new_tokens {
        spec.rollout.max_new_tokens = tokens;
        spec.evaluation.sets.values_mut().for_each(|set| set.max_new_tokens = None);
    }
    if let Some(suffix) = &arguments.prompt_suffix {
        spec.data.prompt_suffix.clone_from(suffix);
        spec.data.evaluation.iter_mut().for_each(|source| source.prompt_suffix = None);
        spec.evaluation.sets.values_mut().for_each(|set| set.prompt_suffix = Some(suffix.clone()));
    }
    if let Some(limit) = arguments.limit {
        let limit = Some(limit as usize);
        spec.data.evaluation.iter_mut().for_each(|source| source.limit = limit);
        spec.evaluation.sets.values_mut().for_each(|set| set.limit = limit);
    }
    if let Some(extraction) = arguments.extraction {
        let extraction = match extraction {
            ExtractionMode::Lenient => Extraction::Lenient,
            ExtractionMode::Strict => Extraction::Strict,
            ExtractionMode::Number => Extraction::Number,
        };
        spec.verifier.extraction = extraction;
        let verifiers = spec.evaluation.sets.values_mut().filter_map(|set| set.verifier.as_mut());
        verifiers.for_each(|verifier| verifier.extraction = extraction);
    }
    // Length bonuses and penalties are for training, and a changed token limit could make them invalid.
    spec.reward = pacs_spec::RewardSpec::default();
}

/// Splits `[NAME=]FILE` into name and file; the name defaults to the file's.
fn named(data: &str) -> (String, PathBuf) {
    match data.split_once('=') {
        Some((name, file)) if !name.is_empty() && !name.contains(['/', '.']) => (name.to_owned(), file.into()),
        _ => {
            let path = PathBuf::from(data);
            let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
            (plain(&stem, 32), path)
        }
    }
}

/// Names a model after its folder; an exported model's folder is called `model`, so its parent is used.
fn model_name(model: &Path) -> String {
    let parts: Vec<String> =
        model.components().rev().take(2).map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
    let name = match parts.as_slice() {
        [own, around] if own == "model" => around,
        [own, ..] => own,
        [] => "model",
    };
    plain(name, 48)
}

fn plain(name: &str, most: usize) -> String {
    let kept = name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' });
    let name: String = kept.take(most).collect();
    if name.is_empty() { "unnamed".to_owned() } else { name }
}

/// Identity of a model's files. Contents are not digested, which would take minutes for a large model; a rewritten file counts as
/// another one.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Model {
    /// Per file: name, size in bytes, modification time in nanoseconds since 1970.
    files: Vec<(String, u64, u64)>,
}

impl Model {
    pub(super) fn inspect(folder: &Path) -> Result<Self, Failure> {
        crate::run::inspect_model(folder)?;
        let listed = || -> std::io::Result<Vec<(String, u64, u64)>> {
            let mut files = Vec::new();
            for entry in fs::read_dir(folder)? {
                let (entry, name) =
                    entry.map(|entry| (entry.path(), entry.file_name().to_string_lossy().into_owned()))?;
                let metadata = fs::metadata(&entry)?;
                let changed = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
                if metadata.is_file() {
                    files.push((name, metadata.len(), u64::try_from(changed.as_nanos()).unwrap_or(u64::MAX)));
                }
            }
            files.sort();
            Ok(files)
        };
        let files = listed().with_context(|| format!("list model `{}`", folder.display())).map_err(Failure::config)?;
        Ok(Self { files })
    }

    pub(super) fn note(&self, run_dir: &Path) -> Result<(), Failure> {
        let path = run_dir.join(MODEL_FILE);
        if path.exists() {
            return Ok(());
        }
        crate::run::create_folders(run_dir, &run_dir.join("logs"))
            .with_context(|| format!("create folder `{}`", run_dir.display()))
            .map_err(Failure::config)?;
        let text = serde_json::to_string(self).context("write down the model's files").map_err(Failure::bug)?;
        super::write(&path, &text)
    }
}

/// Refuses a folder with samples of another model or other settings, which would otherwise be mixed or silently dropped.
pub(super) fn check_folder(job: &EvalJob, model: &Model) -> Result<(), Failure> {
    let refuse = |changes: Vec<String>| {
        let hint = "give another folder with --run-dir DIR, or remove this one";
        let error = anyhow!("it holds an evaluation of something else: {}", changes.join("; "));
        Err(Failure::config(error).doing(format!("continue in `{}`", job.run_dir.display())).hint(hint))
    };
    if let Ok(text) = fs::read_to_string(job.run_dir.join("job.toml"))
        && let Ok(old) = pacs_spec::parse(&text, Path::new("job.toml"))
    {
        let is_free = |path: &str| {
            ["resources", "rollout.cache_tokens", "rollout.max_concurrent_samples", "watchdog", "logging"]
                .iter()
                .any(|free| path.starts_with(free))
        };
        let differences = pacs_spec::differences(&old, &job.spec);
        let changes: Vec<String> =
            differences.iter().filter(|difference| !is_free(&difference.path)).map(ToString::to_string).collect();
        if !changes.is_empty() {
            return refuse(changes);
        }
    }
    if let Ok(text) = fs::read_to_string(job.run_dir.join(MODEL_FILE))
        && serde_json::from_str::<Model>(&text).is_ok_and(|known| known != *model)
    {
        return refuse(vec![format!("the files of `{}` have changed since", job.spec.model.path.display())]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::arguments::{Arguments, Command};

    fn measure(line: &str) -> Measure {
        match Arguments::parse_from(["pacs", "eval"].into_iter().chain(line.split_whitespace())).command {
            Command::Eval(eval) => eval.measure,
            other => panic!("parsed as {other:?}"),
        }
    }

    fn job(line: &str) -> Result<EvalJob, String> {
        of(&measure(line)).map_err(|failure| failure.to_string())
    }

    #[test]
    fn a_model_and_files_are_enough() {
        let job = job("--model runs/demo/checkpoints/step-000040/model --data x/aime24.jsonl --data m=x/math.parquet --preset paper \
                       --samples 64 --limit 5 --cuda")
        .unwrap();
        assert_eq!(job.run_dir, Path::new("runs/eval-step-000040"));
        let sets = job.spec.evaluation_sets();
        let numbers: Vec<_> = sets.iter().map(|set| (set.label(), set.samples, set.temperature, set.top_p)).collect();
        assert_eq!(numbers, [("aime24", 64, 0.6, 0.95), ("m", 64, 0.6, 0.95)]);
        assert_eq!((sets[0].source.limit, job.spec.learners()), (Some(5), 0));
        assert_eq!(job.spec.resources.device, DeviceKind::Cuda);
        assert!(pacs_spec::parse(&job.spec.resolved_toml(), Path::new("again")).is_ok(), "the coordinator reads it");
    }

    #[test]
    fn a_job_brings_its_sets_and_the_command_line_has_the_last_word() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        let text = "name = 'j'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                    checkpoint.keep_best = 1\nreward.overlong_tokens = 100\n\
                    [evaluation.sets.aime]\npath = 'a.jsonl'\nsamples_per_problem = 4\nmax_new_tokens = 64";
        fs::write(&path, text).unwrap();
        let path = path.display();
        let all = job(&format!("{path} --samples 300 --max-new-tokens 50")).unwrap();
        let numbers: Vec<_> = all.spec.evaluation_sets().iter().map(|set| (set.samples, set.max_new_tokens)).collect();
        assert_eq!(numbers, [(300, 50), (300, 50)]);
        assert!(all.spec.rollout.max_concurrent_samples >= 300, "a group has to fit");
        let one = job(&format!("{path} --set aime --model other/m2")).unwrap();
        assert_eq!(one.spec.evaluation_sets().iter().map(|set| set.samples).collect::<Vec<_>>(), [4]);
        assert_eq!(one.run_dir, Path::new("runs/eval-j-m2"));
        let unknown = job(&format!("{path} --set amc")).unwrap_err();
        assert!(unknown.contains("no set `amc`; it has evaluation, aime"), "{unknown}");
        let nothing = job("--model m").unwrap_err();
        assert!(nothing.contains("hint: `pacs eval job.toml`"), "{nothing}");
        let twice = job("--model m --data a/x.jsonl --data b/x.jsonl").unwrap_err();
        assert!(twice.contains("--data NAME=FILE"), "{twice}");
    }

    #[test]
    fn samples_of_something_else_are_not_mixed() {
        let folder = tempfile::tempdir().unwrap();
        let model = |bytes| Model { files: vec![("model.safetensors".to_owned(), bytes, 1)] };
        let dir = folder.path().join("run");
        let line = |more: &str| format!("--model m --data x.jsonl --run-dir {} {more}", dir.display());
        let first = job(&line("--samples 8")).unwrap();
        assert!(check_folder(&first, &model(1)).is_ok(), "a new folder");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("job.toml"), first.spec.resolved_toml()).unwrap();
        model(1).note(&dir).unwrap();
        assert!(check_folder(&first, &model(1)).is_ok());
        assert!(check_folder(&job(&line("--samples 8 --rollouts 2")).unwrap(), &model(1)).is_ok(), "workers are free");
        let other = check_folder(&job(&line("--samples 16")).unwrap(), &model(1)).unwrap_err().to_string();
        assert!(other.contains("samples_per_problem: was 8, is 16") && other.contains("--run-dir"), "{other}");
        assert!(check_folder(&first, &model(2)).unwrap_err().to_string().contains("have changed"));
    }
}
