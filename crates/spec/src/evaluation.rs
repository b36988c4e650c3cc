//! `[evaluation.sets]`: named sets of held-out problems, and what holds for each of them when all defaults are filled in.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{GeneratorSpec, JobSpec, SourceSpec, VerifierSpec};

/// A named set of held-out problems with settings of its own: exactly one of `path` and `generator`. Names are 1 to 32 letters,
/// digits, `-` and `_`; at most 32 sets. `data.evaluation` is the set without a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationSetSpec {
    /// A file, several, or a data set of the hub, as in `data.train`.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// A built-in generator of problems.
    #[serde(default)]
    pub generator: Option<GeneratorSpec>,
    /// Field that holds the question. Default `question`. Files only.
    #[serde(default = "question")]
    pub question_field: String,
    /// Field that holds the reference answer. Default `answer`. Files only.
    #[serde(default = "answer")]
    pub answer_field: String,
    /// Leave out the first so many problems. Default: none.
    #[serde(default)]
    pub skip: Option<usize>,
    /// Take only the first so many problems after those skipped, at least 1. Default: all.
    #[serde(default)]
    pub limit: Option<usize>,
    /// Text after every question. Default: `data.prompt_suffix`.
    #[serde(default)]
    pub prompt_suffix: Option<String>,
    /// Published settings that take the place of the defaults below. Default: none.
    #[serde(default)]
    pub preset: Option<EvaluationPreset>,
    /// Steps between measurements of this set during training; 0: none. Default: `evaluation.every_steps`; at most 1,000,000,000.
    #[serde(default)]
    pub every_steps: Option<u64>,
    /// Samples of each problem. Default: `evaluation.samples_per_problem`; 1 to 1024.
    #[serde(default)]
    pub samples_per_problem: Option<u32>,
    /// Temperature. Default: `evaluation.temperature`, else that of `rollout`; 0.01 to 10.
    #[serde(default)]
    pub temperature: Option<f64>,
    /// Nucleus: smallest set of tokens with this probability. Default: that of `rollout`; above 0, at most 1.
    #[serde(default)]
    pub top_p: Option<f64>,
    /// Only the k most probable tokens; 0: off. Default: that of `rollout`; at most 1,000,000.
    #[serde(default)]
    pub top_k: Option<u32>,
    /// Only tokens with at least this share of the most probable token's probability; 0: off. Default: that of `rollout`; 0 to
    /// below 1.
    #[serde(default)]
    pub min_p: Option<f64>,
    /// Most tokens of an answer. Default: `rollout.max_new_tokens`, which is the most that it may be; at least 1.
    #[serde(default)]
    pub max_new_tokens: Option<u32>,
    /// How answers to this set are graded: the name of a verifier (`verifier = "code"`), or a table with the keys of `[verifier]` but `max_attempts`, `max_replacements` and
    /// `cache_entries`, which hold for all sets. Default: by `[verifier]`.
    #[serde(default, deserialize_with = "crate::verifier::named_or_own")]
    pub verifier: Option<VerifierSpec>,
}

fn question() -> String {
    "question".to_owned()
}

fn answer() -> String {
    "answer".to_owned()
}

/// Published settings of an evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvaluationPreset {
    /// Those of the PACS paper: temperature 0.6, `top_p` 0.95, no `top_k` and no `min_p`, 128 samples (four times the largest `k`
    /// that is reported from them, 32), its prompt suffix.
    Paper,
}

/// One set of held-out problems with all of its settings.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationSet {
    /// Its name; none for `data.evaluation`.
    pub name: Option<String>,
    /// Table of the spec that describes it.
    pub path: String,
    /// Number of its first problem among those of all sets. A function of its name alone, so that its noise does not depend on
    /// which other sets there are.
    pub first: u64,
    /// Where its problems are.
    pub source: SourceSpec,
    /// Text after every question.
    pub prompt_suffix: String,
    /// Steps between measurements during training; 0: none.
    pub every_steps: u64,
    /// Samples of each problem.
    pub samples: u32,
    /// Sampling temperature of the set, resolved from its preset and the job.
    pub temperature: f64,
    /// Nucleus; 1 is off.
    pub top_p: f64,
    /// Most probable tokens; 0 is off.
    pub top_k: u32,
    /// Share of the most probable token's probability; 0 is off.
    pub min_p: f64,
    /// Most tokens of an answer.
    pub max_new_tokens: u32,
    /// Its own verifier, if it has one.
    pub verifier: Option<VerifierSpec>,
}

/// Problems that a set has room for; a power of two.
const ROOM: u64 = 1 << 24;

impl EvaluationSet {
    /// What the report and the records call it.
    #[must_use]
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or("evaluation")
    }

    /// Position in this set of the problem with this number among those of all sets.
    #[must_use]
    pub fn position(&self, number: u64) -> Option<usize> {
        usize::try_from(number.checked_sub(self.first).filter(|position| *position < ROOM)?).ok()
    }

    /// Name of its verifier, where it has one that the job names.
    #[must_use]
    pub fn graded_by(&self, job: &JobSpec) -> Option<String> {
        match &self.name {
            Some(name) => job.evaluation.sets.get(name)?.verifier.as_ref()?.named.clone(),
            None => self.source.verifier.clone(),
        }
    }

    /// Whether something is cut off the distribution that tokens are drawn from.
    #[must_use]
    pub fn filters(&self) -> bool {
        self.top_p < 1.0 || self.top_k > 0 || self.min_p > 0.0
    }
}

/// Where the problems of a named set begin: a multiple of [`ROOM`] from a hash of 31 bits, past those of the set without a name.
/// Numbered by their order instead, one more set would change the noise of those after it.
pub(crate) fn first_problem(name: &str) -> u64 {
    // FNV-1a, whose upper bits are the better ones after one more mix.
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    (1 + (pacs_types::mix(hash) >> 33)) * ROOM
}

impl EvaluationSetSpec {
    /// Where its problems are.
    #[must_use]
    pub fn source(&self) -> SourceSpec {
        SourceSpec {
            path: self.path.clone(),
            generator: self.generator.clone(),
            question_field: self.question_field.clone(),
            answer_field: self.answer_field.clone(),
            skip: self.skip,
            limit: self.limit,
            weight: None,
            prompt_suffix: None,
            verifier: None,
            verifier_field: None,
        }
    }

    /// A set of all problems of a file, with the job's settings.
    #[must_use]
    pub fn of_file(path: PathBuf) -> Self {
        Self {
            path: Some(path),
            generator: None,
            question_field: question(),
            answer_field: answer(),
            skip: None,
            limit: None,
            prompt_suffix: None,
            preset: None,
            every_steps: None,
            samples_per_problem: None,
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            max_new_tokens: None,
            verifier: None,
        }
    }

    fn resolved(&self, name: &str, job: &JobSpec) -> EvaluationSet {
        let plain = EvaluationSet { source: self.source(), ..job.unnamed_set(SourceSpec::default()) };
        let preset = match self.preset {
            None => plain,
            Some(EvaluationPreset::Paper) => EvaluationSet {
                prompt_suffix: crate::PAPER_SUFFIX.to_owned(),
                samples: 128,
                temperature: 0.6,
                top_p: 0.95,
                top_k: 0,
                min_p: 0.0,
                ..plain
            },
        };
        EvaluationSet {
            name: Some(name.to_owned()),
            path: format!("evaluation.sets.{name}"),
            first: first_problem(name),
            prompt_suffix: self.prompt_suffix.clone().unwrap_or(preset.prompt_suffix),
            every_steps: self.every_steps.unwrap_or(preset.every_steps),
            samples: self.samples_per_problem.unwrap_or(preset.samples),
            temperature: self.temperature.unwrap_or(preset.temperature),
            top_p: self.top_p.unwrap_or(preset.top_p),
            top_k: self.top_k.unwrap_or(preset.top_k),
            min_p: self.min_p.unwrap_or(preset.min_p),
            max_new_tokens: self.max_new_tokens.unwrap_or(preset.max_new_tokens),
            verifier: self.verifier.as_ref().and_then(|own| match &own.named {
                Some(name) => job.verifier_named(name),
                None => Some(own.clone()),
            }),
            source: preset.source,
        }
    }
}

impl JobSpec {
    /// The sets that are measured: that of `data.evaluation`, then the named ones in the order of their names; none where
    /// evaluation is off.
    #[must_use]
    pub fn evaluation_sets(&self) -> Vec<EvaluationSet> {
        let is_due = |set: &EvaluationSet| self.evaluation.before || self.evaluation.after || set.every_steps > 0;
        self.all_evaluation_sets().filter(is_due).collect()
    }

    /// The sets that the job names, measured or not.
    pub fn all_evaluation_sets(&self) -> impl Iterator<Item = EvaluationSet> {
        let unnamed = self.data.evaluation.iter().map(|source| self.unnamed_set(source.clone()));
        unnamed.chain(self.evaluation.sets.iter().map(|(name, set)| set.resolved(name, self)))
    }

    /// Learner ranks that the job has: none where it only evaluates.
    #[must_use]
    pub fn learners(&self) -> u32 {
        if self.evaluation.only { 0 } else { self.resources.learners }
    }

    fn unnamed_set(&self, source: SourceSpec) -> EvaluationSet {
        let (rollout, evaluation) = (&self.rollout, &self.evaluation);
        EvaluationSet {
            name: None,
            path: "data.evaluation".to_owned(),
            first: 0,
            verifier: source.verifier.as_deref().and_then(|name| self.verifier_named(name)),
            prompt_suffix: self.suffix_of(&source).to_owned(),
            source,
            every_steps: evaluation.every_steps,
            samples: evaluation.samples_per_problem,
            temperature: evaluation.temperature.unwrap_or(rollout.temperature),
            top_p: rollout.top_p,
            top_k: rollout.top_k,
            min_p: rollout.min_p,
            max_new_tokens: rollout.max_new_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn job(more: &str) -> Result<JobSpec, String> {
        let text = format!("name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\n{more}");
        crate::parse(&text, Path::new("test")).map_err(|errors| errors.to_string())
    }

    #[test]
    fn settings_come_from_the_set_then_its_preset_then_the_job() {
        let job = job("data.evaluation.path = 'e.jsonl'\nrollout.temperature = 0.8\nevaluation.samples_per_problem = 4\n\
             [evaluation.sets.aime]\npath = 'aime.jsonl'\npreset = 'paper'\nsamples_per_problem = 64\nevery_steps = 50\n\
             [evaluation.sets.gsm8k]\npath = 'gsm8k.parquet'\nmax_new_tokens = 100\nverifier.extraction = 'number'")
        .unwrap();
        let sets = job.evaluation_sets();
        let numbers =
            |set: &EvaluationSet| (set.samples, set.temperature, set.top_p, set.every_steps, set.max_new_tokens);
        assert_eq!(sets.iter().map(EvaluationSet::label).collect::<Vec<_>>(), ["evaluation", "aime", "gsm8k"]);
        assert_eq!(numbers(&sets[0]), (4, 0.8, 1.0, 20, 8192));
        assert_eq!(numbers(&sets[1]), (64, 0.6, 0.95, 50, 8192));
        assert_eq!(numbers(&sets[2]), (4, 0.8, 1.0, 20, 100));
        assert!(sets[2].verifier.is_some() && sets[1].verifier.is_none());
    }

    #[test]
    fn problems_are_numbered_by_the_name_of_their_set_alone() {
        let set = |more: &str| {
            let job = job(&format!("{more}\n[evaluation.sets.b]\npath = 'b.jsonl'")).unwrap();
            job.evaluation_sets().into_iter().find(|set| set.label() == "b").unwrap()
        };
        let alone = set("");
        let beside = set("data.evaluation.path = 'e.jsonl'\n[evaluation.sets.a]\npath = 'a.jsonl'");
        assert_eq!(alone.first, beside.first);
        assert_eq!(alone.position(alone.first + 7), Some(7));
        assert_eq!(alone.position(3), None);
        assert_eq!(alone.position(alone.first + ROOM), None);
        assert_ne!(first_problem("a"), first_problem("b"));
    }

    #[test]
    fn what_a_set_cannot_be_is_refused_by_its_path() {
        let refused = |set: &str| job(&format!("[evaluation.sets.x]\n{set}")).unwrap_err();
        for (set, said) in [
            ("", "evaluation.sets.x"),
            ("path = 'x.txt'", "evaluation.sets.x.path"),
            ("path = 'x.jsonl'\nsamples_per_problem = 0", "evaluation.sets.x.samples_per_problem"),
            ("path = 'x.jsonl'\nsamples_per_problem = 512", "rollout.max_concurrent_samples"),
            ("path = 'x.jsonl'\nmax_new_tokens = 9000", "evaluation.sets.x.max_new_tokens"),
            ("path = 'x.jsonl'\ntop_p = 0.0", "evaluation.sets.x.top_p"),
            ("path = 'x.jsonl'\nmin_p = 1.0", "evaluation.sets.x.min_p"),
            ("path = 'x.jsonl'\nverifier.kind = 'exec'", "evaluation.sets.x.verifier.command"),
            ("path = 'x.jsonl'\nverifier.max_attempts = 5", "evaluation.sets.x.verifier.max_attempts"),
            ("path = 'x.jsonl'\nsample = 5", "evaluation.sets.x.sample"),
            ("path = 'x.jsonl'\npreset = 'ours'", "evaluation.sets.x.preset"),
        ] {
            let problem = refused(set);
            assert!(problem.contains(said), "{set}: {problem}");
        }
        let name = job("[evaluation.sets.'a b']\npath = 'x.jsonl'").unwrap_err();
        assert!(name.contains("expected a name"), "{name}");
        let only = job("evaluation = { only = true, before = false }\ndata.evaluation.path = 'e.jsonl'").unwrap_err();
        assert!(only.contains("evaluation.before"), "{only}");
    }

    #[test]
    fn a_job_that_only_evaluates_has_no_learners() {
        assert_eq!(job("data.evaluation.path = 'e.jsonl'").unwrap().learners(), 1);
        assert_eq!(job("data.evaluation.path = 'e.jsonl'\nevaluation.only = true").unwrap().learners(), 0);
    }
}
