use std::fmt;
use std::path::{Path, PathBuf};

use pacs_data::LoadReport;
use pacs_shape::{ModelConfig, RouteShape, WeightFiles};
use pacs_spec::{EvaluationSet, GeneratorTask, JobSpec, RolloutEngineKind, SourceSpec, StepWeight};
use serde_json::{Value, json};

use crate::format::{bytes, count, plural};
use crate::memory::LearnerMemory;
use crate::model_folder::{self, ModelFolder};
use crate::run::gpus::Gpus;
use crate::servers;

/// What `pacs job check` derives from a job spec, and prints.
pub(crate) struct Plan<'a> {
    spec: &'a JobSpec,
    model: Found<ModelFolder>,
    data: Found<LoadReport>,
    /// `None` while the model's configuration cannot be read.
    memory: Option<LearnerMemory>,
    /// That the job takes the second list of a longrope.
    long_factors: Option<String>,
    /// How samples record their experts; `None` where they do not, or while the model's configuration cannot be read.
    routes: Option<RouteShape>,
    /// For a job that computes on GPUs.
    gpus: Option<Gpus>,
}

/// The state of a file or folder that the spec names.
enum Found<T> {
    /// It exists and a run can use it.
    Usable(T),
    /// It does not exist yet, or depends on something that does not.
    Absent,
    /// It exists and a run would refuse it, for this reason.
    Broken(String),
}

/// Returns the run folder used without `--run-dir`: `runs/<name of the job>`.
pub(crate) fn default_run_dir(spec: &JobSpec) -> PathBuf {
    Path::new("runs").join(&spec.name)
}

impl<'a> Plan<'a> {
    /// Inspects the model and the data as far as they exist.
    pub(crate) fn of(spec: &'a JobSpec) -> Self {
        let path = &spec.model.path;
        let config = path.join("config.json").exists().then(|| ModelConfig::read(path));
        let model = match &config {
            Some(Err(error)) => Found::Broken(error.to_string()),
            Some(Ok(_)) if !WeightFiles::are_in(path) => Found::Absent,
            _ if path.exists() => Found::from(model_folder::inspect(path).map_err(|error| format!("{error:#}"))),
            _ => Found::Absent,
        };
        let train = (!spec.evaluation.only).then(|| spec.data.train.clone());
        let sources = train.into_iter().chain(spec.evaluation_sets().into_iter().map(|set| set.source));
        let files_there = sources.filter_map(|source| source.path).all(|path| pacs_data::is_there(&path));
        // Filtering by length needs the model's tokenizer.
        let data = match &model {
            Found::Usable(_) if files_there => {
                Found::from(pacs_data::load(spec).map(|problems| problems.report).map_err(|error| error.to_string()))
            }
            _ => Found::Absent,
        };
        let longest = data.usable().map(|report: &LoadReport| report.train.longest_prompt_tokens);
        let prompt_tokens = longest.unwrap_or(spec.data.max_prompt_tokens);
        let config = config.and_then(Result::ok);
        let long_factors = config.as_ref().and_then(|config| spec.long_factors(config));
        let routes = config.as_ref().map_or(Ok(None), |config| spec.route_shape(config));
        let trained = config.map(|config| spec.model.trained(&config));
        let model = match (&trained, &routes) {
            (Some(Err(error)), _) => Found::Broken(error.to_string()),
            (_, Err(problem)) => Found::Broken(problem.clone()),
            _ => model,
        };
        let routes = routes.unwrap_or_default();
        let memory = trained.and_then(Result::ok).map(|config| LearnerMemory::of(spec, config, prompt_tokens));
        Self { spec, model, data, memory, long_factors, routes, gpus: Gpus::of(spec) }
    }

    /// Returns why a run would be refused; `None` when nothing that exists is broken.
    pub(crate) fn problem(&self) -> Option<String> {
        match (&self.model, &self.data) {
            (Found::Broken(problem), _) => Some(format!("read model `{}`: {problem}", self.spec.model.path.display())),
            (_, Found::Broken(problem)) => Some(problem.clone()),
            _ => {
                let gpus = self.gpus.as_ref().and_then(Gpus::problem).map(|problem| format!("assign GPUs: {problem}"));
                let servers = || servers::problem(self.spec).map(|problem| format!("start vLLM servers: {problem}"));
                gpus.or_else(servers).or_else(|| self.memory.as_ref().and_then(LearnerMemory::problem))
            }
        }
    }

    pub(crate) fn json(&self) -> Value {
        let spec = self.spec;
        let source = |report: &pacs_data::SourceReport| {
            json!({
                "rows": report.rows,
                "kept": report.kept,
                "overlong": report.overlong,
                "unreadable_answers": report.unreadable_answers,
                "duplicates": report.duplicates,
                "with_control_tokens": report.with_control_tokens,
                "fields": report.fields,
                "longest_prompt_tokens": report.longest_prompt_tokens,
            })
        };
        json!({
            "job": spec.name,
            "run_dir": default_run_dir(spec),
            "model": {
                "path": spec.model.path,
                "found": matches!(self.model, Found::Usable(_)),
                "parameters": self.model.usable().map(|model| model.parameters),
                "architecture": self.model.usable().map(|model| model.kind.as_str()),
            },
            "data": self.data.usable().map(|report| json!({
                "train": source(&report.train),
                "evaluation": report.sets.iter().find(|(name, _)| name == "evaluation").map(|(_, report)| source(report)),
                "sets": report.sets.iter().map(|(name, report)| (name.clone(), source(report))).collect::<serde_json::Map<_, _>>(),
                "overlap": report.overlap,
                "end_tokens": report.ends.tokens,
                "warning": report.ends.warning(),
            })),
            "objective": spec.objective.filled(),
            "steps": spec.batch.steps,
            "sequences_per_step": self.spec.sequences_per_step(),
            "updates_per_step": spec.batch.mini_batches,
            "updates": self.updates(),
            "most_answer_tokens_per_step": self.answer_tokens_per_step(),
            "most_sequence_tokens": self.sequence_tokens(),
            "evaluations": self.evaluations(),
            "workers": {
                "rollouts": spec.resources.rollouts,
                "learners": spec.resources.learners,
                "verifiers": spec.resources.verifiers,
            },
            "gpus": self.gpus.as_ref().map(Gpus::json),
            "memory": self.memory.as_ref().map(LearnerMemory::json),
            "weight": weight_json(&self.weight()),
            "route_bytes_per_token": self.routes.map(|shape| shape.token_bytes()),
            "notes": spec.advice(),
            "problem": self.problem(),
        })
    }

    fn weight(&self) -> StepWeight {
        self.spec.step_weight(self.routes.map_or(0, |shape| shape.token_bytes() as u64))
    }

    fn updates(&self) -> u64 {
        self.spec.batch.steps * u64::from(self.spec.batch.mini_batches)
    }

    fn answer_tokens_per_step(&self) -> u64 {
        self.spec.sequences_per_step() * u64::from(self.spec.rollout.max_new_tokens)
    }

    fn sequence_tokens(&self) -> u64 {
        self.spec.data.max_prompt_tokens as u64 + u64::from(self.spec.rollout.max_new_tokens)
    }

    /// Counts the evaluations of the whole run, each set separately.
    fn evaluations(&self) -> u64 {
        self.spec.evaluation_sets().iter().map(|set| self.evaluations_of(set)).sum()
    }

    fn evaluations_of(&self, set: &EvaluationSet) -> u64 {
        let (plan, steps) = (&self.spec.evaluation, self.spec.batch.steps);
        if plan.only {
            return 1;
        }
        let during = (steps - 1).checked_div(set.every_steps).unwrap_or(0);
        during + u64::from(plan.before) + u64::from(plan.after)
    }

    fn model_line(&self) -> String {
        let path = self.spec.model.path.display();
        match &self.model {
            Found::Usable(model) => format!("{path} ({}, {} parameters)", model.kind, count(model.parameters)),
            Found::Absent if self.memory.is_some() => format!("{path} (its configuration; no weights yet)"),
            Found::Absent => format!("{path} (not there)"),
            Found::Broken(_) => format!("{path} (cannot be used)"),
        }
    }

    fn data_lines(&self, source: &SourceSpec, report: Option<&pacs_data::SourceReport>) -> String {
        let origin = match (&source.path, &source.generator) {
            (Some(path), _) => path.display().to_string(),
            (None, Some(generator)) => {
                let task = generator.task.name();
                let numbers = format!("{} to {}", generator.low, generator.high);
                match (generator.task, generator.task.length()) {
                    (GeneratorTask::Programs, _) => format!("{task} of {} steps", generator.length()),
                    (GeneratorTask::Reverse, _) => format!("{task} of {} letters", generator.length()),
                    (_, Some(_)) => format!("{task} of {} numbers, {numbers}", generator.length()),
                    (_, None) => format!("{task} of {numbers}"),
                }
            }
            (None, None) => unreachable!("a valid spec has a path or a generator"),
        };
        match (report, &self.data) {
            (Some(report), _) => {
                format!("{origin}: {report}; prompts of up to {} tokens", report.longest_prompt_tokens)
            }
            (None, Found::Broken(_)) => format!("{origin} (cannot be used)"),
            (None, _) => format!("{origin} (not looked at: model or data is not there)"),
        }
    }
}

impl<T> Found<T> {
    fn usable(&self) -> Option<&T> {
        match self {
            Self::Usable(value) => Some(value),
            Self::Absent | Self::Broken(_) => None,
        }
    }
}

impl<T> From<Result<T, String>> for Found<T> {
    fn from(result: Result<T, String>) -> Self {
        match result {
            Ok(value) => Self::Usable(value),
            Err(problem) => Self::Broken(problem),
        }
    }
}

impl fmt::Display for Plan<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spec = self.spec;
        let (batch, rollout, resources) = (&spec.batch, &spec.rollout, &spec.resources);
        let report = self.data.usable();
        writeln!(f, "job         {} (seed {})", spec.name, spec.seed)?;
        writeln!(f, "model       {}", self.model_line())?;
        writeln!(f, "training    {}", self.data_lines(&spec.data.train, report.map(|report| &report.train)))?;
        let sets = spec.evaluation_sets();
        for (index, set) in sets.iter().enumerate() {
            let found = report.and_then(|report| report.sets.get(index)).map(|(_, report)| report);
            let lines = self.data_lines(&set.source, found);
            let times = plural(self.evaluations_of(set), "evaluation", "evaluations");
            let samples = plural(u64::from(set.samples), "sample", "samples");
            let (head, name) = match &set.name {
                None => ("evaluation", String::new()),
                Some(name) if index == 0 => ("evaluation", format!("{name}: ")),
                Some(name) => ("", format!("{name}: ")),
            };
            writeln!(f, "{head:<12}{name}{lines}; {times}, {samples} a problem")?;
        }
        if sets.is_empty() {
            writeln!(f, "evaluation  none")?;
        }
        if let Some(ends) = report.map(|report| &report.ends) {
            let tokens = if ends.tokens.is_empty() { "no end token".to_owned() } else { ends.tokens.join(", ") };
            let stop: Vec<String> = spec.rollout.stop.iter().map(|stop| format!("{stop:?}")).collect();
            let stop = if stop.is_empty() { String::new() } else { format!("; stop strings {}", stop.join(", ")) };
            writeln!(f, "answers end {tokens}{stop}")?;
            if let Some(warning) = ends.warning() {
                writeln!(f, "note        {warning}")?;
            }
        }
        if let Some(overlap) = report.map(|report| report.overlap).filter(|overlap| *overlap > 0) {
            writeln!(f, "            {overlap} evaluation problems are also trained on")?;
        }
        writeln!(f, "objective   {}", objective(spec))?;
        let updates = plural(u64::from(batch.mini_batches), "optimizer update", "optimizer updates");
        writeln!(
            f,
            "step        {} prompts x {} samples = {} sequences, {updates}",
            count(u64::from(batch.prompts_per_step)),
            rollout.samples_per_prompt,
            count(self.spec.sequences_per_step()),
        )?;
        writeln!(f, "run         {} steps, {} updates", count(batch.steps), count(self.updates()))?;
        writeln!(
            f,
            "tokens      at most {} answer tokens a step, {} tokens a sequence",
            count(self.answer_tokens_per_step()),
            count(self.sequence_tokens()),
        )?;
        let workers = [
            plural(u64::from(resources.rollouts), "rollout worker", "rollout workers"),
            plural(u64::from(spec.learners()), "learner", "learners"),
            plural(u64::from(resources.verifiers), "verifier", "verifiers"),
        ];
        let device = format!("{:?}", resources.device).to_lowercase();
        writeln!(f, "workers     {} ({device})", workers.join(", "))?;
        if let Some(vllm) = spec.rollout.vllm.as_ref().filter(|_| spec.rollout.engine == RolloutEngineKind::Vllm) {
            let servers = match (&vllm.server, vllm.endpoints.len()) {
                (Some(server), _) => format!("{} started for each rollout worker", server.count),
                (None, 0) => "named by each rollout worker".to_owned(),
                (None, count) => format!("{}: {}", count, vllm.endpoints.join(", ")),
            };
            writeln!(f, "vllm        servers {servers}; up to {} requests each", vllm.max_requests)?;
        }
        if let Some(gpus) = &self.gpus {
            write!(f, "{gpus}")?;
        }
        if let Some(memory) = &self.memory {
            write!(f, "{memory}")?;
        }
        if let Some(shape) = &self.routes {
            let (mixtures, per_token, experts) = (shape.mixtures(), shape.per_token(), shape.experts());
            let [token, sample] = [shape.token_bytes() as u64, self.weight().sample_bytes].map(bytes);
            writeln!(
                f,
                "routes      {per_token} of {experts} experts in {mixtures} layers: {token} a token; a sample takes up to {sample}"
            )?;
        }
        write_weight(f, spec, &self.weight())?;
        for note in spec.advice().into_iter().chain(self.long_factors.clone()) {
            writeln!(f, "note        {note}")?;
        }
        writeln!(f, "run folder  {}", default_run_dir(spec).display())?;
        if let Some(report) = report {
            writeln!(f, "prompt      {:?}", report.train.example_prompt)?;
        }
        Ok(())
    }
}

fn weight_json(weight: &StepWeight) -> Value {
    json!({
        "sample_bytes": weight.sample_bytes,
        "samples_in_bytes": weight.samples_in_bytes,
        "batch_out_bytes": weight.batch_out_bytes,
        "rank_bytes": weight.rank_bytes,
        "largest_message_bytes": weight.largest_message_bytes,
        "journal_bytes": weight.journal_bytes,
        "coordinator_bytes": weight.coordinator_bytes,
    })
}

/// Writes the upper bound of a step's bytes in memory, in the journal and on the wire.
fn write_weight(f: &mut fmt::Formatter<'_>, spec: &JobSpec, weight: &StepWeight) -> fmt::Result {
    writeln!(
        f,
        "coordinator at most {} of memory without the problems, {} of samples in its journal",
        bytes(weight.coordinator_bytes),
        bytes(weight.journal_bytes),
    )?;
    let [samples, batch, rank] = [weight.samples_in_bytes, weight.batch_out_bytes, weight.rank_bytes].map(bytes);
    let ranks = match spec.resources.learners {
        1 => format!("{batch} to the learner"),
        learners => format!("{batch} to {learners} learners ({rank} each)"),
    };
    writeln!(
        f,
        "wire        at most {samples} of samples in and {ranks} a step; messages of up to {}",
        bytes(weight.largest_message_bytes),
    )
}

/// Describes the objective and its settings that differ from the published ones.
fn objective(spec: &JobSpec) -> String {
    let (name, changed) = (spec.objective.kind.name(), spec.objective.changed());
    if changed.is_empty() { name.to_owned() } else { format!("{name}, {}", changed.join(", ")) }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use pacs_spec::{ObjectiveKind, ObjectiveSpec};

    use super::*;

    const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

    fn demo() -> JobSpec {
        let path = Path::new(REPOSITORY).join("deploy/jobs/demo.toml");
        pacs_spec::read(&path).unwrap_or_else(|errors| panic!("{errors}"))
    }

    #[test]
    fn a_plan_without_model_says_what_is_known() {
        let mut spec = demo();
        spec.model.path = "models/not-there".into();
        let plan = Plan::of(&spec);
        assert_eq!(plan.problem(), None);
        expect![[r#"
            job         demo (seed 1)
            model       models/not-there (not there)
            training    addition of 10 to 99 (not looked at: model or data is not there)
            evaluation  addition of 10 to 99 (not looked at: model or data is not there); 2 evaluations, 1 sample a problem
            objective   pacs
            step        8 prompts x 8 samples = 64 sequences, 1 optimizer update
            run         40 steps, 40 updates
            tokens      at most 1 536 answer tokens a step, 1 048 tokens a sequence
            workers     1 rollout worker, 1 learner, 1 verifier (cpu)
            coordinator at most 136 MiB of memory without the problems, 22.5 KiB of samples in its journal
            wire        at most 22.5 KiB of samples in and 37.5 KiB to the learner a step; messages of up to 4.0 MiB
            run folder  runs/demo
        "#]].assert_eq(&plan.to_string());
        assert_eq!(plan.json()["sequences_per_step"], 64);
        assert_eq!(plan.json()["objective"]["score"], "rloo");
    }

    #[test]
    fn a_plan_with_model_counts_parameters_and_problems() {
        let mut spec = demo();
        spec.model.path = Path::new(REPOSITORY).join("tests/golden/models/qwen2-tied");
        spec.model.precision = pacs_spec::Precision::Float32;
        let plan = Plan::of(&spec);
        let text = plan.to_string().replace(REPOSITORY, "…");
        expect![[r#"
            job         demo (seed 1)
            model       …/tests/golden/models/qwen2-tied (qwen2, 154 432 parameters)
            training    addition of 10 to 99: 7900 of 7900 rows used; prompts of up to 39 tokens
            evaluation  addition of 10 to 99: 200 of 200 rows used; prompts of up to 39 tokens; 2 evaluations, 1 sample a problem
            answers end `<|im_end|>` (383, generation_config.json, config.json, tokenizer_config.json), `<|endoftext|>` (381, generation_config.json)
            objective   pacs
            step        8 prompts x 8 samples = 64 sequences, 1 optimizer update
            run         40 steps, 40 updates
            tokens      at most 1 536 answer tokens a step, 1 048 tokens a sequence
            workers     1 rollout worker, 1 learner, 1 verifier (cpu)
            memory      351 MiB on the learner (replicated)
                        weights 603 KiB, reference 0 B, gradients 603 KiB, optimizer 1.2 MiB, copy for checkpoints 1.8 MiB
                        a pass of 16 384 tokens: activations 182 MiB (3 of 3 layers kept), workspace 165 MiB; 241 MiB with none kept
            coordinator at most 136 MiB of memory without the problems, 22.5 KiB of samples in its journal
            wire        at most 22.5 KiB of samples in and 37.5 KiB to the learner a step; messages of up to 4.0 MiB
            run folder  runs/demo
            prompt      "<|im_start|>user\nWhat is 10 + 81? Answer with \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
        "#]].assert_eq(&text);
        assert_eq!(plan.json()["data"]["train"]["kept"], 7900);
    }

    #[test]
    fn routes_are_part_of_the_plan_of_a_mixture_and_refused_for_a_dense_model() {
        let mut spec = demo();
        spec.rollout.router_replay = true;
        spec.model.path = Path::new(REPOSITORY).join("tests/golden/models/qwen3_moe");
        let plan = Plan::of(&spec);
        let said = plan.to_string();
        // Two of three layers, two experts in a byte each; prompts of up to 1,024 tokens and answers of 24.
        assert!(
            said.contains("\nroutes      2 of 8 experts in 2 layers: 4 B a token; a sample takes up to 4.4 KiB"),
            "{said}"
        );
        assert_eq!(plan.json()["route_bytes_per_token"], 4);
        spec.rollout.router_replay = false;
        let without = Plan::of(&spec);
        assert!(!without.to_string().contains("\nroutes "));
        assert_eq!(without.json()["route_bytes_per_token"], Value::Null);

        spec.rollout.router_replay = true;
        spec.model.path = Path::new(REPOSITORY).join("tests/golden/models/qwen2-tied");
        let problem = Plan::of(&spec).problem().expect("a dense model has no routes");
        assert!(problem.contains("`rollout.router_replay` is for mixtures of experts"), "{problem}");
    }

    #[test]
    fn what_is_not_as_published_is_shown() {
        let mut spec = demo();
        spec.objective = ObjectiveSpec { kind: ObjectiveKind::Grpo, clip_high: Some(0.28), ..Default::default() };
        assert_eq!(objective(&spec), "grpo, clip_high = 0.28");
    }

    #[test]
    fn what_cannot_be_used_is_a_problem() {
        let mut spec = demo();
        spec.model.path = REPOSITORY.into();
        let problem = Plan::of(&spec).problem().expect("the repository is no model");
        assert!(problem.starts_with("read model `") && problem.contains("config.json"), "{problem}");
    }
}
