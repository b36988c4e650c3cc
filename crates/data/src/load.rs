use std::collections::HashSet;

use pacs_order::{DrawOrder, DrawPlan, SetShare};
use pacs_spec::{JobSpec, SourceSpec, VerifierKind};

use crate::prompt::JobPrompter;
use crate::source::{Row, rows};
use crate::{DataError, LoadReport, MeasuredSet, Problem, Problems, SourceReport};

/// Says whether the verifier can read a reference answer, and if not, why.
pub type GoldCheck = fn(&str) -> Result<(), String>;

/// Loads the problems of a job.
///
/// # Errors
/// [`DataError`]: a file, row, tokenizer or template that cannot be used, or nothing left to train on.
pub fn load(spec: &JobSpec) -> Result<Problems, DataError> {
    load_with(spec, gold_check(spec.verifier.kind))
}

/// What the verifier of a kind says of a reference answer. Only built-in ones can be asked; what a verifier of the
/// user's own can read is for it to say.
#[must_use]
pub fn gold_check(kind: VerifierKind) -> GoldCheck {
    match kind {
        VerifierKind::Math => |answer| pacs_verify::check_gold(answer).map_err(|error| error.to_string()),
        VerifierKind::Countdown => pacs_verify::check_countdown,
        // A source has no empty answer, and any other text is one.
        VerifierKind::Exact | VerifierKind::Exec | VerifierKind::Grpc => |_| Ok(()),
    }
}

/// Loads the problems of a job, asking `check` which reference answers can be read.
///
/// # Errors
/// See [`load`].
pub fn load_with(spec: &JobSpec, check: GoldCheck) -> Result<Problems, DataError> {
    let prompter = JobPrompter::new(spec)?;
    let mut train = Loaded::default();
    let mut shares = Vec::new();
    // A job that only evaluates says what it trains on because every job does, and never reads it.
    for (path, source) in spec.data.train_sets().filter(|_| !spec.evaluation.only) {
        let before = train.problems.len();
        train.load(source, &prompter, (&spec.data.prompt_suffix, check))?;
        let kept = train.problems.len() - before;
        train.refuse_empty(kept, &path)?;
        shares.push(SetShare { weight: source.weight.unwrap_or(1.0), problems: kept });
    }

    let mut report = LoadReport { train: train.report, ..LoadReport::default() };
    let mut sets = Vec::new();
    for set in spec.evaluation_sets() {
        let mut loaded = Loaded::default();
        let check = set.verifier.as_ref().map_or(check, |verifier| gold_check(verifier.kind));
        loaded.load(&set.source, &prompter, (&set.prompt_suffix, check))?;
        loaded.refuse_empty(loaded.problems.len(), &set.path)?;
        report.overlap += loaded.problems.iter().filter(|p| train.seen.contains(&normalised(&p.question))).count();
        report.sets.push((set.label().to_owned(), loaded.report));
        sets.push(MeasuredSet { set, problems: loaded.problems });
    }
    let order = DrawOrder::new(DrawPlan { seed: spec.seed, shuffle: spec.data.shuffle, sets: shares });
    Ok(Problems { train: train.problems, sets, report, order })
}

#[derive(Default)]
struct Loaded {
    problems: Vec<Problem>,
    /// Normalised questions.
    seen: HashSet<String>,
    report: SourceReport,
}

impl Loaded {
    fn load(&mut self, source: &SourceSpec, prompter: &JobPrompter, with: (&str, GoldCheck)) -> Result<(), DataError> {
        rows(source, &mut |row| self.take(row?, prompter, with))
    }

    fn take(&mut self, row: Row, prompter: &JobPrompter, (suffix, check): (&str, GoldCheck)) -> Result<(), DataError> {
        self.report.rows += 1;
        if let Err(reason) = check(&row.answer) {
            self.report.unreadable_answers += 1;
            self.report.first_unreadable.get_or_insert_with(|| format!("{}: {reason}", row.place));
            return Ok(());
        }
        let prompt = prompter.prompt(&row.question, suffix)?;
        if prompt.tokens.len() > prompter.max_tokens() {
            self.report.overlong += 1;
            return Ok(());
        }
        if self.problems.is_empty() {
            self.report.example_prompt = prompt.text;
        }
        self.report.kept += 1;
        self.report.duplicates += usize::from(!self.seen.insert(normalised(&row.question)));
        self.report.longest_prompt_tokens = self.report.longest_prompt_tokens.max(prompt.tokens.len());
        self.problems.push(Problem { question: row.question, answer: row.answer, prompt_tokens: prompt.tokens });
        Ok(())
    }

    /// Refuses a set of which nothing was kept.
    fn refuse_empty(&self, kept: usize, part: &str) -> Result<(), DataError> {
        if kept > 0 {
            return Ok(());
        }
        Err(DataError::Empty { part: part.to_owned(), report: Box::new(self.report.clone()) })
    }
}

/// A question without what does not change its meaning: case, white space, and punctuation that is not mathematics.
/// Operators stay, for `3 + 4` and `3 - 4` are two questions.
pub(crate) fn normalised(question: &str) -> String {
    let mut text = String::with_capacity(question.len());
    let mut gap = false;
    for c in question.chars().flat_map(char::to_lowercase) {
        if c.is_alphanumeric() || "+-*/^=<>()%!".contains(c) {
            if gap && !text.is_empty() {
                text.push(' ');
            }
            gap = false;
            text.push(c);
        } else {
            gap = true;
        }
    }
    text
}

#[cfg(test)]
mod tests;
