//! Bounds of `[evaluation]` and its sets.

use super::{Check, MOST_STEPS};
use crate::{EvaluationSetSpec, JobSpec, Problem, VerifierSpec};

/// Most named sets of a job.
const MOST_SETS: usize = 32;

impl Check {
    pub(super) fn evaluation(&mut self, spec: &JobSpec) {
        let evaluation = &spec.evaluation;
        self.range("evaluation.every_steps", evaluation.every_steps, 0..=MOST_STEPS);
        self.range("evaluation.samples_per_problem", evaluation.samples_per_problem, 1..=1024);
        if let Some(temperature) = evaluation.temperature {
            self.range("evaluation.temperature", temperature, 0.01..=10.0);
        }
        let message = "expected true: a job that only evaluates (`evaluation.only`) does so before the first step, and makes none";
        let measures = evaluation.before || !evaluation.only;
        self.that(measures, "evaluation.before", evaluation.before, message, &["evaluation.only"]);
        let sets = &evaluation.sets;
        let message = format!("expected up to {MOST_SETS} sets");
        self.that(sets.len() <= MOST_SETS, "evaluation.sets", sets.len(), message, &[]);
        for (name, set) in sets {
            self.evaluation_set(name, set, spec);
        }
    }

    fn evaluation_set(&mut self, name: &str, set: &EvaluationSetSpec, spec: &JobSpec) {
        let path = format!("evaluation.sets.{name}");
        let at = |key: &str| format!("{path}.{key}");
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if !plain || !(1..=32).contains(&name.len()) || name == "evaluation" {
            let message =
                "expected a name of 1 to 32 letters, digits, `-` and `_`, not `evaluation`: that is `data.evaluation`";
            self.fail(Problem::new(&path, message), &[]);
        }
        let first = crate::evaluation::first_problem(name);
        if let Some(other) = spec
            .evaluation
            .sets
            .keys()
            .find(|other| other.as_str() < name && crate::evaluation::first_problem(other) == first)
        {
            let message = format!("has the same hash as `{other}`; expected another name for one of the two");
            self.fail(Problem::new(&path, message), &[]);
        }
        let source = set.source();
        self.source(&path, &source);
        if !spec.evaluation.only {
            for (train_path, train) in spec.data.train_sets() {
                self.disjoint_from(&train_path, train, &path, &source);
            }
        }
        if let Some(every) = set.every_steps {
            self.range(&at("every_steps"), every, 0..=MOST_STEPS);
        }
        if let Some(samples) = set.samples_per_problem {
            self.range(&at("samples_per_problem"), samples, 1..=1024);
        }
        if let Some(temperature) = set.temperature {
            self.range(&at("temperature"), temperature, 0.01..=10.0);
        }
        if let Some(top_p) = set.top_p {
            self.above_zero(&at("top_p"), top_p, 1.0);
        }
        if let Some(top_k) = set.top_k {
            self.range(&at("top_k"), top_k, 0..=1_000_000);
        }
        if let Some(min_p) = set.min_p {
            self.that((0.0..1.0).contains(&min_p), &at("min_p"), min_p, "expected 0 to below 1", &[]);
        }
        if let Some(tokens) = set.max_new_tokens {
            let most = spec.rollout.max_new_tokens;
            let message = format!(
                "expected 1 to `rollout.max_new_tokens` ({most}), for which caches and messages have room; `pacs eval` takes \
                 --max-new-tokens"
            );
            let holds = (1..=most).contains(&tokens);
            self.that(holds, &at("max_new_tokens"), tokens, message, &["rollout.max_new_tokens"]);
        }
        if let Some(verifier) = &set.verifier {
            self.verifier_at(&at("verifier"), verifier);
            let path = at("verifier");
            self.of_the_job(&path, verifier);
            let own = VerifierSpec { named: None, ..verifier.clone() };
            let alone = verifier.named.is_none() || own == VerifierSpec::default();
            self.that(
                alone,
                &format!("{path}.named"),
                "set",
                "takes the place of all other keys; expected no other key",
                &[],
            );
        }
    }
}
