//! The bounds that the doc comments of the types state, checked one by one.

mod code;
mod evaluation;
mod flow;
mod generator;
mod lora;
mod verifier;
mod vllm;

use std::fmt::Display;
use std::ops::RangeInclusive;

use pacs_algo::{ImportanceLevel, Objective, RewardMethod, Schedule};
use pacs_types::MAX_SAMPLE_BYTES;

use crate::weight::MOST_SEQUENCES;
use crate::*;

/// A broken bound, and the other values that take part in it.
pub(crate) struct Broken {
    pub(crate) problem: Problem,
    also: &'static [&'static str],
}

impl Broken {
    /// Paths of all values that the bound is about.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.problem.path.as_str()).chain(self.also.iter().copied())
    }
}

/// Everything in `spec` that is out of bounds.
pub(crate) fn check(spec: &JobSpec) -> Vec<Broken> {
    let mut check = Check::default();
    check.top(spec);
    check.lora(spec);
    check.data(spec);
    check.rollout(spec);
    check.engine(spec);
    check.objective(&spec.objective, &spec.rollout);
    check.optimizer(&spec.optimizer);
    check.batch(spec);
    check.flow(spec);
    check.verifiers(spec);
    check.evaluation(spec);
    check.services(spec);
    check.tracking(&spec.logging);
    check.found
}

/// Most sets of problems besides `data.train`.
const MOST_MIXED: usize = 31;

/// Largest number of steps or updates.
const MOST_STEPS: u64 = 1_000_000_000;

/// Largest integer that TOML can hold.
const MOST_SEED: u64 = i64::MAX.unsigned_abs();

#[derive(Default)]
struct Check {
    found: Vec<Broken>,
}

impl Check {
    fn top(&mut self, spec: &JobSpec) {
        let name = &spec.name;
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        self.text(
            "name",
            name,
            plain && (1..=64).contains(&name.len()),
            "expected 1 to 64 letters, digits, `-` and `_`",
        );
        self.range("seed", spec.seed, 0..=MOST_SEED);
        let path = spec.model.path.display().to_string();
        self.text("model.path", &path, !path.is_empty(), "expected the path of a folder, or a name of the hub");
        if let Some(Err(message)) = HubRepo::of_model(&spec.model.path) {
            self.text("model.path", &path, false, &message);
        }
    }

    fn tracking(&mut self, logging: &LoggingSpec) {
        for (at, name) in logging.tracking.iter().enumerate() {
            let is_new = !logging.tracking[..at].contains(name);
            let holds = is_new && LoggingSpec::TRACKERS.contains(&name.as_str());
            let message = format!("expected each of {:?} at most once", LoggingSpec::TRACKERS);
            self.text("logging.tracking", name, holds, &message);
        }
    }

    fn data(&mut self, spec: &JobSpec) {
        let data = &spec.data;
        self.range("data.max_prompt_tokens", data.max_prompt_tokens, 1..=1_000_000);
        if let Some(after) = data.retire_after {
            self.range("data.retire_after", after, 1..=1000);
        }
        if let Some(floor) = data.difficulty_floor {
            let holds = (0.01..1.0).contains(&floor);
            self.that(holds, "data.difficulty_floor", floor, "expected 0.01 to below 1", &[]);
        }
        let message = format!("expected up to {MOST_MIXED} further sets");
        self.that(data.mix.len() <= MOST_MIXED, "data.mix", data.mix.len(), message, &[]);
        for (path, source) in data.train_sets() {
            self.source(&path, source);
            let Some(weight) = source.weight else { continue };
            let at = format!("{path}.weight");
            self.that(weight > 0.0 && weight <= 1e6, &at, weight, "expected above 0, at most 1000000", &[]);
            let message = "has no effect: without `data.mix` there is no other set to weigh it against";
            self.that(!data.mix.is_empty(), &at, weight, message, &["data.mix"]);
        }
        if let Some(evaluation) = &data.evaluation {
            self.source("data.evaluation", evaluation);
            for (path, source) in data.train_sets() {
                self.disjoint_from(&path, source, "data.evaluation", evaluation);
            }
            if let Some(weight) = evaluation.weight {
                let message = "applies to sets that are trained on: all held-out problems are measured";
                self.that(false, "data.evaluation.weight", weight, message, &[]);
            }
        } else if spec.evaluation.is_on() && spec.evaluation.sets.is_empty() {
            let message = "is required, for `evaluation.before`, `after` or `every_steps` asks for evaluations; name \
                           held-out problems here or in `evaluation.sets`, or turn all three off";
            self.fail(Problem::new("data.evaluation", message), &["evaluation"]);
        }
    }

    fn source(&mut self, path: &str, source: &SourceSpec) {
        let at = |key: &str| format!("{path}.{key}");
        match (&source.path, &source.generator) {
            (Some(_), Some(_)) => self.fail(Problem::new(path, "has both `path` and `generator`; expected one"), &[]),
            (None, None) => self.fail(Problem::new(path, "has neither `path` nor `generator`; expected one"), &[]),
            (Some(file), None) => {
                let shown = file.display().to_string();
                match HubData::of_source(file) {
                    Some(name) => {
                        let message = name.err();
                        self.text(&at("path"), &shown, message.is_none(), message.as_deref().unwrap_or_default());
                    }
                    None => self.text(&at("path"), &shown, FileFormat::of(file).is_some(), FileFormat::EXPECTED),
                }
            }
            (None, Some(generator)) => self.generator(&at("generator"), generator),
        }
        for (key, value, default) in
            [("question_field", &source.question_field, "question"), ("answer_field", &source.answer_field, "answer")]
        {
            self.text(&at(key), value, !value.is_empty(), "expected the name of a field");
            let meaningless = source.generator.is_some() && value != default && !value.is_empty();
            self.text(&at(key), value, !meaningless, "applies to files only, not to a generator");
        }
        let is_field = source.verifier_field.as_deref().is_none_or(|field| !field.is_empty() && source.path.is_some());
        let field = source.verifier_field.clone().unwrap_or_default();
        self.text(&at("verifier_field"), &field, is_field, "expected the name of a field, of a file");
        if let Some(limit) = source.limit {
            self.that(limit > 0, &at("limit"), limit, "expected 1 or more", &[]);
        }
    }

    fn rollout(&mut self, spec: &JobSpec) {
        let rollout = &spec.rollout;
        self.range("rollout.samples_per_prompt", rollout.samples_per_prompt, 1..=1024);
        self.range("rollout.max_new_tokens", rollout.max_new_tokens, 1..=1_000_000);
        let (most, mebibytes) = (spec.most_new_tokens(), MAX_SAMPLE_BYTES >> 20);
        let message = format!(
            "expected at most {most}: a sample with its log-probs and its text has to fit into {mebibytes} MiB of a message"
        );
        let fits = u64::from(rollout.max_new_tokens) <= most;
        let also = &["rollout.top_p", "rollout.top_k", "rollout.min_p"];
        self.that(fits, "rollout.max_new_tokens", rollout.max_new_tokens, message, also);
        self.range("rollout.temperature", rollout.temperature, 0.01..=10.0);
        self.above_zero("rollout.top_p", rollout.top_p, 1.0);
        self.range("rollout.top_k", rollout.top_k, 0..=1_000_000);
        self.that((0.0..1.0).contains(&rollout.min_p), "rollout.min_p", rollout.min_p, "expected 0 to below 1", &[]);
        let greedy = rollout.top_k == 1 && rollout.min_p > 0.0;
        let message = "has no effect while `rollout.top_k` is 1: one token is left";
        self.that(!greedy, "rollout.min_p", rollout.min_p, message, &["rollout.top_k"]);
        let stop = format!("{:?}", rollout.stop);
        self.that(rollout.stop.len() <= 64, "rollout.stop", &stop, "expected at most 64 strings", &[]);
        let empty = rollout.stop.iter().any(String::is_empty);
        self.that(!empty, "rollout.stop", &stop, "expected no empty string", &[]);

        let room = rollout.max_concurrent_samples;
        self.range("rollout.max_concurrent_samples", room, 1..=65536);
        let per_problem = spec.evaluation_sets().iter().map(|set| set.samples).max().unwrap_or(1);
        let group = rollout.samples_per_prompt.max(per_problem);
        let message = format!("expected {group} or more: a worker takes a group of samples as a whole");
        let also = &["rollout.samples_per_prompt", "evaluation"];
        self.that(room >= group, "rollout.max_concurrent_samples", room, message, also);

        let longest = spec.data.max_prompt_tokens as u64 + u64::from(rollout.max_new_tokens);
        let holds = rollout.cache_tokens == 0 || (longest..=1_000_000_000).contains(&rollout.cache_tokens);
        let message = format!("expected {longest} (the longest prompt and answer) to 1000000000, or 0");
        let also = &["data.max_prompt_tokens", "rollout.max_new_tokens"];
        self.that(holds, "rollout.cache_tokens", rollout.cache_tokens, message, also);
    }

    fn objective(&mut self, objective: &ObjectiveSpec, rollout: &RolloutSpec) {
        let kind = objective.kind;
        for (key, value) in objective.ignored() {
            let users = quoted(ObjectiveKind::ALL.into_iter().filter(|kind| kind.uses(&key)));
            let message = format!("`{}` would ignore it; it is for {users}", kind.name());
            self.that(false, &format!("objective.{key}"), value, message, &["objective.kind"]);
        }
        self.objective_values(objective);
        self.without_effect(objective);

        let n = rollout.samples_per_prompt;
        let (compares, what, also): (bool, _, &'static [&'static str]) = match objective.objective(1) {
            Objective::Pacs(config) => {
                (config.score.min_group_size() > 1, "this `objective.score`".to_owned(), &["objective.score"])
            }
            Objective::Disco(_) => (true, quoted([kind].into_iter()), &["objective.kind"]),
            Objective::Real(_) | Objective::External => (false, quoted([kind].into_iter()), &["objective.kind"]),
            Objective::Policy(config) => {
                (config.advantage.compares_group(), quoted([kind].into_iter()), &["objective.kind"])
            }
        };
        let message = format!("expected 2 or more: {what} compares the samples of a prompt with each other");
        self.that(!(compares && n == 1), "rollout.samples_per_prompt", n, message, also);
    }

    fn objective_values(&mut self, objective: &ObjectiveSpec) {
        let at = |key: &str| format!("objective.{key}");
        if let Some(beta) = objective.beta {
            self.above_zero(&at("beta"), beta, 1000.0);
        }
        if let Some(steps) = objective.reference_reset_steps {
            let least = u64::from(objective.kind == ObjectiveKind::Pacs);
            self.range(&at("reference_reset_steps"), steps, least..=MOST_STEPS);
        }
        for (key, value, bounds) in [
            ("clip_low", objective.clip_low, 0.0..=1.0),
            ("clip_high", objective.clip_high, 0.0..=1000.0),
            ("kl_coefficient", objective.kl_coefficient, 0.0..=10.0),
            ("importance_cap", objective.importance_cap, 1.0..=1000.0),
            ("entropy_coefficient", objective.entropy_coefficient, 0.0..=10.0),
            ("lambda", objective.lambda, 0.0..=1.0),
            ("pass_exponent", objective.pass_exponent, 0.0..=10.0),
            ("fail_exponent", objective.fail_exponent, 0.0..=10.0),
            ("constraint_delta", objective.constraint_delta, 0.0..=10.0),
            ("constraint_penalty", objective.constraint_penalty, 0.0..=1e6),
            ("ratio_cap", objective.ratio_cap, 1.0..=1000.0),
            ("timeout_seconds", objective.timeout_seconds, 1.0..=3600.0),
        ] {
            if let Some(value) = value {
                self.range(&at(key), value, bounds);
            }
        }
        for (key, value, most) in [
            ("gamma", objective.gamma, 1.0),
            ("tau", objective.tau, 1000.0),
            ("value_clip", objective.value_clip, 1000.0),
            ("critic_learning_rate", objective.critic_learning_rate, 1.0),
        ] {
            if let Some(value) = value {
                self.above_zero(&at(key), value, most);
            }
        }
        if objective.kind == ObjectiveKind::External {
            let command = objective.command.as_deref().unwrap_or_default();
            let names = command.first().is_some_and(|program| !program.is_empty());
            let message = "is required: the program that computes the objective, with its arguments";
            self.that(names, &at("command"), format!("{command:?}"), message, &["objective.kind"]);
        }
        let weighs = objective.importance.is_some_and(|importance| importance != ImportanceKind::Off);
        if objective.kind == ObjectiveKind::Pacs && weighs {
            let message =
                "expected \"sequence\" or \"geometric\": a single token has no part of its own in the loss of `pacs`";
            let holds = objective.importance_level != Some(ImportanceLevel::Token);
            self.that(holds, &at("importance_level"), "\"token\"", message, &["objective.kind"]);
            let steps = objective.reference_reset_steps.unwrap_or(1);
            let message = "expected 1: weights compare with the policy at the start of the step, and the reference is an older \
                           one; or `objective.importance` = \"off\"";
            self.that(steps == 1, &at("reference_reset_steps"), steps, message, &["objective.importance"]);
        }
        if let Some(dual) = objective.dual_clip {
            let holds = dual == 0.0 || (dual > 1.0 && dual <= 1000.0);
            self.that(holds, &at("dual_clip"), dual, "expected above 1, at most 1000, or 0 for no bound", &[]);
        }
    }

    /// Settings away from their default that another setting leaves without effect.
    fn without_effect(&mut self, objective: &ObjectiveSpec) {
        let (set, defaults) = (objective.filled(), objective.kind.defaults());
        let no_kl = set.kl_coefficient == Some(0.0);
        let no_weights = set.importance == Some(ImportanceKind::Off);
        let no_reference = set.reward_method == Some(RewardMethod::MeanLogprob) && set.reset_optimizer == Some(false);
        let kl = "has no effect while `objective.kl_coefficient` is 0";
        let weights = "has no effect while `objective.importance` is \"off\"";
        let reference = "has no effect: `objective.reward_method` = \"mean_logprob\" compares with no reference";
        for (key, changed, message) in [
            ("kl_kind", no_kl && set.kl_kind != defaults.kl_kind, kl),
            ("kl_place", no_kl && set.kl_place != defaults.kl_place, kl),
            ("reference_reset_steps", no_kl && set.reference_reset_steps != defaults.reference_reset_steps, kl),
            ("reference_reset_steps", no_reference && set.reference_reset_steps != Some(1), reference),
            ("importance_level", no_weights && set.importance_level != defaults.importance_level, weights),
            ("importance_cap", no_weights && set.importance_cap != defaults.importance_cap, weights),
        ] {
            if changed {
                self.fail(Problem::new(format!("objective.{key}"), message), &["objective.kind"]);
            }
        }
    }

    fn optimizer(&mut self, optimizer: &OptimizerSpec) {
        self.above_zero("optimizer.learning_rate", optimizer.learning_rate, 1.0);
        for (path, value) in [("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)] {
            self.that((0.0..1.0).contains(&value), path, value, "expected 0 to below 1", &[]);
        }
        self.above_zero("optimizer.epsilon", optimizer.epsilon, 1.0);
        self.range("optimizer.weight_decay", optimizer.weight_decay, 0.0..=1.0);
        self.range("optimizer.max_grad_norm", optimizer.max_grad_norm, 0.0..=1e6);
        self.range("optimizer.warmup_updates", optimizer.warmup_updates, 0..=MOST_STEPS);
        self.range("optimizer.final_learning_rate_ratio", optimizer.final_learning_rate_ratio, 0.0..=1.0);
        if optimizer.schedule == Schedule::Constant && optimizer.final_learning_rate_ratio != 0.0 {
            let message = "applies to `optimizer.schedule` \"linear\" and \"cosine\" only";
            let also = &["optimizer.schedule"];
            self.that(false, "optimizer.final_learning_rate_ratio", optimizer.final_learning_rate_ratio, message, also);
        }
        self.range("optimizer.max_skipped_updates", optimizer.max_skipped_updates, 0..=1_000_000);
    }

    fn batch(&mut self, spec: &JobSpec) {
        let batch = &spec.batch;
        self.range("batch.steps", batch.steps, 1..=MOST_STEPS);
        self.range("batch.prompts_per_step", batch.prompts_per_step, 1..=1_000_000);
        self.range("batch.micro_batch_tokens", batch.micro_batch_tokens, 1..=100_000_000);
        let (prompts, parts) = (batch.prompts_per_step, batch.mini_batches);
        let divides = parts > 0 && prompts.is_multiple_of(parts);
        let message = format!("expected a divisor of `batch.prompts_per_step` ({prompts})");
        self.that(divides, "batch.mini_batches", parts, message, &["batch.prompts_per_step"]);

        let sequences = spec.sequences_per_step();
        let message = format!(
            "expected fewer: a step has {sequences} sequences, and every learner holds an index of at most {MOST_SEQUENCES}"
        );
        let also = &["rollout.samples_per_prompt"];
        self.that(sequences <= MOST_SEQUENCES, "batch.prompts_per_step", prompts, message, also);

        let needs = spec.objective.filled().objective(spec.rollout.max_new_tokens).needs();
        if batch.old_logprobs == OldLogprobs::Rollout {
            let message = "the objective compares with no old policy; leave this out";
            self.that(needs.old, "batch.old_logprobs", "rollout", message, &["objective.kind"]);
            let resets = spec.objective.filled().reference_reset_steps;
            let message = "the old policy is one of an earlier step, which the rollout engine's log-probs are not those \
                           of; expected \"learner\", or `objective.reference_reset_steps` = 1";
            let starts = !needs.old_is_reference || resets == Some(1);
            self.that(starts, "batch.old_logprobs", "rollout", message, &["objective.reference_reset_steps"]);
            let rollout = &spec.rollout;
            let filters = rollout.top_p < 1.0 || rollout.top_k > 0 || rollout.min_p > 0.0;
            let accepts = spec.asynchrony.staleness == StalenessKind::Accept;
            let message = if accepts {
                "expected \"learner\": with the rollout engine's own log-probs as the old ones, the weights of \
                 `objective.importance` do not see how old a token is, which `asynchrony.staleness` = \"accept\" relies on"
            } else {
                "expected \"learner\": with the rollout engine's own log-probs as the old ones and no filter on its samples, \
                 all weights of `objective.importance` are 1"
            };
            let weighs = spec.objective.importance.is_some_and(|importance| importance != ImportanceKind::Off);
            let says_nothing = weighs && (accepts || !filters);
            let also =
                &["objective.importance", "asynchrony.staleness", "rollout.top_p", "rollout.top_k", "rollout.min_p"];
            self.that(!says_nothing, "batch.old_logprobs", "rollout", message, also);
        }

        let learners = spec.resources.learners;
        self.range("resources.learners", learners, 1..=1024);
        let least = spec.resources.min_learners;
        if let Some(least) = least {
            self.range("resources.min_learners", least, 1..=learners.max(1));
        }
        if let Some(wait) = spec.resources.learner_wait_seconds {
            self.range("resources.learner_wait_seconds", wait, 1..=86_400);
            let message = "expected `resources.min_learners` below `resources.learners`: the run waits for all of them \
                           anyway; leave this out";
            let is_heard = least.is_some_and(|least| least < learners);
            self.that(is_heard, "resources.learner_wait_seconds", wait, message, &["resources.min_learners"]);
        }
        self.range("resources.learner_memory_gib", spec.resources.learner_memory_gib, 0.0..=1e6);
        if divides {
            let sequences = u64::from(prompts / parts) * u64::from(spec.rollout.samples_per_prompt);
            let message = format!("expected no more than the {sequences} sequences of a mini-batch");
            let also = &["batch.prompts_per_step", "batch.mini_batches", "rollout.samples_per_prompt"];
            self.that(u64::from(learners) <= sequences, "resources.learners", learners, message, also);
        }
        let divided = spec.resources.sharding == Sharding::ShardAll;
        let message =
            "expected \"replicated\" or \"shard_optimizer\": the objective's value model is not divided further";
        self.that(!(needs.values && divided), "resources.sharding", "\"shard_all\"", message, &["objective.kind"]);
        let on_cpu = spec.resources.device == DeviceKind::Cpu;
        let message = "expected false with `resources.device = \"cuda\"`: libtorch's kernels of a GPU add up in an order that \
                       differs from one run to the next";
        let deterministic = spec.resources.deterministic;
        self.that(!deterministic || on_cpu, "resources.deterministic", deterministic, message, &["resources.device"]);
        if let Some(warmup) = spec.objective.critic_warmup_steps {
            let message =
                format!("expected fewer than `batch.steps` ({}), else the policy is never trained", batch.steps);
            self.that(warmup < batch.steps, "objective.critic_warmup_steps", warmup, message, &["batch.steps"]);
        }
    }

    fn services(&mut self, spec: &JobSpec) {
        self.range("checkpoint.every_steps", spec.checkpoint.every_steps, 0..=MOST_STEPS);
        self.range("checkpoint.keep", spec.checkpoint.keep, 1..=10_000);
        self.range("checkpoint.timeout_seconds", spec.checkpoint.timeout_seconds, 1..=86_400);
        let best = spec.checkpoint.keep_best;
        self.range("checkpoint.keep_best", best, 0..=10_000);
        // Evaluations before and after training have no checkpoint to choose from.
        let compares = best == 0 || spec.evaluation.every_steps > 0;
        let message = "expected 0: without `evaluation.every_steps` no checkpoint is better than another";
        self.that(compares, "checkpoint.keep_best", best, message, &["evaluation.every_steps"]);
        let message = "expected 0: checkpoints are compared by pass@1 of `data.evaluation`, which is not there";
        let measures = best == 0 || spec.data.evaluation.is_some();
        self.that(measures, "checkpoint.keep_best", best, message, &["data.evaluation"]);
        self.range("resources.rollouts", spec.resources.rollouts, 0..=1024);
        self.range("resources.verifiers", spec.resources.verifiers, 0..=1024);
        self.range("resources.threads", spec.resources.threads, 0..=4096);
        self.gpus(spec);
        if let Some(peak) = spec.resources.peak_flops {
            let holds = (1e6..=1e18).contains(&peak);
            self.that(holds, "resources.peak_flops", format!("{peak:e}"), "expected 1e6 to 1e18", &[]);
        }
    }

    /// Which GPUs of a machine its workers get.
    fn gpus(&mut self, spec: &JobSpec) {
        let resources = &spec.resources;
        if resources.device == DeviceKind::Cpu {
            let message = "has no effect without `resources.device = \"cuda\"`; leave it out";
            if let Some(gpus) = resources.gpus {
                self.that(false, "resources.gpus", gpus, message, &["resources.device"]);
            }
            self.that(!resources.share_gpus, "resources.share_gpus", true, message, &["resources.device"]);
            let required = resources.require_gpu_kernels;
            self.that(required, "resources.require_gpu_kernels", required, message, &["resources.device"]);
            return;
        }
        let Some(gpus) = resources.gpus else { return };
        self.range("resources.gpus", gpus, 1..=1024);
        let (learners, rollouts) = (spec.learners(), spec.computing_rollouts());
        let message = format!("expected at least {learners}: learner ranks never share a GPU, for NCCL refuses that");
        self.that(gpus >= learners, "resources.gpus", gpus, message, &["resources.learners"]);
        let message = format!(
            "expected at least {}, a GPU for each learner and rollout worker; with `resources.share_gpus = true` they share",
            learners + rollouts
        );
        let also = &["resources.learners", "resources.rollouts", "resources.share_gpus"];
        let fits = gpus < learners || resources.share_gpus || gpus >= learners + rollouts;
        self.that(fits, "resources.gpus", gpus, message, also);
    }

    fn range<T: PartialOrd + Display>(&mut self, path: &str, value: T, bounds: RangeInclusive<T>) {
        let message = format!("expected {} to {}", bounds.start(), bounds.end());
        // `contains` is false for a float that is no number.
        self.that(bounds.contains(&value), path, value, message, &[]);
    }

    fn above_zero(&mut self, path: &str, value: f64, most: f64) {
        self.that(value > 0.0 && value <= most, path, value, format!("expected above 0, at most {most}"), &[]);
    }

    fn text(&mut self, path: &str, value: &str, holds: bool, message: &str) {
        self.that(holds, path, format!("{value:?}"), message, &[]);
    }

    fn that(
        &mut self,
        holds: bool,
        path: &str,
        value: impl Display,
        message: impl Into<String>,
        also: &'static [&'static str],
    ) {
        if !holds {
            self.fail(Problem::new(path, message).with_value(value), also);
        }
    }

    fn fail(&mut self, problem: Problem, also: &'static [&'static str]) {
        self.found.push(Broken { problem, also });
    }
}

/// Names of kinds for a sentence.
fn quoted(kinds: impl Iterator<Item = ObjectiveKind>) -> String {
    kinds.map(|kind| format!("`{}`", kind.name())).collect::<Vec<_>>().join(", ")
}
