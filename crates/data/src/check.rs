//! What is wrong with the rows of a job, each with its place.

use std::collections::{BTreeMap, HashMap};

use pacs_spec::{JobSpec, SourceSpec, VerifierKind};
use pacs_text::Day;
use pacs_verify::{Leniency, Suite, inspect_gold};

use crate::DataError;
use crate::load::{Grading, normalised};
use crate::prompt::JobPrompter;
use crate::source::{Record, rows};

/// Findings of one kind that are shown; all are counted.
const SHOWN: usize = 20;

/// What is wrong with the rows of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct DataCheck {
    /// The problems to train on.
    pub train: SourceCheck,
    /// The held-out problems, if the job has any.
    pub evaluation: Option<SourceCheck>,
    /// The sets of `evaluation.sets` by name.
    pub sets: Vec<(String, SourceCheck)>,
    /// Held-out questions that are also trained on.
    pub overlap: Findings,
}

/// What is wrong with the rows of one source.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceCheck {
    /// Rows, those that cannot be read included, after `skip` and `limit`.
    pub rows: usize,
    /// Rows that are no problem: not JSON, a field missing or empty.
    pub bad_rows: Findings,
    /// Rows whose reference answer the verifier cannot read.
    pub unreadable_answers: Findings,
    /// Rows whose reference answer the built-in verifier reads by a rule that may not be what was meant.
    pub lenient_answers: Findings,
    /// What to do about those, each kind once with the number of its rows.
    pub proposals: Vec<String>,
    /// Reference solutions of programs, which pass their own cases if the row is right. Who can run programs runs them.
    pub solutions: Vec<Solution>,
    /// Reference solutions that do not pass their own cases.
    pub failing_solutions: Findings,
    /// Questions that stood in the source before.
    pub duplicates: Findings,
    /// Rows that ask with control tokens of the model, which are read as text; looked for with a model folder.
    pub control_tokens: Findings,
    /// Which fields were read, where the spec does not say it.
    pub fields: Vec<String>,
    /// Lengths of the prompts; absent without a model folder, or without rows.
    pub prompts: Option<PromptLengths>,
}

/// A reference solution of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Solution {
    /// Where its row stands.
    pub place: String,
    /// The verifier that the row names.
    pub verifier: Option<String>,
    /// Cases of the problem, as its reference answer holds them.
    pub answer: String,
    /// A response with the solution.
    pub response: String,
}

/// Findings of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// How many there are.
    pub count: usize,
    /// The first of them: where, and what.
    pub first: Vec<String>,
}

/// Lengths of prompts, in tokens of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PromptLengths {
    /// Of the shortest.
    pub shortest: usize,
    /// Half of them have no more.
    pub median: usize,
    /// 99 of 100 have no more.
    pub p99: usize,
    /// Of the longest.
    pub longest: usize,
    /// Most tokens that a prompt of the job may have.
    pub limit: usize,
    /// Prompts that have more, and are left out of a run.
    pub overlong: usize,
}

/// Reads every row of a job's sources; `with_prompts` renders and counts them, which takes the model folder.
///
/// # Errors
/// [`DataError`] when a file, the tokenizer or the template cannot be used. What is wrong with rows is no error.
pub fn check(spec: &JobSpec, with_prompts: bool) -> Result<DataCheck, DataError> {
    let prompter = if with_prompts { Some(JobPrompter::new(spec, Day::today())?) } else { None };
    let grading = |source: &SourceSpec| Grading::of(spec, source.verifier.as_deref(), spec.verifier_of(source).kind);
    let mut train = Checking {
        suffix: spec.data.prompt_suffix.clone(),
        ..Checking::new(prompter.as_ref(), grading(&spec.data.train))
    };
    for (_, source) in spec.data.train_sets() {
        train.grading = grading(source);
        spec.suffix_of(source).clone_into(&mut train.suffix);
        train.read(source)?;
    }
    let mut overlap = Findings::default();
    let mut evaluation = None;
    let mut sets = Vec::new();
    // Training sets were read before, so that their questions are known when held-out ones are compared with them.
    for set in spec.all_evaluation_sets() {
        let kind = set.verifier.as_ref().map_or(spec.verifier.kind, |verifier| verifier.kind);
        let grading = Grading::of(spec, set.graded_by(spec).as_deref(), kind);
        let mut checking = Checking { suffix: set.prompt_suffix, ..Checking::new(prompter.as_ref(), grading) };
        checking.read(&set.source)?;
        for (question, place) in &checking.order {
            if let Some(trained) = train.places.get(question) {
                overlap.add(|| format!("{place}: the question of {trained}"));
            }
        }
        match set.name {
            Some(name) => sets.push((name, checking.done())),
            None => evaluation = Some(checking.done()),
        }
    }
    Ok(DataCheck { train: train.done(), evaluation, sets, overlap })
}

struct Checking<'a> {
    prompter: Option<&'a JobPrompter>,
    /// Text after every question.
    suffix: String,
    grading: Grading<'a>,
    lenient: BTreeMap<Leniency, u64>,
    found: SourceCheck,
    /// Where each normalised question stands first.
    places: HashMap<String, String>,
    /// The same in the order of the source.
    order: Vec<(String, String)>,
    lengths: Vec<usize>,
}

impl<'a> Checking<'a> {
    fn new(prompter: Option<&'a JobPrompter>, grading: Grading<'a>) -> Self {
        Self {
            prompter,
            suffix: String::new(),
            grading,
            lenient: BTreeMap::new(),
            found: SourceCheck::default(),
            places: HashMap::new(),
            order: Vec::new(),
            lengths: Vec::new(),
        }
    }

    fn read(&mut self, source: &SourceSpec) -> Result<(), DataError> {
        let fields = rows(source, &mut |row| self.take(row))?;
        self.found.fields.extend(fields.filter(|fields| !self.found.fields.contains(fields)));
        Ok(())
    }

    fn take(&mut self, row: Result<Record, DataError>) -> Result<(), DataError> {
        self.found.rows += 1;
        let row = match row {
            Ok(row) => row,
            Err(DataError::Row { path, row, message }) => {
                self.found.bad_rows.add(|| format!("{}:{row}: {message}", path.display()));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if self.grading.kind_of(&row) == Ok(VerifierKind::Code)
            && let Ok(Suite { solution: Some(solution), .. }) = Suite::parse(&row.answer)
        {
            let place = row.place.clone();
            let verifier = self.grading.name_of(&row);
            let answer = row.answer.clone();
            let response = row.response.clone().unwrap_or_else(|| format!("```python\n{solution}\n```"));
            self.found.solutions.push(Solution { place, verifier, answer, response });
        }
        // Unreadable answers are findings here and failures in a run: a check should list all of them at once.
        if let Err(reason) = self.grading.check(&row) {
            self.found.unreadable_answers.add(|| format!("{}: {reason}", row.place));
        } else if self.grading.kind_of(&row) == Ok(VerifierKind::Math)
            && let Ok(gold) = inspect_gold(&row.answer)
            && let Some(leniency) = gold.leniency
        {
            *self.lenient.entry(leniency).or_default() += 1;
            let place = &row.place;
            let answer = row.answer.trim();
            let reading = gold.reading;
            self.found.lenient_answers.add(|| format!("{place}: `{answer:.80}` has {leniency}; read as {reading}"));
        }
        if let Some(prompter) = self.prompter {
            let prompt = prompter.prompt(&row.asked, &self.suffix)?;
            self.lengths.push(prompt.tokens.len());
            if prompt.control_tokens > 0 {
                let found = prompt.control_tokens;
                self.found.control_tokens.add(|| format!("{}: {found} in what is asked", row.place));
            }
        }
        // Normalised, because copies of a question mostly differ in spaces and punctuation.
        let question = normalised(row.asked.question());
        match self.places.get(&question) {
            Some(first) => self.found.duplicates.add(|| format!("{}: the question of {first}", row.place)),
            None => {
                self.order.push((question.clone(), row.place.clone()));
                self.places.insert(question, row.place);
            }
        }
        Ok(())
    }

    fn done(mut self) -> SourceCheck {
        self.lengths.sort_unstable();
        let limit = self.prompter.map_or(usize::MAX, JobPrompter::max_tokens);
        // The nearest rank: the smallest length that a share of all do not exceed.
        let quantile = |percent: usize| self.lengths[(self.lengths.len() * percent).div_ceil(100).max(1) - 1];
        self.found.prompts = (!self.lengths.is_empty()).then(|| PromptLengths {
            shortest: quantile(0),
            median: quantile(50),
            p99: quantile(99),
            longest: quantile(100),
            limit,
            overlong: self.lengths.iter().filter(|length| **length > limit).count(),
        });
        let proposal = |(leniency, count): (&Leniency, &u64)| format!("{leniency} ({count}): {}", leniency.advice());
        self.found.proposals = self.lenient.iter().map(proposal).collect();
        self.found
    }
}

impl Findings {
    /// Counts one more, and keeps it if it is among the first.
    pub fn add(&mut self, what: impl FnOnce() -> String) {
        self.count += 1;
        if self.first.len() < SHOWN {
            self.first.push(what());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/models/qwen2-tied");

    fn job(folder: &Path, more: &str) -> JobSpec {
        let folder = folder.display();
        let text = format!(
            "name = 'test'\nmodel.path = '{MODEL}'\nrollout.max_new_tokens = 8\ndata.prompt_suffix = ''\n\
             data.train.path = '{folder}/train.jsonl'\ndata.evaluation.path = '{folder}/test.jsonl'\n{more}"
        );
        pacs_spec::parse(&text, Path::new("test")).expect("a valid job")
    }

    #[test]
    fn every_finding_has_its_place() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let train = [
            r#"{"question": "What is 1 + 1?", "answer": "2"}"#,
            r#"{"question": "torn"#,
            r#"{"question": "What is  1 + 1", "answer": 2}"#,
            "",
            r#"{"question": "What is 1 - 1?", "answer": "(1, 2"}"#,
            r#"{"question": "What is 3?", "reply": "3"}"#,
        ];
        let test = [r#"{"question": "Why?", "answer": "7"}"#, r#"{"question": "what is 1 + 1?", "answer": "2"}"#];
        std::fs::write(folder.path().join("train.jsonl"), train.join("\n")).expect("written");
        std::fs::write(folder.path().join("test.jsonl"), test.join("\n")).expect("written");
        let found = check(&job(folder.path(), "data.max_prompt_tokens = 92"), true).expect("the files can be read");
        let at = |file: &str, line: u32| format!("{}/{file}.jsonl:{line}: ", folder.path().display());
        let places = |findings: &Findings, expected: &[String]| {
            assert_eq!(findings.count, expected.len(), "{findings:?}");
            for (finding, expected) in findings.first.iter().zip(expected) {
                assert!(finding.starts_with(expected.as_str()), "{finding} is not at {expected}");
            }
        };
        assert_eq!(found.train.rows, 5);
        places(
            &found.train.bad_rows,
            &[at("train", 2) + "not a JSON object", at("train", 6) + "there is no field `answer`"],
        );
        places(&found.train.unreadable_answers, &[at("train", 5) + "reference answer `(1, 2` cannot be read"]);
        places(&found.train.duplicates, &[at("train", 3) + "the question of"]);
        places(&found.overlap, &[at("test", 2) + "the question of"]);
        let prompts = found.train.prompts.expect("prompts were counted");
        assert!(prompts.shortest <= prompts.median && prompts.p99 == prompts.longest, "{prompts:?}");
        // The chat template brings a system message.
        assert_eq!((prompts.longest, prompts.limit, prompts.overlong), (93, 92, 1), "{prompts:?}");
        let evaluation = found.evaluation.expect("there are held-out problems");
        assert_eq!((evaluation.rows, evaluation.bad_rows.count, evaluation.duplicates.count), (2, 0, 0));

        let own = check(&job(folder.path(), "verifier = { kind = 'exec', command = ['v'] }"), false).expect("read");
        assert_eq!(own.train.unreadable_answers.count, 0, "only the verifier of the job can say");
        assert_eq!(own.train.prompts, None);
    }

    #[test]
    fn answers_of_more_than_one_meaning_are_named_with_a_proposal() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let train = [
            r#"{"question": "Which?", "answer": "\\textbf{(D)}\\ 42"}"#,
            r#"{"question": "Why?", "answer": "The sum of the two is always less than zero."}"#,
            r#"{"question": "How far?", "answer": "5 km"}"#,
            r#"{"question": "How many?", "answer": "7"}"#,
        ];
        std::fs::write(folder.path().join("train.jsonl"), train.join("\n")).expect("written");
        std::fs::write(folder.path().join("test.jsonl"), r#"{"question": "And?", "answer": "8"}"#).expect("written");
        let found = check(&job(folder.path(), ""), false).expect("the files can be read").train;
        assert_eq!((found.unreadable_answers.count, found.lenient_answers.count), (0, 3), "{found:?}");
        let [choice, prose, letters] = &found.lenient_answers.first[..] else { panic!("{found:?}") };
        assert!(choice.contains("train.jsonl:1: ") && choice.ends_with("read as choice D with 42"), "{choice}");
        assert!(prose.contains("prose") && letters.contains("unit or variables"), "{prose} {letters}");
        assert!(found.proposals.len() == 3 && found.proposals[0].contains("answer_field"), "{:?}", found.proposals);
        let own = check(&job(folder.path(), "verifier = { kind = 'exec', command = ['v'] }"), false).expect("read");
        assert_eq!(own.train.lenient_answers.count, 0, "only the built-in verifier can be asked");
    }

    #[test]
    fn many_findings_are_counted_and_some_shown() {
        let mut findings = Findings::default();
        (0..100).for_each(|i| findings.add(|| i.to_string()));
        assert_eq!((findings.count, findings.first.len(), findings.first[0].as_str()), (100, SHOWN, "0"));
    }
}
